"""Promises of vae.py: diffusers' names and numbers, the papers' losses, statistics of the latents.

diffusers is the independent oracle: the same weights, loaded strictly both ways, must give the same output.
"""

import math

import pytest
import torch
from conftest import TINY, randomize
from diffusers import AutoencoderKL as TheirVAE

from config import SDConfig, UserError
from similarity import mean_ssim, ms_ssim, octave_energies
from vae import (
    AutoencoderKL,
    Upsample,
    convolve_repeated,
    held_out_figures,
    pictures_per_pass,
    reparameterize,
    vae_loss,
)

TOLERANCE = 1e-4


def their_vae(cfg):
    n = len(cfg.block_out_channels)
    return TheirVAE(
        down_block_types=["DownEncoderBlock2D"] * n, up_block_types=["UpDecoderBlock2D"] * n,
        block_out_channels=cfg.block_out_channels, layers_per_block=cfg.layers_per_block,
        latent_channels=cfg.latent_channels, norm_num_groups=cfg.norm_num_groups,
        use_quant_conv=False, use_post_quant_conv=False,
    ).eval()  # fmt: skip


def test_vae_equals_diffusers_with_the_same_weights(preset):
    ours, theirs = randomize(AutoencoderKL(preset)), their_vae(preset)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.rand(2, 3, preset.image_size, preset.image_size) * 2 - 1
    with torch.no_grad():
        mu, log_var = ours.encode(x)
        posterior = theirs.encode(x).latent_dist
        assert (mu - posterior.mean).abs().max() <= TOLERANCE
        assert (log_var - posterior.logvar).abs().max() <= TOLERANCE
        assert (ours.decoder(mu) - theirs.decode(mu).sample).abs().max() <= TOLERANCE


def test_a_vae_of_five_levels_equals_diffusers():
    """What coco512 has and no other preset, at a few channels."""
    cfg = SDConfig(image_size=64, block_out_channels=(8, 8, 16, 16, 16), latent_channels=16, norm_num_groups=4)
    ours, theirs, x = randomize(AutoencoderKL(cfg)), their_vae(cfg), torch.randn(1, 3, 64, 64)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    with torch.no_grad():
        mu = ours.encode(x)[0]
        assert mu.shape == (1, 16, 4, 4) and (mu - theirs.encode(x).latent_dist.mean).abs().max() <= TOLERANCE
        assert (ours.decoder(mu) - theirs.decode(mu).sample).abs().max() <= TOLERANCE


@pytest.mark.parametrize("size", [(1, 1), (5, 6)])
def test_a_convolution_of_repeated_pixels_needs_four_ninths_of_the_products(size):
    """The same result and gradients as PyTorch's interpolation and convolution give, up to rounding."""
    block, x = Upsample(6).double(), torch.randn(2, 6, *size, dtype=torch.double, requires_grad=True)
    repeated = torch.nn.functional.interpolate(x, scale_factor=2.0, mode="nearest")
    expected, found = block.conv(repeated), convolve_repeated(x, block.conv.weight, block.conv.bias)
    torch.testing.assert_close(found, expected)
    wanted = (x, *block.parameters())
    for a, b in zip(*(torch.autograd.grad(y.pow(3).sum(), wanted) for y in (found, expected))):
        torch.testing.assert_close(a, b)


