"""How alike pictures are, where the mean squared error does not see it: SSIM, MS-SSIM, and the energy in each octave.

What it is not: no network judges here. vae.py trains by MS-SSIM if asked to; the rest is measured on held-out pictures.

Papers:
  Wang et al. 2003, Multi-scale structural similarity: MS-SSIM
  Wang et al. 2004, Image quality assessment: SSIM
"""

import math

import torch
import torch.nn.functional as F

MS_SSIM_EXPONENTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # finest scale first (Wang et al. 2003, section 3.2)
SSIM_WINDOW, SSIM_SIGMA = 11, 1.5  # side and sigma of the Gaussian window [pixels]
SSIM_C1, SSIM_C2 = 0.01**2, 0.03**2  # for pixels in [0, 1]


def ms_ssim(a, b):
    """MS-SSIM of pictures (B, C, H, W) in [0, 1] -> scalar, 1 if they are equal (Wang et al. 2003, Eq. 7).

    Up to five scales, each half the one before: all that the window fits into. Their exponents are scaled to sum to 1.
    """
    scales = 1 + sum(min(a.shape[2:]) >> k >= SSIM_WINDOW for k in range(1, len(MS_SSIM_EXPONENTS)))
    exponents, product = MS_SSIM_EXPONENTS[:scales], 1.0
    for i, exponent in enumerate(exponents):
        ssim, contrast_structure = structural_similarity(a, b)
        similarity = ssim if i == scales - 1 else contrast_structure  # luminance counts at the coarsest scale alone
        # clamped: it can be negative, and a fractional power of a negative number is NaN
        product = product * similarity.clamp(min=1e-4) ** (exponent / sum(exponents))
        a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
    return product.mean()


def structural_similarity(a, b):
    """SSIM of pictures (B, C, H, W) in [0, 1], and the same without its luminance factor -> (B, C) each: means over all
    places of the window (Wang et al. 2004, Image quality assessment, Eq. 13)."""
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b, cov = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2, blur(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + SSIM_C1) / (mean_a**2 + mean_b**2 + SSIM_C1)
    contrast_structure = (2 * cov + SSIM_C2) / (var_a + var_b + SSIM_C2)
    return (luminance * contrast_structure).mean(dim=(2, 3)), contrast_structure.mean(dim=(2, 3))


@torch.backends.cudnn.flags(enabled=True, allow_tf32=False)  # a variance is a small difference of two of these
def blur(x):
    """Means under a Gaussian window wherever it fits: (B, C, H, W) -> (B, C, H - 10, W - 10)."""
    g = torch.exp(-0.5 * ((torch.arange(SSIM_WINDOW, device=x.device) - SSIM_WINDOW // 2) / SSIM_SIGMA) ** 2)
    g = (g / g.sum()).to(x.dtype)
    h = F.conv2d(F.conv2d(x.flatten(0, 1)[:, None], g.view(1, 1, -1, 1)), g.view(1, 1, 1, -1))
    return h.view(*x.shape[:2], *h.shape[2:])


def octave_energies(x):
    """Energy of pictures (B, C, H, W) in octaves of spatial frequency, the finest first -> (K,) double.

    Octave k has 2^-(k + 2) to 2^-(k + 1) cycles per pixel, the finest the corners beyond too; K as many as a picture
    of this size can tell apart. A Hann window keeps the step from one edge to the other out of the fine octaves.
    """
    sides = x.shape[2:]
    y, x_ = (torch.hann_window(n, periodic=False, device=x.device) for n in sides)
    windowed = (x - x.mean(dim=(2, 3), keepdim=True)) * y[:, None] * x_
    power = torch.fft.fft2(windowed).abs().square().mean(dim=(0, 1)).cpu().double()
    fy, fx = (torch.fft.fftfreq(n) for n in sides)
    octave = -torch.hypot(fy[:, None], fx).clamp(max=0.49).log2().floor() - 2  # (H, W)
    return torch.stack([power[octave == k].sum() for k in range(max(1, int(math.log2(min(sides))) - 2))])


def mean_ssim(x_hat, x):
    """SSIM of pictures (B, C, H, W) in [-1, 1] -> scalar; NaN if its window does not fit into them."""
    if min(x.shape[2:]) < SSIM_WINDOW:
        return torch.full((), math.nan, device=x.device)
    return structural_similarity((x_hat + 1) / 2, (x + 1) / 2)[0].mean()
