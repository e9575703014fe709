"""Promises of metrics.py: each measure against something independent."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

import metrics
from diffusion import baab

TARGETS = {
    "epsilon": lambda x0, eps, a, b: eps,
    "v_prediction": lambda x0, eps, a, b: a * eps - b * x0,
    "flow": lambda x0, eps, a, b: eps - x0,
}


def random_covariance(size):
    root = torch.randn(size, size, dtype=torch.float64)
    return root @ torch.diag(torch.logspace(-1, 1, size, dtype=torch.float64)) @ root.T / size


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("a, b", [(0.99, 0.14), (0.6, 0.8), (0.3, 0.7)])
def test_the_bound_is_what_the_best_linear_predictor_reaches(target, a, b):
    """Gaussian data; the predictor is fitted by least squares, knowing neither covariance nor formula."""
    covariance = random_covariance(5)
    x0 = torch.randn(200_000, 5, dtype=torch.float64) @ torch.linalg.cholesky(covariance).T
    eps = torch.randn_like(x0)
    z, wanted = a * x0 + b * eps, TARGETS[target](x0, eps, a, b)
    reached = (z @ torch.linalg.lstsq(z, wanted).solution - wanted).square().mean()
    levels = (torch.tensor([v], dtype=torch.float64) for v in (a, b))
    bound = metrics.wiener_bound(*levels, torch.linalg.eigvalsh(covariance), target)
    assert bound.item() == pytest.approx(reached.item(), rel=0.01)


def test_the_bounds_of_white_latents_are_those_known_of_the_recipe():
    """Computed elsewhere, for latents of std 0.908: the recipe's schedule, and a uniform straight flow."""
    alpha_bar, white = baab()[2].double(), torch.tensor([0.908**2], dtype=torch.float64)
    levels = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    assert metrics.wiener_bound(*levels, white, "epsilon").mean().item() == pytest.approx(0.5624, abs=1e-4)
    assert metrics.wiener_bound(*levels, white, "v_prediction").mean().item() == pytest.approx(0.9232, abs=1e-4)
    s = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    assert metrics.wiener_bound(1 - s, s, white, "flow").mean().item() == pytest.approx(1.426, abs=1e-3)


def test_the_covariance_is_that_of_drawn_latents():
    mu, log_var = torch.randn(50, 2, 2, 2) * torch.rand(2, 2, 2) + 3, torch.randn(50, 2, 2, 2) - 1
    draws = torch.cat([mu + (log_var / 2).exp() * torch.randn_like(mu) for _ in range(4000)]).flatten(1).double()
    mean = mu.flatten(1).double().mean(0)
    drawn = (draws - mean).T @ (draws - mean) / len(draws) * 50 / 49 - torch.diag(log_var.flatten(1).exp().mean(0)) / 49
    assert torch.allclose(metrics.latent_covariance(mu, log_var), drawn, atol=0.02)
    without_noise = metrics.latent_covariance(mu, torch.full_like(mu, -torch.inf))
    assert torch.allclose(without_noise, mu.flatten(1).double().T.cov(), atol=1e-12)
    assert metrics.CHUNK < 3000
    many = torch.randn(3000, 3)
    assert torch.allclose(metrics.latent_covariance(many, many - torch.inf), many.double().T.cov(), atol=1e-12)


def test_the_mean_of_an_empty_bin_is_none():
    assert metrics.mean_by_bin(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 0, 2]), 4) == [2.0, None, 5.0, None]


def exactly(n, d):
    """Random features (n, d) whose own mean is 0 and whose own covariance is I, to rounding."""
    x = torch.randn(n, d, dtype=torch.float64)
    x = x - x.mean(0)
    return x @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov())).T


def test_frechet_distance_of_gaussians_in_closed_form():
    """Covariances with common axes: |difference of means|^2 + sum of (s - t)^2."""
    turn = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    s, t, m = torch.rand(6).double() + 0.1, torch.rand(6).double() * 3, torch.randn(6).double()
    x, y = exactly(100, 6) * s @ turn, exactly(80, 6) * t @ turn + m
    expected = m.square().sum() + (s - t).square().sum()
    assert metrics.frechet_distance(x, y) == pytest.approx(expected.item(), rel=1e-9)
    assert metrics.frechet_distance(y, x) == pytest.approx(expected.item(), rel=1e-9)
    assert metrics.frechet_distance(x, x) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("n, m", [(300, 200), (40, 25)])  # more, and fewer rows than features: a singular covariance
