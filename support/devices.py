"""Where the work is done and how: device, precision, memory layout, compiling, and tensors on their way to a GPU.

What it is not: it knows no model and no data.
"""

import os
import re
from functools import partial
from itertools import chain, pairwise

import torch
from torch.utils.checkpoint import checkpoint


def pick_device():
    """CUDA, else MPS, else CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def use_large_pages():
    """Large memory pages for large tensors, on Linux. On a CPU page faults take a fifth of a step otherwise."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # PyTorch reads it at its first large allocation


def computes_in_bf16(device):
    """Whether the processor has bf16 arithmetic, rather than imitating it slowly."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    held_back = torch.backends.cpu.get_cpu_capability() == "AVX2"  # perhaps by ATEN_CPU_CAPABILITY
    if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities") and not held_back:
        found = torch.cpu.get_capabilities()
        return any(found.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return False


def processor(device):
    """The name of what computes: a sum's last bits depend on it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(0)  # of all processes alike
    found = getattr(torch.cpu, "get_capabilities", dict)()
    names = [name for name in ("avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16") if found.get(name)]
    return " ".join([torch.backends.cpu.get_cpu_capability(), *names])


def memory_format(device, channels=None):
    """The memory layout in which a model is fastest: docs/notebook.md, "Speed on a CPU".

    channels: of a VAE's first level; None: of the U-Net, whose maps are small.
    """
    if device.type == "cpu" and not computes_in_bf16(device):
        last = channels is None or channels < 64
    else:
        last = channels is not None and device.type != "mps"
    return torch.channels_last if last else torch.contiguous_format


def make_autocast(device, mixed_precision):
    """-> autocast(), a context for the forward pass; weights, losses and sums of gradients stay in float32."""
    bf16 = mixed_precision == "bf16" or (mixed_precision == "auto" and computes_in_bf16(device))
    print(f"device {device.type}, forward pass in {'bfloat16 autocast' if bf16 else 'float32'}")
    return lambda: torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def keep_compiled(cfg, device):
    """What torch.compile makes is kept in cfg.cache_dir, if that is there. Call it before there is an optimizer: making
    one sets the variable (findings/optimizer_sets_inductor_folder.sh)."""
    wanted = device.type == "cuda" if cfg.compile is None else cfg.compile
    kept = os.path.abspath(os.path.join(cfg.cache_dir, "compiled"))
    if wanted and os.access(cfg.cache_dir, os.W_OK) and " " not in kept:  # PyTorch's calls of a compiler fail there
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", kept)


def maybe_compile(module, cfg, device, pays, count):
    """The module as torch.compile makes it, if cfg.compile says so. The weights stay the module's own.

    count: samples in a call that is compiled. Others, as the last batch of an epoch, run as they are: each number would
    be compiled anew. The number alone decides, so a resumed run has the same bits as an unbroken one.
    cfg.compile: True, False, or None: on CUDA, in a run that is long enough to win back what compiling takes (pays).
    What then cannot be compiled runs as it is, with PyTorch's warnings.
    """
    wanted = cfg.compile
    if wanted is None:
        wanted = device.type == "cuda" and pays
        if wanted:
            torch._dynamo.config.suppress_errors = True
            # compile the backward pass with the forward one: errors are suppressed there alone
            torch._functorch.config.force_non_lazy_backward_lowering = True
    if not wanted:
        return module
    print("the model is compiled at its first step, for minutes; --no-compile leaves that out")
    compiled = torch.compile(module, dynamic=False)
    return lambda x, *others: (compiled if len(x) == count else module)(x, *others)


def checkpoint_blocks(module, wanted):
    """If wanted, keep of each resnet, attention and upsampler its input alone; the backward pass computes the rest anew
    (Chen et al. 2016, arXiv 1604.06174). Less memory, the same bits, more time."""
    for name, block in module.named_modules() if wanted else ():
        if re.search(r"(resnets|attentions|upsamplers)\.\d+$", name):
            # nothing in a block is random, and a CUDA graph cannot record the reading of a generator's state
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)


def to_device(tensor, device):
    """A tensor -> on `device`; to CUDA without waiting for what it is doing."""
    cuda = torch.device(device).type == "cuda"  # MPS might read after the source is freed
    if cuda and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()  # from other memory CUDA may wait all the same
    return tensor.to(device, non_blocking=cuda)


def move_if_it_fits(rows, device):
    """rows, moved to a GPU if they take less than half of its free memory; gather_rows() works with either."""
    if torch.device(device).type == "cuda" and rows.nbytes < torch.cuda.mem_get_info(device)[0] / 2:
        return rows.to(device)
    return rows


def gather_rows(rows, index, device):
    """Some of the rows, wherever they are -> on `device`."""
    # index_select copies whole rows, where rows[index] goes number by number
    return to_device(rows.index_select(0, to_device(index, rows.device)), device)


def copied_back_ahead(tensors):
    """A generator's tensors -> the same on the CPU. The GPU computes the next one while the CPU works on this one."""
    for (tensor, arrived), _ in pairwise(chain(map(start_copy_back, tensors), [None])):
        arrived()
        yield tensor


def start_copy_back(tensor):
    """-> the tensor on the CPU, and a function that waits until it is there."""
    if tensor.device.type != "cuda":
        return tensor.cpu(), lambda: None
    on_cpu, copied = tensor.to("cpu", non_blocking=True), torch.cuda.Event()
    copied.record()
    return on_cpu, copied.synchronize
