"""What the scripts share: errors, signals, device and precision, randomness by step, the optimizer's step, curves, progress,
and last the flags that ask for pictures.

What it is not: a Trainer. There are no hooks and no loop here, no step knows what is being trained, and what a run keeps
on disk is in checkpoint.py.

Randomness is a function of progress (after EDM2, Karras et al. 2024, arXiv 2312.02696): data order from
(seed, epoch), everything else from (seed, step). Nothing else has to be remembered to repeat a run.
"""

import contextlib
import csv
import errno
import hashlib
import io
import math
import os
import shlex
import signal
import stat
import subprocess
import sys
import time
from datetime import timedelta
from itertools import chain, pairwise
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from checkpoint import write_file
from config import LARGEST, UserError, positive_int, printable
from metrics import LARGEST_COVARIANCE
from samplers import SAMPLERS, choose_sampler
from vae import num_together

# ---- Errors ---------------------------------------------------------------------------------------------

ANOTHER_ENDED = ("Connection closed by peer", "Connection reset by peer", "remote process exited")  # gloo, NCCL
OUT_OF_MEMORY = ("out of memory", "allocate memory", "not enough memory", "ALLOC_FAILED")  # GPU, CPU, Windows, cuBLAS


def run_script(main):
    """Run a script's main(); what the user can put right ends in one line on stderr and exit code 1."""
    handlers = {s: signal.getsignal(s) for s in SIGNALS}
    make_output_safe()
    if handlers[signal.SIGTERM] != signal.SIG_IGN:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        check_torchvision()
        main()
        if dist.is_initialized():
            dist.barrier()  # rank 0 may still be writing
            dist.destroy_process_group()
    except UserError as e:
        fail(e)
    except BrokenPipeError:  # whoever read our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as e:
        if e.errno in (errno.EMFILE, errno.ENFILE):
            fail("--num_workers: too many files are open at once; give fewer, or 0")
        fail(
            f"{e.filename}: {e.strerror}; check the path, its permissions and the disk" if e.filename else last_line(e)
        )
    except (RuntimeError, MemoryError) as e:
        if type(e).__module__.startswith(("torch._dynamo", "torch._inductor")):
            why = str(e).strip().splitlines()[0][:200]
            fail(f"--compile: torch.compile does not work here ({why}); give --no-compile")
        if "DataLoader worker" in str(e):
            fail("--num_workers: a process that reads pictures died; give fewer, or 0")
        if not isinstance(e, MemoryError) and not any(words in str(e) for words in OUT_OF_MEMORY):
            if any(words in str(e) for words in ANOTHER_ENDED):
                fail(f"another process of this run has ended and says why ({last_line(e)}); mend that, and the same command "
                     "goes on from the last save")  # fmt: skip
            raise
        fail("--batch_size (of sample.py --size): not enough memory; give a smaller one, or fewer --max_images")
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        sys.exit(130)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def last_line(e):
    """Of an error that comes from another process the last line says what it was."""
    return str(e).strip().split("\n")[-1].removeprefix("OSError: ")


def check_torchvision():
    """UserError where torchvision was built for another PyTorch; whatever imports it later would say so in riddles."""
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError, OSError) as e:
        why = str(e).strip().splitlines()[0][:200] if str(e).strip() else type(e).__name__
        raise UserError(f"torchvision: does not go with torch {torch.__version__} ({why}); install both anew, in one go: "
                        "pip install --force-reinstall torch torchvision") from None  # fmt: skip


