"""The autoencoder: pictures (3, H, W) in [-1, 1] <-> latents (C, H/f, W/f). The recipe (preset coco): C = 4, f = 8.

What it is not: no discriminator (adversarial.py), no perceptual loss by default, no latent scaling factor. The KL term alone
keeps latents near N(0, I), and the U-Net learns on z = mu + sigma * eps unscaled.

Papers:
  Kingma & Welling 2013, Auto-Encoding Variational Bayes (arXiv 1312.6114): Eq. 10 and appendix B
  Higgins et al. 2017, beta-VAE: the weight on the KL term
  Rombach et al. 2022, Latent Diffusion (arXiv 2112.10752), section 3.1: the convolutional architecture

Modules are named and built as in diffusers' AutoencoderKL without quant convs: a state_dict of either loads into the
other with strict=True.
"""

import math
from collections import OrderedDict

import torch
import torch.nn as nn
import torch.nn.functional as F

from similarity import mean_ssim, ms_ssim, octave_energies

LOG_VAR_RANGE = (-30.0, 20.0)  # clamp of log sigma^2, as in latent diffusion: a huge output must not overflow exp()
INITIAL_LOG_VAR = -4.0
MAX_PICTURES_PER_PASS, MAX_PIXELS_PER_PASS = 32, 32 * 128 * 128


def compiled_for_cuda(x):
    """Whether torch.compile is tracing for CUDA: GroupNorm and Upsample then take forms that compile to faster code."""
    return x.device.type == "cuda" and torch.compiler.is_compiling()


class GroupNorm(nn.GroupNorm):
    """PyTorch's GroupNorm, but in float32 on a CPU: there its backward pass in bfloat16 costs more than convolutions.

    Compiled for CUDA in bfloat16 it is by_sums(), which torch.compile fuses with the layers around it. PyTorch's own
    kernel would copy channels_last feature maps to another layout and back.
    """

    def forward(self, x):
        if compiled_for_cuda(x) and x.dtype == torch.bfloat16:
            return self.by_sums(x)
        return super().forward(x.float() if x.device.type == "cpu" else x).to(x.dtype)

    def by_sums(self, x):
        """GroupNorm with Var x = E x^2 - (E x)^2: (B, C, H, W) -> (B, C, H, W).

        In float32 Var x keeps three digits even if the mean is 100 standard deviations; bfloat16 holds no more.
        """
        x32, groups = x.float(), (len(x), self.num_groups, -1)
        mean, mean_square = (m.mean(dim=(2, 3)).view(groups).mean(dim=2) for m in (x32, x32.square()))  # (B, groups)
        std_inverse = ((mean_square - mean.square()).clamp(min=0) + self.eps).rsqrt()
        scale = self.weight.view(1, *groups[1:]) * std_inverse[:, :, None]  # (B, groups, C / groups)
        shift = self.bias.view(1, *groups[1:]) - mean[:, :, None] * scale
        return (x32 * scale.view(len(x), -1, 1, 1) + shift.view(len(x), -1, 1, 1)).to(x.dtype)


class ResnetBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))): (B, in_channels, H, W) -> (B, out_channels, H, W)."""

    def __init__(self, in_channels, out_channels, groups):
        super().__init__()
        self.norm1 = GroupNorm(groups, in_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = GroupNorm(groups, out_channels, eps=1e-6)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


class SelfAttention(nn.Module):
    """Every pixel attends to every pixel, one head over all channels; residual. (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels, groups):
        super().__init__()
        self.group_norm = GroupNorm(groups, channels, eps=1e-6)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def forward(self, x):
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)  # (B, HW, C)
        q, k, v = self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)
        h = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]  # (B, HW, C)
        return x + self.to_out(h).transpose(1, 2).reshape(x.shape)  # (B, C, H, W)


def make_downsampler(channels):
    """A strided convolution, zero-padded on the right and at the bottom only: (B, C, H, W) -> (B, C, H/2, W/2)."""
    return nn.Sequential(OrderedDict(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(channels, channels, 3, stride=2)))


class Upsample(nn.Module):
    """Double the resolution: each pixel repeated 2x2, then a convolution.

    Training in the usual layout, that is wide nets on a CPU without bfloat16, takes convolve_repeated().
    """

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        if x.device.type == "cpu" and self.conv.weight.is_contiguous() and torch.is_grad_enabled():
            return convolve_repeated(x, self.conv.weight, self.conv.bias)
        repeated = repeat_pixels(x) if compiled_for_cuda(x) else F.interpolate(x, scale_factor=2.0, mode="nearest")
        return self.conv(repeated)  # (B, C, 2H, 2W)


