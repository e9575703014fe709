"""Promises of similarity.py: SSIM and MS-SSIM are the papers', and an octave holds the energy of its frequencies."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from similarity import mean_ssim, ms_ssim, octave_energies

# ---- SSIM and MS-SSIM ----


def naive_ssim(a, b):
    """-> SSIM and its factor without brightness of one channel: a weighted mean per window, in plain loops."""
    offsets = np.arange(11) - 5
    g = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    g /= g.sum()
    both = []
    for i in range(a.shape[0] - 10):
        for j in range(a.shape[1] - 10):
            p, q = a[i : i + 11, j : j + 11], b[i : i + 11, j : j + 11]
            mp, mq = (g * p).sum(), (g * q).sum()
            vp, vq, cov = (g * (p - mp) ** 2).sum(), (g * (q - mq) ** 2).sum(), (g * (p - mp) * (q - mq)).sum()
            brightness = (2 * mp * mq + 0.01**2) / (mp**2 + mq**2 + 0.01**2)
            structure = (2 * cov + 0.03**2) / (vp + vq + 0.03**2)
            both.append((brightness * structure, structure))
    return np.mean(both, axis=0)


def test_ms_ssim_equals_a_naive_one():
    """32 pixels: the window fits into two scales, whose exponents 0.0448 and 0.2856 are scaled to a sum of 1."""
    a = torch.rand(2, 2, 32, 32, dtype=torch.float64)
    b = (a + 0.2 * torch.randn_like(a)).clamp(0, 1)
    values, exponents = [], np.array([0.0448, 0.2856]) / (0.0448 + 0.2856)
    for n in range(2):
        for c in range(2):
            fine = naive_ssim(a[n, c].numpy(), b[n, c].numpy())[1]
            coarse = naive_ssim(*(x[n, c].reshape(16, 2, 16, 2).mean(dim=(1, 3)).numpy() for x in (a, b)))[0]
            values.append(fine ** exponents[0] * coarse ** exponents[1])
    assert ms_ssim(a, b).item() == pytest.approx(np.mean(values), abs=1e-6)


@pytest.mark.parametrize("size", [11, 16, 32, 64, 200])
def test_ms_ssim_in_closed_form(size):
    """1 of equal pictures; of two grey ones what is left is the brightness of the coarsest scale."""
    a = torch.rand(1, 3, size, size)
    assert ms_ssim(a, a).item() == pytest.approx(1, abs=1e-5)
    scales = 1 + min(4, int(math.log2(size / 11)))
    exponents = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)[:scales]
    brightness = (2 * 0.3 * 0.6 + 0.01**2) / (0.3**2 + 0.6**2 + 0.01**2)
    found = ms_ssim(torch.full_like(a, 0.3), torch.full_like(a, 0.6)).item()
    assert found == pytest.approx(brightness ** (exponents[-1] / sum(exponents)), abs=1e-4)


def test_the_gradient_of_ms_ssim_is_finite_where_the_pictures_are_opposite():
    a = torch.rand(1, 3, 32, 32, requires_grad=True)
    ms_ssim(a, 1 - a.detach()).backward()
    assert a.grad.isfinite().all()


def test_ssim_is_the_mean_of_a_naive_one():
    torch.manual_seed(0)
    x = torch.rand(2, 3, 16, 20) * 2 - 1
    x_hat = (x + 0.3 * torch.randn_like(x)).clamp(-1, 1)
    channels = zip((x_hat.flatten(0, 1) + 1) / 2, (x.flatten(0, 1) + 1) / 2)
    expected = np.mean([naive_ssim(a.numpy(), b.numpy())[0] for a, b in channels])
    assert mean_ssim(x_hat, x).item() == pytest.approx(expected, abs=1e-5)
    assert math.isnan(mean_ssim(x[..., :8], x[..., :8]).item())  # its window is wider


def test_windows_are_weighted_in_full_precision_on_cuda_too(monkeypatch):
    """cuDNN's convolutions keep 10 bits by default (TF32): of a photograph and its blurred copy SSIM would be 0.80, not 0.82."""
    seen, conv2d = [], F.conv2d
    monkeypatch.setattr(F, "conv2d", lambda *args: seen.append(tf32()) or conv2d(*args))
    before = tf32()
    mean_ssim(*torch.rand(2, 1, 3, 16, 16))
    assert seen and not any(seen) and tf32() == before


def tf32():
    return torch.backends.cudnn.allow_tf32


# ---- Octaves ----


@pytest.mark.parametrize("cycles, octave", [(30, 0), (18, 0), (12, 1), (6, 2)])
def test_a_wave_is_energy_of_its_octave(cycles, octave):
    """A wave of so many cycles across 64 pixels, upright and lying: nearly all of it in one octave of four."""
    wave = torch.cos(2 * math.pi * cycles * torch.arange(64) / 64 + 0.3)
    for x in (wave.expand(64, 64), wave[:, None].expand(64, 64)):
        energies = octave_energies(x.expand(1, 3, 64, 64))
        assert energies.shape == (4,) and energies[octave] > 0.9 * energies.sum()


def test_octaves_share_the_energy_of_a_picture():
    """Parseval: but for the lowest frequencies, the octaves of noise add up to its energy under the window."""
    torch.manual_seed(0)
    x = torch.randn(8, 3, 32, 48)
    window = torch.hann_window(32, periodic=False)[:, None] * torch.hann_window(48, periodic=False)
    whole = ((x - x.mean(dim=(2, 3), keepdim=True)) * window).square().sum(dim=(2, 3)).mean().item() * 32 * 48
    assert 0.9 * whole < octave_energies(x).sum().item() < whole


def test_blur_takes_the_finest_octave_first():
    torch.manual_seed(0)
    x = torch.randn(8, 3, 64, 64)
    kept = (octave_energies(F.avg_pool2d(x, 3, stride=1, padding=1)) / octave_energies(x)).tolist()
    assert kept == sorted(kept) and kept[0] < 0.1 and kept[3] > 0.8
