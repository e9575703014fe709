"""Promises of config.py: defaults once, rules that name the flag and the remedy, presets that state what differs."""

import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
import settings_page
from conftest import ROOT

from config import FINETUNING_PRESETS, LARGEST, PRESETS, VAE_PRESETS, SDConfig
from support.errors import UserError
from support.flags import GUIDANCE

RECIPE = {
    "image_size": 128,
    "max_images": 40_000,
    "latent_channels": 4,
    "block_out_channels": (64, 128, 256, 256),
    "beta": 1e-5,
    "batch_size": 32,
    "num_epochs": 15,
    "lr": 1e-4,
    "timesteps": 200,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "scale_betas": False,
    "prediction_type": "epsilon",
    "caption_dropout": 0.0,
    "weight_decay": 1e-4,
    "ema_decay": 0.9999,
    "lr_schedule": "cosine",
    "text_encoder": "clip",
}


def test_the_coco_preset_is_the_recipe():
    cfg = SDConfig(**PRESETS["coco"])
    assert {name: getattr(cfg, name) for name in RECIPE} == RECIPE
    assert cfg.latent_size == 16


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_states_only_what_differs(name):
    preset = SDConfig(**PRESETS[name])
    vae = replace(preset, **VAE_PRESETS[name])
    finetuning = FINETUNING_PRESETS.get(name, {})
    for cfg, changes in ((SDConfig(), PRESETS[name]), (preset, VAE_PRESETS[name]), (vae, finetuning)):
        assert not [k for k, v in changes.items() if v == getattr(cfg, k)]


def test_every_field_is_read_by_some_module():
    modules = [p for folder in (".", "support") for p in Path(ROOT, folder).glob("*.py") if p.name != "config.py"]
    source = "".join(p.read_text() for p in modules)
    unread = [f.name for f in fields(SDConfig) if not re.search(rf"(cfg|c|cfg.\])\.{f.name}\b", source)]
    assert set(unread) <= set(GUIDANCE)  # which sampling_options() hands on by name


def test_larger_pictures_have_as_much_kl_per_pixel():
    """The KL is a sum over the latent and the MSE a mean over pixels, so beta goes with the size of the latent."""
    for name in ("coco", "coco64", "coco256", "coco512"):
        cfg = SDConfig(**PRESETS[name] | VAE_PRESETS[name])
        assert cfg.beta * cfg.latent_channels * cfg.latent_size**2 == pytest.approx(1e-5 * 4 * 16 * 16)


def test_flow_does_not_mind_what_betas_it_does_not_have_would_do():
    assert SDConfig(prediction_type="flow", timesteps=20_000).timesteps == 20_000
    with pytest.raises(UserError, match="beta_end"):
        SDConfig(timesteps=20_000)


