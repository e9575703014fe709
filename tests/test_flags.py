"""Promises of support/flags.py: a flag for each field, presets with a reason, mistakes in one line with exit code 2."""

import shlex

import pytest
from conftest import assert_one_line_error

from config import LARGEST, SDConfig
from support.flags import (
    Parser,
    add_sampling_flags,
    flags_to_hand_on,
    parse_training_args,
    sampling_options,
    training_command,
)


def test_flags_override_the_stage_which_overrides_the_preset():
    cfg, args = parse_training_args("", "vae", ["--preset", "coco", "--lr", "0.5", "--block_out_channels", "32", "64"])
    assert (cfg.lr, cfg.block_out_channels, cfg.lr_schedule) == (0.5, (32, 64), "constant")
    assert args.run_dir.endswith("coco")
    assert parse_training_args("", "unet", ["--preset", "coco"])[0].lr_schedule == "cosine"
    large = ["--preset", "coco512", "--data_root", "x"]
    vae, unet = (parse_training_args("", stage, large)[0] for stage in ("vae", "unet"))
    assert (vae.lr_schedule, unet.lr_schedule) == ("constant", "cosine")
    assert vae.grad_accumulation > unet.grad_accumulation == 1
    words = ["--preset", "best", "--run_dir", "b"]
    new, sharper = (parse_training_args("", "vae", words + more)[0] for more in ([], ["--finetune_decoder_of", "a"]))
    assert new.adversarial_weight == 0 < sharper.adversarial_weight
    plain = [*words, "--finetune_decoder_of", "a", "--adversarial_weight", "0", "--matching_weight", "0"]
    assert parse_training_args("", "vae", plain)[0].adversarial_weight == 0


@pytest.mark.parametrize(
    "words",
    [
        "",
        "--lr 0.5 --max_images 9",
        "--finetune_decoder_of a",
        "--finetune_decoder_of a --adversarial_weight 0 --matching_weight 0",
    ],
)
def test_a_runs_command_trains_the_same_again(words):
    """What report.html shows, for a decoder's finetuning too, where the preset has other settings."""
    cfg = parse_training_args("", "vae", ["--preset", "demo", "--run_dir", "b", *words.split()])[0]
    command = training_command("vae", "b", {"cfg": cfg, "preset": "demo", "settings": {}})
    python, script, *argv = shlex.split(command)
    assert (python, script) == ("python", "train_vae.py") and parse_training_args("", "vae", argv)[0] == cfg


