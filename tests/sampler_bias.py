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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from diffusion import fitted_start, make_process, sampling_grid  # noqa: E402
from samplers import ddim, ddpm, dpmpp_2m, euler, heun  # noqa: E402

SLOPES = (1, 2)
STEPS = (10, 20, 50, 200)
ROWS = {
    "recipe": ("epsilon", {}),
    "recipe, fitted start": ("epsilon", {}),
    "scale_betas": ("epsilon", {"scale_betas": True}),
    "cosine": ("epsilon", {"beta_schedule": "cosine"}),
    "zero SNR": ("v_prediction", {"rescale_betas_zero_snr": True}),
}
COLUMNS = {"ddpm": ddpm, "ddim eta 1": partial(ddim, eta=1.0), "ddim": ddim, "dpmpp_2m": dpmpp_2m}
FLOW_COLUMNS = {"euler": euler, "heun": heun}


def spectrum(slope, side=16, std=0.908):
    """Variance of each frequency -> (side^2,) double of mean std^2; f = 2/3 stands for the constant's f = 0."""
    k = torch.fft.fftfreq(side, dtype=torch.float64) * side
    f = (k[:, None] ** 2 + k**2).sqrt()
    f[0, 0] = 2 / 3
    power = f.flatten() ** -slope
    return power * std**2 / power.mean()


def variance_out(sampler, a, b, data, start=None):
    """Variance of what a sampler makes with the perfect denoiser of N(0, data) -> (D,).

    data: (D,) variances; a, b: its tables; start: variances at the first level, by default 1. Row 0 of the batch is
    the answer to a unit start without noise, row k the answer to a unit of the k-th noise alone; variances add up.
    """
    z = torch.zeros(len(a), len(data), dtype=torch.float64)
    z[0] = 1.0 if start is None else start.sqrt()
    units = iter(torch.eye(len(a), dtype=torch.float64)[1:])

    def denoise(z, i):
        share = z / (a[i] ** 2 * data + b[i] ** 2)
        return a[i] * data * share, b[i] * share

    return sampler(denoise, z, a, b, lambda: next(units)[:, None].expand_as(z)).square().sum(dim=0)


def relative_w2(variance, data):
    """Squared 2-Wasserstein distance of two centred Gaussians with the same axes, over the data's variance."""
    return ((variance.sqrt() - data.sqrt()).square().sum() / data.sum()).item()


def bias(sampler, process, num_steps, slope, fitted=False):
    """1000 x the relative squared distance after num_steps steps on the project's own grid."""
    _, a, b = sampling_grid(process, num_steps)
    data = spectrum(slope)
    start = None
    if fitted:
        unit = torch.eye(len(data), dtype=torch.float64)
        start = fitted_start(torch.zeros(len(data)), data.diag(), process)(unit).diag() ** 2
    return 1000 * relative_w2(variance_out(sampler, a, b, data, start), data)


def table():
    """-> {(row, sampler, num_steps): [figure for each slope]}."""
    figures = {}
    for name, (prediction_type, schedule) in ROWS.items():
        process = make_process(prediction_type, **schedule)
        for column, sampler in COLUMNS.items():
            for n in STEPS:
                figures[name, column, n] = [bias(sampler, process, n, s, "fitted" in name) for s in SLOPES]
    for column, sampler in FLOW_COLUMNS.items():
        for n in STEPS:
            figures["flow", column, n] = [bias(sampler, make_process("flow"), n, s) for s in SLOPES]
    return figures


def main():
    figures = table()
    print(
        f"relative W2^2 x 1000 on spectra {' and '.join(f'1/f^{s}' for s in SLOPES)}; heun calls the model 2 n - 1 times\n"
    )
    print(f"{'schedule':22}{'sampler':12}" + "".join(f"{f'{n} steps':>16}" for n in STEPS))
    for row, column in dict.fromkeys(key[:2] for key in figures):
        cells = [" / ".join("<.01" if x < 0.01 else f"{x:.2g}" for x in figures[row, column, n]) for n in STEPS]
        print(f"{row:22}{column:12}" + "".join(f"{c:>16}" for c in cells))


if __name__ == "__main__":
    main()
