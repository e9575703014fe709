"""Promises of diffusion.py: schedule and targets as in the papers and in diffusers; guidance; sample().

The samplers have their own file, test_samplers.py.
"""

from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler

import vae
from config import SDConfig
from diffusion import (
    add_noise,
    amplitudes,
    baab,
    configured_process,
    decode,
    draw_times,
    drop_captions,
    guided_denoiser,
    held_out_losses,
    make_process,
    noise_source,
    prediction_loss,
    q_sample,
    sample,
    sampling_grid,
    to_x0_eps,
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
    assert baab(dtype=torch.float64)[2][-1].item() == pytest.approx(product, rel=1e-12)  # samplers take 1 - alpha_bar


def test_defaults_of_the_schedule_are_those_of_the_config():
    """The recipe calls baab() without arguments; the numbers must be the ones in config.py."""
    cfg = SDConfig()
    torch.testing.assert_close(baab(), baab(cfg.timesteps, cfg.beta_start, cfg.beta_end), rtol=0, atol=0)


@pytest.mark.parametrize("settings, theirs", [
    ({}, {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}),
    ({"scale_betas": True}, {"beta_schedule": "linear", "beta_start": 5e-4, "beta_end": 0.1}),
])  # fmt: skip
def test_schedules_equal_those_of_diffusers(settings, theirs):
    """Its tables are in single precision, hence the tolerance."""
    ours = baab(200, **settings)[0]
    torch.testing.assert_close(ours, DDPMScheduler(200, **theirs).betas, rtol=1e-4, atol=1e-6)


def test_a_configs_process_has_every_setting_of_its_schedule():
    for settings in ({"scale_betas": True}, {"beta_start": 1e-3, "beta_end": 0.05}):
        process = configured_process(SDConfig(timesteps=100, **settings))
        assert torch.equal(process.alpha_bar, baab(100, dtype=torch.float64, **settings)[2])
        assert process.prediction_type == "epsilon"
    assert configured_process(SDConfig(prediction_type="v_prediction")).prediction_type == "v_prediction"
    assert configured_process(SDConfig(prediction_type="flow")) == ("flow", 200, None)


def test_q_sample_equals_diffusers():
    x0, noise, t = torch.randn(4, 4, 8, 8), torch.randn(4, 4, 8, 8), torch.tensor([0, 50, 120, 199])
    scheduler = DDPMScheduler(200, beta_start=1e-4, beta_end=0.02)
    torch.testing.assert_close(q_sample(x0, t, noise, baab()[2]), scheduler.add_noise(x0, noise, t))


def test_targets_equal_those_of_diffusers():
    x0, noise, t = torch.randn(4, 4, 8, 8), torch.randn(4, 4, 8, 8), torch.tensor([0, 50, 120, 199])
    scheduler = DDPMScheduler(200, beta_start=1e-4, beta_end=0.02)
    z_t, target = add_noise(make_process("v_prediction"), x0, t, noise)
    torch.testing.assert_close(target, scheduler.get_velocity(x0, noise, t))
    torch.testing.assert_close(z_t, q_sample(x0, t, noise, baab()[2]))
    assert torch.equal(add_noise(make_process(), x0, t, noise)[1], noise)


def test_flow_is_a_straight_line_from_data_to_noise():
    """z = (1 - s) x0 + s eps with s = t / T, and the target is its slope (Lipman et al., Liu et al.)."""
    process, x0, noise = make_process("flow", 1000), torch.randn(3, 5), torch.randn(3, 5)
    z_t, target = add_noise(process, x0, torch.tensor([1e-9, 250.0, 1000.0]), noise)
    torch.testing.assert_close(z_t, torch.stack([x0[0], 0.75 * x0[1] + 0.25 * noise[1], noise[2]]))
    torch.testing.assert_close(target, noise - x0)


PROCESSES = [make_process(), make_process("v_prediction"), make_process("flow")]


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: p.prediction_type)
def test_what_is_predicted_leads_back_to_x0_and_noise(process):
    """At every level that sampling visits, from the first, where flow holds no signal at all."""
    x0, noise = torch.randn(2, 20, 5, dtype=torch.float64)
    t, a, b = sampling_grid(process, 20)
    z_t, target = add_noise(process, x0, t, noise)
    for i in range(20):
        found = to_x0_eps(process.prediction_type, target[i], z_t[i], a[i].item(), b[i].item())
        torch.testing.assert_close(torch.stack(found), torch.stack([x0[i], noise[i]]))