def repeat_pixels(x):
    """Repeat each pixel 2x2, in channels_last: (B, C, H, W) -> (B, C, 2H, 2W). Compiled, it outruns F.interpolate()."""
    b, c, h, w = x.shape
    rows = x.permute(0, 2, 3, 1)[:, :, None, :, None].expand(b, h, 2, w, 2, c).reshape(b, 2 * h, 2 * w, c)
    return rows.permute(0, 3, 1, 2)


def convolve_repeated(x, weight, bias):
    """A 3x3 convolution of pixels repeated 2x2, with 4/9 of the products: (B, C, H, W) -> (B, O, 2H, 2W).

    Each pixel of the result sees 2x2 different ones, so the weights of equal ones are added up first: four kernels of
    2x2, one for each place in a 2x2 square (Shi et al. 2016, arXiv 1609.07009).
    """
    (h, w), places = x.shape[2:], (0, 1)
    added = x.new_tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]])  # (place, row of 2x2, row of 3x3)
    kernels = torch.einsum("pak,qbl,ockl->pqocab", added, added, weight).flatten(0, 2)  # (4 O, C, 2, 2)
    y = F.conv2d(x, kernels, bias.repeat(4), padding=1).unflatten(1, (2, 2, -1))  # (B, 2, 2, O, H + 1, W + 1)
    rows = [torch.stack([y[:, p, q, :, p : p + h, q : q + w] for q in places], dim=-1) for p in places]
    return torch.stack(rows, dim=3).flatten(4).flatten(2, 3)


class MidBlock(nn.Module):
    """Resnet, attention, resnet at the lowest resolution."""

    def __init__(self, channels, groups):
        super().__init__()
        self.attentions = nn.ModuleList([SelfAttention(channels, groups)])
        self.resnets = nn.ModuleList([ResnetBlock(channels, channels, groups) for _ in range(2)])

    def forward(self, x):
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


def make_levels(channels, num_layers, groups, name, make_resampler):
    """One level per entry of `channels`: its resnets, and in all but the last a resampler called `name`."""
    levels = []
    for i, (before, width) in enumerate(zip((channels[0], *channels), channels)):
        resnets = [ResnetBlock(before if k == 0 else width, width, groups) for k in range(num_layers)]
        level = OrderedDict(resnets=nn.Sequential(*resnets))
        if i < len(channels) - 1:
            level[name] = nn.Sequential(make_resampler(width))
        levels.append(nn.Sequential(level))
    return nn.Sequential(*levels)