def make_output_safe():
    """Output may be closed from the start, or unable to show a character of a file's name; neither stops the work."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))
        if hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(errors="backslashreplace")


def usage_error(message):
    """Exit with code 2 and one line, for flags that only the run can tell to be wrong."""
    print(f"error: {printable(message)}", file=sys.stderr)
    sys.exit(2)


def fail(message):
    """Exit with code 1 and one line; names in it may hold line breaks and escape codes."""
    if sys.stderr.isatty():
        print(file=sys.stderr)  # leave the line of a progress bar
    message = f"error: {printable(message)}"
    if dist.is_initialized():  # an exit would close the process group, and may wait for ever for what a GPU has begun
        with contextlib.suppress(OSError, ValueError):
            print(message, file=sys.stderr, flush=True)
            sys.stdout.flush()
        os._exit(1)
    sys.exit(message)


# ---- Signals --------------------------------------------------------------------------------------------

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
SAME_SIGNAL = 1.0  # seconds within which two are one: torchrun passes on what its whole job may have been sent anyway


class Interrupts:
    """When to save within an epoch: every `minutes`, and after the step in which a signal to stop has come."""

    def __init__(self, minutes, rank):
        self.seconds, self.signal, self.last, self.rank = 60 * minutes, None, time.monotonic(), rank
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup leaves a hang-up
                signal.signal(number, self.ask)

    def ask(self, number, frame):
        if self.signal:  # asked twice: at once, which leaves the last set as it is
            if time.monotonic() - self.asked > SAME_SIGNAL:
                os._exit(128 + number)
            return
        self.signal, self.asked = number, time.monotonic()
        if number == getattr(signal, "SIGHUP", None):
            leave_terminal()
        if self.rank:  # goes on until rank 0 has saved and left, which ends them all
            return
        print("\nfinishing the step and saving; once more stops at once", file=sys.stderr, flush=True)

    def due(self):
        """Whether rank 0 must save now; a matter of clocks and signals, so each process must not decide for itself."""
        return self.rank == 0 and (self.signal is not None or time.monotonic() - self.last >= self.seconds)

    def saved(self, step):
        """Note that a set has been saved; exit with code 128 + signal if one has asked for that."""
        self.last = time.monotonic()
        if self.signal:
            command = command_line(*launcher(), *(word for word in sys.argv if word != "--overwrite"))
            print(f"stopped after step {step}, saved; to go on: {command}", flush=True)
            sys.exit(128 + self.signal)


def leave_terminal():
    """After a hang-up: what would be written to the terminal goes nowhere, instead of failing."""
    for number in (1, 2):
        with contextlib.suppress(OSError):
            if stat.S_ISCHR(os.fstat(number).st_mode):
                os.dup2(os.open(os.devnull, os.O_WRONLY), number)


def command_line(*words):
    """Words as they can be pasted into a shell."""
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def launcher():
    """The words before the script's name in the command that started this run."""
    processes, nodes = (os.environ.get(name, "1") for name in ("LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE"))
    if processes == nodes == "1":
        return ["python"]
    address = [f"--nnodes={nodes}", "--node_rank=0", f"--master_addr={os.environ.get('MASTER_ADDR')}"]
    return ["torchrun", *(address if nodes != "1" else []), f"--nproc_per_node={processes}"]


# ---- Device and precision -------------------------------------------------------------------------------


class World(NamedTuple):
    """This process among those that torchrun has started: rank 0 .. size - 1, and its device."""

    rank: int
    size: int
    device: torch.device

    def wait(self):
        """Go on when all processes are here."""
        if self.size > 1:
            dist.barrier()


