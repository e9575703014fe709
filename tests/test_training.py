"""Promises of training.py that need no run: the averaged weights, what counts as too little memory."""

import os

import pytest
import torch
import torch._functorch.config
import torch._inductor.config
from diffusers.training_utils import EMAModel

from config import SDConfig, UserError
from training import compiled, ema_decay_at, fetched_ahead, power_of_width, run_script, update_average
from vae import ResnetBlock


def averaged(cfg, values):
    """The average of a weight that is 0 at the start and values[n] after step n + 1."""
    average, module = torch.nn.Linear(1, 1).double(), torch.nn.Linear(1, 1).double()
    for p in average.parameters():
        p.data.zero_()
    for step, value in enumerate(values, 1):
        for p in module.parameters():
            p.data.fill_(value)
        update_average(list(average.parameters()), list(module.parameters()), ema_decay_at(step, cfg))
    return average.weight.item()


def test_the_recipes_average_still_holds_its_initial_weights():
    """A weight that is 1 after every step and was 0 at first: 18,750 steps with decay 0.9999 leave 15 % of the 0."""
    assert (
        1 - averaged(SDConfig(), [1.0] * 18_750)
        == pytest.approx(0.9999**18_750, rel=1e-6)
        == pytest.approx(0.153, abs=1e-3)
    )
    assert 1 - averaged(SDConfig(ema_warmup=True), [1.0] * 18_750) < 1e-6


def test_warm_up_equals_diffusers():
    theirs = EMAModel([torch.nn.Parameter(torch.zeros(1))], decay=0.999)
    cfg = SDConfig(ema_decay=0.999, ema_warmup=True)
    for step in (1, 2, 10, 500, 5_000, 20_000):
        assert ema_decay_at(step, cfg) == pytest.approx(theirs.get_decay(step + 1), abs=1e-12)


@pytest.mark.parametrize("sigma_rel, gamma", [(0.05, 16.97), (0.1, 6.94)])
def test_the_power_function_has_the_width_that_is_asked_for(sigma_rel, gamma):
    """Averaging the step numbers themselves gives the profile's mean, averaging their squares its variance."""
    assert power_of_width(sigma_rel) == pytest.approx(gamma, abs=0.01)
    cfg, n = SDConfig(ema_sigma_rel=sigma_rel), 20_000
    mean = averaged(cfg, [step / n for step in range(1, n + 1)])
    square = averaged(cfg, [(step / n) ** 2 for step in range(1, n + 1)])
    assert (square - mean**2) ** 0.5 == pytest.approx(sigma_rel, rel=0.01)
    assert mean == pytest.approx((gamma + 1) / (gamma + 2), rel=1e-3)


def test_two_warm_ups_are_one_too_many():
    with pytest.raises(UserError, match="--ema_sigma_rel"):
        SDConfig(ema_warmup=True, ema_sigma_rel=0.1)


@pytest.mark.parametrize(
    "said", ["CUDA out of memory. Tried to allocate 2 GiB", "DefaultCPUAllocator: can't allocate memory"]
)
def test_too_little_memory_is_one_line(said):
    def main():
        raise RuntimeError(said)

    with pytest.raises(SystemExit, match="error: --batch_size.*: not enough memory"):
        run_script(main)


def test_a_fault_of_ours_is_not_taken_for_too_little_memory():
    """It has "memory" in its words, but a smaller batch would not help."""

    def main():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal"):
        run_script(main)


@torch._dynamo.config.patch(suppress_errors=False)
@torch._functorch.config.patch(force_non_lazy_backward_lowering=False)
def test_what_pays_is_compiled_unless_told_otherwise():
    """By itself on CUDA alone, and in long runs alone; what torch.compile() returns compiles nothing until it is called."""
    block, cuda, cpu = ResnetBlock(8, 16, 1), torch.device("cuda"), torch.device("cpu")
    choices = [(True, cpu, False), (False, cuda, True), (None, cpu, True), (None, cuda, False), (None, cuda, True)]
    assert [compiled(block, *choice) is not block for choice in choices] == [True, False, False, False, True]


@pytest.mark.slow
@torch._dynamo.config.patch(suppress_errors=False)
@torch._functorch.config.patch(force_non_lazy_backward_lowering=False)
def test_all_that_can_fail_is_compiled_where_errors_are_suppressed(monkeypatch, tmp_path):
    """The backward pass with the forward pass: without a compiler afterwards there are gradients all the same."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    torch._dynamo.reset()
    block, x = ResnetBlock(8, 40, 1), torch.randn(3, 8, 8, 8)
    loss = compiled(block, None, torch.device("cuda"), True)(x).pow(2).mean()
    with torch._inductor.config.patch({"cpp.cxx": ("no_compiler",)}):
        found = torch.autograd.grad(loss, block.parameters())
    expected = torch.autograd.grad(block(x).pow(2).mean(), block.parameters())
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.skipif(os.name == "nt", reason="the compiler is found in another way there")
@torch._dynamo.config.patch(suppress_errors=False)
@torch._functorch.config.patch(force_non_lazy_backward_lowering=False)
@torch._inductor.config.patch({"cpp.cxx": ("no_compiler",)})
def test_what_cannot_be_compiled_is_run_as_it_is(monkeypatch, tmp_path):
    """Nobody has asked for it, so a machine without a compiler trains all the same."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    torch._dynamo.reset()
    block, x = ResnetBlock(8, 24, 1), torch.randn(3, 8, 8, 8)
    assert torch.equal(compiled(block, None, torch.device("cuda"), True)(x), block(x))
    with pytest.raises(RuntimeError, match="no_compiler"):
        torch._dynamo.config.suppress_errors = False
        torch._dynamo.reset()
        compiled(block, True, torch.device("cpu"), True)(x)


@pytest.mark.slow
def test_what_is_compiled_gives_the_same_bits_after_another_shape():
    """As after the smaller last batch of an epoch, which a resumed run may not have seen yet."""
    torch._dynamo.reset()
    block = ResnetBlock(8, 16, 1)
    call = compiled(block, True, torch.device("cpu"), False)

    def gradients(x):
        with torch.autocast("cpu", torch.bfloat16):
            loss = call(x).float().pow(2).mean()
        return torch.autograd.grad(loss, block.parameters())

    x = torch.randn(8, 8, 16, 16)
    before = gradients(x)
    gradients(x[:7])
    assert all(torch.equal(a, b) for a, b in zip(before, gradients(x)))


def test_each_part_is_handed_out_when_the_next_one_has_been_begun():
    """All of them, in their order; of none, none."""
    begun = []

    def parts(count):
        for i in range(count):
            begun.append(i)
            yield torch.full((2,), float(i))

    handed_out = [(part[0].item(), begun[-1]) for part in fetched_ahead(parts(4))]
    assert handed_out == [(0, 1), (1, 2), (2, 3), (3, 3)]
    assert list(fetched_ahead(parts(0))) == []