class Encoder(nn.Module):
    """x: (B, 3, H, W) -> mu and log sigma^2, concatenated: (B, 2 * latent_channels, H/f, W/f), f = 2^(levels - 1)."""

    def __init__(self, latent_channels, channels, layers_per_block, groups):
        super().__init__()
        self.conv_in = nn.Conv2d(3, channels[0], 3, padding=1)
        self.down_blocks = make_levels(channels, layers_per_block, groups, "downsamplers", make_downsampler)
        self.mid_block = MidBlock(channels[-1], groups)
        self.conv_norm_out = GroupNorm(groups, channels[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(channels[-1], 2 * latent_channels, 3, padding=1)
        # start with little noise, so that the decoder has something to decode from the first step on
        nn.init.constant_(self.conv_out.bias[latent_channels:], INITIAL_LOG_VAR)

    def forward(self, x):
        h = self.mid_block(self.down_blocks(self.conv_in(x)))
        return self.conv_out(F.silu(self.conv_norm_out(h)))


class Decoder(nn.Module):
    """z: (B, latent_channels, h, w) -> x_hat: (B, 3, f h, f w), about [-1, 1] but not clamped; f = 2^(levels - 1)."""

    def __init__(self, latent_channels, channels, layers_per_block, groups):
        super().__init__()
        channels = channels[::-1]  # decoding starts at the lowest resolution
        self.conv_in = nn.Conv2d(latent_channels, channels[0], 3, padding=1)
        self.mid_block = MidBlock(channels[0], groups)
        self.up_blocks = make_levels(channels, layers_per_block + 1, groups, "upsamplers", Upsample)
        self.conv_norm_out = GroupNorm(groups, channels[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(channels[-1], 3, 3, padding=1)

    def forward(self, z):
        h = self.up_blocks(self.mid_block(self.conv_in(z)))
        return self.conv_out(F.silu(self.conv_norm_out(h)))


class AutoencoderKL(nn.Module):
    """`encode` gives q(z|x) = N(mu, sigma^2), `decoder` the mean of p(x|z).

    Reads from cfg: latent_channels, block_out_channels, layers_per_block, norm_num_groups.
    """

    def __init__(self, cfg):
        super().__init__()
        sizes = (cfg.latent_channels, cfg.block_out_channels, cfg.layers_per_block, cfg.norm_num_groups)
        self.encoder = Encoder(*sizes)
        self.decoder = Decoder(*sizes)

    def encode(self, x):
        """x: (B, 3, H, W) in [-1, 1] -> mu, log_var = log sigma^2: (B, latent_channels, H/f, W/f) each."""
        mu, log_var = self.encoder(x).chunk(2, dim=1)
        return mu, log_var.clamp(*LOG_VAR_RANGE)

    def forward(self, x, eps=None):
        """x: (B, 3, H, W) in [-1, 1] -> mu, log_var, and x_hat decoded from a drawn z. eps: see reparameterize()."""
        mu, log_var = self.encode(x)
        return mu, log_var, self.decoder(reparameterize(mu, log_var, eps))


def reparameterize(mu, log_var, eps=None):
    """z = mu + sigma * eps with eps ~ N(0, I), drawn here unless given (Kingma & Welling, section 2.4)."""
    return mu + torch.exp(0.5 * log_var) * (torch.randn_like(mu) if eps is None else eps)


def pictures_per_pass(pixels):
    """How many pictures of `pixels` pixels each the VAE takes at once: few, to save memory, and a function of `pixels`
    alone, because a picture's last bits may depend on the size of its batch."""
    return max(1, min(MAX_PICTURES_PER_PASS, MAX_PIXELS_PER_PASS // pixels))


def vae_loss(x, mu, log_var, x_hat, beta, l1_weight=0.0, ms_ssim_weight=0.0):
    """loss = mse + beta * kl + l1_weight * (mean absolute error) + ms_ssim_weight * (1 - MS-SSIM) -> loss, mse, kl.

    mse: mean over pixels in [-1, 1]. kl: KL(q(z|x) || N(0, I)) [nats], summed over a latent (Kingma & Welling, appendix
    B), averaged over the batch. Up to a factor and a constant, mse + beta * kl is the negative ELBO (Eq. 10) with
    p(x|z) = N(x_hat, s^2 I) and beta = 2 s^2 / N, where N = 3 H W. At 128 pixels the recipe's beta means s = 0.5.
    """
    mse = F.mse_loss(x_hat, x)
    kl = 0.5 * (mu.square() + log_var.exp() - 1 - log_var).sum(dim=(1, 2, 3)).mean()
    loss = mse + beta * kl
    if l1_weight:
        loss = loss + l1_weight * F.l1_loss(x_hat, x)
    if ms_ssim_weight:
        loss = loss + ms_ssim_weight * (1 - ms_ssim((x_hat + 1) / 2, (x + 1) / 2))
    return loss, mse, kl


@torch.no_grad()
def held_out_figures(vae, batches):
    """How well the VAE keeps unseen pictures, and how near their latents are to N(0, I) -> dict of floats.

    batches: an iterable of x (B, 3, H, W) in [-1, 1]. mse: of x_hat decoded from a drawn z. psnr_db: of that mse.
    ssim: of pictures that its window fits into. octave_1, octave_2, ...: energy of x_hat over that of x in each octave
    of octave_energies(); 1 is as sharp as the pictures, None if they have none.
    latent_mean, latent_std: over all of z. latent_mean_0, latent_std_0, ...: per channel.
    """
    count, sums, moments, energies = 0, 0.0, 0.0, 0.0
    for x in batches:
        mu, log_var = vae.encode(x)
        z = reparameterize(mu, log_var)
        x_hat = vae.decoder(z)
        sums += torch.stack([F.mse_loss(x_hat, x), mean_ssim(x_hat, x)]).cpu().double() * len(x)
        energies += torch.stack([octave_energies(p) for p in (x_hat.clamp(-1, 1), x)]) * len(x)  # (2, K)
        moments += torch.stack([z.mean(dim=(0, 2, 3)), z.square().mean(dim=(0, 2, 3))]).cpu().double() * len(x)
        count += len(x)
    mse, ssim = (sums / count).tolist()
    mean, mean_square = moments / count  # (C,) each
    figures = {"mse": mse, "psnr_db": 10 * math.log10(4 / mse) if 0 < mse < math.inf else math.nan}
    figures |= {"ssim": ssim} if math.isfinite(ssim) else {}
    for k, (kept, whole) in enumerate(energies.T.tolist(), start=1):
        figures[f"octave_{k}"] = kept / whole if whole else None
    figures["latent_mean"] = mean.mean().item()
    figures["latent_std"] = (mean_square.mean() - mean.mean() ** 2).sqrt().item()
    for c, (m, s) in enumerate(zip(mean, (mean_square - mean**2).sqrt())):
        figures |= {f"latent_mean_{c}": m.item(), f"latent_std_{c}": s.item()}
    return figures
