"""Promises of edit.py: strength and masks, their ends to the bit, and the way between them against diffusers."""

import pytest
import torch
from conftest import TINY, randomize
from diffusers import DDIMScheduler

from config import SDConfig
from diffusion import decode, make_process, noise_source, sample
from edit import between_prompts, between_seeds, from_picture, latent_mask
from samplers import SAMPLERS
from text_encoder import WordHashTextEncoder
from unet import TimeEmbedding, UNetLatent
from vae import AutoencoderKL

T, STEPS = 20, 5
EPSILON, FLOW = make_process("epsilon", T), make_process("flow", T)
KINDS = {
    "ddpm": {"process": EPSILON, "sampler": "ddpm"},
    "ddim": {"process": EPSILON, "sampler": "ddim"},
    "ddim with noise": {"process": EPSILON, "sampler": "ddim", "eta": 1.0},
    "dpmpp_2m": {"process": EPSILON, "sampler": "dpmpp_2m"},
    "euler": {"process": FLOW, "sampler": "euler"},
    "heun": {"process": FLOW, "sampler": "heun"},
}
every_sampler = pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)


@pytest.fixture(scope="module")
def models():
    cfg = SDConfig(**TINY)
    nets = [randomize(m) for m in (UNetLatent(cfg), AutoencoderKL(cfg), TimeEmbedding(cfg.time_dim))]
    return *nets, WordHashTextEncoder(cfg.text_dim, cfg.text_length)


@pytest.fixture(scope="module")
def z0(models):
    return torch.randn(models[0].latent_shape, generator=torch.Generator().manual_seed(9))


@pytest.fixture
def draw(models):
    """draw(options, edit) -> two pictures of a prompt."""

    def pictures(options, edit=None, prompt="a cat", seeds=(3, 4), **more):
        return sample(*models, prompt, STEPS, 2, guidance_scale=2.0, seeds=seeds, **options, edit=edit, **more)

    return pictures


def edit_of(z0, strength, repaint):
    return lambda sampler: from_picture(sampler, z0, strength, repaint)


