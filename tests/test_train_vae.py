"""Promises of train_vae.py: its options reach the training, a stop changes no bit, and a decoder can be finetuned alone."""

import json
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, TRAIN, Forked, assert_one_line_error, bits, files, flags, picture, randomize, rows, sign
from PIL import Image

import evaluate
import train_vae
import vae as vae_module
from support import encoded
from vae import AutoencoderKL

QUICK = {
    "image_size": 16,
    "block_out_channels": (8, 16),
    "unet_block_out_channels": (8,),
    "time_dim": 32,
    "lr": 5e-3,
    "mixed_precision": "no",
}

ABOUT = {"made_from": {}, "machine": {}, "code": {"latents": ""}}  # what encode_pictures() reads of a run


def weights(path):
    return torch.load(path, weights_only=True)


# ---- A run ----


def test_max_steps_finishes_as_a_whole_run_would_and_overwrite_starts_over(tmp_path, run_here):
    assert run_here("train_vae.py", *TRAIN, *flags(TINY), cwd=tmp_path).returncode == 0
    again = run_here("train_vae.py", *TRAIN, *flags(TINY), "--max_steps", 2, "--overwrite", cwd=tmp_path)
    assert again.returncode == 0
    assert sorted(p.name for p in (tmp_path / "run").glob("*.pth")) == ["vae_ckpt_epoch1.pth"]
    assert rows(tmp_path / "run/vae_train.csv")[-1]["step"] == "2"
    assert (tmp_path / "run/vae_pictures_epoch1.png").exists()


def test_a_loss_that_is_no_number_stops_the_run(tmp_path, run_here):
    result = run_here("train_vae.py", *TRAIN, *flags(TINY | {"lr": 1e9}), cwd=tmp_path)
    assert_one_line_error(result, 1, "--lr", "step")
    assert not list((tmp_path / "run").glob("vae_ckpt_epoch?.pth"))


def test_weights_that_the_last_step_made_useless_are_not_called_finished(tmp_path, run_here):
    """The loss of the only step is fine; what comes after it is not."""
    result = run_here("train_vae.py", *TRAIN, *flags(TINY | {"lr": 1e9}), "--max_steps", 1, cwd=tmp_path)
    assert_one_line_error(result, 1, "--lr", "step 1", "set1_step0")
    assert [p.name for p in (tmp_path / "run").glob("vae_set*")] == ["vae_set1_step0.json"]


def test_the_next_command_trains_on_the_same_data(tmp_path, run_here):
    """What train_vae.py prints at its end, pasted as it is: your own pictures, other sizes, a folder with a blank."""
    for i in range(24):
        picture(tmp_path / f"my pictures/images/{i}.png", (9 * i, 0, 0))
        (tmp_path / f"my pictures/images/{i}.txt").write_text("a thing")
    settings = TINY | {"dataset": "folder", "data_root": "my pictures"}
    command = ["--preset", "demo", "--run_dir", "my run", "--max_steps", 2, *flags(settings)]
    trained = run_here("train_vae.py", *command, cwd=tmp_path)
    python, *words = shlex.split(trained.stdout.split("next: ")[1])
    assert python == "python" and "--lr" not in words and "--max_steps" not in words
    result = run_here(*words, "--max_steps", 1, cwd=tmp_path)
    assert result.returncode == 0 and "warning: the VAE" not in result.stderr, result.stderr
    records = json.loads((tmp_path / "my run/config.json").read_text())
    vae, unet = (records[name]["settings"] for name in ("train_vae", "train_unet"))
    assert (vae["dataset"], vae["data_root"]) == (unet["dataset"], unet["data_root"]) == ("folder", "my pictures")


CAPTIONS = ['it\'s $HOME; `rm` "x" !y \\ z', "--seed", "-1", "caf\u00e9 \u7ea2\u8272", "--a b", "\x1b[31mred"]


