"""The autoencoder: pictures (3, H, W) in [-1, 1] <-> latents (4, H/8, W/8) of about unit variance.

What it is not: no discriminator, no perceptual loss, and no latent scaling factor. The KL weight alone
keeps the latents near N(0, 1), so the diffusion model uses them as they come: z = mu + sigma * eps.

Papers:
  Kingma & Welling 2013, Auto-Encoding Variational Bayes (arXiv 1312.6114): Eq. 10 and appendix B
  Higgins et al. 2017, beta-VAE: the weight on the KL term
  Rombach et al. 2022, Latent Diffusion (arXiv 2112.10752): the convolutional architecture, section 3.1

Module names and block structure are those of diffusers' AutoencoderKL without quant convs,
so a state_dict from here opens there with strict=True, and back.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

# Limits of log sigma^2: outside them exp() under- or overflows and the KL term stops being a number.
LOG_VAR_RANGE = (-30.0, 20.0)
INITIAL_LOG_VAR = -4.0


class GroupNorm(nn.GroupNorm):
    """In float32 on a CPU even where all else is bfloat16, whose backward pass costs more than the convolutions there."""

    def forward(self, x):
        return super().forward(x.float() if x.device.type == "cpu" else x).to(x.dtype)


class ResnetBlock(nn.Module):
    """Pre-activation residual block: x + conv(silu(norm(conv(silu(norm(x)))))).

    x: (B, in_channels, H, W) -> (B, out_channels, H, W).
    """

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
    """One head over all channels, every pixel attends to every pixel; residual.

    x: (B, C, H, W) -> (B, C, H, W).
    """

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


class Downsample(nn.Module):
    """Halve the resolution by a strided convolution, zero-padded on the right and at the bottom only."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # (B, C, H/2, W/2)


