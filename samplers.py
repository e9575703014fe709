"""The samplers: each turns noise into latents, step by step, with the (x0, eps) that a model predicts.

What it is not: no model, no guidance, no schedule; diffusion.py brings them. All have one interface:

  sampler(denoise, z, a, b, draw_noise) -> latents

z: (B, ...) at level 0, the noisiest. a, b: (n + 1,) double, on the CPU: at level i, z is a_i x0 + b_i eps; level n
is clean, (1, 0). denoise(z, i) -> (x0, eps), predicted from z at level i. draw_noise() -> fresh noise of z's shape.
Step i leads from level i, of a_t and b_t, to level i + 1, of a_next and b_next.

Papers:
  Ho et al. 2020, DDPM (arXiv 2006.11239): ddpm
  Song et al. 2020, DDIM (2010.02502): ddim
  Lu et al. 2022, DPM-Solver++ (2211.01095): dpmpp_2m
  Lipman et al. 2022, Flow Matching (2210.02747); Liu et al. 2022, Rectified Flow (2209.03003): euler, heun; t = 1 - b
"""

import math


def steps(a, b):
    """-> (i, a_t, b_t, a_next, b_next) for each step, as Python numbers, so that no sampler waits for a GPU."""
    a, b = a.tolist(), b.tolist()
    return zip(range(len(a) - 1), a, b, a[1:], b[1:])


def ddpm(denoise, z, a, b, draw_noise):
    """Ancestral sampling (DDPM, Algorithm 2 with its mean written as Eq. 7, sigma_t^2 = beta_t); needs a^2 + b^2 = 1.

    A step that skips timesteps is one of a shorter schedule, with alpha = (a_t / a_next)^2.
    """
    for i, a_t, b_t, a_next, b_next in steps(a, b):
        x0, _ = denoise(z, i)
        alpha = (a_t / a_next) ** 2
        z = (a_next * (1 - alpha) * x0 + math.sqrt(alpha) * b_next**2 * z) / b_t**2
        if b_next > 0:
            z = z + math.sqrt(1 - alpha) * draw_noise()
    return z


def ddim(denoise, z, a, b, draw_noise=None, eta=0.0):
    """DDIM (Song et al., Eq. 12, sigma by Eq. 16). eta 0 is deterministic, eta 1 is DDPM with the smaller sigma_t^2."""
    for i, a_t, b_t, a_next, b_next in steps(a, b):
        x0, eps = denoise(z, i)
        sigma = eta * b_next / b_t * math.sqrt(1 - (a_t / a_next) ** 2)
        z = a_next * x0 + math.sqrt(max(b_next**2 - sigma**2, 0.0)) * eps
        if sigma > 0:
            z = z + sigma * draw_noise()
    return z


def dpmpp_2m(denoise, z, a, b, draw_noise=None):
    """DPM-Solver++(2M) (Lu et al., Algorithm 2): extrapolates x0 along lambda = log(a / b).

    Not in the first step, which has no x0 before it, nor in the last, which ends at lambda = infinity.
    """
    lam = (a.log() - b.log()).tolist()
    x0_before, last = None, len(a) - 2
    for i, a_t, b_t, a_next, b_next in steps(a, b):
        x0, _ = denoise(z, i)
        d = x0
        if 0 < i < last:
            r = (lam[i] - lam[i - 1]) / (lam[i + 1] - lam[i])
            d = x0 + (x0 - x0_before) / (2 * r)
        z = b_next / b_t * z + (a_next - a_t * b_next / b_t) * d
        x0_before = x0
    return z


def euler(denoise, z, a, b, draw_noise=None):
    """Euler's method on dz/db = eps - x0: in flow matching b is the time (Liu et al., section 2)."""
    for i, _, b_t, _, b_next in steps(a, b):
        x0, eps = denoise(z, i)
        z = z + (b_next - b_t) * (eps - x0)
    return z


def heun(denoise, z, a, b, draw_noise=None):
    """Heun's method on the same equation. It calls the model twice per step, in the last once: b = 0 is not trained."""
    for i, _, b_t, _, b_next in steps(a, b):
        x0, eps = denoise(z, i)
        v = eps - x0
        if b_next > 0:
            x0, eps = denoise(z + (b_next - b_t) * v, i + 1)
            v = (v + eps - x0) / 2
        z = z + (b_next - b_t) * v
    return z


SAMPLERS = {"ddpm": ddpm, "ddim": ddim, "dpmpp_2m": dpmpp_2m, "euler": euler, "heun": heun}
DIFFUSION = ("ddpm", "ddim", "dpmpp_2m")
SAMPLERS_FOR = {"epsilon": DIFFUSION, "v_prediction": DIFFUSION, "flow": ("euler", "heun")}  # default first


def choose_sampler(prediction_type, name=None):
    """The name of a sampler, by default the first for the prediction type; ValueError if the two do not go together."""
    names = SAMPLERS_FOR[prediction_type]
    if name not in (None, *names):
        raise ValueError(f"{name} does not go with prediction_type {prediction_type}; choose from {', '.join(names)}")
    return name or names[0]