@pytest.mark.parametrize("process, bound", [
    (make_process(), 0.5624), (make_process(scale_betas=True), 0.2581), (make_process("v_prediction"), 0.9232),
    (make_process("flow"), 1.579),
])  # fmt: skip
def test_the_loss_of_the_best_white_gaussian_predictor(process, bound):
    """Latents N(0, s^2) with s = 0.908 and all that can be told from z alone, over the times that training draws.

    The recipe's 0.5624 is what a model must beat to have learned anything. Losses of different targets and schedules
    do not compare, each has its own bound.
    """
    s, count = 0.908, 40_000
    cfg = SimpleNamespace(prediction_type=process.prediction_type, timesteps=200, flow_time_mean=0.0)
    t, x0, noise = draw_times(count, cfg), s * torch.randn(count, 16), torch.randn(count, 16)
    z_t, target = add_noise(process, x0, t, noise)
    a, b = (c.float()[:, None] for c in amplitudes(process, t))
    x0_hat, eps_hat = (g * z_t / (a**2 * s**2 + b**2) for g in (a * s**2, b))
    out = {"epsilon": eps_hat, "v_prediction": a * eps_hat - b * x0_hat, "flow": eps_hat - x0_hat}
    loss = prediction_loss(out[process.prediction_type], target)
    assert loss.shape == (count,) and loss.mean().item() == pytest.approx(bound, rel=0.01)


def test_times_to_train_at():
    """All integers 0 .. T-1, or floats in (0, T) with the quartiles of a logit-normal: sigmoid(0.6745) = 0.6625."""
    assert draw_times(500, SDConfig(timesteps=10)).unique().tolist() == list(range(10))
    t = draw_times(40_000, SDConfig(timesteps=10, prediction_type="flow"))
    assert t.min() > 0 and t.max() < 10
    quartiles = t.quantile(torch.tensor([0.25, 0.5, 0.75]))
    torch.testing.assert_close(quartiles, torch.tensor([3.375, 5, 6.625]), rtol=0, atol=0.1)


def test_captions_are_dropped_at_the_rate_asked_for():
    rows, empty = torch.arange(5000), torch.tensor(5000)
    kept = drop_captions(rows, empty, 0.1)
    assert set(kept[kept != rows].tolist()) == {5000} and 400 < (kept == empty).sum() < 600
    assert torch.equal(drop_captions(rows, empty, 0.0), rows)


@pytest.mark.parametrize("num_steps", [0, 201, -1])
def test_steps_out_of_range_are_refused(num_steps):
    with pytest.raises(ValueError, match="1 to 200"):
        sampling_grid(make_process(), num_steps)
    if num_steps < 1:
        with pytest.raises(ValueError, match="1 or more"):
            sampling_grid(make_process("flow"), num_steps)


def test_flow_can_take_more_steps_than_training_has_times():
    assert len(sampling_grid(make_process("flow", 20), 50)[0]) == 50


@pytest.mark.parametrize("num_steps", [1, 7, 50, 200])
def test_sampling_starts_at_the_last_training_step_and_ends_clean(num_steps):
    for process in (make_process(), make_process("flow")):
        t, a, b = sampling_grid(process, num_steps)
        assert t[0] == (200 if process.prediction_type == "flow" else 199) and len(t) == num_steps
        assert (a[-1], b[-1]) == (1, 0) and a.dtype == torch.float64 and (b.diff() < 0).all()
    assert t[-1].item() == pytest.approx(200 / num_steps)


@pytest.fixture
def models(tiny):
    torch.manual_seed(0)
    unet = UNetLatent(tiny)
    torch.nn.init.normal_(unet.conv_out.weight, std=0.05)
    return unet.eval(), AutoencoderKL(tiny).eval(), TimeEmbedding(tiny.time_dim).eval(), WordHashTextEncoder(512, 12)


def test_an_image_depends_on_its_seed_not_on_its_batch(models):
    alone = sample(*models, "a red bus", 5, 1, process=make_process("epsilon", 20), seeds=[7])
    batch = sample(*models, ["a cat", "a red bus", "a dog"], 5, 3, process=make_process("epsilon", 20), seeds=[3, 7, 9])
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
    t, loss = held_out_losses(unet, t_ember, encoder, z, ["a cat"] * 10, make_process("epsilon", 20), 10)
    assert t.tolist() == list(range(1, 21, 2)) and loss.shape == (10,)
    torch.manual_seed(0)
    assert torch.equal(
        loss, held_out_losses(unet, t_ember, encoder, z, ["a cat"] * 10, make_process("epsilon", 20), 10)[1]
    )
    t, _ = held_out_losses(unet, t_ember, encoder, z, ["a cat"] * 10, make_process("flow", 20), 10)
    assert t.tolist() == list(range(1, 21, 2))