# one for each rule, and for each way to ask for too much
WRONG = [
    ({"scale_betas": True, "timesteps": 20}, "--scale_betas: .*more --timesteps"),
    ({"prediction_type": "flow", "beta_start": 1e-3}, "--beta_start: flow"),
    ({"prediction_type": "flow", "beta_end": 0.1}, "--beta_end: flow"),
    ({"prediction_type": "flow", "scale_betas": True}, "--scale_betas: flow"),
    (PRESETS["demo"] | {"beta_end": 0.1}, "--beta_end: .*--prediction_type epsilon"),
    ({"beta_start": 0.5}, "--beta_start: .*noise must grow"),
    ({"timesteps": 1000, "beta_end": 0.999}, "--beta_end: .*fewer --timesteps"),
    ({"timesteps": 100_000}, "--beta_end"),
    ({"sample_steps": 201}, "--sample_steps: .*200"),
    ({"guidance_scale": 2.0}, "--guidance_scale: .*--caption_dropout"),
    (PRESETS["demo"] | {"caption_dropout": 0.0}, "--guidance_scale: .*--caption_dropout"),
    ({"guidance_interval": (0.8, 0.2)}, "--guidance_interval: 0.8 0.2.*rising"),
    ({"guidance_interval": (0.8,)}, "--guidance_interval: .*two"),
    ({"guidance_interval": (0.0, 1.1)}, "--guidance_interval"),
    ({"held_out_combinations": 5}, "--held_out_combinations: .*--dataset scenes"),
    ({"time_dim": 100}, "--time_dim: .*multiple of 8"),
    ({"time_dim": 256}, "--time_dim: .*--time_dim 512"),
    ({"norm_num_groups": 7}, "--block_out_channels: .*norm_num_groups"),
    ({"unet_norm_num_groups": 5}, "--unet_block_out_channels: .*unet_norm_num_groups"),
    ({"num_heads": 5}, "--unet_block_out_channels: .*num_heads"),
    ({"image_size": 100}, "--image_size: 100 .*multiple of 32"),
    ({"random_scale": True}, "--random_scale: .*--random_crop"),
    ({"random_crop": 200}, "--random_crop: .*at most 128"),
    (
        {"block_out_channels": (32,) * 4, "image_size": 8, "unet_block_out_channels": (128,)},
        "--norm_num_groups: .*1 x 1",
    ),
    (
        {"image_size": 32, "unet_block_out_channels": (16, 16, 32), "time_dim": 64},
        "--unet_norm_num_groups: .*1 x 1",
    ),
    (
        {"ms_ssim_weight": 0.5, "image_size": 8, "block_out_channels": (64,), "unet_block_out_channels": (128,)},
        "--ms_ssim",
    ),
    ({"caption_dropout": 1.5}, "--caption_dropout: .*1 or less"),
    ({"batch_size": 0}, "--batch_size: 0 .*1 or more"),
    ({"lr": float("nan")}, "--lr: nan .*finite"),
    ({"lr": 10**400}, "--lr: is out of range; give 1000000000 or less"),
    ({"lr_schedule": "linear"}, "--lr_schedule: 'linear' is not a choice; choose from cosine, constant"),
    ({"sample_prompts": ()}, "--sample_prompts: is empty"),
    ({"compile": "yes"}, "--compile: 'yes' is of the wrong type; give a bool"),
    ({"seed": None}, "--seed: None is of the wrong type"),
    ({"guidance_interval": (None, 1.0)}, r"--guidance_interval: \(None, 1.0\) is of the wrong type; give a float"),
    ({"sample_prompts": "a cat"}, "--sample_prompts: 'a cat' is of the wrong type"),
    ({"timesteps": 0}, "--timesteps"),
]


@pytest.mark.parametrize("settings, message", WRONG)
def test_settings_that_make_no_sense_are_refused_with_a_remedy(settings, message):
    with pytest.raises(UserError, match=message) as e:
        SDConfig(**settings)
    assert ";" in str(e.value)


RIGHT = [
    {"scale_betas": True},
    {"scale_betas": True, "timesteps": 1000},
    {"prediction_type": "v_prediction"},
    {"prediction_type": "v_prediction", "scale_betas": True},
    {"prediction_type": "flow", "sample_steps": 1000},
    {"guidance_scale": 2.0, "caption_dropout": 0.1},
    {"guidance_interval": (0.5, 0.5)},
    {"random_crop": 384, "random_scale": True},
    {"held_out_combinations": 240, "dataset": "scenes"},
    {"lr": 1},
    {"compile": None, "num_workers": None},
]


@pytest.mark.parametrize("settings", RIGHT)
def test_settings_that_go_together(settings):
    SDConfig(**settings)


def test_the_largest_numbers_are_taken():
    assert SDConfig(max_images=LARGEST, seed=2**32 - 1).max_images == LARGEST


def test_the_page_of_settings_is_up_to_date():
    """If not: python tests/settings_page.py > docs/settings.md."""
    assert (Path(__file__).parent.parent / "docs/settings.md").read_text() == settings_page.page()


def test_the_page_of_settings_has_every_field_and_every_group():
    settings, presets = settings_page.page().split("## Presets")
    assert re.findall(r"^\| `(\w+)` \|", settings, re.MULTILINE) == [f.name for f in fields(SDConfig)]
    assert re.findall(r"^\| `(\w+)` \|", presets, re.MULTILINE) == [*PRESETS, *FINETUNING_PRESETS]
    assert len(settings_page.groups()) == 7