def test_frechet_distance_against_singular_values(n, m):
    """Another way to the same root: the trace is the nuclear norm of X Y^T, and no covariance is formed."""
    x, y = torch.randn(n, 64) @ torch.randn(64, 64) + 1, torch.randn(m, 64) @ torch.randn(64, 64)
    cx, cy = (v.double() - v.double().mean(0) for v in (x, y))
    cross = torch.linalg.svdvals(cx @ cy.T).sum() / math.sqrt((n - 1) * (m - 1))
    spread = cx.square().sum() / (n - 1) + cy.square().sum() / (m - 1)
    expected = (x.double().mean(0) - y.double().mean(0)).square().sum() + spread - 2 * cross
    assert metrics.frechet_distance(x, y) == pytest.approx(expected.item(), rel=1e-6)


def test_kernel_distance_against_a_naive_sum(monkeypatch):
    monkeypatch.setattr(metrics, "CHUNK", 4)
    x, y = torch.randn(9, 5), torch.randn(7, 5) + 0.5
    k = lambda u, v: (float(np.dot(u, v)) / 5 + 1) ** 3  # noqa: E731
    xs, ys = x.double().numpy(), y.double().numpy()
    same = [sum(k(s[i], s[j]) for i in range(len(s)) for j in range(len(s)) if i != j) / len(s) / (len(s) - 1)
            for s in (xs, ys)]  # fmt: skip
    cross = sum(k(u, v) for u in xs for v in ys) / 63
    assert metrics.kernel_distance(x, y) == pytest.approx(sum(same) - 2 * cross, rel=1e-9)


def test_kernel_distance_is_unbiased_where_the_frechet_distance_is_not():
    pairs = [(torch.randn(20, 8), torch.randn(20, 8)) for _ in range(600)]
    values = np.array([metrics.kernel_distance(x, y) for x, y in pairs])
    assert abs(values.mean()) < 4 * values.std() / math.sqrt(len(values))
    assert np.mean([metrics.frechet_distance(x, y) for x, y in pairs[:50]]) > 1


def test_nearest_is_that_of_all_pairs():
    x, y = torch.rand(6, 10), torch.rand(50, 10)
    y[33] = x[2]
    distance, number = metrics.nearest_rows(x, y.split(7))
    every = np.sqrt(((x.numpy()[:, None] - y.numpy()[None]) ** 2).mean(-1))
    assert np.allclose(distance, every.min(1)) and number.tolist() == every.argmin(1).tolist()
    assert distance[2] == 0 and number[2] == 33


def test_pictures_are_shrunk_by_averaging():
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    theirs = Image.fromarray(pixels[1].permute(1, 2, 0).numpy()).resize((16, 16), Image.Resampling.BOX)
    ours = metrics.shrink(pixels, 16)[1].view(3, 16, 16).permute(1, 2, 0) * 255
    assert np.abs(ours.numpy() - np.asarray(theirs, dtype=float)).max() < 1.1  # of 255; Pillow rounds twice


def test_channel_mean_variances_are_those_of_the_covariance():
    z = torch.randn(300, 3, 4, 4) * torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1) + torch.randn(300, 3, 1, 1)
    blocks = z.flatten(1).double().T.cov().view(3, 16, 3, 16)
    expected = torch.stack([blocks[c, :, c].sum() for c in range(3)]) / 16**2
    assert torch.allclose(metrics.channel_mean_variances(z), expected)


def test_auc_is_the_share_of_pairs_in_order_and_a_tie_counts_half():
    scores = torch.tensor([[3.0, 1.0, 0.0], [2.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
    labels = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 1, 0], [0, 0, 0]])
    areas = metrics.auc(scores, labels)
    assert areas[:2].tolist() == [0.75, 0.5] and areas[2].isnan()  # nothing has the third label


def test_contrast_and_colourfulness_of_known_pictures():
    grey = torch.full((2, 3, 8, 8), 77, dtype=torch.uint8)
    assert metrics.contrast(grey) == metrics.colourfulness(grey) == 0
    halves = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    halves[..., :4] = 255
    assert metrics.contrast(halves) == pytest.approx(0.5, rel=0.01) and metrics.colourfulness(halves) == 0
    red = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    red[:, 0] = 255  # red - green = 1, (red + green) / 2 - blue = 1/2, the same everywhere
    assert metrics.colourfulness(red) == pytest.approx(0.3 * 1.25**0.5)
