"""The denoiser: a U-Net on latents. An embedding tells it the noise level, cross-attention tells it the caption.

What it is not: it knows no noise schedule, no guidance and no text encoder. It maps (z_t, embedded t, embedded caption)
to a prediction: of the noise in z_t, or of another target of diffusion.py.

Papers:
  Ronneberger et al. 2015, U-Net (arXiv 1505.04597)
  Ho et al. 2020, DDPM (arXiv 2006.11239), appendix B: resnets with GroupNorm and time embedding
  Vaswani et al. 2017, Attention Is All You Need (arXiv 1706.03762): section 3.2 attention, 3.5 sinusoids
  Rombach et al. 2022, Latent Diffusion (arXiv 2112.10752), section 3.3: cross-attention conditioning
  Shazeer 2020, GLU Variants Improve Transformer (arXiv 2002.05202), Eq. 5: GEGLU

Modules are named and built as in diffusers' UNet2DConditionModel with only_cross_attention = (True, ..., True, False):
the image attends to itself at the lowest resolution alone; every other attention looks at the caption. TimeEmbedding is
a part of the model there, `time_embedding`.
"""

import math
from collections import OrderedDict

import torch
import torch.nn as nn
import torch.nn.functional as F


class TimeEmbedding(nn.Module):
    """Sinusoids of the timestep, then a two-layer MLP. t: (B,) int or float, counted from 0 -> (B, dim).

    dim / 8 cosines, then as many sines; wavelengths from 2 pi to almost 10,000 * 2 pi steps (DDPM, appendix B).
    """

    def __init__(self, dim):
        super().__init__()
        self.num_frequencies = dim // 8
        self.linear_1 = nn.Linear(dim // 4, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, t):
        i = torch.arange(self.num_frequencies, device=t.device, dtype=torch.float32)
        frequencies = torch.exp(-math.log(10_000) * i / self.num_frequencies)
        angles = t[:, None].float() * frequencies  # (B, dim / 8)
        sinusoids = torch.cat([angles.cos(), angles.sin()], dim=1)  # (B, dim / 4)
        return self.linear_2(F.silu(self.linear_1(sinusoids)))  # (B, dim)


class ResnetBlock(nn.Module):
    """Pre-activation residual block; the time embedding is added between its two convolutions.

    x: (B, in_channels, H, W), t_emb: (B, time_dim) -> (B, out_channels, H, W).
    """

    def __init__(self, in_channels, out_channels, cfg):
        super().__init__()
        groups = cfg.unet_norm_num_groups
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=1e-5)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(cfg.time_dim, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=1e-5)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x, t_emb):
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time_emb_proj(F.silu(t_emb))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


class Attention(nn.Module):
    """Multi-head attention from tokens x to tokens `context` (Vaswani et al., section 3.2.2).

    x: (B, N, dim), context: (B, M, context_dim) -> (B, N, dim).
    """

    def __init__(self, dim, context_dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim, dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(dim, dim))

    def split_heads(self, tokens):
        return tokens.unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, N, dim / heads)

    def forward(self, x, context):
        q, k, v = (self.split_heads(h) for h in (self.to_q(x), self.to_k(context), self.to_v(context)))
        h = attend(q, k, v)  # (B, heads, N, dim / heads)
        return self.to_out(h.transpose(1, 2).flatten(2))  # (B, N, dim)


def attend(q, k, v):
    """softmax(q k^T / sqrt(d)) v (Vaswani et al., Eq. 1): q (B, heads, N, d), k and v (B, heads, M, d) -> shape of q.

    In bfloat16 on a CPU without PyTorch's fused kernel, whose backward pass is slow there. The scores are transposed,
    (M, N), because softmax over the few tokens of a caption is faster down the columns than along the rows.
    """
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v)
    weights = (k * q.shape[-1] ** -0.5 @ q.transpose(-2, -1)).softmax(dim=-2)  # (B, heads, M, N)
    return weights.transpose(-2, -1) @ v


