"""Promises of diffusion.py: the schedule of the recipe, the paper's formulas, the sampler of diffusers."""

import pytest
import torch
from diffusers import DDPMScheduler

from config import SDConfig
from diffusion import (
    baab,
    ddpm,
    held_out_losses,
    noise_prediction_loss,
    noise_source,
    q_sample,
    sample,
    spaced_timesteps,
)
from text_encoder import WordHashTextEncoder
from unet import TimeEmbedding, UNetLatent
from vae import AutoencoderKL


def test_the_schedule_is_the_recipes():
    """Signal left at the last step, computed once by hand in double precision: the product of 200 alphas."""
    beta, alpha, alpha_bar = baab()
    assert (len(beta), beta[0].item(), beta[-1].item()) == (200, pytest.approx(1e-4), pytest.approx(0.02))
    product = 1.0
    for t in range(200):
        product *= 1 - (1e-4 + (0.02 - 1e-4) * t / 199)
    assert alpha_bar[-1].item() == pytest.approx(product, rel=1e-5) == pytest.approx(0.13218, abs=1e-5)
    torch.testing.assert_close(alpha, 1 - beta)


def test_defaults_of_the_schedule_are_those_of_the_config():
    """The recipe calls baab() without arguments; the numbers must be the ones in config.py."""
    cfg = SDConfig()
    torch.testing.assert_close(baab(), baab(cfg.timesteps, cfg.beta_start, cfg.beta_end), rtol=0, atol=0)


def test_q_sample_equals_diffusers():
    x0, noise, t = torch.randn(4, 4, 8, 8), torch.randn(4, 4, 8, 8), torch.tensor([0, 50, 120, 199])
    scheduler = DDPMScheduler(200, beta_start=1e-4, beta_end=0.02)
    torch.testing.assert_close(q_sample(x0, t, noise, baab()[2]), scheduler.add_noise(x0, noise, t))


def test_the_loss_of_the_best_white_gaussian_predictor():
    """Closed form: for x0 ~ N(0, s^2) the least noise-prediction error at t is ab s^2 / (ab s^2 + 1 - ab).

    Averaged over the recipe's schedule with s = 0.908 that is 0.5624: what a model must beat to have learned anything.
    """
    torch.manual_seed(0)
    s, alpha_bar = 0.908, baab()[2]
    x0, t = s * torch.randn(2000, 64), torch.arange(2000) % 200
    noise = torch.randn_like(x0)
    ab = alpha_bar[t, None]
    eps = q_sample(x0, t, noise, alpha_bar) * (1 - ab).sqrt() / (ab * s**2 + 1 - ab)
    assert noise_prediction_loss(eps, noise).mean().item() == pytest.approx(0.5624, abs=0.005)


@pytest.mark.parametrize("num_steps", [200, 50, 10])
def test_ddpm_equals_diffusers_with_the_same_noise(num_steps):
    """fixed_large is sigma_t^2 = beta_t; trailing spacing keeps the last training step.

    Compared at every step, and at the end for 200 steps: with fewer, diffusers adds noise after the last step too.
    """
    scheduler = DDPMScheduler(200, beta_start=1e-4, beta_end=0.02, variance_type="fixed_large", clip_sample=False,
                              timestep_spacing="trailing", steps_offset=0)  # fmt: skip
    scheduler.set_timesteps(num_steps)
    # its coefficients take differences of numbers near 1, which in single precision costs 1e-4 in the last steps
    scheduler.alphas_cumprod = torch.cumprod(1 - scheduler.betas.double(), dim=0)
    scheduler.one = torch.tensor(1.0, dtype=torch.float64)
    weight, alpha_bar = torch.randn(4, 4) / 4, baab()[2]
    ts = spaced_timesteps(num_steps, 200)
    assert ts.tolist() == scheduler.timesteps.tolist()
    start, path = torch.randn(2, 4, 8, 8), []

    def predict_noise(z, t):
        """The ideal predictor of white latents plus something that mixes channels, so that z stays of order 1."""
        path.append(z)
        return z * (1 - alpha_bar[t]).sqrt() + 0.2 * torch.tanh(torch.einsum("bchw,dc->bdhw", z, weight))

    theirs, generator = start, torch.Generator().manual_seed(2)
    for t in scheduler.timesteps:
        theirs = scheduler.step(predict_noise(theirs, t.item()), t, theirs, generator=generator).prev_sample
    generator = torch.Generator().manual_seed(2)
    ours = ddpm(predict_noise, start, ts, alpha_bar, lambda: torch.randn(start.shape, generator=generator))

    difference = (torch.stack(path[:num_steps]) - torch.stack(path[num_steps:])).abs().max()
    assert difference <= 1e-4 and torch.stack(path).std() < 2
    assert num_steps < 200 or (ours - theirs).abs().max() <= 1e-4