@pytest.mark.parametrize(
    "argv, preset, reason",
    [
        (["--preset", "demo"], "demo", "--preset"),
        (["--dataset", "folder"], "coco", "--dataset"),
        (["--dataset", "scenes"], "demo", "--dataset scenes"),
        (["--data_root", "x"], "coco", "--data_root"),
        ([], "demo", "not there"),
    ],
)
def test_the_first_line_says_which_preset_and_why(argv, preset, reason, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse_training_args("", "unet", argv)[1].preset == preset
    line = capsys.readouterr().out.splitlines()[0]
    assert line.startswith(f"preset {preset}") and reason in line


def test_of_several_processes_one_speaks(capsys, monkeypatch):
    for rank, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", rank)
        parse_training_args("", "unet", ["--preset", "demo"])
        assert capsys.readouterr().out.count("preset demo") == lines


def test_coco_is_chosen_where_its_captions_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    captions = tmp_path / SDConfig().data_root / SDConfig().captions_json
    captions.parent.mkdir(parents=True)
    captions.write_text("{}")
    assert parse_training_args("", "unet", [])[1].preset == "coco"


@pytest.mark.parametrize("preset", ["best64", "demo"])
def test_another_target_leaves_out_what_flow_alone_reads(preset, capsys):
    """As in README's recipe on the demo; but not what the user asks for by name."""
    words = ["--preset", preset, "--prediction_type", "epsilon"]
    assert parse_training_args("", "unet", words)[0].flow_time_mean == 0
    assert parse_training_args("", "unet", words[:2])[0].flow_time_mean == 0.5
    with pytest.raises(SystemExit):
        parse_training_args("", "unet", [*words, "--flow_time_mean", "0.5"])


@pytest.mark.parametrize(
    "argv, compile, num_workers",
    [([], None, None), (["--compile", "--num_workers", "0"], True, 0), (["--no-compile"], False, None)],
)
def test_what_is_not_given_may_be_left_to_the_machine(argv, compile, num_workers):
    cfg = parse_training_args("", "unet", argv)[0]
    assert (cfg.compile, cfg.num_workers) == (compile, num_workers)


@pytest.mark.parametrize("stage, shown", [("vae", "constant"), ("unet", "cosine")])
def test_help_shows_the_defaults_of_its_own_script(stage, shown, capsys):
    with pytest.raises(SystemExit):
        parse_training_args("", stage, ["--help"])
    words = " ".join(capsys.readouterr().out.split())
    assert f"--lr_schedule str cosine (annealed to 0) or constant (default: {shown})" in words


MISTAKES = [
    (["--no_such_flag", "1"], "--no_such_flag"),
    (["--batch_siz", "4"], "--batch_siz"),
    (["--batch_size", "0"], "--batch_size"),
    (["--batch_size", "many"], "--batch_size"),
    (["--lr", "nan"], "--lr"),
    (["--lr", "-1"], "--lr"),
    (["--num_workers", "-1"], "--num_workers"),
    (["--seed", "-1"], "--seed"),
    (["--image_size", "100"], "--image_size"),
    (["--time_dim", "100"], "--time_dim"),
    (["--lr_schedule", "linear"], "--lr_schedule"),
    (["--dataset", "imagenet"], "--dataset"),
    (["--max_steps", "0"], "--max_steps"),
    (["--max_steps", "1000000001"], "--max_steps: '1000000001' is not a whole number from 1 to 1000000000"),
    (["--max_steps", "9" * 5000], "to 1000000000"),
    (["--preset", "huge"], "--preset"),
    (["--preset", "demo", "--data_root", "x"], "--data_root: preset demo uses no files"),
    (["--run_dir", ""], "--run_dir"),
    (["--finetune_decoder_of", "x"], "--finetune_decoder_of: is a flag of train_vae.py"),
]


@pytest.mark.parametrize("argv, word", MISTAKES)
def test_a_mistake_ends_in_one_line_and_code_2(argv, word, capsys):
    with pytest.raises(SystemExit) as e:
        parse_training_args("", "unet", argv)
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1 and word in err


def test_the_largest_number_is_taken():
    assert parse_training_args("", "unet", ["--max_steps", "1000000000"])[1].max_steps == LARGEST


def test_a_finetuned_decoder_needs_a_folder_of_its_own(capsys):
    words = ["--finetune_decoder_of", "runs/x", "--run_dir"]
    assert parse_training_args("", "vae", [*words, "runs/y"])[0].finetune_decoder_of == "runs/x"
    with pytest.raises(SystemExit):
        parse_training_args("", "vae", [*words, "runs/../runs/x"])
    assert "--run_dir: holds the VAE to be finetuned" in capsys.readouterr().err


def test_the_unet_gets_what_it_needs_of_the_vaes_command():
    """The words lead to the same settings; what was chosen for the VAE's training stays behind."""
    argv = ["--dataset", "folder", "--data_root", "my pictures", "--skip_bad", "--block_out_channels", "32", "64"]
    args = parse_training_args(
        "", "vae", [*argv, "--lr", "0.5", "--no-compile", "--no-random_scale", "--no-horizontal_flips"]
    )[1]
    words = flags_to_hand_on(args.given)
    assert "--lr" not in words and "--no-compile" not in words and "--no-horizontal_flips" in words
    given = parse_training_args("", "unet", words)[1].given
    assert given == {name: v for name, v in args.given.items() if name not in ("lr", "compile", "random_scale")}


@pytest.mark.parametrize("script, flag", [("sample.py", "--num_images"), ("get_data.py", "--max_images")])
def test_a_giant_number_is_refused_by_the_name_of_its_flag(script, flag, run_here, tmp_path):
    words = ["download"] if script == "get_data.py" else ["--prompt", "x"]
    result = run_here(script, *words, flag, "9" * 20, cwd=tmp_path)
    assert_one_line_error(result, 2, f"error: {flag}: ", f"1 to {LARGEST}")


# ---- Sampling ----

GUIDED = SDConfig(caption_dropout=0.1, guidance_scale=2.0, guidance_interval=(0.1, 0.6), sample_steps=40)


def options(argv, cfg):
    parser = Parser()
    add_sampling_flags(parser)
    return sampling_options(parser.parse_args(argv), cfg)


def test_what_no_flag_says_is_the_runs():
    found = options([], GUIDED)
    assert found["guidance_interval"] == (0.1, 0.6)
    assert (found["num_steps"], found["guidance_scale"], found["sampler"], found["eta"]) == (40, 2.0, "ddpm", 0.0)
    assert options([], SDConfig())["num_steps"] == 200
    assert options([], SDConfig(prediction_type="flow"))["sampler"] == "euler"


def test_flags_come_before_the_runs_settings():
    words = [
        "--steps",
        "7",
        "--sampler",
        "ddim",
        "--eta",
        "0.5",
        "--guidance_scale",
        "3",
        "--guidance_interval",
        "0",
        "0",
    ]
    words += ["--negative_prompt", "fog"]
    expected = {"num_steps": 7, "sampler": "ddim", "eta": 0.5, "guidance_scale": 3.0, "guidance_interval": (0, 0)}
    found = options(words, GUIDED)
    assert found | expected | {"negative_prompt": "fog"} == found


@pytest.mark.parametrize(
    "argv, word",
    [
        (["--steps", "201"], "--steps: 201 is out of range; give 1 to 200"),
        (["--steps", "0"], "--steps"),
        (["--eta", "0.5"], "--eta: is read by ddim alone"),
        (["--eta", "1.5", "--sampler", "ddim"], "--eta: 1.5 is out of range"),
        (["--sampler", "heun"], "--sampler"),
        (["--guidance_scale", "nan"], "--guidance_scale: nan is not a finite number; give"),
        (["--guidance_scale", "inf"], "--guidance_scale: inf is not a finite number; give"),
        (["--guidance_interval", "0.5", "0.2"], "--guidance_interval: 0.5 0.2: no interval; give two rising numbers"),
        (["--guidance_interval", "0.5"], "--guidance_interval: 0.5: no interval; give two rising numbers"),
        (["--guidance_interval", "0.5", "1.5"], "--guidance_interval: 1.5 is out of range; give 1"),
        (["--guidance_rescale", "-1"], "--guidance_rescale: -1.0 is out of range; give 0"),
        (["--guidance_interval", "0", "nan"], "--guidance_interval"),
        (["--guidance_scale", "1", "--negative_prompt", "x"], "--negative_prompt: acts by guidance alone"),
    ],
)
def test_sampling_flags_that_do_not_fit_end_in_one_line_and_code_2(argv, word, capsys):
    with pytest.raises(SystemExit) as e:
        options(argv, GUIDED)
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1 and word in err


def test_guidance_that_has_nothing_to_compare_with_is_warned_of(capsys):
    options(["--guidance_scale", "2"], SDConfig())
    assert "warning: the run was trained without --caption_dropout" in capsys.readouterr().err
    options(["--guidance_scale", "2"], GUIDED)
    assert not capsys.readouterr().err