class GEGLU(nn.Module):
    """A linear layer gated by the GELU of another (Shazeer, Eq. 5): (B, N, dim) -> (B, N, inner)."""

    def __init__(self, dim, inner):
        super().__init__()
        self.proj = nn.Linear(dim, 2 * inner)

    def forward(self, x):
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class TransformerBlock(nn.Module):
    """Self-attention (with only_cross_attention: attention to the caption), attention to the caption, feed-forward.

    x: (B, N, dim), text_emb: (B, L, text_dim) -> (B, N, dim).
    """

    def __init__(self, dim, only_cross_attention, cfg):
        super().__init__()
        self.only_cross_attention = only_cross_attention
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, cfg.text_dim if only_cross_attention else dim, cfg.num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = Attention(dim, cfg.text_dim, cfg.num_heads)
        self.norm3 = nn.LayerNorm(dim)
        # the Identity takes the place of diffusers' dropout, so that the names of weights agree
        net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))
        self.ff = nn.Sequential(OrderedDict(net=net))

    def forward(self, x, text_emb):
        h = self.norm1(x)
        x = x + self.attn1(h, text_emb if self.only_cross_attention else h)
        x = x + self.attn2(self.norm2(x), text_emb)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """A transformer block over the pixels of a map, residual: (B, C, H, W), (B, L, text_dim) -> (B, C, H, W)."""

    def __init__(self, channels, only_cross_attention, cfg):
        super().__init__()
        self.norm = nn.GroupNorm(cfg.unet_norm_num_groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels, only_cross_attention, cfg)])
        self.proj_out = nn.Linear(channels, channels)

    def forward(self, x, text_emb):
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # (B, HW, C)
        tokens = self.transformer_blocks[0](self.proj_in(tokens), text_emb)
        return x + self.proj_out(tokens).transpose(1, 2).reshape(x.shape)  # (B, C, H, W)


def make_downsampler(channels):
    """A strided convolution, zero-padded on all sides: (B, C, H, W) -> (B, C, H/2, W/2)."""
    return nn.Sequential(OrderedDict(conv=nn.Conv2d(channels, channels, 3, stride=2, padding=1)))


def make_upsampler(channels):
    """Each pixel repeated 2x2, then a convolution: (B, C, H, W) -> (B, C, 2H, 2W)."""
    repeat = nn.Upsample(scale_factor=2.0, mode="nearest")
    return nn.Sequential(OrderedDict(repeat=repeat, conv=nn.Conv2d(channels, channels, 3, padding=1)))


class DownBlock(nn.Module):
    """(Resnet, transformer) x num_layers, then a downsampler unless `last`. Every output is also a skip."""

    def __init__(self, in_channels, out_channels, num_layers, last, cfg):
        super().__init__()
        widths = [in_channels] + [out_channels] * num_layers
        self.resnets = nn.ModuleList([ResnetBlock(a, b, cfg) for a, b in zip(widths, widths[1:])])
        self.attentions = nn.ModuleList([SpatialTransformer(out_channels, not last, cfg) for _ in range(num_layers)])
        self.downsamplers = nn.ModuleList([] if last else [make_downsampler(out_channels)])

    def forward(self, h, t_emb, text_emb):
        """-> h, [skips]."""
        skips = []
        for resnet, attention in zip(self.resnets, self.attentions):
            h = attention(resnet(h, t_emb), text_emb)
            skips.append(h)
        for downsample in self.downsamplers:
            h = downsample(h)
            skips.append(h)
        return h, skips


class MidBlock(nn.Module):
    """Resnet, transformer with self-attention, resnet, all at the lowest resolution."""

    def __init__(self, channels, cfg):
        super().__init__()
        self.attentions = nn.ModuleList([SpatialTransformer(channels, only_cross_attention=False, cfg=cfg)])
        self.resnets = nn.ModuleList([ResnetBlock(channels, channels, cfg) for _ in range(2)])

    def forward(self, h, t_emb, text_emb):
        h = self.attentions[0](self.resnets[0](h, t_emb), text_emb)
        return self.resnets[1](h, t_emb)