@pytest.mark.parametrize("caption", CAPTIONS)
def test_the_last_line_asks_for_a_caption_of_theirs_and_can_be_pasted(tmp_path, run_here, caption):
    for i in range(3):
        picture(tmp_path / f"mine/images/{i}.png", (90 * i, 0, 0))
        (tmp_path / f"mine/images/{i}.txt").write_text(caption)
    settings = TINY | QUICK | {"dataset": "folder", "data_root": "mine"}
    words = ["--preset", "demo", *flags(settings), "--max_steps", 1, "--run_dir"]
    assert run_here("train_vae.py", *words, "a run", cwd=tmp_path).returncode == 0
    unet = run_here("train_unet.py", *words, "a run", cwd=tmp_path)
    sharper = run_here("train_vae.py", *words, "sharp", "--finetune_decoder_of", "a run", cwd=tmp_path)
    for result in (unet, sharper):
        assert result.returncode == 0, result.stderr
        line = next(line for line in result.stdout.splitlines() if "; next: " in line)
        shell = subprocess.run(
            ["sh", "-c", f"printf '%s\\n' {line.split('next: ')[1]}"], capture_output=True, text=True
        )
        python, script, *argv = shell.stdout.splitlines()
        prompt = caption.replace("\x1b", "?")
        assert (python, script) == ("python", "sample.py") and argv[-1] in (prompt, f"--prompt={prompt}")
        made = run_here(script, *argv, "--num_images", 1, "--steps", 1, cwd=tmp_path)
        assert made.returncode == 0 and f"picture of {prompt!r}" in made.stdout, made.stderr


# ---- Resuming ----

ALL = {
    "l1_weight": 0.1,
    "ms_ssim_weight": 0.1,
    "adversarial_weight": 0.5,
    "adversarial_start": 2,
    "matching_weight": 1.0,
    "random_crop": 4,
    "random_scale": True,
    "horizontal_flips": True,
    "captions_per_image": 1,
    "text_encoder": "words",
}
SHORT = {
    "text_dim": 16,
    "text_length": 4,
    "max_images": 12,
    "held_out_images": 4,
    "batch_size": 4,
    "num_epochs": 2,
    "timesteps": 4,
    "save_minutes": 0,
}


def command_with_all(kind):
    settings = TINY | QUICK | ALL | SHORT
    return f"train_{kind}.py", *TRAIN, *flags(settings)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    cwd = tmp_path_factory.mktemp("unbroken")
    for kind in ("vae", "unet"):
        result = Forked(cwd / "process", *command_with_all(kind), cwd=cwd).wait()
        assert result.returncode == 0, result.stderr
    return bits(cwd / "run")


@pytest.mark.parametrize("step", [2, 3, 6])
def test_a_run_with_every_option_stopped_at_any_step_goes_on_to_the_same_bits(unbroken, fork, tmp_path, step):
    """Step 3 ends an epoch of three; after step 6 the latents are yet to be measured."""
    for kind in ("vae", "unet"):
        stopped = fork(*command_with_all(kind), cwd=tmp_path, inject={"signal_at_step": (signal.SIGTERM, step)}).wait()
        assert stopped.returncode == 143, stopped.stderr
        assert fork(*command_with_all(kind), cwd=tmp_path).wait().returncode == 0
    assert bits(tmp_path / "run") == unbroken


def test_a_run_from_before_an_option_existed_is_the_run_without_it(tiny_run, tmp_path, run_here):
    shutil.copytree(tiny_run / "run", tmp_path / "run")
    path = tmp_path / "run/vae_set2.json"
    manifest = json.loads(path.read_text())
    del manifest["settings"]["l1_weight"]
    path.write_text(sign(manifest))
    command = [*TRAIN, *flags(TINY)]
    assert "finished" in run_here("train_vae.py", *command, cwd=tmp_path).stdout
    changed = run_here("train_vae.py", *command, "--l1_weight", 0.5, cwd=tmp_path)
    assert_one_line_error(changed, 1, "l1_weight was 0.0, now 0.5")


def test_pictures_are_encoded_a_bounded_number_of_pixels_at_a_time(tiny, tmp_path, monkeypatch):
    """Wherever it is done: 512-pixel pictures must fit where those of 128 do."""
    cfg = replace(tiny, cache_dir=str(tmp_path), batch_size=4)
    vae, pixels, sizes = randomize(AutoencoderKL(cfg)), torch.randint(256, (5, 3, 32, 32), dtype=torch.uint8), []
    vae.encoder.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    run = SimpleNamespace(show=lambda name, epoch, images, columns: None)
    ways = {
        "encode_pictures": lambda: encoded.encode_pictures(vae, pixels, ABOUT, "cpu", cfg, "encode"),
        "held-out figures": lambda: train_vae.evaluate(vae, pixels, "cpu", cfg),
        "pictures": lambda: train_vae.show_reconstructions(vae, None, pixels, "cpu", cfg, run, 1),
        "evaluate.py": lambda: sizes.extend(len(x) for x in evaluate.batches(pixels, "cpu")),
    }
    monkeypatch.setattr(vae_module, "MAX_PIXELS_PER_PASS", 2 * 32 * 32)
    for name, way in ways.items():
        sizes.clear()
        with torch.no_grad():
            way()
        assert sizes == [2, 2, 1], name


