"""The autoencoder: pictures (3, H, W) in [-1, 1] <-> latents (C, H/f, W/f) of about unit variance; the recipe has C = 4, f = 8.

What it is not: no discriminator, no perceptual loss, and no latent scaling factor. The KL weight alone
keeps the latents near N(0, 1), so the diffusion model uses them as they come: z = mu + sigma * eps. With
cfg.normalize_latents they come with mean 0 and variance 1 per channel; nobody outside this file shifts or scales.

Papers:
  Kingma & Welling 2013, Auto-Encoding Variational Bayes (arXiv 1312.6114): Eq. 10 and appendix B
  Higgins et al. 2017, beta-VAE: the weight on the KL term
  Rombach et al. 2022, Latent Diffusion (arXiv 2112.10752): the convolutional architecture, section 3.1
  Kouzelis et al. 2025, EQ-VAE (arXiv 2502.09509): equivariance of the latents, an option
  Wang et al. 2003, Multi-scale structural similarity, an option

Module names and block structure are those of diffusers' AutoencoderKL without quant convs,
so a state_dict from here opens there with strict=True, and back.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

# Limits of log sigma^2, as in latent diffusion: one wild output must not make exp() overflow.
LOG_VAR_RANGE = (-30.0, 20.0)
INITIAL_LOG_VAR = -4.0
MS_SSIM_EXPONENTS = (
    0.0448,
    0.2856,
    0.3001,
    0.2363,
    0.1333,
)  # of the scales, finest first (Wang et al. 2003, section 3.2)
SSIM_WINDOW, SSIM_SIGMA = 11, 1.5  # Gaussian [pixels]
SSIM_C1, SSIM_C2 = 0.01**2, 0.03**2  # for pixels in [0, 1]
PICTURES_TOGETHER, PIXELS_TOGETHER = 32, 32 * 128 * 128  # at most, where no batch size says how many


def compiled_for_cuda(x):
    """Whether this is being compiled for the GPU that x is on: some layers then have a form that torch.compile makes more of."""
    return x.device.type == "cuda" and torch.compiler.is_compiling()


class GroupNorm(nn.GroupNorm):
    """In float32 on a CPU even under bfloat16 autocast: its bfloat16 backward pass would cost more than the convolutions.

    Compiled for CUDA in bfloat16 out of sums, which become one with what comes before and after; PyTorch's own would copy
    channels_last maps to another layout and back.
    """

    def forward(self, x):
        if compiled_for_cuda(x) and x.dtype == torch.bfloat16:
            return self.by_sums(x)
        return super().forward(x.float() if x.device.type == "cpu" else x).to(x.dtype)

    def by_sums(self, x):
        """The same out of the means of x and x^2: x (B, C, H, W) -> (B, C, H, W).

        Where a mean is a hundred times the standard deviation, the difference of squares costs float32 all but three
        digits, which is what bfloat16 has.
        """
        x32, groups = x.float(), (len(x), self.num_groups, -1)
        mean, square = (m.mean(dim=(2, 3)).view(groups).mean(dim=2) for m in (x32, x32.square()))  # (B, groups) each
        std_inverse = ((square - mean.square()).clamp(min=0) + self.eps).rsqrt()
        a = self.weight.view(1, *groups[1:]) * std_inverse[:, :, None]  # (B, groups, C / groups)
        b = self.bias.view(1, *groups[1:]) - mean[:, :, None] * a
        return (x32 * a.view(len(x), -1, 1, 1) + b.view(len(x), -1, 1, 1)).to(x.dtype)


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
        repeated = repeat_pixels(x) if compiled_for_cuda(x) else F.interpolate(x, scale_factor=2.0, mode="nearest")
        return self.conv(repeated)  # (B, C, 2H, 2W)


def repeat_pixels(x):
    """(B, C, H, W) -> (B, C, 2H, 2W), as F.interpolate(), in channels_last. Its backward pass is a sum; that one's, compiled,
    adds one number after the other."""
    b, c, h, w = x.shape
    rows = x.permute(0, 2, 3, 1)[:, :, None, :, None].expand(b, h, 2, w, 2, c).reshape(b, 2 * h, 2 * w, c)
    return rows.permute(0, 3, 1, 2)


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
    """z: (B, latent_channels, h, w) -> x_hat (B, 3, f h, f w), about [-1, 1] but not clamped; f = 2^(levels - 1).

    normalized: z comes normalized; the buffers latent_mean and latent_std, (latent_channels, 1, 1) each, say by what.
    """

    def __init__(self, latent_channels, channels, layers_per_block, groups, normalized):
        super().__init__()
        if normalized:
            self.register_buffer("latent_mean", torch.zeros(latent_channels, 1, 1))
            self.register_buffer("latent_std", torch.ones(latent_channels, 1, 1))
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
        if hasattr(self, "latent_std"):
            z = z * self.latent_std + self.latent_mean
        h = self.mid_block(self.conv_in(z))
        for level in self.up_blocks:
            h = level(h)
        return self.conv_out(F.silu(self.conv_norm_out(h)))


class AutoencoderKL(nn.Module):
    """q(z|x) = N(mu, sigma^2) by `encode`, the mean of p(x|z) by `decoder`.

    cfg needs: latent_channels, block_out_channels (one entry per resolution, each a multiple of
    norm_num_groups), layers_per_block, norm_num_groups, normalize_latents.
    """

    def __init__(self, cfg):
        super().__init__()
        shape = (cfg.latent_channels, cfg.block_out_channels, cfg.layers_per_block, cfg.norm_num_groups)
        self.encoder = Encoder(*shape)
        self.decoder = Decoder(*shape, cfg.normalize_latents)

    def encode(self, x):
        """x: (B, 3, H, W) in [-1, 1] -> mu, log_var: (B, latent_channels, H / f, W / f) each; f = 2^(levels - 1)."""
        mu, log_var = self.encoder(x).chunk(2, dim=1)
        log_var = log_var.clamp(*LOG_VAR_RANGE)
        if hasattr(self.decoder, "latent_std"):
            mu = (mu - self.decoder.latent_mean) / self.decoder.latent_std
            log_var = log_var - 2 * self.decoder.latent_std.log()
        return mu, log_var

    def forward(self, x, eps=None, transform=None):
        """x: (B, 3, H, W) in [-1, 1] -> mu, log_var, and x_hat decoded from one draw of z. eps: as in reparameterize.

        transform: what is done to z before it is decoded, as in transformed(); x_hat then is of transformed(x).
        """
        mu, log_var = self.encode(x)
        return mu, log_var, self.decoder(transformed(reparameterize(mu, log_var, eps), transform))


def reparameterize(mu, log_var, eps=None):
    """Draw z = mu + sigma * eps with eps ~ N(0, I), drawn here unless given (Kingma & Welling, section 2.4)."""
    return mu + torch.exp(0.5 * log_var) * (torch.randn_like(mu) if eps is None else eps)


def draw_transform(probability):
    """With this probability one of the seven transforms below that change something, else None -> (turns, halved) or None.

    EQ-VAE's objective in its implicit form: the reconstruction loss asks the decoder for transformed(x), given
    transformed(z), and in the other steps for x, given z. So a step has one pass of the decoder as ever, a smaller one
    if halved. The paper draws its scales from 1/4 to 1; here 1/2 is the only one, exact for every number of levels.
    Drawn from PyTorch's global generator.
    """
    if torch.rand(()) >= probability:
        return None
    turns, halved = divmod(torch.randint(1, 8, ()).item(), 2)
    return turns, bool(halved)


def transformed(x, transform):
    """Pictures or latents (B, C, H, W), turned by quarter turns and halved by averaging; as they are if transform is None."""
    return x if transform is None else turn_and_halve(x, *transform)


@torch.compiler.disable  # else --compile would make one graph of the whole VAE for each transform
def turn_and_halve(x, turns, halved):
    x = torch.rot90(x, turns, dims=(2, 3))
    return F.avg_pool2d(x, 2) if halved else x


def num_together(pixels):
    """How many pictures of so many pixels each to encode or decode at once: bounds the memory, whatever their size.

    A fixed number, because the same pictures in other groups could have other last bits.
    """
    return max(1, min(PICTURES_TOGETHER, PIXELS_TOGETHER // pixels))


def vae_loss(x, mu, log_var, x_hat, beta, l1_weight=0.0, ms_ssim_weight=0.0):
    """Negative ELBO with a weighted KL term; returns (loss, mse, kl), each a scalar.

    mse is averaged over pixels (in [-1, 1]); kl is KL(q(z|x) || N(0, I)) in nats, summed over the latent
    of one picture (Kingma & Welling, appendix B) and averaged over the batch; loss = mse + beta * kl, and, if
    weighted, + l1_weight * (mean absolute error) + ms_ssim_weight * (1 - MS-SSIM).
    With p(x|z) = N(x_hat, s^2 I) over N pixel values, -ELBO times 2 s^2 / N is mse + beta * kl for beta = 2 s^2 / N, up
    to a constant: at the recipe's size its beta means s = 0.5.
    """
    mse = F.mse_loss(x_hat, x)
    kl = 0.5 * (mu.square() + log_var.exp() - 1 - log_var).sum(dim=(1, 2, 3)).mean()
    loss = mse + beta * kl
    if l1_weight:
        loss = loss + l1_weight * F.l1_loss(x_hat, x)
    if ms_ssim_weight:
        loss = loss + ms_ssim_weight * (1 - ms_ssim((x_hat + 1) / 2, (x + 1) / 2))
    return loss, mse, kl


def ms_ssim(a, b):
    """Multi-scale structural similarity of pictures (B, C, H, W) in [0, 1] -> scalar, 1 if equal (Wang et al. 2003, Eq. 7).

    Five scales, each half the one before; small pictures have only those that the window fits into, and the exponents
    of these are scaled to the same sum of 1.
    """
    scales = 1
    while scales < len(MS_SSIM_EXPONENTS) and min(a.shape[2:]) >> scales >= SSIM_WINDOW:
        scales += 1
    product = 1.0
    for i, exponent in enumerate(MS_SSIM_EXPONENTS[:scales]):
        ssim, structure = structural_similarity(a, b)
        similarity = structure if i < scales - 1 else ssim  # brightness counts at the coarsest scale alone
        product = product * similarity.clamp(min=1e-4) ** (
            exponent / sum(MS_SSIM_EXPONENTS[:scales])
        )  # no root of <= 0
        a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
    return product.mean()


def structural_similarity(a, b):
    """SSIM of pictures (B, C, H, W) in [0, 1], and its factor without brightness, the mean over all places of the
    window -> (B, C) each (Wang et al. 2004, Image quality assessment, Eq. 13)."""
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b, cov = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2, blur(a * b) - mean_a * mean_b
    brightness = (2 * mean_a * mean_b + SSIM_C1) / (mean_a**2 + mean_b**2 + SSIM_C1)
    structure = (2 * cov + SSIM_C2) / (var_a + var_b + SSIM_C2)
    return (brightness * structure).mean(dim=(2, 3)), structure.mean(dim=(2, 3))


def blur(x):
    """Means under a Gaussian window wherever it fits: (B, C, H, W) -> (B, C, H - 10, W - 10)."""
    g = torch.exp(-0.5 * ((torch.arange(SSIM_WINDOW, device=x.device) - SSIM_WINDOW // 2) / SSIM_SIGMA) ** 2)
    g = (g / g.sum()).to(x.dtype)
    h = F.conv2d(F.conv2d(x.flatten(0, 1)[:, None], g.view(1, 1, -1, 1)), g.view(1, 1, 1, -1))
    return h.view(*x.shape[:2], *h.shape[2:])


@torch.no_grad()
def measure_latents(vae, batches):
    """Set a VAE's latent_mean and latent_std to those of z, by channel, over all of batches: x (B, 3, H, W) in [-1, 1].

    Exact and without a draw: E z = E mu, Var z = Var mu + E sigma^2. Until then they are 0 and 1, so that training in
    float32 is the same with and without them; the weights around them stay, and what is decoded too.
    """
    vae.decoder.latent_mean.zero_()
    vae.decoder.latent_std.fill_(1)
    count, moments = 0, 0.0
    for x in batches:
        mu, log_var = vae.encode(x)
        moments += torch.stack([mu, mu.square() + log_var.exp()]).mean(dim=(1, 3, 4)).cpu().double() * len(x)  # (2, C)
        count += len(x)
    mean, square = moments[:, :, None, None] / count  # (C, 1, 1) each
    vae.decoder.latent_mean.copy_(mean)
    vae.decoder.latent_std.copy_((square - mean**2).sqrt())


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