def test_ddpm_with_the_ideal_denoiser_gives_the_data():
    """Gaussian data N(0, s^2) and its exact noise predictor: samples have the data's variance."""
    s, alpha_bar = 0.9, baab(200, 5e-4, 0.1)[2]
    generator = torch.Generator().manual_seed(0)

    def predict_noise(z, t):
        return z * (1 - alpha_bar[t]).sqrt() / (alpha_bar[t] * s**2 + 1 - alpha_bar[t])

    z = torch.randn(50_000, 1, generator=generator)
    x0 = ddpm(
        predict_noise, z, spaced_timesteps(200, 200), alpha_bar, lambda: torch.randn(z.shape, generator=generator)
    )
    assert x0.std().item() == pytest.approx(s, rel=0.02) and abs(x0.mean().item()) < 0.02


@pytest.mark.parametrize("num_steps", [0, 201, -1])
def test_steps_out_of_range_are_refused(num_steps):
    with pytest.raises(ValueError, match="1 to 200"):
        spaced_timesteps(num_steps, 200)


@pytest.fixture
def models(tiny):
    torch.manual_seed(0)
    unet = UNetLatent(tiny)
    torch.nn.init.normal_(unet.conv_out.weight, std=0.05)
    return unet.eval(), AutoencoderKL(tiny).eval(), TimeEmbedding(tiny.time_dim).eval(), WordHashTextEncoder(512, 12)


def test_an_image_depends_on_its_seed_not_on_its_batch(models):
    alone = sample(*models, "a red bus", 5, 1, alpha_bar=baab(20)[2], seeds=[7])
    batch = sample(*models, ["a cat", "a red bus", "a dog"], 5, 3, alpha_bar=baab(20)[2], seeds=[3, 7, 9])
    assert (alone[0] - batch[1]).abs().max() < 1e-5
    assert (batch[0] - batch[1]).abs().max() > 1e-3


def test_samples_are_pictures(models, tiny):
    x = sample(*models, "a cat", 200, 2)
    assert x.shape == (2, 3, tiny.image_size, tiny.image_size) and x.min() >= 0 and x.max() <= 1 and not x.requires_grad


def test_noise_of_a_seed_does_not_depend_on_its_neighbours():
    a, b = noise_source((4, 2, 2), 2, "cpu", [5, 6]), noise_source((4, 2, 2), 1, "cpu", [6])
    for _ in range(3):
        assert torch.equal(a()[1], b()[0])


def test_held_out_losses_spread_the_timesteps(models, tiny):
    unet, _, t_ember, encoder = models
    z = torch.randn(10, *unet.latent_shape)
    torch.manual_seed(0)
    t, loss = held_out_losses(unet, t_ember, encoder, z, ["a cat"] * 10, baab(20)[2], batch_size=10)
    assert t.tolist() == list(range(0, 20, 2)) and loss.shape == (10,)
    torch.manual_seed(0)
    assert torch.equal(loss, held_out_losses(unet, t_ember, encoder, z, ["a cat"] * 10, baab(20)[2], batch_size=10)[1])
