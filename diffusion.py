"""The diffusion process: noise schedule, what the U-Net learns to predict, guidance, sample().

What it is not: no network, no files; the samplers are in samplers.py. All defaults are the recipe's (preset coco).

Every process here is z_t = a_t x0 + b_t eps: x0 is a clean latent, z_t a noisy one (the papers' x_t), and t grows with
the noise. Diffusion counts t = 0 .. T - 1, with a_t = sqrt(alpha_bar_t) and b_t = sqrt(1 - alpha_bar_t). Flow matching
takes any s in (0, 1], with a = 1 - s and b = s; its t = s T gives the time embedding numbers of the same range.

Papers:
  Ho et al. 2020, DDPM (arXiv 2006.11239): the recipe's process, loss and sampler
  Salimans & Ho 2022, Progressive Distillation (2202.00512), appendix D: v-prediction
  Lipman et al. 2022, Flow Matching (2210.02747); Liu et al. 2022, Rectified Flow (2209.03003), both with t = 1 - s
  Esser et al. 2024, Stable Diffusion 3 (2403.03206), section 3.1: logit-normal times
  Lin et al. 2023, Common Diffusion Noise Schedules ... are Flawed (2305.08891), section 3.3: trailing steps
  Ho & Salimans 2022, Classifier-Free Guidance (2207.12598)
  Kynkaanniemi et al. 2024 (2404.07724): guidance in an interval, given there in sigma, here as a part of the schedule
"""

import contextlib
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

from samplers import SAMPLERS, choose_sampler, ddim
from support.cuda_graph import record_cuda_graph
from vae import pictures_per_pass

RECORD_FROM = 20  # steps from which a CUDA graph saves time: recording takes as long as ~10 (estimated on an H200)


# ---- What the U-Net learns ----


def baab(timesteps=200, beta_start=1e-4, beta_end=0.02, *, scale_betas=False, dtype=torch.float32):
    """The linear noise schedule -> beta, alpha, alpha_bar, hence the name: (timesteps,) each (DDPM, sections 2 and 4).

    beta_t is the variance of the noise that step t adds, alpha_t = 1 - beta_t, and alpha_bar_t = alpha_0 ... alpha_t is
    the share of the signal's variance that is left after step t. Computed in double precision.
    scale_betas: scale DDPM's betas, made for T = 1000, so that their sum stays the same whatever T is.
    """
    scale = 1000 / timesteps if scale_betas else 1.0
    beta = torch.linspace(scale * beta_start, scale * beta_end, timesteps, dtype=torch.float64)
    alpha = 1.0 - beta
    return beta.to(dtype), alpha.to(dtype), torch.cumprod(alpha, dim=0).to(dtype)


def q_sample(x0, t, noise, alpha_bar):
    """Jump to step t of the forward process (DDPM, Eq. 4): x0, noise (B, ...), t (B,) in 0 .. T-1 -> x_t, shape of x0.

    Training uses add_noise() instead, which also knows the other processes.
    """
    ab = alpha_bar[t].view(-1, *[1] * (x0.dim() - 1))
    return ab.sqrt() * x0 + (1.0 - ab).sqrt() * noise


class Process(NamedTuple):
    """A forward process, and which of its quantities the U-Net predicts."""

    prediction_type: str  # epsilon: the noise | v_prediction: a eps - b x0 | flow: the velocity eps - x0
    timesteps: int  # T
    alpha_bar: torch.Tensor | None  # (T,) double, on the CPU; None for flow, which needs no table


def make_process(prediction_type="epsilon", timesteps=200, **schedule):
    """A process, by default the recipe's. schedule: further arguments of baab()."""
    alpha_bar = None if prediction_type == "flow" else baab(timesteps, dtype=torch.float64, **schedule)[2]
    return Process(prediction_type, timesteps, alpha_bar)


