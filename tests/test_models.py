"""Promises of support/models.py: a finished run's models, and in one line why they are not to be had."""

import json
import os
import shutil
import signal
import time

import pytest
import torch
from conftest import (
    KINDS,
    SAMPLE,
    SMALL,
    STEPS_PER_EPOCH,
    TINY,
    TRAIN,
    assert_one_line_error,
    command,
    files,
    flags,
    forge,
    picture,
    sign,
)

from config import PRESETS, SDConfig
from diffusion import baab, sample
from support import models
from support.errors import UserError
from support.models import load_models, load_text_encoder, load_vae, newest_run
from text_encoder import WordHashTextEncoder
from unet import TimeEmbedding, UNetLatent
from vae import AutoencoderKL
from word_vectors import learn_word_vectors

CPU = torch.device("cpu")


def load_by_hand(run, cfg):
    """The recipe's way: build the three modules, torch.load the three plain state_dicts."""
    vae = AutoencoderKL(cfg)
    vae.load_state_dict(torch.load(run / "vae_ckpt_epoch2.pth", map_location="cpu", weights_only=True))
    unet = UNetLatent(cfg)
    unet.load_state_dict(torch.load(run / "unet_ckpt2.pth", map_location="cpu", weights_only=True))
    t_ember = TimeEmbedding(cfg.time_dim)
    t_ember.load_state_dict(torch.load(run / "t_ember_ckpt2.pth", map_location="cpu", weights_only=True))
    return vae.eval(), unet.eval(), t_ember.eval()


def test_models_are_those_of_the_plain_files(tiny_run):
    run, cfg = tiny_run / "run", SDConfig(**PRESETS["demo"] | TINY)
    found_cfg, name, *found = load_models(str(run), False, CPU)
    assert (found_cfg, name) == (cfg, "unet_ckpt2")
    for ours, by_hand in zip(found, load_by_hand(run, cfg)):
        assert type(ours) is type(by_hand) and not ours.training
        assert all(torch.equal(v, by_hand.state_dict()[k]) for k, v in ours.state_dict().items())
    _, name, _, averaged, _ = load_models(str(run), True, CPU)
    theirs = torch.load(run / "ema_unet_ckpt2.pth", weights_only=True)
    assert name == "ema_unet_ckpt2" and all(torch.equal(v, theirs[k]) for k, v in averaged.state_dict().items())
    vae, files = load_vae(cfg, str(run), CPU)
    assert [*files] == ["vae_ckpt_epoch2.pth"] and not any(p.requires_grad for p in vae.parameters())


def test_the_recipes_own_snippet_gives_the_picture_of_sample(tiny_run):
    """The loop of the recipe, as its readers will paste it, against sample() from the same random state."""
    cfg = SDConfig(**TINY)
    vae, unet, t_embedder = load_by_hand(tiny_run / "run", cfg)
    text_encoder = WordHashTextEncoder(cfg.text_dim, cfg.text_length)
    prompt, num_samples, num_steps, device = "a red sports car", 2, 200, "cpu"

    torch.manual_seed(3)
    with torch.no_grad():
        text_emb = text_encoder([prompt] * num_samples)
        z = torch.randn(num_samples, cfg.latent_channels, cfg.latent_size, cfg.latent_size, device=device)
        beta, alpha, alpha_bar = baab()
        beta, alpha, alpha_bar = beta.to(device), alpha.to(device), alpha_bar.to(device)
        for t in reversed(range(num_steps)):
            t_batch = torch.full((num_samples,), t, device=device, dtype=torch.long)
            eps_pred = unet(z, t_embedder(t_batch), text_emb)
            noise = torch.randn_like(z) if t > 0 else torch.zeros_like(z)
            mean = (z - ((1 - alpha[t]) / torch.sqrt(1 - alpha_bar[t])) * eps_pred) / torch.sqrt(alpha[t])
            z = mean + torch.sqrt(beta[t]) * noise
        theirs = (vae.decoder(z).clamp(-1, 1) + 1) / 2

    torch.manual_seed(3)
    ours = sample(unet, vae, t_embedder, text_encoder, prompt, num_steps=200, num_samples=2)
    assert (ours - theirs).abs().max() < 1e-3 and theirs.std() > 0.01


