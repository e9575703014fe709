"""How far samplers stray by themselves: the error that is left with a perfect denoiser.

  python tests/sampler_bias.py             a table of schedules x samplers x steps, in seconds

Data: Gaussian latents of 16 x 16 with power spectrum 1 / f^slope and the standard deviation 0.908 of the recipe's
latents. The perfect denoiser of Gaussian data is linear in each frequency, and so is every sampler; so the variance
that comes out is computed exactly, by sending unit inputs through the samplers themselves, not by drawing samples.
A figure is the squared 2-Wasserstein distance from the data, relative to their variance, times 1000.
What it is not: no model and no training; what a trained U-Net adds to these errors is another question.
"""

import sys
from functools import partial
from pathlib import Path

import torch

if "conftest" not in sys.modules:  # which may have named a copy of the project
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from diffusion import make_process, sampling_grid  # noqa: E402
from samplers import ddim, ddpm, dpmpp_2m, euler, heun  # noqa: E402

SLOPES = (1, 2)
STEPS = (10, 20, 50, 200)
ROWS = {"recipe": {}, "scale_betas": {"scale_betas": True}}  # further arguments of make_process()
COLUMNS = {"ddpm": ddpm, "ddim eta 1": partial(ddim, eta=1.0), "ddim": ddim, "dpmpp_2m": dpmpp_2m}
FLOW_COLUMNS = {"euler": euler, "heun": heun}


def spectrum(slope, side=16, std=0.908):
    """Variance of each frequency -> (side^2,) double of mean std^2; f = 2/3 stands for the constant's f = 0."""
    k = torch.fft.fftfreq(side, dtype=torch.float64) * side
    f = (k[:, None] ** 2 + k**2).sqrt()
    f[0, 0] = 2 / 3
    power = f.flatten() ** -slope
    return power * std**2 / power.mean()


def variance_out(sampler, a, b, data):
    """Variance of what a sampler makes of N(0, I) with the perfect denoiser of N(0, data) -> (D,).

    data: (D,) variances; a, b: its tables. Row 0 of the batch is the answer to a unit start without noise, row k the
    answer to a unit of the k-th noise alone; variances add up.
    """
    z = torch.zeros(len(a), len(data), dtype=torch.float64)
    z[0] = 1.0
    units = iter(torch.eye(len(a), dtype=torch.float64)[1:])

    def denoise(z, i):
        share = z / (a[i] ** 2 * data + b[i] ** 2)
        return a[i] * data * share, b[i] * share

    return sampler(denoise, z, a, b, lambda: next(units)[:, None].expand_as(z)).square().sum(dim=0)


def relative_w2(variance, data):
    """Squared 2-Wasserstein distance of two centred Gaussians with the same axes, over the data's variance."""
    return ((variance.sqrt() - data.sqrt()).square().sum() / data.sum()).item()


def bias(sampler, process, num_steps, slope):
    """1000 x the relative squared distance after num_steps steps on the project's own grid."""
    _, a, b = sampling_grid(process, num_steps)
    data = spectrum(slope)
    return 1000 * relative_w2(variance_out(sampler, a, b, data), data)


def table():
    """-> {(row, sampler, num_steps): [figure for each slope]}."""
    rows = [(name, make_process(**schedule), COLUMNS) for name, schedule in ROWS.items()]
    rows.append(("flow", make_process("flow"), FLOW_COLUMNS))
    return {
        (name, column, n): [bias(sampler, process, n, slope) for slope in SLOPES]
        for name, process, columns in rows
        for column, sampler in columns.items()
        for n in STEPS
    }


def main():
    figures = table()
    spectra = " and ".join(f"1/f^{s}" for s in SLOPES)
    print(f"relative W2^2 x 1000 on spectra {spectra}; heun calls the model 2 n - 1 times\n")
    print(f"{'schedule':22}{'sampler':12}" + "".join(f"{f'{n} steps':>16}" for n in STEPS))
    for row, column in dict.fromkeys(key[:2] for key in figures):
        cells = [" / ".join("<.01" if x < 0.01 else f"{x:.2g}" for x in figures[row, column, n]) for n in STEPS]
        print(f"{row:22}{column:12}" + "".join(f"{c:>16}" for c in cells))


if __name__ == "__main__":
    main()
