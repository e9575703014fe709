"""The diffusion process: noise schedules, what the U-Net learns to predict, guidance, sample().

What it is not: no network, no device picking, no files; the samplers' formulas are in samplers.py. Functions on tensors; a
model is any callable. The recipe is the default of everything; what goes beyond it is chosen by the fields of SDConfig and
the arguments of sample().

Everything here is z_t = a_t x0 + b_t eps: latents are called z where the papers have x, and t grows with the noise.
Diffusion counts t = 0 .. T - 1 with a = sqrt(alpha_bar_t), b = sqrt(1 - alpha_bar_t). Flow matching has a = 1 - s,
b = s for any s in (0, 1], and t = s T, so that the time embedding sees the same range of numbers.

Papers:
  Ho et al. 2020, DDPM (arXiv 2006.11239): the recipe's process, loss and sampler
  Nichol & Dhariwal 2021, Improved DDPM (2102.09672), Eq. 17: the cosine schedule
  Lin et al. 2023, Common Diffusion Noise Schedules ... are Flawed (2305.08891): zero terminal SNR, trailing steps
  Salimans & Ho 2022, Progressive Distillation (2202.00512), appendix D: v-prediction
  Hang et al. 2023, Min-SNR Weighting (2303.09556)
  Lipman et al. 2022, Flow Matching (2210.02747); Liu et al. 2022, Rectified Flow (2209.03003): both count the other way
  Esser et al. 2024, Stable Diffusion 3 (2403.03206), section 3.1: logit-normal times
  Ho & Salimans 2022, Classifier-Free Guidance (2207.12598); Kynkaanniemi et al. 2024 (2404.07724): its interval,
  here a share of the steps, there of sigma
"""

import contextlib
import math
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

from cuda_graph import recorded
from samplers import SAMPLERS, choose_sampler, ddim
from vae import num_together

# ---- Noise schedules ------------------------------------------------------------------------------------


def baab(timesteps=200, beta_start=1e-4, beta_end=0.02, *, beta_schedule="linear", scale_betas=False,
         rescale_betas_zero_snr=False, dtype=torch.float32):  # fmt: skip
    """A noise schedule -> beta, alpha, alpha_bar, hence the name: (timesteps,) each (DDPM, section 2 and 4).

    beta_t is the variance of the noise added by step t, alpha_t = 1 - beta_t, alpha_bar_t the product of
    alpha_0 .. alpha_t: the share of the signal's variance that is left after step t. Computed in double precision.
    The options are the fields of SDConfig; without them this is the recipe's linear schedule.
    """
    scale = 1000 / timesteps if scale_betas else 1.0  # DDPM's betas are made for T = 1000: keep their sum
    if beta_schedule == "cosine":
        beta = cosine_betas(timesteps)
    else:
        beta = torch.linspace(scale * beta_start, scale * beta_end, timesteps, dtype=torch.float64)
    if rescale_betas_zero_snr:
        beta = zero_terminal_snr(beta)
    alpha = 1.0 - beta
    return beta.to(dtype), alpha.to(dtype), torch.cumprod(alpha, dim=0).to(dtype)


def cosine_betas(timesteps):
    """Betas whose alpha_bar falls like a squared cosine (Nichol & Dhariwal, Eq. 17), at most 0.999 -> (timesteps,)."""
    t = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
    f = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - f[1:] / f[:-1]).clamp(max=0.999)


def zero_terminal_snr(beta):
    """Betas that leave no signal at the last step and as much as before at the first (Lin et al., Algorithm 1)."""
    root = torch.cumprod(1.0 - beta, dim=0).sqrt()
    alpha_bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return 1.0 - alpha_bar / torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])


def q_sample(x0, t, noise, alpha_bar):
    """Jump to step t of the forward process (DDPM, Eq. 4). Training uses add_noise(), the same for every process.

    x0, noise: (B, ...), t: (B,) in 0 .. T-1 -> x_t: shape of x0.
    """
    ab = alpha_bar[t].view(-1, *[1] * (x0.dim() - 1))
    return ab.sqrt() * x0 + (1.0 - ab).sqrt() * noise


# ---- What the U-Net learns ------------------------------------------------------------------------------


class Process(NamedTuple):
    """A forward process, and which of its quantities the U-Net predicts."""

    prediction_type: str  # epsilon: the noise | v_prediction: a eps - b x0 | flow: the velocity eps - x0
    timesteps: int  # T
    alpha_bar: torch.Tensor | None  # (T,) double, on the CPU; None for flow, whose levels are no table