class Casts(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts what is turned into another type."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._to_copy.default
        return function(*args, **(kwargs or {}))


def test_sampling_turns_the_weights_into_bfloat16_once(tiny_run):
    """And not in every step, which on two CPU cores made each step of a U-Net of coco's size a sixth longer."""
    _, _, _, unet, t_ember = load_models(str(tiny_run / "run"), False, CPU)
    z, t_emb, text_emb = torch.randn(1, *unet.latent_shape), t_ember(torch.zeros(1)), torch.randn(1, 12, 512)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        first, second = Casts(), Casts()
        for casts in (first, second):
            with casts:
                unet(z, t_emb, text_emb)
    weights = [name for name, p in unet.named_parameters() if p.dim() > 1 and "norm" not in name]
    assert first.count - second.count >= len(weights) > 50


def test_the_newest_run_is_the_one_in_which_an_epoch_was_saved_last(tiny_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no trained U-Net in runs/; run python train_vae.py"):
        newest_run()
    for age, preset in ((50, "coco"), (10, "demo"), (90, "best")):
        (tmp_path / "runs" / preset).mkdir(parents=True)
        for name in ("unet_set2.json", "unet_set1.json"):
            shutil.copy(tiny_run / "run/unet_set2.json", tmp_path / "runs" / preset / name)
            moment = time.time() - age
            os.utime(tmp_path / "runs" / preset / name, (moment, moment))
    (tmp_path / "runs/coco/unet_set3_step9.json").write_text("{}")  # within an epoch
    assert newest_run() == os.path.join("runs", "demo")


def test_an_earlier_epoch_is_sampled_measured_and_exported(tmp_path, run_here, fork, quick_judge):
    for kind in KINDS:
        assert fork(*command(kind, SMALL | {"save_every": 1}), cwd=tmp_path).wait().returncode == 0
    first = torch.load(tmp_path / "run/unet_ckpt1.pth", weights_only=True)
    _, name, _, unet, _ = load_models(str(tmp_path / "run"), False, CPU, epoch=1)
    assert name == "unet_ckpt1" and all(torch.equal(v, first[k]) for k, v in unet.state_dict().items())
    assert run_here(*SAMPLE, "--epoch", 1, cwd=tmp_path).returncode == 0
    assert b"Model: unet_ckpt1" in (tmp_path / "run/samples/x_seed0.png").read_bytes()
    measured = run_here("evaluate.py", "--run_dir", "run", "--epoch", 1, "--num_prompts", 4, "--steps", 2, cwd=tmp_path)
    assert measured.returncode == 0, measured.stderr
    assert json.loads((tmp_path / "run/evaluation_epoch1.json").read_text())["model"] == "unet_ckpt1"
    assert run_here("sample.py", "--run_dir", "run", "--export", "card", "--epoch", 1, cwd=tmp_path).returncode == 0
    assert "This is epoch 1 of 2" in (tmp_path / "card/README.md").read_text()
    missing = run_here(*SAMPLE, "--epoch", 7, cwd=tmp_path)
    assert_one_line_error(missing, 1, "--epoch 7: not saved in run; give one of 1, 2")


def test_an_average_that_is_mostly_its_random_start_is_warned_of(copy, run_here, capsys):
    """And only where it is asked for."""
    unet = ["train_unet.py", *TRAIN, "--overwrite", *flags(TINY | {"ema_decay": 0.9999})]
    assert run_here(*unet, cwd=copy).returncode == 0
    warned = run_here(*SAMPLE, "--ema", cwd=copy)
    assert "warning: --ema: 99.9% of these weights are the random ones" in warned.stderr and warned.returncode == 0
    assert "--ema_warmup" in warned.stderr and "--ema" not in run_here(*SAMPLE, cwd=copy).stderr
    assert "--ema" in run_here("sample.py", "--run_dir", "run", "--ema", "--export", "card", cwd=copy).stderr
    assert run_here(*unet, "--ema_warmup", cwd=copy).returncode == 0
    assert "--ema" not in run_here(*SAMPLE, "--ema", cwd=copy).stderr


# ---- Models that are not to be had ----


def test_what_is_missing_names_the_command_that_makes_it(tmp_path, run_here):
    assert_one_line_error(run_here("train_unet.py", "--preset", "demo", cwd=tmp_path), 1, "train_vae.py")
    missing = run_here("train_vae.py", "--preset", "coco", cwd=tmp_path)
    assert_one_line_error(missing, 1, "captions_train2017.json", "demo")


def test_a_vae_of_another_shape_or_age_is_refused(copy, run_here):
    wider = run_here("train_unet.py", *TRAIN, *flags(TINY | {"image_size": 64}), "--overwrite", cwd=copy)
    assert_one_line_error(wider, 1, "--image_size")
    again = run_here("train_vae.py", *TRAIN, "--overwrite", *flags(TINY | {"seed": 9}), cwd=copy)
    assert again.returncode == 0
    remedy = "train_unet.py --run_dir run --overwrite"
    assert_one_line_error(run_here(*SAMPLE, cwd=copy), 1, "vae_ckpt_epoch2.pth", remedy)


def test_a_vae_that_was_stopped_is_used_as_its_newest_whole_epoch_left_it(tmp_path, fork, run_here):
    """Stopped in epoch 3 of 20, of which none is due to be saved; then in its first epoch, which can be ended there."""
    words = ("train_vae.py", *TRAIN, *flags(SMALL | {"num_epochs": 20}))
    stop = {"signal_at_step": (signal.SIGINT, 2 * STEPS_PER_EPOCH + 2)}
    assert fork(*words, cwd=tmp_path, inject=stop).wait().returncode == 130
    unet = run_here("train_unet.py", *TRAIN, *flags(SMALL), cwd=tmp_path)
    said = "VAE: run/vae_ckpt_epoch2.pth: epoch 2 of 20, where its training was stopped"
    assert unet.returncode == 0 and said in unet.stdout, unet.stderr
    before = files(tmp_path / "run")
    assert fork(*words, cwd=tmp_path).wait().returncode == 0  # goes on, and leaves the U-Net its VAE
    assert run_here(*SAMPLE, cwd=tmp_path).returncode == 0
    after = files(tmp_path / "run")
    assert after["vae_ckpt_epoch2.pth"] == before["vae_ckpt_epoch2.pth"] and "vae_ckpt_epoch5.pth" in after
    assert "vae_ckpt_epoch4.pth" not in after  # saved, and of no use to anybody

    words = ("train_vae.py", "--preset", "demo", "--run_dir", "short", *flags(SMALL))
    stop = {"signal_at_step": (signal.SIGINT, 2)}
    assert fork(*words, cwd=tmp_path, inject=stop).wait().returncode == 130
    unet = ("train_unet.py", "--preset", "demo", "--run_dir", "short", *flags(SMALL))
    assert_one_line_error(run_here(*unet, cwd=tmp_path), 1, "--run_dir short", "whole epoch", "--max_steps 3")
    assert run_here("train_vae.py", *unet[1:], "--max_steps", 3, cwd=tmp_path).returncode == 0
    assert run_here(*unet, cwd=tmp_path).returncode == 0


def test_a_vae_of_another_data_set_is_used_only_if_that_is_said(tiny_run, tmp_path, run_here):
    shutil.copytree(tiny_run / "run", tmp_path / "run", ignore=shutil.ignore_patterns("unet_*", "ema_*", "t_ember_*"))
    for i in range(3):
        picture(tmp_path / f"images/{i}.png")
        (tmp_path / f"images/{i}.txt").write_text("a picture")
    settings = {k: v for k, v in TINY.items() if k != "dataset"}
    words = ["train_unet.py", "--run_dir", "run", "--data_root", ".", "--max_steps", 1, *flags(settings)]
    assert_one_line_error(run_here(*words, "--preset", "coco", cwd=tmp_path), 1, "--dataset", "coco", "scenes")
    said = run_here(*words, "--preset", "coco", "--dataset", "folder", cwd=tmp_path)
    assert said.returncode == 0 and "warning: the VAE was trained on --dataset scenes" in said.stderr


def test_other_held_out_combinations_than_the_vaes_are_warned_of(tiny_run, tmp_path, run_here):
    shutil.copytree(tiny_run / "run", tmp_path / "run", ignore=shutil.ignore_patterns("unet_*", "ema_*", "t_ember_*"))
    words = [*TRAIN, "--max_steps", 1, *flags(TINY | {"held_out_combinations": 10})]
    result = run_here("train_unet.py", *words, cwd=tmp_path)
    assert result.returncode == 0 and "warning: the VAE was trained with other --held_out_combinations" in result.stderr


def test_another_text_encoder_than_the_trained_one_is_refused(copy, run_here):
    cfg = SDConfig(**TINY)
    encoder = load_text_encoder(str(copy / "run"), cfg, None, torch.device("cpu"))
    assert isinstance(encoder, WordHashTextEncoder) and encoder.max_length == 12
    path = copy / "run/unet_set2.json"
    manifest = json.loads(path.read_text())
    assert manifest["text"] == {"hash": 2, "dim": 512, "max_length": 12}
    path.write_text(sign(manifest | {"text": {"clip": "another"}}))
    assert_one_line_error(run_here(*SAMPLE, cwd=copy), 1, "--text_encoder", "unet_set2.json")


def test_word_vectors_belong_to_the_run(tiny_run, tmp_path, run_here):
    """Learned once, kept through a resumed run and one that starts from its weights, replaced by --overwrite."""
    shutil.copytree(tiny_run / "run", tmp_path / "run", ignore=shutil.ignore_patterns("unet_*", "ema_*", "t_ember_*"))
    shutil.copytree(tmp_path / "run", tmp_path / "new")
    words = ["train_unet.py", "--preset", "demo", *flags(TINY | {"text_encoder": "words", "num_epochs": 1})]
    for more in (["--run_dir", "run"], ["--run_dir", "new", "--init_from", "run", "--captions_per_image", 1]):
        assert run_here(*words, *more, cwd=tmp_path).returncode == 0
    (path,), (same,) = ([*(tmp_path / run).glob("words_*")] for run in ("run", "new"))
    assert path.name == same.name and path.read_bytes() == same.read_bytes()
    said = run_here(*SAMPLE, "--prompt", "a zebra on the grass", cwd=tmp_path)
    assert said.returncode == 0 and "zebra" in said.stderr and "of fewer than 5 training pictures" in said.stderr
    kept = path.read_bytes()
    for content in (kept[:-1] + b"?", b"", None):
        path.write_bytes(content) if content is not None else path.unlink()
        for again in (SAMPLE, [*words, "--run_dir", "run", "--num_epochs", 3]):
            assert_one_line_error(run_here(*again, cwd=tmp_path), 1, f"run/{path.name}", "restore it")
    path.with_name("words_01234567.safetensors").write_bytes(kept)
    assert run_here(*words, "--run_dir", "run", "--overwrite", cwd=tmp_path).returncode == 0
    assert [p.name for p in (tmp_path / "run").glob("words_*")] == [path.name] and path.read_bytes() == kept


def test_of_a_word_no_more_is_said_than_is_known(monkeypatch):
    """Of many words the rarest have no vectors, though of five pictures; after --init_from those are of other captions."""
    encoder = WordHashTextEncoder(8, 4, words=learn_word_vectors([["a dog"]] * 9, 8))

    def said(**settings):
        cfg, lines = SDConfig(**TINY | {"dataset": "folder", "text_encoder": "words"} | settings), []
        models.warn_of_unknown_words("a zebra", cfg, encoder, lines.append)
        return lines

    assert said() == ["zebra: in the captions of fewer than 5 training pictures; the U-Net hardly knows it"]
    assert said(init_from="runs/a") == []
    monkeypatch.setattr(models, "MOST_WORDS", 2)
    assert said() == ["zebra: in the captions of few training pictures; the U-Net hardly knows it"]


@pytest.mark.parametrize("prompt", ["?!", " \N{DOG FACE} "])
def test_a_prompt_without_words_is_said_to_be_empty(prompt):
    """The built-in text encoder knows words alone: such a prompt is the empty caption."""
    encoder, lines = WordHashTextEncoder(8, 4), []
    assert not encoder([prompt]).any()
    for text in (prompt, "a dog!", ""):
        models.warn_of_unknown_words(text, SDConfig(**TINY | {"dataset": "folder"}), encoder, lines.append)
    assert lines == [f"{prompt.strip()!r}: has no word in it; to the U-Net it is the empty caption"]


def test_pictures_that_are_not_numbers_are_not_written(copy, run_here):
    weights = torch.load(copy / "run/vae_ckpt_epoch2.pth", weights_only=True)
    forge(copy / "run", "unet", "2", "vae_ckpt_epoch2.pth", {k: torch.full_like(v, 3e38) for k, v in weights.items()})
    assert_one_line_error(run_here(*SAMPLE, cwd=copy), 1, "not numbers")
    assert not list(copy.rglob("*_seed0.png"))
