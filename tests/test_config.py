"""Promises of config.py: defaults once, flags from fields, mistakes answered in one line with exit code 2."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
from conftest import ROOT, assert_one_line_error, run_script

from config import LARGEST, PRESETS, VAE_PRESETS, SDConfig, UserError, parse_training_args

RECIPE = {
    "image_size": 128, "max_images": 40_000, "latent_channels": 4, "block_out_channels": (64, 128, 256, 256),
    "beta": 1e-5, "batch_size": 32, "num_epochs": 15, "lr": 1e-4, "timesteps": 200, "beta_start": 1e-4,
    "beta_end": 0.02, "beta_schedule": "linear", "scale_betas": False, "rescale_betas_zero_snr": False,
    "prediction_type": "epsilon", "min_snr_gamma": 0.0, "caption_dropout": 0.0, "weight_decay": 1e-4, "ema_decay": 0.9999, "lr_schedule": "cosine", "text_encoder": "clip",
}  # fmt: skip


def test_the_coco_preset_is_the_recipe():
    cfg = SDConfig(**PRESETS["coco"])
    assert {name: getattr(cfg, name) for name in RECIPE} == RECIPE
    assert cfg.latent_size == 16


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_states_only_what_differs(name):
    preset = SDConfig(**PRESETS[name])
    for cfg, changes in ((SDConfig(), PRESETS[name]), (preset, VAE_PRESETS[name])):
        assert not [k for k, v in changes.items() if v == getattr(cfg, k)]


def test_every_field_is_read_by_some_module():
    source = "".join(p.read_text() for p in Path(ROOT).glob("*.py") if p.name != "config.py")
    source += (ROOT / "config.py").read_text().split("def __post_init__")[1]
    unread = [f.name for f in fields(SDConfig) if not re.search(rf"cfg\.{f.name}\b|self\.{f.name}\b", source)]
    assert not unread


def test_config_imports_no_torch():
    """A mistyped flag is answered without waiting for torch."""
    assert "torch" not in re.findall(r"^(?:import|from) (\w+)", (ROOT / "config.py").read_text(), re.M)


def test_flags_override_the_stage_which_overrides_the_preset(capsys):
    cfg, args = parse_training_args("", "vae", ["--preset", "coco", "--lr", "0.5", "--block_out_channels", "32", "64"])
    assert (cfg.lr, cfg.block_out_channels, cfg.lr_schedule) == (0.5, (32, 64), "constant")
    assert args.run_dir.endswith("coco")
    assert parse_training_args("", "unet", ["--preset", "coco"])[0].lr_schedule == "cosine"
    large = [
        parse_training_args("", stage, ["--preset", "coco512", "--data_root", "x"])[0] for stage in ("vae", "unet")
    ]
    assert [c.lr_schedule for c in large] == ["constant", "cosine"] and large[0].grad_accumulation > 1


@pytest.mark.parametrize("argv, preset, reason", [
    (["--preset", "demo"], "demo", "--preset"),
    (["--dataset", "folder"], "coco", "--dataset"),
    (["--data_root", "x"], "coco", "--data_root"),
    ([], "demo", "not there"),
])  # fmt: skip
def test_the_first_line_says_which_preset_and_why(argv, preset, reason, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse_training_args("", "unet", argv)[1].preset == preset
    line = capsys.readouterr().out.splitlines()[0]
    assert line.startswith(f"preset {preset}") and reason in line


def test_coco_is_chosen_where_its_captions_are(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    captions = tmp_path / SDConfig().data_root / SDConfig().captions_json
    captions.parent.mkdir(parents=True)
    captions.write_text("{}")
    assert parse_training_args("", "unet", [])[1].preset == "coco"


@pytest.mark.parametrize("argv, compile, num_workers", [
    ([], None, None), (["--compile", "--num_workers", "0"], True, 0), (["--no-compile"], False, None),
])  # fmt: skip
def test_what_is_not_given_may_be_left_to_the_machine(argv, compile, num_workers):
    cfg = parse_training_args("", "unet", argv)[0]
    assert (cfg.compile, cfg.num_workers) == (compile, num_workers)
    with pytest.raises(UserError, match="--compile: 'yes' is of the wrong type; give a bool"):
        SDConfig(compile="yes")
    with pytest.raises(UserError, match="--seed: None is of the wrong type"):
        SDConfig(seed=None)


def test_larger_pictures_have_as_much_kl_per_pixel():
    """The KL term is a sum over the latent and the MSE a mean over pixels, so that beta goes with the size of the latent."""
    for name in ("coco", "coco64", "coco256", "coco512"):
        cfg = SDConfig(**PRESETS[name] | VAE_PRESETS[name])
        assert cfg.beta * cfg.latent_channels * cfg.latent_size**2 == pytest.approx(1e-5 * 4 * 16 * 16)


@pytest.mark.parametrize("stage, shown", [("vae", "constant"), ("unet", "cosine")])
def test_help_shows_the_defaults_of_its_own_script(stage, shown, capsys):
    with pytest.raises(SystemExit):
        parse_training_args("", stage, ["--help"])
    words = " ".join(capsys.readouterr().out.split())
    assert f"--lr_schedule str cosine (annealed to 0) or constant (default: {shown})" in words


def test_flow_does_not_mind_what_betas_it_does_not_have_would_do():
    assert SDConfig(prediction_type="flow", timesteps=20_000).timesteps == 20_000
    with pytest.raises(UserError, match="beta_end"):
        SDConfig(timesteps=20_000)


@pytest.mark.parametrize("argv, word", [
    (["--no_such_flag", "1"], "--no_such_flag"),
    (["--batch_siz", "4"], "--batch_siz"),
    (["--batch_size", "0"], "--batch_size"),
    (["--batch_size", "many"], "--batch_size"),
    (["--lr", "nan"], "--lr"),
    (["--lr", "-1"], "--lr"),
    (["--num_workers", "-1"], "--num_workers"),
    (["--seed", "-1"], "--seed"),
    (["--image_size", "100"], "--image_size"),
    (["--norm_num_groups", "7"], "--block_out_channels"),
    (["--num_heads", "5"], "--unet_block_out_channels"),
    (["--preset", "coco", "--image_size", "32", "--unet_norm_num_groups", "16", "--unet_block_out_channels", "16", "16", "32",
      "--time_dim", "64"], "--unet_norm_num_groups"),
    (["--preset", "coco", "--image_size", "32", "--unet_norm_num_groups", "224", "--unet_block_out_channels", "224", "224", "224", "--time_dim",
      "896"], "--unet_norm_num_groups"),
    (["--time_dim", "100"], "--time_dim"),
    (["--beta_start", "0.5"], "--beta_start"),
    (["--lr_schedule", "linear"], "--lr_schedule"),
    (["--dataset", "imagenet"], "--dataset"),
    (["--max_steps", "0"], "--max_steps"),
    (["--max_steps", "1000000001"], "--max_steps: '1000000001' is not a whole number from 1 to 1000000000"),
    (["--max_steps", "9" * 5000], "to 1000000000"),
    (["--preset", "huge"], "--preset"),
])  # fmt: skip
def test_a_mistake_ends_in_one_line_and_code_2(argv, word, capsys):
    with pytest.raises(SystemExit) as e:
        parse_training_args("", "unet", argv)
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1 and word in err


ZERO_SNR = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}


@pytest.mark.parametrize("settings, message", [
    (ZERO_SNR | {"prediction_type": "epsilon"}, "--rescale_betas_zero_snr: .*v_prediction"),
    (ZERO_SNR | {"timesteps": 1}, "--rescale_betas_zero_snr: .*two steps"),
    ({"scale_betas": True, "timesteps": 20}, "--scale_betas: .*more than 20 --timesteps"),
    ({"beta_schedule": "cosine", "beta_end": 0.1}, "--beta_end: cosine"),
    ({"beta_schedule": "cosine", "scale_betas": True}, "--scale_betas: cosine"),
    ({"prediction_type": "flow", "beta_start": 1e-3}, "--beta_start: flow"),
    ({"prediction_type": "flow", "beta_schedule": "cosine"}, "--beta_schedule: flow"),
    ({"prediction_type": "flow", "scale_betas": True}, "--scale_betas: flow"),
    ({"prediction_type": "flow", "rescale_betas_zero_snr": True}, "--rescale_betas_zero_snr: flow"),
    ({"prediction_type": "flow", "min_snr_gamma": 5.0}, "--min_snr_gamma: .*epsilon"),
    ({"prediction_type": "v_prediction", "min_snr_gamma": 5.0}, "--min_snr_gamma: .*epsilon"),
    ({"flow_times": "uniform"}, "--flow_times: .*--prediction_type flow"),
    ({"guidance_scale": 2.0}, "--guidance_scale: .*--caption_dropout"), ({"sample_steps": 201}, "--sample_steps: .*200"),
    ({"guidance_interval": (0.8, 0.2)}, "--guidance_interval: 0.8 0.2 .*rising"),
    ({"guidance_interval": (0.8,)}, "--guidance_interval: .*two"), ({"guidance_interval": (0.0, 1.1)}, "--guidance_interval"),
    (PRESETS["demo"] | {"beta_end": 0.1}, "--beta_end: .*--prediction_type epsilon"),
    (PRESETS["demo"] | {"caption_dropout": 0.0}, "--guidance_scale: .*--guidance_scale 1"),
    ({"caption_dropout": 1.5}, "--caption_dropout"), ({"ema_sigma_rel": 1e-160}, "--ema_sigma_rel"),
    ({"timesteps": 1000, "beta_end": 0.999}, "--beta_end"), ({"timesteps": 100_000}, "--beta_end"),
])  # fmt: skip
def test_diffusion_settings_that_make_no_sense_together_are_refused(settings, message):
    """The message names the flag and what to do."""
    with pytest.raises(UserError, match=message) as e:
        SDConfig(**settings)
    assert ";" in str(e.value)


@pytest.mark.parametrize("settings", [
    ZERO_SNR, ZERO_SNR | {"beta_schedule": "cosine"}, {"scale_betas": True}, {"scale_betas": True, "timesteps": 1000},
    {"prediction_type": "v_prediction"}, {"prediction_type": "flow", "flow_times": "uniform"}, {"min_snr_gamma": 5.0},
])  # fmt: skip
def test_diffusion_settings_that_go_together(settings):
    SDConfig(**settings)


def test_the_largest_number_is_taken():
    assert parse_training_args("", "unet", ["--max_steps", "1000000000"])[1].max_steps == LARGEST


@pytest.mark.parametrize("script, flag", [("sample.py", "--num_images"), ("data.py", "--max_images")])
def test_a_giant_number_is_refused_by_the_name_of_its_flag(script, flag, run_here, tmp_path):
    words = ["download"] if script == "data.py" else ["--prompt", "x"]
    result = run_here(script, *words, flag, "9" * 20, cwd=tmp_path)
    assert_one_line_error(result, 2, f"error: {flag}: ", f"1 to {LARGEST}")


def test_settings_are_checked_in_python_too():
    with pytest.raises(UserError, match="--timesteps"):
        SDConfig(timesteps=0)


@pytest.mark.slow
def test_a_mistake_in_a_script_has_the_same_form(tmp_path):
    assert_one_line_error(run_script("train_vae.py", "--epochs", "3", cwd=tmp_path), 2, "--epochs")
    assert_one_line_error(run_script("sample.py", cwd=tmp_path), 2, "--prompt")
    assert_one_line_error(run_script("sample.py", "--prompt", cwd=tmp_path), 2, "--prompt")