def join_world():
    """-> World; alone unless torchrun says otherwise. Only rank 0 speaks and writes; the others compute their share."""
    device = pick_device()
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return World(0, 1, device)
    if device.type == "mps":  # no process group moves its tensors
        device = torch.device("cpu")
    try:
        size, rank, local_rank, _ = (int(os.environ[k]) for k in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT"))
    except (KeyError, ValueError) as e:
        raise UserError(f"WORLD_SIZE: is set in the environment, but what goes with it is not ({e}); start several processes "
                        "by torchrun, or unset it") from None  # fmt: skip
    if device.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UserError(f"--nproc_per_node: process {local_rank} has no GPU; give {torch.cuda.device_count()}")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    # long, because all wait while rank 0 prepares data and samples; torchrun notices a dead process by itself
    wait = timedelta(days=2)
    if device.type == "cuda":
        dist.init_process_group("nccl", timeout=wait, device_id=device)
    else:
        dist.init_process_group("gloo", timeout=wait)
    if rank:
        sys.stdout = open(os.devnull, "w", errors="backslashreplace")
    return World(rank, size, device)


@contextlib.contextmanager
def first_alone(world):
    """Rank 0 does it first; the others then find it done."""
    if world.rank:
        world.wait()
    yield
    if not world.rank:
        world.wait()


def in_parallel(module, world):
    """The module as it is called in training: with gradients that are averaged over all processes, if there are several."""
    if world.size == 1:
        return module
    return DistributedDataParallel(module, device_ids=[world.device] if world.device.type == "cuda" else None)


def share_of(count, world):
    """Which samples of a batch of `count` this process computes -> slice; the first, where there is none left for it."""
    return slice(world.rank, count, world.size) if world.rank < count else slice(0, 1)


def parts_of(count, world, parts):
    """That share in at most `parts` parts, one after the other -> [(slice of the share, weight of the mean of its losses)].

    The weighted losses, summed over parts and averaged over processes, are the mean over the batch.
    """
    mine = range(len(range(world.rank, count, world.size)))
    parts = min(parts, math.ceil(count / world.size))  # of all processes alike: each part ends in a common reduction
    nothing = slice(0, 1), 0.0  # one sample that counts for nothing, where there is none left
    return [(slice(part[0], part[-1] + 1), len(part) * world.size / count) if len(part) else nothing
            for part in np.array_split(mine, parts)]  # fmt: skip


def check_held_out(figure, step, last_saved):
    """UserError if a held-out figure is not a number: the weights are useless, even if each step's loss was finite."""
    if not math.isfinite(figure):
        raise UserError(f"--lr: after step {step} the held-out figures are not numbers; start over with a lower --lr and "
                        f"--overwrite; the newest set is {last_saved}")  # fmt: skip


SHAPES = 64  # far more than there are of batches, their parts and halved latents


def compiled(module, wanted, device, pays):
    """The module as torch.compile makes it, if wanted; the weights are the module's own either way.

    wanted: True, False, or None: on CUDA, in a run that wins back what compiling takes (pays); what then cannot be
    compiled is run as it is, with PyTorch's warnings.
    Each shape is compiled by itself: code for any shape, which PyTorch turns to after the second one, gives other last
    bits, so that a resumed run would have others than an unbroken one.
    """
    if wanted is None:
        wanted = device.type == "cuda" and pays
        if wanted:
            torch._dynamo.config.suppress_errors = True
            # with the forward pass, as errors are suppressed there alone; not at the first backward()
            torch._functorch.config.force_non_lazy_backward_lowering = True
    if not wanted:
        return module
    print("the model is compiled at its first step with each batch size, for minutes; --no-compile leaves that out")
    torch._dynamo.config.recompile_limit = SHAPES  # beyond it PyTorch goes on without compiling
    return torch.compile(module, dynamic=False)


def average_over(tensor, world):
    """The mean of a tensor over all processes, the same on each; takes the tensor over."""
    if world.size > 1:
        dist.all_reduce(tensor)
        tensor /= world.size
    return tensor


def pick_device():
    """CUDA, else MPS, else CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def use_large_pages():
    """Large memory pages for large tensors, on Linux: on a CPU a fifth of a step goes into page faults otherwise."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read by PyTorch at its first large allocation


def computes_in_bf16(device):
    """Whether the processor has bf16 arithmetic, rather than imitating it slowly."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):
        found = torch.cpu.get_capabilities()
        return any(found.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return False


def conv_layout(device):
    """The memory format in which convolutions are fastest; MPS is left as it is."""
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def make_autocast(device, mixed_precision):
    """-> autocast(), a context for the forward pass; weights, losses and gradients' sums stay in float32."""
    bf16 = mixed_precision == "bf16" or (mixed_precision == "auto" and computes_in_bf16(device))
    print(f"device {device.type}, forward pass in {'bfloat16 autocast' if bf16 else 'float32'}")
    return lambda: torch.autocast(device.type, torch.bfloat16, enabled=bf16)


# ---- Randomness and progress ----------------------------------------------------------------------------


def hash_seed(*parts):
    """A 63-bit seed that is a function of its arguments alone."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def seed_step(seed, step):
    """Make everything drawn until the next call a function of (seed, step)."""
    torch.manual_seed(hash_seed(seed, "step", step))


def epoch_batches(seed, epoch, num_samples, batch_size):
    """The data order of one epoch -> list of index tensors; the last may be shorter."""
    generator = torch.Generator().manual_seed(hash_seed(seed, "order", epoch))
    return torch.randperm(num_samples, generator=generator).split(batch_size)


def lr_at(step, total_steps, cfg):
    """Learning rate of step 1 .. total_steps: linear warm-up, then constant or cosine to 0 (Loshchilov & Hutter
    2017, arXiv 1608.03983, Eq. 5 without restarts)."""
    warmup = min(1.0, step / (cfg.lr_warmup_steps + 1))
    cosine = 0.5 * (1 + math.cos(math.pi * (step - 1) / total_steps))
    return cfg.lr * warmup * (cosine if cfg.lr_schedule == "cosine" else 1.0)


def make_optimizer(parameters, cfg):
    """Adam (Kingma & Ba 2015, arXiv 1412.6980), all parameters updated by one fused kernel."""
    betas = (0.9, cfg.adam_beta2)
    return torch.optim.Adam(parameters, lr=cfg.lr, betas=betas, weight_decay=cfg.weight_decay, fused=True)


def clip_gradients(optimizer, max_grad_norm):
    """Clip the gradients to max_grad_norm unless that is 0 -> their norm before clipping."""
    parameters = optimizer.param_groups[0]["params"]
    if max_grad_norm:
        return torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


class FiniteGuard:
    """Keeps the weights from a step whose loss or gradient is NaN or infinite, and names the first such step.

    On CUDA nothing waits for the device: the optimizer's own kernel leaves such a step out, and check() looks at all
    steps since the last look at once. Elsewhere judge() looks at once: on a CPU that costs nothing, on MPS it waits for
    the step.
    """

    def __init__(self, device):
        self.lazy, self.unseen = device.type == "cuda", []

    def judge(self, optimizer, loss, grad_norm, step, last_saved):
        """To be called between backward pass and optimizer step. loss: the same on all processes."""
        figures = torch.stack([loss.detach(), grad_norm])
        self.unseen.append((step, figures))
        if self.lazy:
            optimizer.found_inf = (~figures.isfinite().all()).float()
        else:
            self.check(last_saved)

    def check(self, last_saved):
        """UserError if a step since the last look was not finite: before anything is saved or logged."""
        steps, figures = zip(*self.unseen) if self.unseen else ((), None)
        self.unseen = []
        for step, (loss, grad_norm) in zip(steps, torch.stack(figures).tolist() if figures else ()):
            if not math.isfinite(loss + grad_norm):
                raise UserError(f"--lr: step {step} gives loss {loss:.3g} and gradient norm {grad_norm:.3g}; start over "
                                f"with a lower --lr and --overwrite; the newest set is {last_saved}")  # fmt: skip


def optimizer_step(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()


def ema_decay_at(step, cfg):
    """Decay of the averaged weights at step 1, 2, ... of training.

    cfg.ema_decay as it stands; with cfg.ema_warmup at most (1 + step) / (10 + step), so that the random initial weights
    are soon forgotten; with cfg.ema_sigma_rel the power function of EDM2 (Karras et al. 2024, arXiv 2312.02696, section 3.1).
    """
    if cfg.ema_sigma_rel:
        return (1 - 1 / step) ** (power_of_width(cfg.ema_sigma_rel) + 1)
    return min(cfg.ema_decay, (1 + step) / (10 + step)) if cfg.ema_warmup else cfg.ema_decay


def power_of_width(sigma_rel):
    """gamma of the profile t^gamma whose standard deviation is sigma_rel of the training time (EDM2, Eq. 123):
    the real root of sigma_rel^-2 (gamma + 1) = (gamma + 2)^2 (gamma + 3)."""
    s = sigma_rel**-2
    return max(root.real for root in np.roots([1, 7, 16 - s, 12 - s]) if abs(root.imag) < 1e-6)


@torch.no_grad()
def update_average(average, weights, decay):
    """average <- decay * average + (1 - decay) * weights; both lists of tensors, all updated at once."""
    torch._foreach_lerp_(average, weights, 1 - decay)


def show_progress(what):
    """-> start(total, done), for work that may have nothing left to do and then shows nothing."""
    return lambda total, done: Progress(total, what, done)


class Progress:
    """A bar with rate and time left on a terminal, otherwise a plain line now and then."""

    def __init__(self, total, what, done=0, seconds_between_lines=10):
        self.total, self.what, self.done, self.before, self.pause = total, what, done, done, seconds_between_lines
        silent = dist.is_initialized() and dist.get_rank() > 0
        self.bar = tqdm(total=total, desc=what, initial=done, disable=silent or None, dynamic_ncols=True)
        self.start = self.last = time.monotonic()

    def update(self, count=1):
        self.done += count
        self.bar.update(count)
        now = time.monotonic()
        if self.bar.disable and (now - self.last > self.pause or self.done == self.total):
            self.last = now
            rate = (self.done - self.before) / max(now - self.start, 1e-9)
            left = f", {(self.total - self.done) / rate:.0f} s left" if self.total and rate else ""
            print(f"{self.what}: {self.done}/{self.total or '?'}, {rate:.1f}/s{left}", flush=True)

    def say(self, text):
        """Print a line, above the bar if there is one."""
        self.bar.write(text) if not self.bar.disable else print(text, flush=True)

    def close(self):
        self.bar.close()


# ---- What a run shows -----------------------------------------------------------------------------------


def append_csv(path, row):
    """Append one row (a dict) to a CSV file, with a header if it is new."""
    new = not os.path.exists(path)
    text = io.StringIO()
    writer = csv.DictWriter(text, row)
    if new:
        writer.writeheader()
    writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
    try:
        with open(path, "a", newline="", encoding="utf-8") as f:
            f.write(text.getvalue())
    except OSError as e:  # a full disk does not say of which file
        raise OSError(e.errno, e.strerror, path) from None


def read_csv(path):
    """A CSV of numbers -> {column: [float]}."""
    with open(path, newline="", encoding="utf-8") as f:
        rows = list(csv.DictReader(f))
    return {name: [float(row[name]) for row in rows] for name in rows[0]}


def plot_curves(path, x_label, panels):
    """Draw {panel title: {label: (xs, ys)}} side by side into a PNG."""
    import matplotlib

    matplotlib.use("Agg")  # no window, no display needed
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 3.5), squeeze=False)
    for axis, (title, lines) in zip(axes[0], panels.items()):
        for label, (xs, ys) in lines.items():
            axis.plot(xs, ys, label=label, marker="." if len(xs) < 30 else None)
        axis.set(title=title, xlabel=x_label)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=100)
    plt.close(figure)
    write_file(path, png.getvalue())


def to_pil(x):
    """x: (3, H, W) in [0, 1] -> PIL picture."""
    return Image.fromarray((x.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy())


def save_grid(path, images, columns):
    """images: (N, 3, H, W) in [0, 1] -> one PNG, `columns` pictures to a row."""
    write_file(path, png_bytes(make_grid(images, columns)))


def make_grid(images, columns):
    """images: (N, 3, H, W) in [0, 1] -> (3, ...), `columns` pictures to a row."""
    from torchvision.utils import make_grid  # not before run_script() has seen whether it can be loaded

    return make_grid(images.float().cpu(), nrow=columns)


def png_bytes(x, **options):
    """x: (3, H, W) in [0, 1] -> the bytes of a PNG."""
    data = io.BytesIO()
    to_pil(x).save(data, format="PNG", **options)
    return data.getvalue()


def send(tensor, device):
    """A tensor -> on `device`; to CUDA without waiting for what it is doing. MPS might read after the source is freed."""
    cuda = torch.device(device).type == "cuda"
    if cuda and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()  # out of other memory CUDA may wait all the same
    return tensor.to(device, non_blocking=cuda)


def near(rows, device):
    """rows, moved to a GPU if they take less than half of what is free there; take() does not mind where they are."""
    if torch.device(device).type == "cuda" and rows.nbytes < torch.cuda.mem_get_info(device)[0] / 2:
        return rows.to(device)
    return rows


def take(rows, index, device):
    """Some of the rows, wherever they are -> on `device`."""
    return send(rows.index_select(0, send(index, rows.device)), device)  # copies whole rows, where [] goes by number


def fetched_ahead(tensors):
    """Tensors on any device, out of a generator -> the same on the CPU; each when the next one has been asked for, so that
    a GPU computes it while the CPU is busy with this one."""
    for (tensor, arrived), _ in pairwise(chain(map(fetch, tensors), [None])):
        arrived()
        yield tensor


def fetch(tensor):
    """-> the tensor on the CPU, and a function that waits until it is there."""
    if tensor.device.type != "cuda":
        return tensor.cpu(), lambda: None
    on_cpu, copied = tensor.to("cpu", non_blocking=True), torch.cuda.Event()
    copied.record()
    return on_cpu, copied.synchronize


def to_float(pixels, device):
    """uint8 pictures (B, 3, H, W) -> float32 in [-1, 1] on `device`."""
    return send(pixels, device).float().div_(127.5).sub_(1.0)


@torch.no_grad()
def encode_pictures(vae, pixels, device, progress):
    """uint8 pictures (N, 3, S, S) -> mu, log_var: (N, C, s, s) each, on the CPU."""
    found = []
    for x in pixels.split(num_together(pixels[0, 0].numel())):
        found.append(torch.stack(vae.encode(to_float(x, device))).cpu())
        progress.update(len(x))
    progress.close()
    return torch.cat(found, dim=1)


# ---- Flags of sampling ----------------------------------------------------------------------------------


def add_sampling_flags(parser):
    """What sample.py and evaluate.py ask of sample(); see there."""
    parser.add_argument("--steps", type=positive_int, help="denoising steps, at most the T of training but for flow "
                        "matching (default: the run's sample_steps)")  # fmt: skip
    parser.add_argument("--sampler", choices=SAMPLERS, help="ddpm, ddim or dpmpp_2m; for flow matching euler or heun "
                        "(default: ddpm, euler)")  # fmt: skip
    parser.add_argument("--eta", type=float, default=0.0, help="randomness of ddim, 0 to 1 (default: 0)")
    parser.add_argument("--guidance_scale", type=float, help="how much the prompt is exaggerated; 1 = not; needs a "
                        "U-Net trained with --caption_dropout (default: the run's guidance_scale)")  # fmt: skip
    parser.add_argument("--guidance_interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="part of the schedule to "
                        "guide in: 0 is clean, 1 pure noise (default: the run's guidance_interval)")  # fmt: skip
    parser.add_argument(
        "--negative_prompt", default="", help="what guidance leads away from (default: the empty caption)"
    )
    parser.add_argument("--start", choices=("noise", "fitted"), default="noise", help="fitted: the Gaussian that the forward "
                        "process of the training data ends in, for schedules that leave signal; needs the training pictures "
                        "(default: noise)")  # fmt: skip


def sampling_options(args, cfg):
    """The flags as arguments of sample(); ends with code 2 and one line if they do not fit the run or each other."""
    steps, flow = args.steps or cfg.sample_steps or cfg.timesteps, cfg.prediction_type == "flow"
    guidance_scale = cfg.guidance_scale if args.guidance_scale is None else args.guidance_scale
    low, high = args.guidance_interval or cfg.guidance_interval
    checks = (
        (flow or steps <= cfg.timesteps, "steps", f"{steps} is out of range; give 1 to {cfg.timesteps}"),
        (0 <= args.eta <= 1, "eta", f"{args.eta} is out of range; give 0 to 1"),
        (args.eta == 0 or args.sampler == "ddim", "eta", "is read by --sampler ddim alone, which flow does not have; leave it "
         "out" if flow else "is read by ddim alone; give --sampler ddim, or leave it out"),
        (abs(guidance_scale) <= LARGEST, "guidance_scale", f"{guidance_scale} is out of range; give a number"),
        (0 <= low <= high <= 1, "guidance_interval", f"{low} {high} is out of range; give two rising numbers in 0 to 1"),
        (guidance_scale != 1 or not args.negative_prompt, "negative_prompt", "acts by guidance alone; give a "
         "--guidance_scale above 1"),
        (args.start == "noise" or not flow, "start", "fitted is the same as noise for flow, which ends in nothing else; "
         "leave it out"),
        (args.start == "noise" or cfg.latent_channels * cfg.latent_size**2 <= LARGEST_COVARIANCE, "start", "fitted is for "
         "pictures of at most 256 pixels; leave it out"),
    )  # fmt: skip
    for ok, name, what in checks:
        if not ok:
            usage_error(f"--{name}: {what}")
    try:
        sampler = choose_sampler(cfg.prediction_type, args.sampler)
    except ValueError as e:
        usage_error(f"--sampler: {e}")
    if guidance_scale != 1 and not cfg.caption_dropout:
        print(
            "warning: the run was trained without --caption_dropout; guidance has nothing to compare with",
            file=sys.stderr,
        )
    return {"num_steps": steps, "sampler": sampler, "eta": args.eta, "guidance_scale": guidance_scale,
            "negative_prompt": args.negative_prompt, "guidance_interval": (low, high)}  # fmt: skip
