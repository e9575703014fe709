"""Promises of training.py: randomness by step, the learning rate, the averaged weights, steps that are not finite."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import training
from config import SDConfig
from support.errors import UserError
from training import (
    LOG_EVERY,
    FiniteGuard,
    Plan,
    State,
    clip_gradients,
    ema_decay_at,
    epoch_order,
    hash_seed,
    lr_at,
    make_optimizer,
    optimizer_step,
    seed_step,
    update_average,
)

# ---- Progress ----


def followed(plan, stops=()):
    """The (step, batch) of a training, and the steps that end a row; stopped and resumed after each of `stops`."""
    seen, rows, state = [], [], State(0, 0, 0, torch.zeros(()))
    while state.epoch < plan.last_epoch:
        for index in plan.batches(state.epoch + 1, state.step):
            state.step += 1
            state.add(torch.tensor(1.0))
            seen.append((state.step, index.tolist()))
            if plan.ends_row(state):
                rows.append(state.step)
                assert state.take_means() == 1.0
            if state.step in stops:
                break
        else:
            state.epoch += 1
    return seen, rows


def test_every_picture_is_seen_once_in_an_epoch_in_another_order_each_time():
    seen, rows = followed(Plan(10, 4, 3, None, seed=0))
    assert [step for step, _ in seen] == list(range(1, 10)) and [len(index) for _, index in seen] == [4, 4, 2] * 3
    epochs = [sum((index for _, index in seen[i : i + 3]), []) for i in (0, 3, 6)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs) and epochs[0] != epochs[1] != epochs[2]
    assert rows == [3, 6, 9]


def test_a_training_that_is_resumed_sees_the_rest():
    plan = Plan(10, 4, 3, None, seed=0)
    assert followed(plan, stops=(1, 2, 3, 5, 9)) == followed(plan)


def test_max_steps_ends_within_an_epoch():
    plan = Plan(10, 4, 3, max_steps=4, seed=0)
    seen, rows = followed(plan)
    assert (plan.total_steps, plan.last_epoch, len(seen), rows) == (4, 2, 4, [3, 4])
    assert seen == followed(Plan(10, 4, 3, None, seed=0))[0][:4]
    assert Plan(10, 4, 3, max_steps=99, seed=0).total_steps == 9


def test_a_row_is_the_mean_of_so_many_steps():
    plan, state = Plan(1000, 1, 1, None, seed=0), State(0, 0, 0, torch.zeros(2))
    for step in range(1, LOG_EVERY + 1):
        state.step = step
        state.add(torch.tensor([float(step), 2.0]))
        assert plan.ends_row(state) == (step == LOG_EVERY)
    assert state.take_means() == [(LOG_EVERY + 1) / 2, 2.0]
    assert state.count == 0 and not state.window.any()


# ---- Randomness ----


def test_what_is_drawn_is_a_function_of_seed_and_step():
    def draw(*where):
        seed_step(*where)
        return torch.randn(4).tolist()

    assert draw(0, 5) == draw(0, 5)
    assert len({tuple(draw(*where)) for where in ((0, 5), (0, 6), (1, 5), (1, 6))}) == 4
    assert not torch.equal(epoch_order(0, 1, 50), epoch_order(0, 2, 50))
    assert torch.equal(epoch_order(3, 1, 50), epoch_order(3, 1, 50))


def test_a_seed_is_the_same_on_every_machine_and_for_ever():
    """Resuming a run of last year needs that."""
    assert hash_seed(0, "step", 1) == 4677137154503864754
    assert all(0 <= hash_seed(i, "order", i) < 2**63 for i in range(100))


# ---- The optimizer's step ----


def test_the_learning_rate_rises_and_then_falls_to_zero():
    cfg = SDConfig(lr=2.0, lr_warmup_steps=3)
    rates = [lr_at(step, 100, cfg) for step in range(1, 101)]
    cosine = [1 + math.cos(math.pi * step / 100) for step in range(100)]
    assert rates == pytest.approx([r * c for r, c in zip([0.25, 0.5, 0.75, *[1.0] * 97], cosine)])
    assert rates[-1] < 0.001 < rates[0]
    assert {lr_at(step, 100, SDConfig(lr=2.0, lr_schedule="constant")) for step in (1, 50, 100)} == {2.0}


def test_a_step_is_adams_with_the_rate_and_the_decays_that_were_asked_for():
    """Against the formulas of Kingma & Ba, weight decay added to the gradient."""
    p, cfg = torch.nn.Parameter(torch.tensor([1.0, -2.0])), SDConfig(adam_beta2=0.9, weight_decay=0.1)
    optimizer = make_optimizer([torch.nn.ParameterList([p])], cfg)
    m = v = torch.zeros(2)
    w = p.detach().clone()
    for step, lr in ((1, 0.1), (2, 0.05)):
        p.grad = torch.tensor([0.5, step])
        g = p.grad + 0.1 * w
        optimizer_step(optimizer, lr)
        m, v = 0.9 * m + 0.1 * g, 0.9 * v + 0.1 * g**2
        w = w - lr * (m / (1 - 0.9**step)) / ((v / (1 - 0.9**step)).sqrt() + 1e-8)
        torch.testing.assert_close(p.detach(), w)


@pytest.mark.parametrize("most, left", [(0.0, 5.0), (10.0, 5.0), (1.0, 1.0)])
def test_gradients_are_clipped_and_their_norm_before_that_is_told(most, left):
    p, unused = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(1))
    p.grad = torch.tensor([3.0, 4.0])
    assert clip_gradients(torch.optim.SGD([p, unused]), most).item() == pytest.approx(5.0)
    assert p.grad.norm().item() == pytest.approx(left, rel=1e-5)


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("loss, norm", [(1.0, float("inf")), (float("nan"), 1.0)])
def test_the_first_step_that_is_not_finite_is_named(lazy, loss, norm):
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = make_optimizer([torch.nn.ParameterList([p])], SDConfig())
    guard = FiniteGuard(torch.device("cpu"), SimpleNamespace(last_saved="run/set4"))
    guard.lazy, message = lazy, "--lr: step 2 gives loss .* newest set is run/set4"

    def take(step, *figures):
        p.grad = torch.full((2,), figures[1])
        guard.judge(optimizer, *map(torch.tensor, figures), step)
        optimizer_step(optimizer, 0.1)

    take(1, 1.0, 1.0)
    if not lazy:
        with pytest.raises(UserError, match=message):
            take(2, loss, norm)
        return
    before = p.detach().clone()
    take(2, loss, norm)
    assert torch.equal(p.detach(), before)  # the optimizer has left it out
    take(3, 1.0, 1.0)
    with pytest.raises(UserError, match=message):
        guard.check()
    guard.check()  # each step is looked at once


def test_held_out_figures_that_are_not_numbers_are_named():
    guard = FiniteGuard(torch.device("cpu"), SimpleNamespace(last_saved="run/set4"))
    guard.check_held_out(0.5, 7)
    with pytest.raises(UserError, match="--lr: after step 7 .* run/set4"):
        guard.check_held_out(float("nan"), 7)


# ---- The averaged weights ----


def averaged(cfg, values):
    """The average of a weight that is 0 at the start and values[n] after step n + 1."""
    average, weight = torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for step, value in enumerate(values, 1):
        update_average([average], [weight.fill_(value)], ema_decay_at(step, cfg))
    return average.item()


def test_the_recipes_average_still_holds_its_initial_weights():
    """A weight that is 1 after every step and was 0 at first: 18,750 steps with decay 0.9999 leave 15 % of the 0."""
    left = 1 - averaged(SDConfig(), [1.0] * 18_750)
    assert left == pytest.approx(0.9999**18_750, rel=1e-6) == pytest.approx(0.153, abs=1e-3)
    assert 1 - averaged(SDConfig(ema_warmup=True), [1.0] * 18_750) < 1e-6


@pytest.mark.slow
def test_warm_up_equals_diffusers():
    from diffusers.training_utils import EMAModel

    theirs = EMAModel([torch.nn.Parameter(torch.zeros(1))], decay=0.999)
    cfg = SDConfig(ema_decay=0.999, ema_warmup=True)
    for step in (1, 2, 10, 500, 5_000, 20_000):
        assert ema_decay_at(step, cfg) == pytest.approx(theirs.get_decay(step + 1), abs=1e-12)


def test_warm_up_begins_with_a_short_memory():
    cfg = SDConfig(ema_decay=0.999, ema_warmup=True)
    assert [ema_decay_at(step, cfg) for step in (1, 10, 10_000)] == [2 / 11, 11 / 20, 0.999]


def test_the_share_of_random_weights_in_the_average_is_the_product_of_the_decays(tiny):
    for settings in ({"ema_decay": 0.9999}, {"ema_decay": 0.999, "ema_warmup": True}, {"ema_decay": 1.0}, {}):
        cfg = replace(tiny, **settings)
        for steps in (0, 1, 150, 2500):
            by_hand = math.prod(ema_decay_at(step, cfg) for step in range(1, steps + 1))
            assert training.random_share(steps, cfg) == pytest.approx(by_hand, abs=1e-9)
    average, weights = [torch.ones(3)], [torch.zeros(3)]
    cfg = replace(tiny, ema_decay=0.9)
    for step in range(1, 8):
        update_average(average, weights, ema_decay_at(step, cfg))
    assert average[0].tolist() == pytest.approx([training.random_share(7, cfg)] * 3)