class CountingUNet(torch.nn.Module):
    """Says the caption's number, less what z and t say; remembers the size of each batch it is asked."""

    latent_shape = (1, 4, 4)

    def __init__(self):
        super().__init__()
        self.weight, self.asked = torch.nn.Parameter(torch.zeros(())), []

    def forward(self, z, t_emb, text_emb):
        self.asked.append(len(z))
        return text_emb.view(-1, 1, 1, 1) - 0.1 * z - 0.01 * t_emb.view(-1, 1, 1, 1)


def denoiser(unet, num_steps=4, **guidance):
    """Captions are numbers here, the empty one is 0."""

    def encode(prompts):
        return torch.tensor([float(p or 0) for p in prompts])[:, None, None]

    process = make_process()
    t, a, b = sampling_grid(process, num_steps)
    return guided_denoiser(unet, lambda t: t[:, None], encode, ["1", "2"], process, t, **guidance), t


@pytest.mark.parametrize("w", [0.0, 0.5, 3.0])
@pytest.mark.parametrize("negative", ["", "-5"])
def test_guidance_is_uncond_plus_w_times_the_difference(w, negative):
    """One batched call per step; the negative prompt stands where the empty caption was."""
    unet, z = CountingUNet(), torch.randn(2, 1, 4, 4)
    denoise, t = denoiser(unet, scale=w, negative_prompt=negative)
    cond, uncond = (
        c.view(-1, 1, 1, 1) - 0.1 * z - 0.01 * t[1]
        for c in (torch.tensor([1.0, 2.0]), torch.tensor([float(negative or 0)]))
    )
    torch.testing.assert_close(denoise(z, 1)[1], uncond + w * (cond - uncond))
    assert unet.asked == [4]


def test_a_scale_of_1_is_one_unguided_call():
    unet, z = CountingUNet(), torch.randn(2, 1, 4, 4)
    denoise, t = denoiser(unet)
    expected = torch.tensor([1.0, 2.0]).view(-1, 1, 1, 1) - 0.1 * z - 0.01 * t[0]
    torch.testing.assert_close(denoise(z, 0)[1], expected)
    assert unet.asked == [2]


@pytest.mark.parametrize("interval, sizes", [
    ((0.0, 1.0), [4, 4, 4, 4]), ((0.0, 0.5), [2, 2, 4, 4]), ((0.5, 0.75), [2, 4, 2, 2]), ((0.8, 1.0), [4, 2, 2, 2]),
])  # fmt: skip
def test_guidance_acts_within_its_interval_alone(interval, sizes):
    """Four steps at the noise levels 1, 3/4, 1/2, 1/4 of the schedule."""
    unet = CountingUNet()
    denoise, _ = denoiser(unet, scale=2.0, interval=interval)
    for i in range(4):
        denoise(torch.zeros(2, 1, 4, 4), i)
    assert unet.asked == sizes


class ScalingUNet(CountingUNet):
    """The more the caption says, the more it leaves of z: so guidance changes the spread of x0."""

    def forward(self, z, t_emb, text_emb):
        return (0.2 * text_emb.view(-1, 1, 1, 1) + 0.1) * z


@pytest.mark.parametrize("rescale", [0.0, 0.5, 1.0])
def test_rescaled_guidance_has_the_spread_of_the_unguided_x0(rescale):
    z = torch.randn(2, 1, 4, 4)
    plain, guided, found = (
        denoiser(ScalingUNet(), scale=w, rescale=r)[0](z, 1) for w, r in ((1.0, 0.0), (4.0, 0.0), (4.0, rescale))
    )
    spread = [x0.std(dim=(1, 2, 3)) for x0, _ in (plain, guided, found)]
    assert (spread[1] - spread[0]).abs().min() > 0.1
    torch.testing.assert_close(spread[2], spread[1] + rescale * (spread[0] - spread[1]))
    a, b = (c[1].item() for c in sampling_grid(make_process(), 4)[1:])
    torch.testing.assert_close((a * found[0] + b * found[1]).float(), z)  # still the same point z = a x0 + b eps


