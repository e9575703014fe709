"""Promises of support/devices.py: what is compiled and what is not, tensors that come back while the next is computed."""

import os

import pytest
import torch
from conftest import TINY, randomize

from config import SDConfig
from support.devices import (
    checkpoint_blocks,
    computes_in_bf16,
    copied_back_ahead,
    gather_rows,
    keep_compiled,
    make_autocast,
    maybe_compile,
    memory_format,
    move_if_it_fits,
    pick_device,
    to_device,
)
from unet import UNetLatent
from vae import AutoencoderKL, ResnetBlock

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("inductor"))


@pytest.fixture
def compiler(monkeypatch, cache):
    """torch.compile as in a fresh process; the blocks differ in their channels, so none has been compiled before."""
    import torch._functorch.config
    import torch._inductor.config

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", cache)
    torch._dynamo.reset()
    with (
        torch._dynamo.config.patch(suppress_errors=False),
        torch._functorch.config.patch(force_non_lazy_backward_lowering=False),
    ):
        yield torch._inductor.config


def test_what_pays_is_compiled_unless_told_otherwise(compiler):
    """By itself on CUDA alone, and in long runs alone; what torch.compile() returns compiles nothing until it is called."""
    block = ResnetBlock(8, 16, 1)
    choices = [(True, CPU, False), (False, CUDA, True), (None, CPU, True), (None, CUDA, False), (None, CUDA, True)]
    found = [maybe_compile(block, settings(wanted), *where, 3) is not block for wanted, *where in choices]
    assert found == [True, False, False, False, True]


def settings(compile, cache_dir=""):
    return SDConfig(**TINY | {"compile": compile, "cache_dir": cache_dir})