def make_process(prediction_type="epsilon", timesteps=200, **schedule):
    """The recipe's process, or another one; schedule: further arguments of baab()."""
    alpha_bar = None if prediction_type == "flow" else baab(timesteps, dtype=torch.float64, **schedule)[2]
    if prediction_type == "epsilon" and alpha_bar[-1] == 0:
        raise ValueError("epsilon tells nothing about x0 where no signal is left: take v_prediction or flow")
    return Process(prediction_type, timesteps, alpha_bar)


def configured_process(cfg):
    """The process of an SDConfig."""
    schedule = {} if cfg.prediction_type == "flow" else dict(
        beta_start=cfg.beta_start, beta_end=cfg.beta_end, beta_schedule=cfg.beta_schedule, scale_betas=cfg.scale_betas,
        rescale_betas_zero_snr=cfg.rescale_betas_zero_snr)  # fmt: skip
    return make_process(cfg.prediction_type, cfg.timesteps, **schedule)


def levels(process, t):
    """Times t: (N,) on the CPU -> a, b: (N,) double, the amplitudes of signal and noise in z_t."""
    if process.prediction_type == "flow":
        s = t.double() / process.timesteps
        return 1.0 - s, s
    ab = process.alpha_bar[t]
    return ab.sqrt(), (1.0 - ab).sqrt()


def draw_times(count, cfg):
    """Times to train at -> (count,) on the CPU: integers 0 .. T-1, or for flow floats in (0, T].

    flow_times logit_normal: s = sigmoid(N(0, 1)), which favours the middle (Esser et al., section 3.1).
    """
    if cfg.prediction_type != "flow":
        return torch.randint(cfg.timesteps, (count,))
    s = torch.randn(count).sigmoid() if cfg.flow_times == "logit_normal" else 1 - torch.rand(count)
    return cfg.timesteps * s


def add_noise(process, x0, t, noise):
    """The U-Net's input and its regression target: x0, noise (B, ...), t (B,) on the CPU -> z_t, target: (B, ...) each."""
    a, b = (c.to(x0, non_blocking=x0.is_cuda).view(-1, *[1] * (x0.dim() - 1)) for c in levels(process, t))
    target = {"epsilon": lambda: noise, "v_prediction": lambda: a * noise - b * x0, "flow": lambda: noise - x0}
    return a * x0 + b * noise, target[process.prediction_type]()


def to_x0_eps(prediction_type, out, z, a, b):
    """add_noise() solved for x0 and eps: out, z (B, ...), a and b numbers -> x0, eps: (B, ...) each."""
    if prediction_type == "epsilon":
        return (z - b * out) / a, out
    if prediction_type == "v_prediction":
        return a * z - b * out, b * z + a * out
    return z - b * out, z + a * out


def prediction_loss(out, target):
    """L_simple (DDPM, Eq. 14), one value per sample: mean square of (target - out). (B, ...) twice -> (B,)."""
    return F.mse_loss(out.float(), target, reduction="none").flatten(1).mean(dim=1)


def min_snr_weights(process, t, gamma):
    """Weights of the epsilon loss, min(SNR, gamma) / SNR with SNR = (a / b)^2 (Hang et al.); all 1 if gamma is 0.
    (B,) -> (B,)."""
    a, b = levels(process, t)
    return (gamma * (b / a) ** 2).clamp(max=1.0).float() if gamma else torch.ones(len(t))


def drop_captions(rows, empty, share):
    """Replaces each caption's number by `empty`, that of the empty caption, with probability `share`, to train for guidance
    (Ho & Salimans, Algorithm 1). rows: (B,), empty: (), both integer -> (B,)."""
    return torch.where(torch.rand(len(rows)) < share, empty, rows)


@torch.no_grad()
def held_out_losses(unet, t_embedder, text_encoder, z, captions, process, batch_size):
    """Unweighted loss of latents not trained on -> t, loss: (N,) each, the times evenly spread over the schedule.

    Not the training loss, which may have weights, captions left out, and times drawn more often in the middle.

    z: (N, C, h, w), captions: N strings. Noise comes from PyTorch's global generator: seed it to compare.
    """
    t = (torch.arange(len(z)) + 0.5) * process.timesteps / len(z)
    t = t if process.prediction_type == "flow" else t.long()
    losses = []
    for i in range(0, len(z), batch_size):
        part = slice(i, i + batch_size)
        z_t, target = add_noise(process, z[part], t[part], torch.randn_like(z[part]))
        out = unet(z_t, t_embedder(t[part].to(z.device)), text_encoder(captions[part]))
        losses.append(prediction_loss(out, target))
    return t, torch.cat(losses)