def test_only_training_in_the_usual_layout_adds_weights_up_first():
    """Elsewhere the bits stay those of PyTorch's own layers: in channels_last, and wherever pictures are decoded."""
    block, x = Upsample(8), torch.randn(2, 8, 8, 8)
    plain = block.conv(torch.nn.functional.interpolate(x, scale_factor=2.0, mode="nearest"))
    with torch.no_grad():
        assert torch.equal(block(x), plain)
    assert not torch.equal(block(x), plain)
    block.to(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    repeated = torch.nn.functional.interpolate(x, scale_factor=2.0, mode="nearest")
    assert torch.equal(block(x), block.conv(repeated))


def test_vae_loss_is_the_papers():
    """Against torch.distributions: KL summed over a latent, averaged over the batch; MSE averaged over pixels."""
    mu, log_var = torch.randn(5, 4, 3, 3), torch.randn(5, 4, 3, 3)
    x, x_hat = torch.randn(5, 3, 8, 8), torch.randn(5, 3, 8, 8)
    normal = torch.distributions.Normal
    kl = torch.distributions.kl_divergence(normal(mu, (0.5 * log_var).exp()), normal(0.0, 1.0)).flatten(1).sum(1).mean()
    mse = ((x - x_hat) ** 2).mean()
    loss, our_mse, our_kl = vae_loss(x, mu, log_var, x_hat, beta=0.01)
    torch.testing.assert_close((loss, our_mse, our_kl), (mse + 0.01 * kl, mse, kl))


def test_reparameterize_draws_from_the_posterior():
    torch.manual_seed(0)
    z = reparameterize(torch.full((200_000,), 3.0), torch.full((200_000,), 2 * math.log(0.5)))
    assert z.mean().item() == pytest.approx(3.0, abs=0.01) and z.std().item() == pytest.approx(0.5, abs=0.01)


def test_held_out_figures_against_a_direct_computation(tiny):
    vae = randomize(AutoencoderKL(tiny))
    x = torch.rand(6, 3, 32, 32) * 2 - 1
    torch.manual_seed(1)
    figures = held_out_figures(vae, [x])
    torch.manual_seed(1)
    with torch.no_grad():
        z = reparameterize(*vae.encode(x))
        mse = ((vae.decoder(z) - x) ** 2).mean().item()
    assert figures["mse"] == pytest.approx(mse, rel=1e-5)
    assert figures["psnr_db"] == pytest.approx(10 * math.log10(4 / mse), rel=1e-5)
    assert figures["latent_mean"] == pytest.approx(z.mean().item(), abs=1e-5)
    assert figures["latent_std"] == pytest.approx(z.std(correction=0).item(), rel=1e-4)
    assert figures["latent_std_2"] == pytest.approx(z[:, 2].std(correction=0).item(), rel=1e-4)
    x_hat = vae.decoder(z).detach()
    kept = octave_energies(x_hat.clamp(-1, 1)) / octave_energies(x)
    assert [figures[f"octave_{k}"] for k in (1, 2, 3)] == pytest.approx(kept.tolist(), rel=1e-5)
    assert figures["ssim"] == pytest.approx(mean_ssim(x_hat, x).item(), abs=1e-5)
    assert held_out_figures(vae, [torch.full((1, 3, 32, 32), 0.5)])["octave_1"] is None


def test_a_pass_holds_as_many_pixels_at_most_as_32_pictures_of_128():
    assert [pictures_per_pass(side**2) for side in (32, 128, 256, 512, 4096)] == [32, 32, 8, 2, 1]


# ---- L1 and MS-SSIM ----


def test_the_weighted_terms_are_added_to_the_loss():
    mu, log_var, x, x_hat = (*torch.randn(2, 1, 4, 2, 2), *torch.rand(2, 1, 3, 16, 16))
    plain = vae_loss(x, mu, log_var, x_hat, 0.1)[0]
    both = vae_loss(x, mu, log_var, x_hat, 0.1, l1_weight=0.5, ms_ssim_weight=0.25)[0]
    expected = 0.5 * (x - x_hat).abs().mean() + 0.25 * (1 - ms_ssim((x + 1) / 2, (x_hat + 1) / 2))
    assert (both - plain).item() == pytest.approx(expected.item(), abs=1e-6)


def test_pictures_smaller_than_the_window_are_refused():
    with pytest.raises(UserError, match="--ms_ssim_weight.*11 pixels"):
        SDConfig(**TINY | {"image_size": 8, "ms_ssim_weight": 0.1})
    SDConfig(**TINY | {"image_size": 16, "ms_ssim_weight": 0.1})