def configured_process(cfg):
    """The process of an SDConfig."""
    schedule = {"beta_start": cfg.beta_start, "beta_end": cfg.beta_end, "scale_betas": cfg.scale_betas}
    return make_process(cfg.prediction_type, cfg.timesteps, **schedule)


def amplitudes(process, t):
    """Times t: (N,) on the CPU -> a, b: (N,) double, the amplitudes of signal and noise in z_t."""
    if process.prediction_type == "flow":
        s = t.double() / process.timesteps
        return 1.0 - s, s
    ab = process.alpha_bar[t]
    return ab.sqrt(), (1.0 - ab).sqrt()


def draw_times(count, cfg):
    """Times to train at -> (count,) on the CPU: integers in 0 .. T-1, or for flow floats in (0, T).

    Flow takes s = sigmoid(N(m, 1)), m = flow_time_mean: 0 favours the middle, m > 0 noise (Esser et al., section 3.1).
    """
    if cfg.prediction_type == "flow":
        return cfg.timesteps * (torch.randn(count) + cfg.flow_time_mean).sigmoid()
    return torch.randint(cfg.timesteps, (count,))


def add_noise(process, x0, t, noise):
    """The U-Net's input and its target: x0, noise (B, ...), t (B,) on the CPU -> z_t, target: (B, ...) each."""
    a, b = (c.to(x0, non_blocking=x0.is_cuda).view(-1, *[1] * (x0.dim() - 1)) for c in amplitudes(process, t))
    target = {"epsilon": lambda: noise, "v_prediction": lambda: a * noise - b * x0, "flow": lambda: noise - x0}
    return a * x0 + b * noise, target[process.prediction_type]()


def to_x0_eps(prediction_type, out, z, a, b):
    """add_noise() solved for x0 and eps: prediction out and z (B, ...), a and b numbers -> x0, eps: (B, ...) each."""
    if prediction_type == "epsilon":
        return (z - b * out) / a, out
    if prediction_type == "v_prediction":
        return a * z - b * out, b * z + a * out
    return z - b * out, z + a * out


def prediction_loss(out, target):
    """L_simple (DDPM, Eq. 14): mean square of (target - out), one value per sample. (B, ...) twice -> (B,)."""
    return F.mse_loss(out.float(), target, reduction="none").flatten(1).mean(dim=1)


def drop_captions(rows, empty, share):
    """Replace each caption by the empty one with probability `share`, as guidance needs (Ho & Salimans, Algorithm 1).

    rows: (B,) numbers of captions, empty: () the number of the empty one -> (B,).
    """
    return torch.where(torch.rand(len(rows)) < share, empty, rows)


