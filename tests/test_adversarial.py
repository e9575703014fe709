"""Promises of adversarial.py: its losses are the papers', both nets get their own gradients and no others, and the two
losses of the decoder pull alike."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import adversarial
from adversarial import Discriminator, decoder_loss, hinge_loss, new_balance

CFG = SimpleNamespace(adversarial_weight=0.7, matching_weight=2.0)


def test_the_losses_are_those_of_the_papers():
    """Two levels of two and one patch, by hand: hinges at 1 and -1; minus the mean logit, plus features' differences."""
    real, fake = [torch.tensor([0.5, 3.0]), torch.tensor([1.0])], [torch.tensor([-2.0, 0.0]), torch.tensor([1.0])]
    assert hinge_loss(real, fake).item() == pytest.approx(((0.25 + 0.5) + (0.0 + 2.0)) / 4)
    assert decoder_loss(fake, None, None, 0).item() == pytest.approx((1.0 - 1.0) / 2)
    features, real_features = [torch.zeros(3), torch.ones(2)], [torch.full((3,), 2.0), torch.ones(2)]
    assert decoder_loss(fake, features, real_features, 0.5).item() == pytest.approx((0.0 + 0.5 * 2.0) / 2)


@pytest.mark.parametrize("matching", [0.0, 2.0])
def test_one_pass_leaves_the_gradients_of_two(matching):
    """Against autograd, a loss at a time: the decoder's of loss + weight x balance x its own, the discriminator's of hinges."""
    torch.manual_seed(0)
    cfg = SimpleNamespace(adversarial_weight=0.7, matching_weight=matching)
    hidden, last, discriminator = torch.nn.Conv2d(4, 8, 3, padding=1), torch.nn.Conv2d(8, 3, 1), Discriminator()
    z, x, balance = torch.randn(2, 4, 16, 16), torch.rand(2, 3, 16, 16) * 2 - 1, torch.tensor(0.3)

    def decoded():
        return last(hidden(z).tanh())

    x_hat = decoded()
    (real_features, real), (features, fake) = discriminator(x), discriminator(x_hat)
    pulling, loss = decoder_loss(fake, features, real_features, matching), F.mse_loss(x_hat, x)
    weights = [*hidden.parameters(), *last.parameters()]
    expected = torch.autograd.grad(0.5 * (loss + 0.7 * balance * pulling), weights, retain_graph=True)
    edges = [torch.autograd.grad(y, last.weight, retain_graph=True)[0] for y in (loss, pulling)]
    own = hinge_loss(real, discriminator(x_hat.detach())[1])
    expected_own = torch.autograd.grad(0.5 * own, [*discriminator.parameters()])

    x_hat = decoded()
    arguments = discriminator, balance, last.weight, F.mse_loss(x_hat, x), x, x_hat, 0.5, cfg, contextlib.nullcontext
    losses, gradients = adversarial.backward(*arguments)
    torch.testing.assert_close([p.grad for p in weights], list(expected))
    torch.testing.assert_close([p.grad for p in discriminator.parameters()], list(expected_own))
    torch.testing.assert_close(gradients, torch.stack(edges))
    torch.testing.assert_close(losses, torch.stack([pulling, own]).detach())


def test_balanced_losses_pull_at_the_last_layer_alike():
    gradients = torch.randn(2, 3, 8, 1, 1) * torch.tensor([1.0, 50.0]).view(2, 1, 1, 1, 1)
    reconstruction, pull = gradients
    assert (new_balance(gradients) * pull).norm().item() == pytest.approx(reconstruction.norm().item(), rel=1e-4)
    assert new_balance(torch.stack([reconstruction, 0 * pull])).item() == pytest.approx(adversarial.LARGEST_WEIGHT)


def test_each_level_judges_larger_patches():
    """What a logit sees, found by gradients: squares of 4, 10 and 22 pixels."""
    discriminator, x = Discriminator(), torch.zeros(1, 3, 64, 64, requires_grad=True)
    for logits, side in zip(discriminator(x)[1], (4, 10, 22)):
        seen = torch.autograd.grad(logits[0, 0, *(n // 2 for n in logits.shape[2:])], x, retain_graph=True)[0]
        touched = seen.abs().sum(dim=(0, 1)).nonzero()
        assert (touched.amax(dim=0) - touched.amin(dim=0) + 1).tolist() == [side, side]


def test_it_learns_to_tell_smooth_from_sharp():
    torch.manual_seed(0)
    discriminator = Discriminator()
    optimizer = torch.optim.Adam(discriminator.parameters(), 2e-3, betas=adversarial.BETAS)
    for _ in range(40):
        x = torch.rand(8, 3, 16, 16) * 2 - 1
        smooth = F.interpolate(F.avg_pool2d(x, 4), scale_factor=4, mode="bilinear")
        loss = hinge_loss(discriminator(x)[1], discriminator(smooth)[1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.3