class UpBlock(nn.Module):
    """(Concatenate the newest skip, resnet, transformer) for each skip, then an upsampler unless `last`."""

    def __init__(self, in_channels, skip_channels, out_channels, first, last, cfg):
        super().__init__()
        widths = [in_channels] + [out_channels] * (len(skip_channels) - 1)
        self.resnets = nn.ModuleList([ResnetBlock(a + s, out_channels, cfg) for a, s in zip(widths, skip_channels)])
        self.attentions = nn.ModuleList([SpatialTransformer(out_channels, not first, cfg) for _ in skip_channels])
        self.upsamplers = nn.ModuleList([] if last else [make_upsampler(out_channels)])

    def forward(self, h, skips, t_emb, text_emb):
        """Takes its skips off the end of the list `skips`."""
        for resnet, attention in zip(self.resnets, self.attentions):
            h = torch.cat([h, skips.pop()], dim=1)
            h = attention(resnet(h, t_emb), text_emb)
        for upsample in self.upsamplers:
            h = upsample(h)
        return h


class UNetLatent(nn.Module):
    """Predicts the noise eps in z_t (DDPM, section 3.2), or another target.

    z: (B, latent_channels, h, w), h and w divisible by 2^(levels - 1); t_emb: (B, time_dim) from TimeEmbedding;
    text_emb: (B, L, text_dim) -> prediction: shape of z.

    Reads from cfg: latent_channels, latent_size, unet_block_out_channels (one entry per resolution, each a multiple of
    unet_norm_num_groups and num_heads), unet_layers_per_block, unet_norm_num_groups, num_heads, text_dim, time_dim.
    """

    def __init__(self, cfg):
        super().__init__()
        channels, num_layers = cfg.unet_block_out_channels, cfg.unet_layers_per_block
        self.latent_shape = (cfg.latent_channels, cfg.latent_size, cfg.latent_size)
        self.conv_in = nn.Conv2d(cfg.latent_channels, channels[0], 3, padding=1)
        skips = [channels[0]]  # their channels, oldest first

        self.down_blocks = nn.ModuleList()
        for i, (before, width) in enumerate(zip((channels[0], *channels), channels)):
            last = i == len(channels) - 1
            self.down_blocks.append(DownBlock(before, width, num_layers, last, cfg))
            skips += [width] * (num_layers + (not last))

        self.mid_block = MidBlock(channels[-1], cfg)

        self.up_blocks = nn.ModuleList()
        channels = channels[::-1]
        for i, (before, width) in enumerate(zip((channels[0], *channels), channels)):
            first, last = i == 0, i == len(channels) - 1
            skip_channels = [skips.pop() for _ in range(num_layers + 1)]
            self.up_blocks.append(UpBlock(before, skip_channels, width, first, last, cfg))

        self.conv_norm_out = nn.GroupNorm(cfg.unet_norm_num_groups, channels[-1], eps=1e-5)
        self.conv_out = nn.Conv2d(channels[-1], cfg.latent_channels, 3, padding=1)
        for p in self.conv_out.parameters():  # the first prediction is zero, as in DDPM's code
            nn.init.zeros_(p)

    def forward(self, z, t_emb, text_emb):
        h = self.conv_in(z)
        text_emb = text_emb.to(h.dtype)  # once; under autocast each attention would cast it again
        skips = [h]
        for block in self.down_blocks:
            h, new = block(h, t_emb, text_emb)
            skips += new
        h = self.mid_block(h, t_emb, text_emb)
        for block in self.up_blocks:
            h = block(h, skips, t_emb, text_emb)
        return self.conv_out(F.silu(self.conv_norm_out(h)))
