"""The diffusion process: noise schedule, forward process, training loss, sampler.

What it is not: no network, no device picking, no files. Functions on tensors; a model is any callable.

Paper: Ho et al. 2020, Denoising Diffusion Probabilistic Models (arXiv 2006.11239). Letters are the paper's,
but that t counts from 0 (t = 0 is the least noise) and latents are called z where the paper has x.
"""

import torch
import torch.nn.functional as F


def baab(timesteps=200, beta_start=1e-4, beta_end=0.02):
    """The linear noise schedule -> beta, alpha, alpha_bar: (timesteps,) each (DDPM, section 2 and 4).

    beta_t is the variance of the noise added by step t, alpha_t = 1 - beta_t, alpha_bar_t the product of
    alpha_0 .. alpha_t: the share of the signal's variance that is left after step t.
    """
    beta = torch.linspace(beta_start, beta_end, timesteps)
    alpha = 1.0 - beta
    return beta, alpha, torch.cumprod(alpha, dim=0)


def q_sample(x0, t, noise, alpha_bar):
    """Jump to step t of the forward process (DDPM, Eq. 4).

    x0, noise: (B, ...), t: (B,) in 0 .. T-1 -> x_t: shape of x0.
    """
    ab = alpha_bar[t].view(-1, *[1] * (x0.dim() - 1))
    return ab.sqrt() * x0 + (1.0 - ab).sqrt() * noise


def noise_prediction_loss(eps, noise):
    """L_simple (DDPM, Eq. 14), one value per sample: mean square of (noise - eps). (B, ...) twice -> (B,)."""
    return F.mse_loss(eps.float(), noise, reduction="none").flatten(1).mean(dim=1)


def spaced_timesteps(num_steps, timesteps):
    """`num_steps` of the `timesteps` training steps, evenly spaced, from the last one down -> (num_steps,) int64.

    The last training step is always among them: it is the noise level that sampling starts from.
    """
    if not 1 <= num_steps <= timesteps:
        raise ValueError(f"num_steps must be 1 to {timesteps}, not {num_steps}")
    return torch.arange(num_steps, 0, -1) * timesteps // num_steps - 1


def ddpm(predict_noise, z, ts, alpha_bar, draw_noise):
    """Ancestral sampling (DDPM, Algorithm 2) with sigma_t^2 = beta_t.

    predict_noise(z, t) -> eps for an integer t; z: (B, ...) starting noise; ts: descending timesteps;
    draw_noise() -> fresh noise of z's shape. A step from t to the next timestep s is one step of the
    schedule with alpha = alpha_bar_t / alpha_bar_s, which is alpha_t where no timestep is left out.
    """
    ts = ts.tolist()
    for t, s in zip(ts, ts[1:] + [None]):
        alpha = alpha_bar[t] / (1.0 if s is None else alpha_bar[s])
        eps = predict_noise(z, t)
        z = (z - (1 - alpha) / (1 - alpha_bar[t]).sqrt() * eps) / alpha.sqrt()
        if s is not None:
            z = z + (1 - alpha).sqrt() * draw_noise()
    return z


SAMPLERS = {"ddpm": ddpm}


@torch.no_grad()
def sample(unet, vae, t_embedder, text_encoder, prompt, num_steps=200, num_samples=4,
           *, alpha_bar=None, sampler="ddpm", seeds=None):  # fmt: skip
    """Pictures of a prompt -> (num_samples, 3, H, W) in [0, 1].

    prompt: one string for all samples, or a list of num_samples strings. alpha_bar: the schedule that the
    U-Net was trained on (on the CPU; default: the recipe's). seeds: one integer per sample, which then depends
    on it alone, whatever the batch and the device; None draws from PyTorch's global generator.
    """
    device = next(unet.parameters()).device
    alpha_bar = baab()[2] if alpha_bar is None else alpha_bar
    prompts = [prompt] * num_samples if isinstance(prompt, str) else prompt
    if len(prompts) != num_samples or (seeds is not None and len(seeds) != num_samples):
        raise ValueError(f"{num_samples} samples need as many prompts and seeds")
    text_emb = text_encoder(prompts)  # (B, L, text_dim)

    def predict_noise(z, t):
        t_emb = t_embedder(torch.full((len(z),), t, device=device))
        return unet(z, t_emb, text_emb)

    draw_noise = noise_source(unet.latent_shape, len(prompts), device, seeds)
    ts = spaced_timesteps(num_steps, len(alpha_bar))
    z = SAMPLERS[sampler](predict_noise, draw_noise(), ts, alpha_bar, draw_noise)
    return (vae.decoder(z).clamp(-1, 1) + 1) / 2


def noise_source(shape, num_samples, device, seeds=None):
    """-> a function that draws the next Gaussian noise (num_samples, *shape), on `device`.

    With seeds, sample k comes from its own generator on the CPU, the one device whose numbers are the same everywhere.
    """
    if seeds is None:
        return lambda: torch.randn(num_samples, *shape, device=device)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return lambda: torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)


@torch.no_grad()
def held_out_losses(unet, t_embedder, text_encoder, z, captions, alpha_bar, batch_size):
    """Noise-prediction loss of latents not trained on -> t, loss: (N,) each, timesteps evenly spread over 0 .. T-1.

    z: (N, C, h, w), captions: N strings. Noise comes from PyTorch's global generator: seed it to compare.
    """
    t = torch.arange(len(z), device=z.device) * len(alpha_bar) // len(z)
    losses = []
    for i in range(0, len(z), batch_size):
        part = slice(i, i + batch_size)
        noise = torch.randn_like(z[part])
        z_t = q_sample(z[part], t[part], noise, alpha_bar)
        losses.append(noise_prediction_loss(unet(z_t, t_embedder(t[part]), text_encoder(captions[part])), noise))
    return t, torch.cat(losses)