@torch.no_grad()
def held_out_losses(unet, t_embedder, text_encoder, z, captions, process, batch_size):
    """Loss on latents not trained on, at times evenly spread over the schedule -> t, loss: (N,) each.

    z: (N, C, h, w), captions: N strings. The training loss differs: it drops captions and may favour some times.
    Noise comes from PyTorch's global generator: seed it to compare.
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


# ---- Sampling ----


def sampling_grid(process, num_steps):
    """-> t (n,): n evenly spaced times, noisiest first; a, b (n + 1,): those of amplitudes(), then the clean latent's 1, 0.

    t[0] is the noisiest time of training, as sampling starts from pure noise ("trailing", Lin et al., section 3.3).
    """
    flow, T = process.prediction_type == "flow", process.timesteps
    if num_steps < 1 or (num_steps > T and not flow):
        raise ValueError(f"num_steps must be 1 {'or more' if flow else f'to {T}'}, not {num_steps}")
    t = torch.arange(num_steps, 0, -1, dtype=torch.float64) * T / num_steps
    t = t if flow else t.round().long() - 1
    a, b = amplitudes(process, t)
    return t, F.pad(a, (0, 1), value=1.0), F.pad(b, (0, 1), value=0.0)


@torch.no_grad()
def sample(unet, vae, t_embedder, text_encoder, prompt, num_steps=200, num_samples=4, *, process=None, sampler=None,
           eta=0.0, guidance_scale=1.0, negative_prompt="", guidance_interval=(0.0, 1.0),
           guidance_rescale=0.0, size=None, seeds=None, watch=None, edit=None):  # fmt: skip
    """Pictures of a prompt -> (num_samples, 3, H, W) in [0, 1]. ValueError if the arguments do not go together.

    prompt: one string for all samples, a list of num_samples strings, or their embeddings (num_samples, L, text_dim).
    process: what the U-Net was trained on, from configured_process(cfg); by default the recipe's.
    sampler: one of SAMPLERS_FOR[prediction_type]; by default the first. eta: of ddim alone, in [0, 1].
    guidance_scale w: the prediction becomes uncond + w (cond - uncond); 1 is no guidance. Any other needs a U-Net that
    was trained with caption_dropout. negative_prompt: the caption of uncond, by default the empty one.
    guidance_interval: the part of the schedule to guide in, from 0 (clean) to 1 (noise): steps that begin above its
    lower end, and up to its upper. guidance_rescale: guidance raises the standard deviation of x0, which makes pictures
    too colourful; 0 leaves it, 1 takes all of the rise back.
    size: (height, width) in pixels; by default as in training.
    seeds: one integer per sample; apart from rounding, its picture then depends on neither the batch nor the device.
    Without seeds PyTorch's global generator draws.
    watch: called as watch(i, x0) after each call of the model at level i, with the guided x0 (num_samples, C, h, w), a
    latent that decode(vae, x0) shows. heun comes to most levels twice.
    edit: takes the sampler and gives back the one to use in its place (edit.py).
    """
    device = next(unet.parameters()).device
    process = process or make_process()
    prompts = [prompt] * num_samples if isinstance(prompt, str) else prompt
    if len(prompts) != num_samples or (seeds is not None and len(seeds) != num_samples):
        raise ValueError(f"{num_samples} samples need as many prompts and seeds")
    sampler = choose_sampler(process.prediction_type, sampler)
    if not 0 <= eta <= (sampler == "ddim"):
        raise ValueError(f"eta is from 0 to 1 with ddim, and 0 with any other sampler; it is {eta} with {sampler}")
    run_sampler = partial(ddim, eta=eta) if sampler == "ddim" else SAMPLERS[sampler]

    t, a, b = sampling_grid(process, num_steps)
    guidance = (guidance_scale, negative_prompt, guidance_interval, guidance_rescale)
    denoise = guided_denoiser(unet, t_embedder, text_encoder, prompts, process, t, *guidance, watch)
    draw_noise = noise_source(latent_shape(unet, vae, size), num_samples, device, seeds)
    run_sampler = edit(run_sampler) if edit else run_sampler
    z = run_sampler(denoise, draw_noise(), a, b, draw_noise)
    del denoise  # frees what a CUDA graph keeps on the GPU
    return decode(vae, z)


def guided_denoiser(unet, t_embedder, text_encoder, prompts, process, t,
                    scale=1.0, negative_prompt="", interval=(0.0, 1.0), rescale=0.0, watch=None):  # fmt: skip
    """-> denoise(z, i) -> (x0, eps) at time t[i]. The text is encoded once, here. For the arguments see sample()."""
    low, high = interval
    if not 0 <= low <= high <= 1:
        raise ValueError(f"guidance_interval must be two rising numbers in [0, 1], not {interval}")
    if negative_prompt and scale == 1:
        raise ValueError("a negative prompt acts by guidance alone: give a guidance_scale other than 1")
    device, n = next(unet.parameters()).device, len(t)
    t_embs = t_embedder(t.float().to(device))  # (n, time_dim)
    autocast = device.type != "meta" and torch.is_autocast_enabled(device.type)
    # captions are encoded in float32, as in training
    with torch.autocast(device.type, enabled=False) if autocast else contextlib.nullcontext():
        cond = prompts if isinstance(prompts, torch.Tensor) else text_encoder(prompts)  # (B, L, text_dim)
        uncond = cond if scale == 1 else text_encoder([negative_prompt]).expand_as(cond)
    if autocast:  # cast once here, not in every layer at every step
        cond, uncond = (c.to(torch.get_autocast_dtype(device.type)) for c in (cond, uncond))
    scales = [scale if low < (n - i) / n <= high else 1.0 for i in range(n)]  # step i begins at (n - i) / n
    a, b = (c.tolist() for c in amplitudes(process, t))
    predict = record_cuda_graph(unet, device) if n >= RECORD_FROM else unet

    def denoise(z, i):
        out, out_cond = (o.to(z.dtype) for o in guide(predict, z, t_embs[i], cond, uncond, scales[i]))
        x0, eps = to_x0_eps(process.prediction_type, out, z, a[i], b[i])
        if rescale and scales[i] != 1:
            x0_cond, _ = to_x0_eps(process.prediction_type, out_cond, z, a[i], b[i])
            ratio = x0_cond.std(dim=(1, 2, 3), keepdim=True) / x0.std(dim=(1, 2, 3), keepdim=True)
            x0 = x0 * (1 + rescale * (ratio - 1))  # Lin et al., section 3.4, rescale the prediction instead
            eps = (z - a[i] * x0) / b[i]
        if watch:
            watch(i, x0)
        return x0, eps

    return denoise


def guide(unet, z, t_emb, cond, uncond, w):
    """Classifier-free guidance (Ho & Salimans, Eq. 6, whose w is our w - 1) -> the guided prediction, and that for
    cond alone: shape of z each.

    z: (B, C, h, w), t_emb: (time_dim,), cond, uncond: (B, L, text_dim). w = 1 is no guidance, and half the work.
    """
    if w == 1:
        out = unet(z, t_emb.expand(len(z), -1), cond)
        return out, out
    out = unet(torch.cat([z, z]), t_emb.expand(2 * len(z), -1), torch.cat([cond, uncond]))
    out_cond, out_uncond = out.chunk(2)
    return out_uncond + w * (out_cond - out_uncond), out_cond


def latent_shape(unet, vae, size=None):
    """(C, h, w) of the latents of pictures of size (height, width), by default as in training."""
    if size is None:
        return unet.latent_shape
    vae_factor, unet_factor = (2 ** (len(m.up_blocks) - 1) for m in (vae.decoder, unet))
    factor = vae_factor * unet_factor
    if any(side < 1 or side % factor for side in size):
        raise ValueError(f"height and width must be multiples of {factor}, not {size}")
    return (unet.latent_shape[0], *(side // vae_factor for side in size))


@torch.no_grad()
def decode(vae, z):
    """Latents (N, C, h, w) -> pictures (N, 3, H, W) in [0, 1], a bounded number of pixels at a time."""
    pixels = z[0, 0].numel() * 4 ** (len(vae.decoder.up_blocks) - 1)
    with torch.autocast(z.device.type, enabled=False):  # the 8 bits of bfloat16 would show as bands in a smooth sky
        parts = [vae.decoder(part) for part in z.split(pictures_per_pass(pixels))]
    return (torch.cat(parts).clamp(-1, 1) + 1) / 2


def noise_source(shape, num_samples, device, seeds=None):
    """-> draw(), which returns new Gaussian noise (num_samples, *shape) on `device` at each call.

    With seeds each sample has its own generator, on the CPU: only there are numbers the same on all machines.
    """
    if seeds is None:
        return lambda: torch.randn(num_samples, *shape, device=device)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    cuda = torch.device(device).type == "cuda"

    def draw():
        noise = torch.stack([torch.randn(shape, generator=g) for g in generators])
        # copying from pinned memory does not wait for the GPU's earlier work
        return (noise.pin_memory() if cuda else noise).to(device, non_blocking=cuda)

    return draw