@pytest.mark.parametrize(
    "compile, device, cache_dir, before, after",
    [
        (True, CPU, "prepared", None, "prepared/compiled"),
        (None, CUDA, "prepared", None, "prepared/compiled"),
        (True, CPU, "prepared", "/mine", "/mine"),
        (True, CPU, "", None, None),
        (True, CPU, "missing", None, None),
        (True, CPU, "with space", None, None),
        (None, CPU, "prepared", None, None),
        (False, CUDA, "prepared", None, None),
    ],
)
def test_what_is_compiled_is_kept_with_what_is_prepared(
    compile, device, cache_dir, before, after, tmp_path, monkeypatch
):
    """Unless the user has a place for it, nothing is to be kept or nothing compiled; PyTorch's compiler knows no spaces."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", before or "")
    if before is None:
        del os.environ["TORCHINDUCTOR_CACHE_DIR"]
    for name in ("prepared", "with space"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    keep_compiled(settings(compile, cache_dir), device)
    assert os.environ.get("TORCHINDUCTOR_CACHE_DIR") == (after and str(tmp_path / after))


@pytest.mark.slow
def test_all_that_can_fail_is_compiled_where_errors_are_suppressed(compiler):
    """The backward pass with the forward pass: without a compiler afterwards there are gradients all the same."""
    block, x = ResnetBlock(8, 40, 1), torch.randn(3, 8, 8, 8)
    loss = maybe_compile(block, settings(None), CUDA, True, 3)(x).pow(2).mean()
    with compiler.patch({"cpp.cxx": ("no_compiler",)}):
        found = torch.autograd.grad(loss, block.parameters())
    expected = torch.autograd.grad(block(x).pow(2).mean(), block.parameters())
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="the compiler is found in another way there")
def test_what_cannot_be_compiled_is_run_as_it_is(compiler):
    """Nobody has asked for it, so a machine without a compiler trains all the same."""
    block, x = ResnetBlock(8, 24, 1), torch.randn(3, 8, 8, 8)
    with compiler.patch({"cpp.cxx": ("no_compiler",)}):
        assert torch.equal(maybe_compile(block, settings(None), CUDA, True, 3)(x), block(x))
        torch._dynamo.config.suppress_errors = False
        torch._dynamo.reset()
        with pytest.raises(RuntimeError, match="no_compiler"):
            maybe_compile(block, settings(True), CPU, True, 3)(x)


@pytest.mark.slow
def test_batches_of_another_size_run_as_they_are(compiler):
    """As the smaller last batch of an epoch, which a resumed run may see first. It changes no bits of those after it."""
    block = ResnetBlock(8, 16, 1)
    call = maybe_compile(block, settings(True), CPU, False, 8)

    def gradients(call, x):
        with torch.autocast("cpu", torch.bfloat16):
            loss = call(x).float().pow(2).mean()
        return torch.autograd.grad(loss, block.parameters())

    x = torch.randn(8, 8, 16, 16)
    assert all(torch.equal(a, b) for a, b in zip(gradients(call, x[:7]), gradients(block, x[:7])))
    before = gradients(call, x)
    gradients(call, x[:7])
    assert all(torch.equal(a, b) for a, b in zip(before, gradients(call, x)))
    assert not all(torch.equal(a, b) for a, b in zip(before, gradients(block, x)))  # it was compiled


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("kind", [AutoencoderKL, UNetLatent])
def test_checkpointed_blocks_give_the_same_gradients_and_keep_less(tiny, kind, precision):
    model, autocast = randomize(kind(tiny)), make_autocast(CPU, precision)
    inputs = [torch.randn(2, 3, 32, 32), torch.randn(2, 4, 8, 8)]
    if kind is UNetLatent:
        inputs = [inputs[1], torch.randn(2, tiny.time_dim), torch.randn(2, 12, tiny.text_dim)]

    def step():
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t), autocast():
            out = model(*inputs)
        outputs = out if isinstance(out, tuple) else (out,)
        gradients = torch.autograd.grad(sum(o.float().square().mean() for o in outputs), model.parameters())
        return [*outputs, *gradients], sum(kept)

    (plain, most), names = step(), [*model.state_dict()]
    checkpoint_blocks(model, False)
    assert step()[1] == most
    checkpoint_blocks(model, True)
    found, kept = step()
    assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True)) and kept < most / 2, (kept, most)
    assert [*model.state_dict()] == names


def test_each_tensor_is_handed_out_when_the_next_one_has_been_begun():
    """All of them, in their order; of none, none."""
    begun = []

    def parts(count):
        for i in range(count):
            begun.append(i)
            yield torch.full((2,), float(i))

    handed_out = [(part[0].item(), begun[-1]) for part in copied_back_ahead(parts(4))]
    assert handed_out == [(0, 1), (1, 2), (2, 3), (3, 3)]
    assert list(copied_back_ahead(parts(0))) == []


def test_rows_are_gathered_wherever_they_are():
    rows, index = torch.arange(12).view(6, 2), torch.tensor([5, 0, 5])
    assert move_if_it_fits(rows, CPU) is rows
    assert torch.equal(gather_rows(rows, index, CPU), rows[index])
    assert to_device(rows, CPU) is rows


@pytest.mark.parametrize("wanted, dtype", [("bf16", torch.bfloat16), ("no", torch.float32), ("auto", None)])
def test_autocast_is_in_bf16_where_it_is_wanted(wanted, dtype, capsys):
    dtype = dtype or (torch.bfloat16 if computes_in_bf16(CPU) else torch.float32)
    a = torch.ones(2, 2)
    with make_autocast(CPU, wanted)():
        assert (a @ a).dtype == dtype
    assert ("bfloat16" if dtype == torch.bfloat16 else "float32") in capsys.readouterr().out


@pytest.mark.parametrize(
    "kind, device, narrow, wide, unet",
    [("AVX2", CPU, True, False, True), ("AVX512", CPU, True, True, False), ("AVX2", CUDA, True, True, False)],
)
def test_each_kind_of_processor_has_the_layout_that_was_faster_there(kind, device, narrow, wide, unet, monkeypatch):
    """A processor that is told to leave its bfloat16 unused counts as one that has none."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: kind)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    found = [memory_format(device, 16), memory_format(device, 64), memory_format(device)]
    assert [f == torch.channels_last for f in found] == [narrow, wide, unet]


def test_the_device_is_one_that_works():
    assert torch.ones(2, device=pick_device()).sum() == 2