# ---- Sampling -------------------------------------------------------------------------------------------

RECORD_FROM = 20  # steps on CUDA; to record one takes as long as some ten (an estimate: on an H200 200 were measured)


def spaced_timesteps(num_steps, timesteps):
    """`num_steps` of the `timesteps` training steps, evenly spaced, from the last one down -> (num_steps,) int64.

    The last training step is always among them: it is the noise level that sampling starts from ("trailing", Lin et
    al., section 3.3).
    """
    if not 1 <= num_steps <= timesteps:
        raise ValueError(f"num_steps must be 1 to {timesteps}, not {num_steps}")
    return (torch.arange(num_steps, 0, -1, dtype=torch.float64) * timesteps / num_steps).round().long() - 1


def sampling_grid(process, num_steps):
    """-> t (n,), the times of n steps from the most noise down, and the samplers' tables a, b (n + 1,)."""
    if process.prediction_type == "flow":
        if num_steps < 1:
            raise ValueError(f"num_steps must be 1 or more, not {num_steps}")
        t = torch.arange(num_steps, 0, -1, dtype=torch.float64) * process.timesteps / num_steps
    else:
        t = spaced_timesteps(num_steps, process.timesteps)
    a, b = levels(process, t)
    return t, F.pad(a, (0, 1), value=1.0), F.pad(b, (0, 1), value=0.0)


@torch.no_grad()
def sample(unet, vae, t_embedder, text_encoder, prompt, num_steps=200, num_samples=4,
           *, process=None, sampler=None, eta=0.0, guidance_scale=1.0, negative_prompt="",
           guidance_interval=(0.0, 1.0), start=None, size=None, seeds=None):  # fmt: skip
    """Pictures of a prompt -> (num_samples, 3, H, W) in [0, 1].

    prompt: one string for all samples, or a list of num_samples strings.
    process: what the U-Net was trained on, from configured_process(cfg); default: the recipe's.
    sampler: one of SAMPLERS_FOR its prediction type; default: the first. eta: of ddim, in [0, 1].
    guidance_scale w: the prediction becomes uncond + w (cond - uncond); 1 is no guidance. Needs a U-Net that was trained
    with caption_dropout. negative_prompt: what uncond is told, by default the empty caption. guidance_interval: the
    part of the schedule to guide in, from 0 (clean) to 1 (first step).
    start: from fitted_start(); default: pure noise.
    size: (height, width) in pixels; default: as in training.
    seeds: one integer per sample, which then depends on it alone, but for rounding, whatever the batch and the device;
    None draws from PyTorch's global generator.
    """
    device = next(unet.parameters()).device
    process = process or make_process()
    prompts = [prompt] * num_samples if isinstance(prompt, str) else prompt
    if len(prompts) != num_samples or (seeds is not None and len(seeds) != num_samples):
        raise ValueError(f"{num_samples} samples need as many prompts and seeds")
    sampler = choose_sampler(process.prediction_type, sampler)
    if not 0 <= eta <= (sampler == "ddim"):
        raise ValueError(f"eta is from 0 to 1 with ddim, and 0 with any other sampler; it is {eta} with {sampler}")
    run = partial(ddim, eta=eta) if sampler == "ddim" else SAMPLERS[sampler]

    t, a, b = sampling_grid(process, num_steps)
    denoise = guided_denoiser(unet, t_embedder, text_encoder, prompts, process, t,
                              guidance_scale, negative_prompt, guidance_interval)  # fmt: skip
    draw_noise = noise_source(latent_shape(unet, vae, size), num_samples, device, seeds)
    z = draw_noise() if start is None else start(draw_noise())
    z = run(denoise, z, a, b, draw_noise)
    del denoise  # and with it what a GPU keeps for it
    return decode(vae, z)


