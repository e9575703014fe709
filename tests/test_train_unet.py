"""Promises of train_unet.py: what of the pictures, captions and settings reaches the training and its samples."""

import contextlib
import json
import os
import shutil
import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import SMALL, TINY, TRAIN, assert_one_line_error, bits, files, flags, picture, randomize, rows, run_script
from PIL import Image

import diffusion
import train_unet
import training
from diffusion import configured_process
from text_encoder import WordHashTextEncoder
from unet import TimeEmbedding, UNetLatent
from vae import AutoencoderKL

# ---- A run ----


def test_a_run_leaves_what_the_contract_lists(tiny_run):
    run = tiny_run / "run"
    weights = ["vae_ckpt_epoch2.pth", "unet_ckpt2.pth", "t_ember_ckpt2.pth", "ema_unet_ckpt2.pth"]
    pictures = [f"{name}_epoch{epoch}.png" for name in ("vae_pictures", "unet_samples") for epoch in (1, 2)]
    for name in (*weights, *pictures, "config.json", "vae_curves.png", "unet_curves.png"):
        assert (run / name).stat().st_size > 0, name
    assert not list(run.glob("*.tmp"))
    held_out = rows(run / "vae_held_out.csv")
    assert [r["epoch"] for r in held_out] == ["1", "2"]
    assert {"mse", "psnr_db", "latent_mean", "latent_std", "latent_mean_3", "latent_std_3"} <= set(held_out[0])
    assert rows(run / "unet_train.csv")[-1]["step"] == "6"
    record = json.loads((run / "config.json").read_text())
    assert record["train_unet"]["settings"]["batch_size"] == TINY["batch_size"]
    assert json.loads((run / "unet_set2.json").read_text())["finished"]


def test_training_is_a_function_of_its_seed(tiny_run, tmp_path, run_here):
    """The same commands twice give the same bits, pictures and figures included; another seed does not."""
    for run, seed in (("same", 0), ("other", 1)):
        for script in ("train_vae.py", "train_unet.py"):
            command = ["--preset", "demo", "--run_dir", run, *flags(TINY | {"seed": seed})]
            assert run_here(script, *command, cwd=tmp_path).returncode == 0
    runs = tiny_run / "run", tmp_path / "same", tmp_path / "other"
    for name in ("vae_held_out.csv", "unet_train.csv", "unet_held_out.csv", "unet_samples_epoch2.png"):
        first, same, other = ((run / name).read_bytes() for run in runs)
        assert first == same != other, name
    for name in ("vae_ckpt_epoch2", "unet_ckpt2", "t_ember_ckpt2", "ema_unet_ckpt2"):
        first, same = (torch.load(run / f"{name}.pth", weights_only=True) for run in runs[:2])
        assert all(torch.equal(first[k], same[k]) for k in first), name


def test_a_finished_run_is_left_alone(tiny_run, run_here):
    before = files(tiny_run / "run")
    for script in ("train_vae.py", "train_unet.py"):
        result = run_here(script, *TRAIN, *flags(TINY), cwd=tiny_run)
        assert result.returncode == 0 and "finished" in result.stdout
    changed = run_here("train_unet.py", *TRAIN, *flags(TINY | {"lr": 0.5}), cwd=tiny_run)
    assert_one_line_error(changed, 1, "lr was 0.001, now 0.5", "--overwrite")
    assert before == files(tiny_run / "run")