def test_training_with_flips_and_crops_is_another_training(tmp_path, run_here):
    """That each option reaches each loop it is for, and no other: by the losses that follow."""
    settings = TINY | QUICK | {"max_images": 16, "num_epochs": 1}
    losses = {"vae": {}, "unet": {}}
    crops = ("--random_crop 4", "--random_crop 4 --random_scale")
    for option in ("", *crops, "--horizontal_flips", "--captions_per_image 1"):
        for kind in losses:
            run = f"{kind} {option}"
            if kind == "unet":  # on the VAE trained without any
                shutil.copytree(tmp_path / "vae ", tmp_path / run)
            command = ["--preset", "demo", "--run_dir", run, *flags(settings), *option.split()]
            assert run_here(f"train_{kind}.py", *command, cwd=tmp_path).returncode == 0
            losses[kind][option] = (tmp_path / run / f"{kind}_train.csv").read_text()
    vae, unet = losses["vae"], losses["unet"]
    assert vae[""] == vae["--captions_per_image 1"] and len({*vae.values()}) == 4
    assert unet[""] == unet[crops[0]] == unet[crops[1]] != unet["--horizontal_flips"]


# ---- The decoder alone ----


@pytest.fixture
def finetuned(tiny_run, tmp_path, run_here):
    """A copy of the tiny run, and beside it `sharp`: its VAE with the decoder finetuned."""
    shutil.copytree(tiny_run / "run", tmp_path / "run")
    words = ["--preset", "demo", "--run_dir", "sharp", "--finetune_decoder_of", "run"]
    command = [*words, "--l1_weight", 0.1, *flags(TINY)]
    result = run_here("train_vae.py", *command, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    return tmp_path, command


def test_finetuning_the_decoder_leaves_every_bit_of_the_encoder(finetuned, tiny_run):
    cwd, _ = finetuned
    before, after = (weights(cwd / run / "vae_ckpt_epoch2.pth") for run in ("run", "sharp"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) != k.startswith("decoder.") for k in before)
    assert files(cwd / "run") == files(tiny_run / "run")


def test_a_unet_is_sampled_with_the_decoder_finetuned_on_its_latents_and_no_other(finetuned, run_here):
    cwd, _ = finetuned
    other = ["--preset", "demo", "--run_dir", "other", *flags(TINY | {"seed": 5})]
    assert run_here("train_vae.py", *other, cwd=cwd).returncode == 0
    sample = ["--run_dir", "run", "--prompt", "x", "--steps", 2, "--num_images", 1]
    pictures = {}
    for out, more in (("own", []), ("same", ["--vae", "run"]), ("sharp", ["--vae", "sharp"])):
        result = run_here("sample.py", *sample, *more, "--out", out, cwd=cwd)
        assert result.returncode == 0, result.stderr
        with Image.open(cwd / out / "x_seed0.png") as image:
            pictures[out] = image.tobytes()
            assert (f"VAE: {out}" in image.text["parameters"]) == (out == "sharp")
    assert pictures["own"] == pictures["same"] != pictures["sharp"]
    for vae, remedy in (("other", "--finetune_decoder_of run"), ("nowhere", "train_vae.py")):
        result = run_here("sample.py", *sample, "--vae", vae, cwd=cwd)
        assert_one_line_error(result, 1, f"--vae {vae}", remedy)


def test_a_finetuned_run_is_finished_until_the_vae_it_came_from_is_another(finetuned, run_here):
    cwd, command = finetuned
    again = run_here("train_vae.py", *command, cwd=cwd)
    assert again.returncode == 0 and "finished" in again.stdout
    other = [*TRAIN, "--overwrite", *flags(TINY | {"seed": 5})]
    assert run_here("train_vae.py", *other, cwd=cwd).returncode == 0
    assert_one_line_error(run_here("train_vae.py", *command, cwd=cwd), 1, "the VAE is another", "--overwrite")


def test_a_vae_is_not_finetuned_onto_itself_nor_by_the_wrong_script(tiny_run, run_here):
    command = ["--preset", "demo", *flags(TINY), "--finetune_decoder_of", "run"]
    for script, run in (("train_vae.py", "run/../run"), ("train_unet.py", "new")):
        result = run_here(script, *command, "--run_dir", run, cwd=tiny_run)
        assert_one_line_error(result, 2, "--run_dir" if run != "new" else "--finetune_decoder_of")
    nothing = run_here("train_vae.py", *command[:-1], "nowhere", "--run_dir", "new", cwd=tiny_run)
    assert_one_line_error(nothing, 1, "--finetune_decoder_of nowhere", "train_vae.py")


# ---- A discriminator ----

PULLED = ("--adversarial_weight", 0.5, "--matching_weight", 1)


def test_a_discriminator_pulls_from_its_start_on_and_no_earlier(tmp_path, run_here):
    """It begins with the fourth step, and pulls from the fifth on, when it knows how hard."""
    found = {}
    for steps in (4, 6):
        for words in ((), (*PULLED, "--adversarial_start", 3)):
            settings = TINY | QUICK | {"max_images": 24, "num_epochs": 2, "batch_size": 8}
            command = [*TRAIN[:2], "--run_dir", "run", "--overwrite", *flags(settings), "--max_steps", steps, *words]
            assert run_here("train_vae.py", *command, cwd=tmp_path).returncode == 0
            found[steps, bool(words)] = weights(next((tmp_path / "run").glob("vae_ckpt_epoch*.pth")))
    same = {n: all(torch.equal(found[n, True][k], v) for k, v in found[n, False].items()) for n in (4, 6)}
    assert same == {4: True, 6: False}
    assert float(rows(tmp_path / "run/vae_train.csv")[-1]["discriminator"]) > 0


def test_an_adversarial_finetuning_leaves_the_encoder_and_shows_the_decoder_it_began_with(finetuned, run_here):
    cwd, _ = finetuned
    words = ["--preset", "demo", "--run_dir", "sharper", "--finetune_decoder_of", "run", *PULLED, *flags(TINY)]
    assert run_here("train_vae.py", *words, cwd=cwd).returncode == 0
    before, after = (weights(cwd / run / "vae_ckpt_epoch2.pth") for run in ("run", "sharper"))
    assert all(torch.equal(before[k], after[k]) != k.startswith("decoder.") for k in before)
    heights = {}
    for run in ("run", "sharper"):
        with Image.open(cwd / run / "vae_pictures_epoch2.png") as image:
            heights[run] = image.height
    assert heights == {"run": 2 * 34 + 2, "sharper": 3 * 34 + 2}


def test_checkpointed_blocks_change_no_bit_of_an_adversarial_training(tmp_path, run_here):
    found = []
    for words in ([], ["--grad_checkpointing"]):
        command = [*TRAIN, "--overwrite", *flags(TINY | QUICK), *PULLED, "--max_steps", 4, *words]
        assert run_here("train_vae.py", *command, cwd=tmp_path).returncode == 0
        found.append(weights(next((tmp_path / "run").glob("vae_ckpt_epoch*.pth"))))
    assert all(torch.equal(found[0][k], v) for k, v in found[1].items())


def test_what_a_discriminator_cannot_do_is_one_line(tiny_run, tmp_path, run_here):
    shutil.copytree(tiny_run / "run", tmp_path / "run")
    common = ["--preset", "demo", "--run_dir", "new", *flags(TINY)]
    for words, code, parts in (
        (["--adversarial_weight", -1], 2, ["--adversarial_weight", "give 0 or more"]),
        (["--adversarial_start", 5], 2, ["--adversarial_start", "give both"]),
        (["--matching_weight", 1], 2, ["--matching_weight", "give both"]),
        ([*PULLED, "--compile"], 2, ["--compile", "leave one out"]),
        ([*PULLED, "--image_size", 8], 2, ["--adversarial_weight", "16 pixels"]),
        ([*PULLED, "--adversarial_start", 6], 1, ["--adversarial_start", "give less"]),
    ):
        assert_one_line_error(run_here("train_vae.py", *common, *words, cwd=tmp_path), code, *parts)
    assert not list((tmp_path / "new").glob("vae_*"))


def test_a_vae_that_still_trains_is_not_finetuned(tiny_run, tmp_path, run_here):
    shutil.copytree(tiny_run / "run", tmp_path / "run")
    hold = "import fcntl, sys; f = open('run/.lock', 'a+'); fcntl.lockf(f, fcntl.LOCK_EX); print(); sys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    words = ["--preset", "demo", "--run_dir", "new", "--finetune_decoder_of", "run", *flags(TINY)]
    with subprocess.Popen([sys.executable, "-c", hold], cwd=tmp_path, **pipes) as other:
        other.stdout.readline()
        result = run_here("train_vae.py", *words, cwd=tmp_path)
        other.stdin.close()
    assert_one_line_error(result, 1, "--finetune_decoder_of run", "still trains")
    assert run_here("train_vae.py", *words, cwd=tmp_path).returncode == 0