def guided_denoiser(unet, t_embedder, text_encoder, prompts, process, t, scale=1.0, negative_prompt="",
                    interval=(0.0, 1.0)):  # fmt: skip
    """-> denoise(z, i) -> (x0, eps) at time t[i]; the text is encoded once, here. For the arguments see sample()."""
    low, high = interval
    if not 0 <= low <= high <= 1:
        raise ValueError(f"guidance_interval must be two rising numbers in [0, 1], not {interval}")
    if negative_prompt and scale == 1:
        raise ValueError("a negative prompt acts by guidance alone: give a guidance_scale other than 1")
    device, n = next(unet.parameters()).device, len(t)
    t_embs = t_embedder(t.float().to(device))  # (n, time_dim)
    autocast = device.type != "meta" and torch.is_autocast_enabled(device.type)
    # captions are embedded in float32 for training too
    with torch.autocast(device.type, enabled=False) if autocast else contextlib.nullcontext():
        cond = text_encoder(prompts)  # (B, L, text_dim)
        uncond = cond if scale == 1 else text_encoder([negative_prompt]).expand_as(cond)
    if autocast:  # once, instead of in each layer at each step
        cond, uncond = (c.to(torch.get_autocast_dtype(device.type)) for c in (cond, uncond))
    scales = [scale if low <= (n - i) / n <= high else 1.0 for i in range(n)]  # the times are evenly spaced
    amplitudes = [c.tolist() for c in levels(process, t)]
    predict = recorded(unet, device) if n >= RECORD_FROM else unet

    def denoise(z, i):
        out = guide(predict, z, t_embs[i], cond, uncond, scales[i]).to(z.dtype)
        return to_x0_eps(process.prediction_type, out, z, *(c[i] for c in amplitudes))

    return denoise


def guide(unet, z, t_emb, cond, uncond, w):
    """Classifier-free guidance (Ho & Salimans, Eq. 6, where their w is ours less 1) -> prediction: shape of z.

    z: (B, C, h, w), t_emb: (time_dim,), cond, uncond: (B, L, text_dim). w = 1 is no guidance, and half the work.
    """
    if w == 1:
        return unet(z, t_emb.expand(len(z), -1), cond)
    out = unet(torch.cat([z, z]), t_emb.expand(2 * len(z), -1), torch.cat([cond, uncond]))
    out_cond, out_uncond = out.chunk(2)
    return out_uncond + w * (out_cond - out_uncond)


def fitted_start(mean, covariance, process):
    """-> start(noise) -> z_T ~ N(a mean, a^2 covariance + b^2 I), for a and b at the last step of the process.

    mean: (D,), covariance: (D, D) of the flattened latents of the data; noise: (B, ...) of D numbers each. A process
    that leaves signal at its last step (the recipe's leaves 36 % of the amplitude) does not end in the pure noise that
    sampling starts from; this is where it ends, up to the latents' being Gaussian.
    """
    a, b = (c[0].item() for c in sampling_grid(process, 1)[1:])
    variances, axes = torch.linalg.eigh(covariance.double().cpu())
    root = axes * (a**2 * variances.clamp(min=0) + b**2).sqrt() @ axes.T  # symmetric, so that noise and z_T look alike
    shift = a * mean.double().cpu()

    def start(noise):
        if noise[0].numel() != len(shift):
            raise ValueError(f"the fitted start is for latents of {len(shift)} numbers, not {noise[0].numel()}")
        with torch.autocast(noise.device.type, enabled=False):
            return (shift.to(noise) + noise.flatten(1) @ root.to(noise)).view_as(noise)

    return start


def latent_shape(unet, vae, size=None):
    """(C, h, w) of the latents of pictures of size (height, width), by default those trained on."""
    if size is None:
        return unet.latent_shape
    vae_factor, factor = (2 ** (len(m.up_blocks) - 1) for m in (vae.decoder, unet))
    if any(side < 1 or side % (vae_factor * factor) for side in size):
        raise ValueError(f"height and width must be multiples of {vae_factor * factor}, not {size}")
    return (unet.latent_shape[0], *(side // vae_factor for side in size))


def decode(vae, z):
    """Latents (N, C, h, w) -> pictures (N, 3, H, W) in [0, 1], a bounded number of pixels at a time."""
    pixels = z[0, 0].numel() * 4 ** (len(vae.decoder.up_blocks) - 1)
    with torch.autocast(z.device.type, enabled=False):  # 8 bits of a bfloat16 would show in a smooth sky
        parts = [vae.decoder(part) for part in z.split(num_together(pixels))]
    return (torch.cat(parts).clamp(-1, 1) + 1) / 2


def noise_source(shape, num_samples, device, seeds=None):
    """-> a function that draws the next Gaussian noise (num_samples, *shape), on `device`.

    With seeds, sample k comes from its own generator on the CPU, the one device whose numbers are the same everywhere.
    """
    if seeds is None:
        return lambda: torch.randn(num_samples, *shape, device=device)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    cuda = torch.device(device).type == "cuda"

    def draw():
        noise = torch.stack([torch.randn(shape, generator=g) for g in generators])
        return (noise.pin_memory() if cuda else noise).to(device, non_blocking=cuda)  # pinned: no waiting for the GPU

    return draw
