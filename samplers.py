"""The samplers: each leads from noise to latents by (x0, eps) as a model predicts them.

What it is not: no model, no guidance, no schedule; diffusion.py brings them. One interface for all:

  sampler(denoise, z, a, b, draw_noise) -> latents

denoise(z, i) -> (x0, eps), predicted from z at level i; z: (B, ...) at level 0, the noisiest; a, b: (n + 1,) double
tables on the CPU with z_t = a_t x0 + b_t eps, the last level clean: (1, 0); draw_noise() -> fresh noise of z's shape,
not used by the deterministic ones. In the formulas a step leads from level t to level s.

Papers:
  Ho et al. 2020, DDPM (arXiv 2006.11239): ddpm
  Song et al. 2020, DDIM (2010.02502): ddim
  Lu et al. 2022, DPM-Solver++ (2211.01095): dpmpp_2m
  Lipman et al. 2022, Flow Matching (2210.02747); Liu et al. 2022, Rectified Flow (2209.03003): euler, heun; s = 1 is
  noise here, and data there
"""

import math


def steps(a, b):
    """The steps -> (i, a_t, b_t, a_s, b_s), as Python floats: nothing in a sampler's loop waits for a GPU."""
    a, b = a.tolist(), b.tolist()
    return zip(range(len(a) - 1), a, b, a[1:], b[1:])


def ddpm(denoise, z, a, b, draw_noise):
    """Ancestral sampling (DDPM, Algorithm 2) with sigma_t^2 = beta_t; for a = sqrt(1 - b^2) only.

    Where timesteps are left out, a step is one of a schedule with alpha = (a_t / a_s)^2. The mean is written as the
    posterior's (Eq. 7): Algorithm 2 has the same one, but divides by sqrt(alpha), which is 0 at zero terminal SNR.
    """
    for i, a_t, b_t, a_s, b_s in steps(a, b):
        x0, _ = denoise(z, i)
        alpha = (a_t / a_s) ** 2
        z = (a_s * (1 - alpha) * x0 + math.sqrt(alpha) * b_s**2 * z) / b_t**2
        if b_s > 0:
            z = z + math.sqrt(1 - alpha) * draw_noise()
    return z


def ddim(denoise, z, a, b, draw_noise=None, eta=0.0):
    """DDIM (Song et al., Eq. 12 with the sigma of Eq. 16); eta: 0 is deterministic, 1 as noisy as DDPM's small variance."""
    for i, a_t, b_t, a_s, b_s in steps(a, b):
        x0, eps = denoise(z, i)
        sigma = eta * b_s / b_t * math.sqrt(1 - (a_t / a_s) ** 2)
        z = a_s * x0 + math.sqrt(max(b_s**2 - sigma**2, 0.0)) * eps
        if sigma > 0:
            z = z + sigma * draw_noise()
    return z


def dpmpp_2m(denoise, z, a, b, draw_noise=None):
    """DPM-Solver++(2M) (Lu et al., Algorithm 2), of first order in the first step and in the last.

    The first step has no x0 before it. The last ends at lambda = log(a / b) = infinity, where no line in lambda leads.
    """
    lam = (a.log() - b.log()).tolist()  # -inf at zero terminal SNR, which makes the next step first-order too
    before, last = None, len(a) - 2
    for i, a_t, b_t, a_s, b_s in steps(a, b):
        x0, _ = denoise(z, i)
        d = x0
        if before is not None and i < last:
            r = (lam[i] - lam[i - 1]) / (lam[i + 1] - lam[i])
            d = x0 + (x0 - before) / (2 * r)
        z = b_s / b_t * z + (a_s - a_t * b_s / b_t) * d
        before = x0
    return z


def euler(denoise, z, a, b, draw_noise=None):
    """Euler's method on dz/ds = eps - x0, the flow from data to noise (Liu et al., section 2)."""
    for i, _, s, _, s_next in steps(a, b):
        x0, eps = denoise(z, i)
        z = z + (s_next - s) * (eps - x0)
    return z


def heun(denoise, z, a, b, draw_noise=None):
    """Heun's method on the same equation: two calls of the model per step, but one in the last, as s = 0 is not trained."""
    for i, _, s, _, s_next in steps(a, b):
        x0, eps = denoise(z, i)
        v = eps - x0
        if s_next > 0:
            x0, eps = denoise(z + (s_next - s) * v, i + 1)
            v = (v + eps - x0) / 2
        z = z + (s_next - s) * v
    return z


SAMPLERS = {"ddpm": ddpm, "ddim": ddim, "dpmpp_2m": dpmpp_2m, "euler": euler, "heun": heun}
DIFFUSION_SAMPLERS = ("ddpm", "ddim", "dpmpp_2m")
SAMPLERS_FOR = {  # the first is the default
    "epsilon": DIFFUSION_SAMPLERS, "v_prediction": DIFFUSION_SAMPLERS, "flow": ("euler", "heun"),
}  # fmt: skip


def choose_sampler(prediction_type, name=None):
    """A sampler's name, by default the first that goes with the prediction type; ValueError if this one does not."""
    names = SAMPLERS_FOR[prediction_type]
    if name not in (None, *names):
        raise ValueError(f"{name} does not go with prediction_type {prediction_type}; choose from {', '.join(names)}")
    return name or names[0]