class Upsample(nn.Module):
    """Double the resolution: each pixel repeated 2x2, then a convolution."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))  # (B, C, 2H, 2W)


class MidBlock(nn.Module):
    """Resnet, attention, resnet at the lowest resolution."""

    def __init__(self, channels, groups):
        super().__init__()
        self.attentions = nn.ModuleList([SelfAttention(channels, groups)])
        self.resnets = nn.ModuleList([ResnetBlock(channels, channels, groups) for _ in range(2)])

    def forward(self, x):
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Level(nn.Module):
    """The resnets of one resolution, then the module that leaves it (none at the innermost or outermost)."""

    def __init__(self, in_channels, out_channels, num_layers, groups):
        super().__init__()
        widths = [in_channels] + [out_channels] * num_layers
        self.resnets = nn.ModuleList([ResnetBlock(a, b, groups) for a, b in zip(widths, widths[1:])])

    def forward(self, x):
        for resnet in self.resnets:
            x = resnet(x)
        for leave in [*getattr(self, "downsamplers", []), *getattr(self, "upsamplers", [])]:
            x = leave(x)
        return x


class Encoder(nn.Module):
    """x: (B, 3, H, W) -> moments (B, 2 * latent_channels, H/2^(n-1), W/2^(n-1)) for n channel levels."""

    def __init__(self, latent_channels, channels, layers_per_block, groups):
        super().__init__()
        self.conv_in = nn.Conv2d(3, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for i, (a, b) in enumerate(zip((channels[0], *channels), channels)):
            level = Level(a, b, layers_per_block, groups)
            if i < len(channels) - 1:
                level.downsamplers = nn.ModuleList([Downsample(b)])
            self.down_blocks.append(level)
        self.mid_block = MidBlock(channels[-1], groups)
        self.conv_norm_out = GroupNorm(groups, channels[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(channels[-1], 2 * latent_channels, 3, padding=1)
        # start with little noise, so that the decoder has something to decode from the first step on
        nn.init.constant_(self.conv_out.bias[latent_channels:], INITIAL_LOG_VAR)

    def forward(self, x):
        h = self.conv_in(x)
        for level in self.down_blocks:
            h = level(h)
        h = self.mid_block(h)
        return self.conv_out(F.silu(self.conv_norm_out(h)))


class Decoder(nn.Module):
    """z: (B, latent_channels, h, w) -> x_hat (B, 3, 8h, 8w), about [-1, 1] but not clamped."""

    def __init__(self, latent_channels, channels, layers_per_block, groups):
        super().__init__()
        channels = channels[::-1]  # decoding starts at the lowest resolution
        self.conv_in = nn.Conv2d(latent_channels, channels[0], 3, padding=1)
        self.mid_block = MidBlock(channels[0], groups)
        self.up_blocks = nn.ModuleList()
        for i, (a, b) in enumerate(zip((channels[0], *channels), channels)):
            level = Level(a, b, layers_per_block + 1, groups)
            if i < len(channels) - 1:
                level.upsamplers = nn.ModuleList([Upsample(b)])
            self.up_blocks.append(level)
        self.conv_norm_out = GroupNorm(groups, channels[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(channels[-1], 3, 3, padding=1)

    def forward(self, z):
        h = self.mid_block(self.conv_in(z))
        for level in self.up_blocks:
            h = level(h)
        return self.conv_out(F.silu(self.conv_norm_out(h)))


class AutoencoderKL(nn.Module):
    """q(z|x) = N(mu, sigma^2) by `encode`, the mean of p(x|z) by `decoder`.

    cfg needs: latent_channels, block_out_channels (one entry per resolution, each a multiple of
    norm_num_groups), layers_per_block, norm_num_groups.
    """

    def __init__(self, cfg):
        super().__init__()
        shape = (cfg.latent_channels, cfg.block_out_channels, cfg.layers_per_block, cfg.norm_num_groups)
        self.encoder = Encoder(*shape)
        self.decoder = Decoder(*shape)

    def encode(self, x):
        """x: (B, 3, H, W) in [-1, 1] -> mu, log_var: (B, latent_channels, H/8, W/8) each."""
        mu, log_var = self.encoder(x).chunk(2, dim=1)
        return mu, log_var.clamp(*LOG_VAR_RANGE)

    def forward(self, x, eps=None):
        """x: (B, 3, H, W) in [-1, 1] -> mu, log_var, and x_hat decoded from one draw of z. eps: as in reparameterize."""
        mu, log_var = self.encode(x)
        return mu, log_var, self.decoder(reparameterize(mu, log_var, eps))


def reparameterize(mu, log_var, eps=None):
    """Draw z = mu + sigma * eps with eps ~ N(0, I), drawn here unless given (Kingma & Welling, section 2.4)."""
    return mu + torch.exp(0.5 * log_var) * (torch.randn_like(mu) if eps is None else eps)


def vae_loss(x, mu, log_var, x_hat, beta):
    """Negative ELBO with a weighted KL term; returns (loss, mse, kl), each a scalar.

    mse is averaged over pixels (in [-1, 1]); kl is KL(q(z|x) || N(0, I)) in nats, summed over the latent
    of one picture (Kingma & Welling, appendix B) and averaged over the batch; loss = mse + beta * kl.
    """
    mse = F.mse_loss(x_hat, x)
    kl = 0.5 * (mu.square() + log_var.exp() - 1 - log_var).sum(dim=(1, 2, 3)).mean()
    return mse + beta * kl, mse, kl


@torch.no_grad()
def held_out_figures(vae, batches):
    """How well pictures not trained on are kept, and how far the latents are from N(0, 1).

    batches: an iterable of x (B, 3, H, W) in [-1, 1] -> dict of floats: mse of x_hat decoded from a drawn z,
    psnr_db (of the mean mse, for a range of 2), mean and std of z over all and by channel.
    """
    count, mse, moments = 0, 0.0, 0.0
    for x in batches:
        mu, log_var = vae.encode(x)
        z = reparameterize(mu, log_var)
        mse += F.mse_loss(vae.decoder(z), x).item() * len(x)
        moments += torch.stack([z.mean(dim=(0, 2, 3)), z.square().mean(dim=(0, 2, 3))]).cpu().double() * len(x)
        count += len(x)
    mean, square = moments / count  # (C,) each
    figures = {"mse": mse / count, "psnr_db": 10 * math.log10(4 * count / mse) if 0 < mse < math.inf else math.nan}
    figures |= {"latent_mean": mean.mean().item()}
    figures |= {"latent_std": (square.mean() - mean.mean() ** 2).sqrt().item()}
    for c, (m, s) in enumerate(zip(mean, (square - mean**2).sqrt())):
        figures |= {f"latent_mean_{c}": m.item(), f"latent_std_{c}": s.item()}
    return figures