@pytest.mark.parametrize("wrong, word", [
    ({"guidance_interval": (0.5, 0.2)}, "guidance_interval"), ({"guidance_interval": (0, 2)}, "guidance_interval"),
    ({"negative_prompt": "blurry"}, "guidance_scale"), ({"eta": 0.5}, "eta"), ({"sampler": "ddim", "eta": 2}, "eta"),
    ({"sampler": "euler"}, "ddpm, ddim, dpmpp_2m"), ({"sampler": "ddim", "process": make_process("flow")}, "euler, heun"),
    ({"size": (32, 31)}, "multiples"), ({"seeds": [1]}, "2 samples"),
])  # fmt: skip
def test_arguments_of_sample_that_make_no_sense_are_refused(models, wrong, word):
    with pytest.raises(ValueError, match=word):
        sample(*models, "a cat", 2, 2, **wrong)


@pytest.mark.parametrize("name, process", [
    ("ddim", make_process("epsilon", 20)), ("dpmpp_2m", make_process("epsilon", 20)),
    ("ddpm", make_process("v_prediction", 20)),
    ("euler", make_process("flow", 20)), ("heun", make_process("flow", 20)),
])  # fmt: skip
def test_samples_of_any_shape_guided_by_every_sampler(models, tiny, name, process):
    """Height and width need not be those of training, nor equal; a seed's picture still depends on nothing else."""
    options = dict(process=process, sampler=name, guidance_scale=2.0, negative_prompt="a dog", size=(32, 48))
    x = sample(*models, ["a cat", "a red bus"], 4, 2, seeds=[3, 4], **options)
    assert x.shape == (2, 3, 32, 48) and x.isfinite().all() and x.min() >= 0 and x.max() <= 1
    assert (x[1:] - sample(*models, "a red bus", 4, 1, seeds=[4], **options)).abs().max() < 1e-4


def test_eta_and_the_name_of_the_sampler_reach_the_samplers(models):
    """From the same noise: the samplers differ, and so does ddim with fresh noise from ddim without."""
    choices = ({"sampler": "ddpm"}, {"sampler": "ddim"}, {"sampler": "ddim", "eta": 1.0}, {"sampler": "dpmpp_2m"})
    pictures = [sample(*models, "a cat", 5, 1, seeds=[0], process=make_process("epsilon", 20), **c) for c in choices]
    assert all((x - y).abs().max() > 1e-4 for i, x in enumerate(pictures) for y in pictures[:i])


@pytest.mark.parametrize("name, process, levels", [
    ("ddim", make_process("epsilon", 20), [0, 1, 2, 3]), ("dpmpp_2m", make_process("v_prediction", 20), [0, 1, 2, 3]),
    ("euler", make_process("flow", 20), [0, 1, 2, 3]), ("heun", make_process("flow", 20), [0, 1, 1, 2, 2, 3, 3]),
])  # fmt: skip
def test_whoever_watches_sees_each_guided_x0_and_changes_nothing(models, name, process, levels):
    """The last x0, decoded, is the picture: the last step of these samplers leads there."""
    seen = []
    options = dict(process=process, sampler=name, guidance_scale=2.0, seeds=[3, 4])
    x = sample(*models, "a cat", 4, 2, **options, watch=lambda i, x0: seen.append((i, x0)))
    assert torch.equal(x, sample(*models, "a cat", 4, 2, **options))
    assert [i for i, _ in seen] == levels and {x0.shape for _, x0 in seen} == {(2, *models[0].latent_shape)}
    torch.testing.assert_close(decode(models[1], seen[-1][1]), x)
    assert (decode(models[1], seen[0][1]) - x).abs().max() > 1e-3


def test_pictures_are_decoded_a_bounded_number_of_pixels_at_a_time(models, monkeypatch):
    whole = sample(*models, "a cat", 2, 5, seeds=range(5))
    sizes, decoder = [], models[1].decoder
    monkeypatch.setattr(vae, "MAX_PIXELS_PER_PASS", 2 * 32 * 32)
    decoder.register_forward_hook(lambda module, args, out: sizes.append(len(out)))
    torch.testing.assert_close(sample(*models, "a cat", 2, 5, seeds=range(5)), whole)
    assert sizes == [2, 2, 1]


def test_captions_are_encoded_in_float32_under_autocast(models):
    """As they are for training; bfloat16 would round them."""
    unet, vae, t_embedder, text_encoder = models
    seen = []

    def watched(prompts):
        seen.append(torch.is_autocast_enabled("cpu"))
        return text_encoder(prompts)

    with torch.autocast("cpu", torch.bfloat16):
        sample(unet, vae, t_embedder, watched, "a cat", 2, 1)
    assert seen == [False]