def half(z0):
    """Repaints the left half."""
    return (torch.arange(z0.shape[2]) < z0.shape[2] // 2).expand(z0.shape[1:])


ALL, NOTHING = torch.tensor(True), torch.tensor(False)

# ---- Pictures and masks ----


@every_sampler
def test_strength_0_and_an_empty_mask_give_the_reconstruction(models, z0, draw, options):
    expected = decode(models[1], z0.expand(2, -1, -1, -1))
    for strength, repaint in ((0, ALL), (0, half(z0)), (0.6, NOTHING), (1, NOTHING)):
        assert torch.equal(draw(options, edit_of(z0, strength, repaint)), expected)


@every_sampler
def test_strength_1_and_a_full_mask_give_the_bits_of_plain_sampling(z0, draw, options):
    full = torch.ones(z0.shape[1:], dtype=torch.bool)
    assert torch.equal(draw(options, edit_of(z0, 1.0, full)), draw(options))
    some = draw(options, edit_of(z0, 0.6, ALL))
    assert torch.equal(draw(options, edit_of(z0, 0.6, full)), some)
    assert (some - draw(options)).abs().max() > 1e-3 and (some - draw(options, edit_of(z0, 0, full))).abs().max() > 1e-3


def their_loop(models, z0, noise, scheduler, start, steps, repaint):
    """diffusers' way, as its inpainting pipelines go it for plain U-Nets: after each step the kept part is put back."""
    unet, vae, t_embedder, text_encoder = models
    text = text_encoder(["a cat", "", "a cat", ""])
    z = scheduler.add_noise(z0, noise, steps[start : start + 1]) if start else noise
    for i, t in list(enumerate(steps))[start:]:
        known = scheduler.add_noise(z0, noise, steps[i : i + 1])
        z = torch.where(repaint, z, known)
        out = unet(z.repeat_interleave(2, dim=0), t_embedder(t[None].float()).expand(4, -1), text)
        cond, uncond = out[::2], out[1::2]
        z = scheduler.step(uncond + 2.0 * (cond - uncond), t, z).prev_sample
    return decode(vae, torch.where(repaint, z, z0))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("strength, start", [(0.2, 4), (0.6, 2), (0.69, 2), (0.8, 1), (1.0, 0)])
def test_ddim_from_a_picture_equals_diffusers(models, z0, draw, strength, start, masked):
    repaint = half(z0) if masked else ALL
    scheduler = DDIMScheduler(T, beta_start=1e-4, beta_end=0.02, clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(STEPS)
    noise = noise_source(z0.shape, 2, "cpu", (3, 4))()
    with torch.no_grad():
        theirs = their_loop(models, z0, noise, scheduler, start, scheduler.timesteps, repaint)
    torch.testing.assert_close(draw(KINDS["ddim"], edit_of(z0, strength, repaint)), theirs, atol=1e-4, rtol=0)


@every_sampler
def test_the_model_sees_the_picture_at_the_noise_of_each_level(models, z0, options):
    """In the kept part z is a z0 + b eps, by the definition of the process; what is repainted is the sampler's own."""
    process, seen, repaint = options["process"], [], half(z0)
    n, b = STEPS, torch.linspace(0.9, 0, STEPS + 1, dtype=torch.float64)
    a = 1 - b if process is FLOW else (1 - b**2).sqrt()
    noise = torch.randn(2, *z0.shape)

    def denoise(z, i):
        seen.append((i, z))
        return 0.5 * z, 0.5 * z.flip(-1)

    edited = from_picture(SAMPLERS[options["sampler"]], z0, 0.6, repaint)
    z = edited(denoise, noise, a, b, lambda: torch.randn_like(noise))
    assert [i for i, _ in seen] == ([2, 3, 3, 4, 4] if options["sampler"] == "heun" else [2, 3, 4])
    for i, z_i in seen:
        expected = (a[i] * z0 + b[i] * noise).float()
        torch.testing.assert_close(z_i[..., ~repaint], expected[..., ~repaint])
        assert i == n - 3 or (z_i - expected)[..., repaint].abs().min() > 0
    assert torch.equal(z[..., ~repaint], z0[:, ~repaint].expand(2, -1, -1)) and (z - z0)[..., repaint].abs().min() > 0


def test_a_place_is_repainted_if_any_of_its_pixels_is(z0):
    white = torch.zeros(32, 32, dtype=torch.bool)
    factor = 32 // z0.shape[1]
    assert not latent_mask(white, z0).any()
    white[factor, 2 * factor - 1] = True
    found = latent_mask(white, z0)
    assert found.shape == z0.shape[1:] and found.nonzero().tolist() == [[1, 1]]
    assert latent_mask(torch.ones(32, 32), z0).all()


# ---- Interpolation ----


@every_sampler
def test_the_ends_between_two_seeds_have_the_bits_of_plain_sampling(draw, options):
    """Fresh noise within the sampling too."""
    found = draw(options, lambda s: between_seeds(s, [7, 7], torch.tensor([0.0, 1.0])), seeds=(3, 3))
    plain = draw(options, seeds=(3, 7))
    assert torch.equal(found, plain)
    between = draw(options, lambda s: between_seeds(s, [7, 7], torch.tensor([0.3, 0.7])), seeds=(3, 3))
    assert (between - plain).abs().amax(dim=(1, 2, 3)).min() > 1e-4


def test_noise_between_two_seeds_is_noise():
    """Of variance 1 all the way, equally near to both in the middle."""
    x, y = (noise_source((4, 64, 64), 1, "cpu", [seed])().expand(5, -1, -1, -1) for seed in (3, 7))
    u = torch.linspace(0, 1, 5)
    found = between_seeds(lambda denoise, z, a, b, draw_noise: z, [7] * 5, u)(None, x, None, None, None)
    assert torch.equal(found[0], x[0]) and torch.equal(found[-1], y[0])
    assert (found.var(dim=(1, 2, 3)) - 1).abs().max() < 0.05
    torch.testing.assert_close(found[2], (x[0] + y[0]) / 2**0.5)
    to_x, to_y = ((found * end).mean(dim=(1, 2, 3)) for end in (x, y))
    assert (to_x.diff() < 0).all() and (to_y.diff() > 0).all()


def test_the_ends_between_two_prompts_have_the_bits_of_plain_sampling(models, draw):
    encoder, options = models[3], KINDS["ddpm"]
    ends = between_prompts(encoder, "a cat", "a red bus at night", torch.tensor([0.0, 1.0]))
    assert torch.equal(draw(options, prompt=ends), draw(options, prompt=["a cat", "a red bus at night"]))
    middle = between_prompts(encoder, "a cat", "a red bus at night", torch.tensor([0.5]))
    torch.testing.assert_close(middle[0], encoder(["a cat", "a red bus at night"]).mean(dim=0))


def test_a_way_may_lead_from_a_picture(z0, draw):
    """Both edits at once, as sample.py takes them: between the seeds, each with the picture."""
    options = KINDS["ddim"]

    def both(sampler):
        return between_seeds(from_picture(sampler, z0, 0.6, ALL), [7, 7], torch.tensor([0.0, 1.0]))

    assert torch.equal(draw(options, both, seeds=(3, 3)), draw(options, edit_of(z0, 0.6, ALL), seeds=(3, 7)))