@pytest.mark.slow
def test_real_coco_pictures_real_tokens_whole_pipeline(real_data, clip_dir, tmp_path):
    """coco-mini in the coco preset's architecture: both trainers, then sample.py; both losses fall."""
    words = ["--preset", "coco", "--run_dir", "run", "--data_root", real_data / "coco-mini", "--held_out_images", 4]
    words += ["--lr", "1e-3", "--text_encoder", clip_dir, "--sample_prompts", "a dog", "--sample_steps", 4]
    vae = run_script("train_vae.py", *words, "--batch_size", 1, "--max_steps", 28, cwd=tmp_path)
    assert vae.returncode == 0, vae.stderr
    unet = run_script("train_unet.py", *words, "--batch_size", 4, "--max_steps", 24, cwd=tmp_path)
    assert unet.returncode == 0, unet.stderr
    for name, column in (("vae_train.csv", "mse"), ("unet_train.csv", "loss")):
        values = [float(r[column]) for r in rows(tmp_path / "run" / name)]
        assert values[-1] < 0.9 * values[0], (name, values)
    made = run_script("sample.py", "--prompt", "a dog on the grass", "--run_dir", "run", "--steps", 4, cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    with Image.open(tmp_path / "run/samples/a-dog-on-the-grass_grid.png") as grid:
        assert grid.size == (262, 262)


@pytest.mark.slow
@pytest.mark.parametrize("also", [[], ["--grad_checkpointing"]])
def test_compiled_models_train_as_the_plain_ones(tmp_path, run_here, monkeypatch, also):
    """And have the same bits if the run is broken off."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    settings = SMALL | {"mixed_precision": "no", "num_epochs": 1, "batch_size": 5, "save_minutes": 60}
    settings |= {"image_size": 8, "block_out_channels": (8,), "num_heads": 2}
    for run, more in (("plain", []), ("compiled", ["--compile", *also])):
        for script in ("train_vae.py", "train_unet.py"):
            command = ("--preset", "demo", "--run_dir", run, *more, *flags(settings))
            assert run_here(script, *command, cwd=tmp_path).returncode == 0
    stop_after(2, monkeypatch)  # what comes next is the smaller last batch
    for script in ("train_vae.py", "train_unet.py"):
        command = (
            "--preset",
            "demo",
            "--run_dir",
            "resumed",
            "--compile",
            *also,
            *flags(settings | {"save_minutes": 0}),
        )
        assert [run_here(script, *command, cwd=tmp_path).returncode for _ in range(2)] == [9, 0]
    assert bits(tmp_path / "resumed") == bits(tmp_path / "compiled")
    for file in ("vae_train.csv", "vae_held_out.csv", "unet_train.csv", "unet_held_out.csv"):
        plain, compiled = (rows(tmp_path / run / file) for run in ("plain", "compiled"))
        for a, b in zip(plain, compiled, strict=True):
            assert [float(v) for v in a.values()] == pytest.approx([float(v) for v in b.values()], abs=1e-4)
    names = [p.name for p in sorted((tmp_path / "plain").iterdir())]
    assert names == [p.name for p in sorted((tmp_path / "compiled").iterdir())]


def stop_after(step, monkeypatch):
    """Each process that takes the step after that one leaves with exit code 9 instead; the next does not."""
    real, taken = training.optimizer_step, []

    def optimizer_step(*args):
        taken.append(args)
        if len(taken) % (step + 2) == step + 1:
            sys.exit(9)
        real(*args)

    monkeypatch.setattr(training, "optimizer_step", optimizer_step)


def test_a_run_compiles_once_and_for_the_same_batches_when_resumed(tmp_path, run_here, monkeypatch):
    """Of batches of 5, 5 and 2 those of 5; of their parts of 3, 2, 1 and 1 those of 3. Here they come out 1 % larger.

    Where to keep what is compiled is known before there is an optimizer: making one loads what reads it.
    """
    real, make, graphs, kept = torch.compile, training.make_optimizer, [], set()

    def backend(graph, inputs):
        graphs.append(inputs)
        return lambda *args: tuple(1.01 * out for out in graph(*args))

    def train(run, script, parts):
        settings = SMALL | {"batch_size": 5, "num_epochs": 1, "grad_accumulation": parts}
        settings |= {"compile": True, "cache_dir": f"prepared_{run}"}
        torch._dynamo.reset()
        graphs.clear()
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
        del os.environ["TORCHINDUCTOR_CACHE_DIR"]
        return run_here(script, "--preset", "demo", "--run_dir", run, *flags(settings), cwd=tmp_path).returncode

    def make_optimizer(*args):
        kept.add(os.environ.get("TORCHINDUCTOR_CACHE_DIR"))
        return make(*args)

    monkeypatch.setattr(training, "make_optimizer", make_optimizer)
    monkeypatch.setattr(torch, "compile", partial(real, backend=backend))
    for script, parts in (both := (("train_vae.py", 1), ("train_unet.py", 2))):
        assert train("whole", script, parts) == 0 and len(graphs) == 1
    stop_after(2, monkeypatch)  # what comes next is the smaller last batch
    for script, parts in both:
        assert [train("stopped", script, parts), len(graphs), train("stopped", script, parts)] == [9, 1, 0]
        assert not graphs
    assert bits(tmp_path / "stopped") == bits(tmp_path / "whole")
    assert kept == {str(tmp_path / f"prepared_{run}/compiled") for run in ("whole", "stopped")}


@pytest.mark.parametrize("count, captions", [(4, ["a cat", "a dog"]), (24, ["the same"]), (24, [""])])
def test_what_other_captions_cost_is_not_measured_where_there_is_no_other(tmp_path, run_here, count, captions):
    """One held-out picture; one caption of all pictures; none at all."""
    for i in range(count):
        picture(tmp_path / f"mine/images/{i}.png", (9 * i, 0, 0))
        (tmp_path / f"mine/images/{i}.txt").write_text(captions[i % len(captions)])
    settings = SMALL | {"dataset": "folder", "data_root": "mine"}
    for script in ("train_vae.py", "train_unet.py"):
        result = run_here(script, *TRAIN, *flags(settings), cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    last = rows(tmp_path / "run/unet_held_out.csv")[-1]
    assert last["other_caption"] == last["other_caption_error"] == "" and float(last["loss"]) > 0
    assert (last["none_caption"] == "") == (captions == [""])
    assert (last["none_caption_error"] == "") == (captions == [""] or count == 4)
    assert "another picture's caption not measured" in result.stdout and "nan" not in result.stdout
    assert "not heard" not in result.stderr


# ---- What reaches the training and its samples ----


def test_the_samples_of_an_epoch_are_guided_as_the_settings_say(tiny):
    """An interval without a step is no guidance, one with some steps is neither that nor all of it."""
    models = (randomize(UNetLatent(tiny)), AutoencoderKL(tiny).eval(), TimeEmbedding(tiny.time_dim).eval())
    models += (WordHashTextEncoder(512, 12),)
    guided, found = {"guidance_scale": 5.0, "caption_dropout": 0.1}, []
    run = SimpleNamespace(show=lambda name, epoch, images, columns: found.append(images))
    for settings in ({}, *(guided | {"guidance_interval": (0.0, high)} for high in (0.0, 0.5, 1.0))):
        cfg = replace(tiny, sample_prompts=("a red bus",), sample_steps=4, **settings)
        train_unet.show_samples(models, configured_process(cfg), contextlib.nullcontext, cfg, run, 1)
    same = [[torch.equal(a, b) for b in found[1:]] for a in found[1:]]
    assert torch.equal(found[0], found[1]) and same == torch.eye(3).bool().tolist()


TARGETS = {
    "flow": ({"prediction_type": "flow", "caption_dropout": 0.5, "ema_warmup": True}, "heun"),
    "v_prediction": ({"prediction_type": "v_prediction", "scale_betas": True, "timesteps": 40}, "dpmpp_2m"),
    "epsilon": ({"scale_betas": True, "timesteps": 40}, "ddim"),
}


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_trains_makes_pictures_and_is_measured(tiny_run, tmp_path, run_here, quick_judge, target):
    """Through the scripts: the process of a run is in its settings, and sample.py and evaluate.py go by it."""
    settings, sampler = TARGETS[target]
    shutil.copytree(tiny_run / "run", tmp_path / "run")
    command = [*TRAIN, "--overwrite", "--max_steps", 2, *flags(TINY | settings)]
    trained = run_here("train_unet.py", *command, cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    shown = ["--run_dir", "run", "--prompt", "a red car", "--num_images", 1, "--steps", 3, "--out", "out"]
    for extra in ([], ["--sampler", sampler]):
        result = run_here("sample.py", *shown, *extra, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    assert f"Sampler: {sampler.upper()}" in (tmp_path / "out" / "a-red-car_seed0_2.png").read_bytes().decode("latin-1")
    wrong = run_here("sample.py", *shown, "--sampler", "ddpm" if "flow" in settings.values() else "euler", cwd=tmp_path)
    assert_one_line_error(wrong, 2, "--sampler", "choose from")
    measured = run_here("evaluate.py", "--run_dir", "run", "--num_prompts", 4, "--steps", 4, cwd=tmp_path)
    assert measured.returncode == 0, measured.stderr
    figures = json.loads((tmp_path / "run/evaluation.json").read_text())
    assert figures["denoising"]["target"] == target
    assert figures["denoising"]["white"]["ratio"] > 0.5


def test_a_run_says_how_it_is_sampled_and_flags_come_before_it(tiny_run, tmp_path, run_here, monkeypatch):
    """Steps and guidance scale of the settings: in the epochs' samples, in sample.py, and there only without flags."""
    shutil.copytree(tiny_run / "run", tmp_path / "run")
    asked, real = [], diffusion.sample
    noted = lambda *a, **k: asked.append((a[5], k["guidance_scale"])) or real(*a, **k)  # noqa: E731
    monkeypatch.setattr(diffusion, "sample", noted)
    settings = TINY | {"caption_dropout": 0.5, "sample_steps": 3, "guidance_scale": 2.0}
    command = [*TRAIN, "--overwrite", "--max_steps", 2, *flags(settings)]
    assert run_here("train_unet.py", *command, cwd=tmp_path).returncode == 0
    assert asked == [(3, 2.0)]
    asked_otherwise = ["--steps", 4, "--guidance_scale", 1]
    for name, more, said in (
        ("a", [], "Steps: 3, Sampler: DDPM, CFG scale: 2,"),
        ("b", asked_otherwise, "Steps: 4, Sampler: DDPM, CFG scale: 1,"),
    ):
        shown = ["--run_dir", "run", "--prompt", "x", "--num_images", 1, "--out", name, *more]
        assert run_here("sample.py", *shown, cwd=tmp_path).returncode == 0
        assert said in (tmp_path / name / "x_seed0.png").read_bytes().decode("latin-1")


def test_caption_dropout_reaches_the_training(tiny_run, tmp_path, run_here):
    """Everything else being equal, to the last random number, it changes the weights that two steps lead to."""
    trained = []
    for settings in ({}, {"caption_dropout": 1.0}):
        shutil.copytree(tiny_run / "run", tmp_path / "run", dirs_exist_ok=True)
        command = [*TRAIN, "--overwrite", "--max_steps", 2, *flags(TINY | settings)]
        assert run_here("train_unet.py", *command, cwd=tmp_path).returncode == 0
        trained.append(torch.load(tmp_path / "run/unet_ckpt1.pth", weights_only=True))
    assert any(not torch.equal(trained[1][k], trained[0][k]) for k in trained[0])
