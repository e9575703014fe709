"""Promises of unet.py: diffusers' names and numbers, and for each size of the presets the models that fit together.

diffusers is the independent oracle: the same weights, loaded strictly both ways, must give the same output.
"""

import math

import pytest
import torch
from conftest import randomize
from diffusers import UNet2DConditionModel as TheirUNet
from test_vae import TOLERANCE

from config import PRESETS, SDConfig
from unet import TimeEmbedding, UNetLatent, attend
from vae import AutoencoderKL


def their_unet(cfg):
    n = len(cfg.unet_block_out_channels)
    return TheirUNet(
        sample_size=cfg.latent_size, in_channels=cfg.latent_channels, out_channels=cfg.latent_channels,
        down_block_types=["CrossAttnDownBlock2D"] * n, up_block_types=["CrossAttnUpBlock2D"] * n,
        only_cross_attention=[True] * (n - 1) + [False], block_out_channels=cfg.unet_block_out_channels,
        layers_per_block=cfg.unet_layers_per_block, norm_num_groups=cfg.unet_norm_num_groups,
        cross_attention_dim=cfg.text_dim, attention_head_dim=cfg.num_heads, use_linear_projection=True,
        time_embedding_dim=cfg.time_dim,
    ).eval()  # fmt: skip


def test_unet_equals_diffusers_with_the_same_weights(preset):
    ours, t_ember, theirs = randomize(UNetLatent(preset)), randomize(TimeEmbedding(preset.time_dim)), their_unet(preset)
    merged = ours.state_dict() | {f"time_embedding.{k}": v for k, v in t_ember.state_dict().items()}
    theirs.load_state_dict(merged, strict=True)
    back = theirs.state_dict()
    t_ember.load_state_dict(
        {k.removeprefix("time_embedding."): back.pop(k) for k in list(back) if "time_embedding" in k}
    )
    ours.load_state_dict(back, strict=True)
    z = torch.randn(3, *ours.latent_shape)
    t = torch.tensor([0, 7, preset.timesteps - 1])
    text_emb = torch.randn(3, preset.text_length, preset.text_dim)
    with torch.no_grad():
        assert (ours(z, t_ember(t), text_emb) - theirs(z, t, text_emb).sample).abs().max() <= TOLERANCE


def test_the_recipes_sizes():
    cfg = SDConfig(**PRESETS["coco"])
    vae, unet, t_ember = AutoencoderKL(cfg), UNetLatent(cfg), TimeEmbedding(cfg.time_dim)
    with torch.no_grad():
        mu, log_var = vae.encode(torch.zeros(1, 3, 128, 128))
        assert mu.shape == log_var.shape == (1, 4, 16, 16)
        assert vae.decoder(mu).shape == (1, 3, 128, 128)
        assert len(vae(torch.zeros(1, 3, 128, 128))) == 3
    parameters = sum(p.numel() for m in (unet, t_ember) for p in m.parameters())
    assert 20.5e6 <= parameters <= 21.5e6


SIZES = {"coco64": (64, 4, 16), "coco": (128, 4, 16), "coco256": (256, 4, 32), "coco512": (512, 16, 32)}


@pytest.mark.parametrize("name", SIZES)
def test_each_size_has_the_levels_that_fit(name):
    """Shapes through whole models on the meta device: latents of 16 or 32, U-Nets of 21M parameters down to 4 or 8."""
    size, channels, side = SIZES[name]
    cfg = SDConfig(**PRESETS[name])
    assert (cfg.image_size, cfg.latent_channels, cfg.latent_size) == SIZES[name]
    with torch.device("meta"), torch.no_grad():
        vae, unet, t_ember = AutoencoderKL(cfg), UNetLatent(cfg), TimeEmbedding(cfg.time_dim)
        mu, log_var, x_hat = vae(torch.empty(2, 3, size, size))
        seen = []
        unet.mid_block.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[-1]))
        eps = unet(mu, t_ember(torch.zeros(2)), torch.empty(2, cfg.text_length, cfg.text_dim))
    assert mu.shape == log_var.shape == eps.shape == (2, channels, side, side) and x_hat.shape == (2, 3, size, size)
    assert seen == [side // 4]
    assert 20.5e6 <= sum(p.numel() for m in (unet, t_ember) for p in m.parameters()) <= 21.5e6
    assert 3 * size**2 / mu[0].numel() == (12 if name == "coco64" else 48)


def test_the_unet_starts_by_predicting_nothing():
    """Zero-initialised output: the first loss is that of the zero prediction, whatever the input."""
    cfg = SDConfig(**PRESETS["demo"])
    with torch.no_grad():
        eps = UNetLatent(cfg)(
            torch.randn(2, *(cfg.latent_channels, 16, 16)), torch.randn(2, cfg.time_dim), torch.randn(2, 5, 512)
        )
    assert eps.abs().max() == 0


def test_the_caption_reaches_the_prediction(tiny):
    unet = randomize(UNetLatent(tiny))
    z, t_emb = torch.randn(2, *unet.latent_shape), torch.randn(2, tiny.time_dim)
    with torch.no_grad():
        a, b = (unet(z, t_emb, torch.randn(2, 5, tiny.text_dim)) for _ in range(2))
    assert (a - b).abs().max() > 1e-3


def test_attention_in_bfloat16_is_that_in_float32():
    """A CPU takes it by products of its own in bfloat16: values and gradients against PyTorch's kernel in float32."""
    torch.manual_seed(0)
    q, k, v, g = (torch.randn(2, 4, n, 32) for n in (64, 77, 77, 64))
    results = []
    for kernel, dtype in ((torch.nn.functional.scaled_dot_product_attention, torch.float32), (attend, torch.bfloat16)):
        inputs = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        h = kernel(*inputs)
        results.append([h, *torch.autograd.grad(h, inputs, g.to(dtype))])
    for exact, ours in zip(*results):
        assert (ours.float() - exact).norm() <= 0.01 * exact.norm()


def test_time_embedding_starts_from_cosines_and_sines():
    """At t = 0 every cosine is 1 and every sine 0; the first frequency is 1 radian per step."""
    t_ember = TimeEmbedding(64)
    seen = []
    t_ember.linear_1.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    t_ember(torch.tensor([0, 3]))
    assert torch.equal(seen[0][0], torch.tensor([1.0] * 8 + [0.0] * 8))
    assert seen[0][1, 0].item() == pytest.approx(math.cos(3), abs=1e-6)
    assert seen[0][1, 8].item() == pytest.approx(math.sin(3), abs=1e-6)
