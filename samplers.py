"""The samplers: each leads from noise to latents by the (x0, eps) that a model predicts.

What it is not: no model, no guidance, no schedule; diffusion.py brings them. All have one interface:

  sampler(denoise, z, a, b, draw_noise) -> latents

z: (B, ...) at level 0, the noisiest. a, b: (n + 1,) double, on the CPU: level t is z_t = a_t x0 + b_t eps, the last level
is clean, (1, 0). denoise(z, i) -> (x0, eps), predicted from z at level i. draw_noise() -> fresh noise of z's shape.
A step leads from level t to level s.

Papers:
  Ho et al. 2020, DDPM (arXiv 2006.11239): ddpm
  Song et al. 2020, DDIM (2010.02502): ddim
  Lu et al. 2022, DPM-Solver++ (2211.01095): dpmpp_2m
  Lipman et al. 2022, Flow Matching (2210.02747); Liu et al. 2022, Rectified Flow (2209.03003): euler, heun (in their time
  0 is noise, in ours data)
"""

import math


def steps(a, b):
    """-> (i, a_t, b_t, a_s, b_s) for each step, as Python numbers: nothing in a sampler's loop waits for a GPU."""
    a, b = a.tolist(), b.tolist()
    return zip(range(len(a) - 1), a, b, a[1:], b[1:])


def ddpm(denoise, z, a, b, draw_noise):
    """Ancestral sampling (DDPM, Algorithm 2 with its mean written as Eq. 7, sigma_t^2 = beta_t); needs a^2 + b^2 = 1.

    If timesteps are skipped, a step is that of the shorter schedule, with alpha = (a_t / a_s)^2.
    """
    for i, a_t, b_t, a_s, b_s in steps(a, b):
        x0, _ = denoise(z, i)
        alpha = (a_t / a_s) ** 2
        z = (a_s * (1 - alpha) * x0 + math.sqrt(alpha) * b_s**2 * z) / b_t**2
        if b_s > 0:
            z = z + math.sqrt(1 - alpha) * draw_noise()
    return z


def ddim(denoise, z, a, b, draw_noise=None, eta=0.0):
    """DDIM (Song et al., Eq. 12, sigma by Eq. 16). eta 0 is deterministic, 1 as noisy as DDPM with its small variance."""
    for i, a_t, b_t, a_s, b_s in steps(a, b):
        x0, eps = denoise(z, i)
        sigma = eta * b_s / b_t * math.sqrt(1 - (a_t / a_s) ** 2)
        z = a_s * x0 + math.sqrt(max(b_s**2 - sigma**2, 0.0)) * eps
        if sigma > 0:
            z = z + sigma * draw_noise()
    return z


def dpmpp_2m(denoise, z, a, b, draw_noise=None):
    """DPM-Solver++(2M) (Lu et al., Algorithm 2): extrapolates x0 along lambda = log(a / b).

    It does not in the first step, which has no x0 before it, nor in the last, which ends at lambda = infinity.
    """
    lam = (a.log() - b.log()).tolist()
    x0_before, last = None, len(a) - 2
    for i, a_t, b_t, a_s, b_s in steps(a, b):
        x0, _ = denoise(z, i)
        d = x0
        if 0 < i < last:
            r = (lam[i] - lam[i - 1]) / (lam[i + 1] - lam[i])
            d = x0 + (x0 - x0_before) / (2 * r)
        z = b_s / b_t * z + (a_s - a_t * b_s / b_t) * d
        x0_before = x0
    return z


def euler(denoise, z, a, b, draw_noise=None):
    """Euler's method on dz/ds = eps - x0, the flow from data to noise (Liu et al., section 2)."""
    for i, _, s, _, s_next in steps(a, b):
        x0, eps = denoise(z, i)
        z = z + (s_next - s) * (eps - x0)
    return z


def heun(denoise, z, a, b, draw_noise=None):
    """Heun's method on the same equation. It calls the model twice per step; in the last once, as s = 0 is not trained."""
    for i, _, s, _, s_next in steps(a, b):
        x0, eps = denoise(z, i)
        v = eps - x0
        if s_next > 0:
            x0, eps = denoise(z + (s_next - s) * v, i + 1)
            v = (v + eps - x0) / 2
        z = z + (s_next - s) * v
    return z


SAMPLERS = {"ddpm": ddpm, "ddim": ddim, "dpmpp_2m": dpmpp_2m, "euler": euler, "heun": heun}
DIFFUSION = ("ddpm", "ddim", "dpmpp_2m")
SAMPLERS_FOR = {"epsilon": DIFFUSION, "v_prediction": DIFFUSION, "flow": ("euler", "heun")}  # default first


def choose_sampler(prediction_type, name=None):
    """The name of a sampler, by default the first that goes with the prediction type; ValueError if it does not."""
    names = SAMPLERS_FOR[prediction_type]
    if name not in (None, *names):
        raise ValueError(f"{name} does not go with prediction_type {prediction_type}; choose from {', '.join(names)}")
    return name or names[0]
