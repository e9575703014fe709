"""Promises of support/checkpoint.py: a set is whole or not there, and a stopped run goes on to the bits of an unbroken one.

"Bits" are every file that a finished run leaves: weights, EMA, CSV, curves and grids; the Adam state is compared
through the steps that it leads to. A damaged, foreign or hostile file is named in one line, and every other stays as it
was, byte for byte.
"""

import contextlib
import io
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import zipfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (
    KINDS,
    SAMPLE,
    SMALL,
    STEPS,
    STEPS_PER_EPOCH,
    TINY,
    TRAIN,
    Forked,
    assert_one_line_error,
    bits,
    command,
    files,
    finish,
    flags,
    forge,
    no_hang,
    sign,
    special_file,
    wait_for,
)
from PIL import Image

import train_vae
from config import SDConfig
from support import checkpoint
from support.processes import World

# ---- Exact resume ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", [1, 2, STEPS_PER_EPOCH, STEPS_PER_EPOCH + 1, STEPS])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_stopped_at_any_step_goes_on_to_the_same_bits(begin, fork, kind, step, number):
    cwd, expected = begin(kind)
    stopped = fork(*command(kind), cwd=cwd, inject={"signal_at_step": (number, step)}).wait()
    if number == signal.SIGTERM:
        assert stopped.returncode == 143 and f"after step {step}, saved" in stopped.stdout, stopped.stderr
    else:
        assert stopped.returncode == -signal.SIGKILL
    again = finish(fork, kind, cwd, expected)
    assert f"resumed after step {step if number == signal.SIGTERM else step - 1}" in again.stdout


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_can_be_resumed(begin, fork, kind):
    cwd, expected = begin(kind)
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)):
        stopped = fork(*command(kind), cwd=cwd, inject={"signal_at_step": (number, 1)}).wait()
        assert stopped.returncode == code, stopped.stderr
        assert f"to go on: python train_{kind}.py --preset demo" in stopped.stdout
    finish(fork, kind, cwd, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_window_cut_by_a_stop_are_the_same(begin, fork, kind):
    """The mean loss of a row is taken over the steps before and after the stop."""
    cwd, expected = begin(kind)
    assert fork(*command(kind), cwd=cwd, inject={"signal_at_step": (signal.SIGINT, 2)}).wait().returncode == 130
    finish(fork, kind, cwd, expected)
    assert (cwd / f"run/{kind}_train.csv").read_text().count("\n") == 3


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_steps_that_a_killed_save_lost_are_not_written_twice(begin, fork, kind):
    """Step 3 ends a row, and is killed in its save."""
    cwd, expected = begin(kind)
    assert fork(*command(kind), cwd=cwd, inject={"kill_at": ("1_step3", 2)}).wait().returncode == -signal.SIGKILL
    assert (cwd / f"run/{kind}_train.csv").read_text().count("\n") == 2
    assert "resumed after step 2" in finish(fork, kind, cwd, expected).stdout


@pytest.mark.parametrize("kind", KINDS)
def test_curves_too_are_the_same(begin, fork, kind):
    """Drawn, as in no other test here."""
    cwd, expected = begin(kind, "unbroken")
    assert fork(*command(kind), cwd=cwd, inject={"draw_curves": True}).wait().returncode == 0
    drawn = (cwd / f"run/{kind}_curves.png").read_bytes()
    cwd, expected = begin(kind)
    stop = {"draw_curves": True, "signal_at_step": (signal.SIGINT, 4)}
    assert fork(*command(kind), cwd=cwd, inject=stop).wait().returncode == 130
    assert fork(*command(kind), cwd=cwd, inject={"draw_curves": True}).wait().returncode == 0
    assert (cwd / f"run/{kind}_curves.png").read_bytes() == drawn and drawn.startswith(b"\x89PNG")


def test_another_seed_is_another_run(begin, fork):
    """The comparison can fail."""
    cwd, expected = begin("vae")
    assert fork(*command("vae", SMALL | {"seed": 1}), cwd=cwd).wait().returncode == 0
    found = bits(cwd / "run")
    assert found.keys() == expected.keys() and all(found[k] != expected[k] for k in found)


def test_the_pace_may_change_on_resume(begin, fork):
    cwd, expected = begin("unet")
    fork(*command("unet"), cwd=cwd, inject={"signal_at_step": (signal.SIGINT, 2)}).wait()
    other = SMALL | {"save_minutes": 5, "num_workers": 1, "save_every": 4, "compile": False}
    result = fork(*command("unet", other), cwd=cwd).wait()
    assert result.returncode == 0 and bits(cwd / "run") == expected, result.stderr


def test_save_minutes_bounds_what_a_kill_costs(begin, fork):
    """With saves only at epochs a kill in epoch 2 costs its steps; with --save_minutes 0 it costs none."""
    for minutes, resumed in ((60, STEPS_PER_EPOCH), (0, STEPS_PER_EPOCH + 1)):
        cwd, _ = begin("vae", f"minutes{minutes}")
        settings = SMALL | {"save_minutes": minutes, "save_every": 1}
        at_step = {"signal_at_step": (signal.SIGKILL, STEPS_PER_EPOCH + 2)}
        fork(*command("vae", settings), cwd=cwd, inject=at_step).wait()
        assert f"resumed after step {resumed}" in fork(*command("vae", settings), cwd=cwd).wait().stdout


# ---- More or fewer epochs than planned ----

CONSTANT = SMALL | {"lr_schedule": "constant", "lr_warmup_steps": 2, "save_minutes": 60}


@pytest.fixture(scope="module")
def constant(tmp_path_factory):
    """kind -> bits of a run of two epochs at a constant learning rate; the U-Net's with its VAE."""
    cwd, found = tmp_path_factory.mktemp("constant"), {}
    for kind in KINDS:
        assert Forked(cwd / "process", *command(kind, CONSTANT), cwd=cwd).wait().returncode == 0
        found[kind] = files(cwd / "run"), bits(cwd / "run")
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first", [["--num_epochs", 1], ["--num_epochs", 9], ["--max_steps", 2], ["--max_steps", 4]])
def test_a_run_at_a_constant_rate_goes_on_to_the_bits_of_a_longer_one(constant, tmp_path, fork, kind, first):
    """Finished after an epoch, stopped on the way to more of them, or ended within an epoch."""
    if kind == "unet":
        (tmp_path / "run").mkdir()
        for file, data in constant["vae"][0].items():
            (tmp_path / "run" / file).write_bytes(data)
    stop = {"signal_at_step": (signal.SIGINT, 5)} if first[1] == 9 else {}
    started = fork(*command(kind, CONSTANT), *first, cwd=tmp_path, inject=stop).wait()
    assert started.returncode == (130 if stop else 0), started.stderr
    plan = f"{first[0][2:]} was {first[1]}, now {2 if first[0] == '--num_epochs' else None}"
    again = fork(*command(kind, CONSTANT), cwd=tmp_path).wait()
    assert again.returncode == 0 and f"{plan}: the learning rate is constant, so this is exact" in again.stdout
    found, expected = bits(tmp_path / "run"), constant[kind][1]
    if first[0] == "--max_steps":  # the tables have a row of the end that was none
        expected = {
            name: bits for name, bits in expected.items() if not name.endswith((".csv", "curves.png", "state2.pth"))
        }
    assert found | expected == found
    assert "finished (epoch 2)" in fork(*command(kind, CONSTANT), cwd=tmp_path).wait().stdout


@pytest.mark.parametrize("kind", KINDS)
def test_a_finished_run_goes_on_along_the_cosine_of_more_epochs(begin, fork, kind):
    """From the trained weights; stopped on the way it comes to the bits of one that was not."""
    longer, found = SMALL | {"num_epochs": 4, "lr_warmup_steps": 2}, []
    for name, stops in (("unbroken", []), ("stopped", [{"signal_at_step": (signal.SIGTERM, n)} for n in (1, 3)])):
        cwd, _ = begin(kind, name)
        assert fork(*command(kind, longer | {"num_epochs": 2}), cwd=cwd).wait().returncode == 0
        trained = bits(cwd / "run")
        for stop in stops:
            assert fork(*command(kind, longer), cwd=cwd, inject=stop).wait().returncode == 143
        result = fork(*command(kind, longer), cwd=cwd).wait()
        assert result.returncode == 0, result.stderr
        found.append(bits(cwd / "run"))
        weights = {name for name in trained if name.endswith("2.pth")}
        assert weights and all(found[-1][name] == trained[name] for name in weights)
        if not stops:
            said = "num_epochs was 2, now 4: the learning rate goes on along the cosine of all 12 steps, from 0.00017"
            assert f"{said} down to 0; the optimizer begins anew from the trained weights" in result.stdout
    assert found[0] == found[1]
    assert (cwd / f"run/{kind}_held_out.csv").read_text().count("\n") == 5


def test_fewer_epochs_than_were_trained_are_refused_or_already_done(stopped_run, fork):
    cwd, _ = stopped_run("vae")
    before = bits(cwd / "run")
    result = fork(*command("vae"), "--max_steps", 1, cwd=cwd).wait()
    assert_one_line_error(result, 1, "has taken 2 steps of 1 asked for (max_steps was None, now 1)", "--overwrite")
    assert bits(cwd / "run") == before
    ended = fork(*command("vae"), "--max_steps", 3, cwd=cwd).wait()
    assert ended.returncode == 0 and json.loads((cwd / "run/vae_set1.json").read_text())["finished"], ended.stderr
    fewer = fork(*command("vae"), "--max_steps", 2, cwd=cwd).wait()
    assert fewer.returncode == 0 and "this run is finished (epoch 1)" in fewer.stdout


# ---- From another run's weights ----


def test_a_run_starts_from_another_runs_weights(copy, tmp_path, run_here, fork):
    """Both trainers: the first set is those weights, the average too; the other run may go once it has begun."""
    (copy / "new").mkdir()
    for name in ("vae_ckpt_epoch2.pth", "vae_set2.json"):
        shutil.copy(copy / "run" / name, copy / "new" / name)
    before = files(copy / "run")
    for kind, run in (("vae", "newer"), ("unet", "new")):
        words = (f"train_{kind}.py", "--preset", "demo", "--run_dir", run, "--init_from", "run")
        words += (*flags(TINY | {"image_size": 48 if kind == "vae" else 32, "lr": 1e-4}),)
        stopped = fork(*words, cwd=copy, inject={"signal_at_step": (signal.SIGINT, 1)}).wait()
        assert stopped.returncode == 130 and "starting from run/" in stopped.stdout, stopped.stderr
        assert "warning: --init_from" not in stopped.stderr
        for prefix, source in {"vae": {"vae_ckpt_epoch": "vae_ckpt_epoch"}}.get(
            kind, {"unet_ckpt": "unet_ckpt"}
        ).items():
            first = torch.load(copy / run / f"{prefix}1_step0.pth", weights_only=True)
            theirs = torch.load(copy / f"run/{source}2.pth", weights_only=True)
            assert all(torch.equal(first[k], v) for k, v in theirs.items())
    average = torch.load(copy / "new/ema_unet_ckpt1_step0.pth", weights_only=True)
    assert all(torch.equal(average[k], v) for k, v in weights_of(copy).items()) and files(copy / "run") == before
    (copy / "run").rename(copy / "gone")
    assert run_here(*words, cwd=copy).returncode == 0
    assert_one_line_error(run_here(*words, "--overwrite", cwd=copy), 1, "--init_from run", "train_unet.py")
    assert (copy / "new/unet_ckpt2.pth").exists()  # a mistake costs nothing


def test_weights_of_another_shape_or_meaning_are_named(copy, run_here):
    words = ("train_vae.py", "--preset", "demo", "--run_dir", "new", "--init_from", "run")
    other = run_here(*words, *flags(TINY | {"latent_channels": 3}), cwd=copy)
    assert_one_line_error(other, 1, "--init_from run", "latent_channels 4 there, 3 here")
    own = run_here("train_vae.py", *TRAIN, "--init_from", "run", "--overwrite", *flags(TINY), cwd=copy)
    assert_one_line_error(own, 2, "--run_dir: is what --init_from names")
    assert run_here(*words, *flags(TINY | {"seed": 3}), cwd=copy).returncode == 0
    words = ("train_unet.py", *words[1:], *flags(TINY), "--max_steps", 1)
    result = run_here(*words, cwd=copy)
    assert result.returncode == 0 and "run: has learned the latents of another VAE" in result.stderr, result.stderr
    assert "has learned the embeddings" not in result.stderr
    result = run_here(*words, "--overwrite", "--text_encoder", "words", cwd=copy)
    assert "run: has learned the embeddings of --text_encoder hash; give the same" in result.stderr, result.stderr
    flow = run_here(*words, "--overwrite", "--prediction_type", "flow", cwd=copy)
    assert_one_line_error(flow, 1, "prediction_type epsilon there, flow here")


# ---- Kill sweep ----


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_kill_at_every_point_of_a_save_leaves_a_whole_set(begin, fork, kind):
    """kill -9 within each write, and before each sync, rename and removal, of the save after step 2."""
    for n in range(1, 100):
        cwd, expected = begin(kind, f"point{n}")
        killed = fork(*command(kind), cwd=cwd, inject={"kill_at": ("1_step2", n)}).wait()
        if killed.returncode == 0:
            break
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        again = finish(fork, kind, cwd, expected)
        assert "resumed after step 1" in again.stdout or "resumed after step 2" in again.stdout
    print(f"{kind}: {n - 1} points")
    assert n - 1 >= (11 if kind == "vae" else 21) and bits(cwd / "run") == expected


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_kills_at_random_moments_cost_no_bit(begin, fork, kind):
    """Twenty-five kill -9 for each trainer, at moments that a seed draws, each followed by a resume."""
    moments, longest, kills, runs = random.Random(0), 0.4, 0, 0
    while kills < 25:
        runs += 1
        cwd, expected = begin(kind, f"run{runs}")
        while True:
            one = fork(*command(kind), cwd=cwd)
            one.process.join(moments.uniform(0.02, longest))
            if one.process.exitcode is not None:
                break
            one.process.kill()
            one.process.join()
            kills, longest = kills + 1, 1.05 * longest  # or on a busy machine none would live to its next save
        finish(fork, kind, cwd, expected)
    print(f"{kind}: {kills} kills in {runs} runs")


# ---- Sets that are damaged, missing, changed: going on ----


@pytest.fixture(scope="module")
def stopped(unbroken, tmp_path_factory):
    """kind -> a directory in which its training has been stopped after step 2."""
    found = {}
    for kind in KINDS:
        cwd = tmp_path_factory.mktemp("stopped")
        (cwd / "run").mkdir()
        for file, data in unbroken[kind][0].items():
            (cwd / "run" / file).write_bytes(data)
        stop = {"signal_at_step": (signal.SIGINT, 2)}
        assert Forked(cwd / "process", *command(kind), cwd=cwd, inject=stop).wait().returncode == 130
        found[kind] = cwd
    return found


@pytest.fixture
def stopped_run(stopped, unbroken, tmp_path):
    """stopped_run(kind) -> a copy of a training that was stopped after step 2, and the bits that it must come to."""

    def make(kind, name="stopped"):
        shutil.copytree(stopped[kind] / "run", tmp_path / name / "run")
        return tmp_path / name, unbroken[kind][1]

    return make


@pytest.mark.parametrize(
    "kind, file",
    [
        ("vae", "vae_ckpt_epoch1_step2.pth"),
        ("unet", "unet_ckpt1_step2.pth"),
        ("unet", "t_ember_ckpt1_step2.pth"),
        ("unet", "ema_unet_ckpt1_step2.pth"),
        ("unet", "unet_state1_step2.pth"),
        ("unet", "unet_set1_step2.json"),
    ],
)
@pytest.mark.parametrize("how", ["flip", "missing", "cut", "empty"])
def test_a_damaged_newest_set_is_put_aside_for_the_one_before(stopped_run, fork, kind, file, how):
    cwd, expected = stopped_run(kind)
    path = cwd / "run" / file
    data = path.read_bytes()
    flipped = data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]
    path.unlink()
    if how != "missing":
        path.write_bytes({"flip": flipped, "cut": data[: len(data) // 2], "empty": b""}[how])
    again = fork(*command(kind), cwd=cwd).wait()
    assert again.returncode == 0 and "resumed after step 1" in again.stdout, again.stderr
    no_manifest = how == "missing" and file.endswith(".json")  # then the set is not there, and nothing is damaged
    assert (f"warning: run/{file}" in again.stderr) != no_manifest
    if how != "missing":
        assert (cwd / f"run/{file}.damaged").exists()
    assert bits(cwd / "run") == expected


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_mutated_set_is_never_gone_on_from(stopped_run, run_here, kind):
    """Thirty mutations of a file of the newest set: refused in one line, or put aside and gone on to the same bits.

    A third of them are vouched for by the manifest; then only a clean answer is promised.
    """
    from test_fuzz import assert_clean, mutate

    dice, outcomes = random.Random(5), set()
    cwd, expected = stopped_run(kind, "good")
    names = sorted(p.name for p in (cwd / "run").glob("*1_step2*") if kind in p.name or "ember" in p.name)
    for i in range(30):
        here, _ = stopped_run(kind, str(i))
        name = dice.choice(names)
        bad, signed = mutate((here / "run" / name).read_bytes(), dice), name.endswith(".pth") and dice.random() < 0.4
        if signed:
            forge(here / "run", kind, "1_step2", name, bad)
        else:
            (here / "run" / name).write_bytes(bad)
        with no_hang(20):
            result = run_here(*command(kind), cwd=here)
        assert_clean(result)
        outcomes.add(result.returncode)
        if result.returncode == 0 and not signed:
            assert bits(here / "run") | expected == bits(here / "run"), name  # a file put aside may be there too
        shutil.rmtree(here)
    assert 0 in outcomes


def test_nothing_usable_is_an_error_and_not_a_fresh_start(stopped_run, fork):
    cwd, _ = stopped_run("vae")
    for path in (cwd / "run").glob("vae_state*"):
        path.write_bytes(b"")
    before = bits(cwd / "run")
    assert_one_line_error(fork(*command("vae"), cwd=cwd).wait(), 1, "vae_state1_step2.pth", "--overwrite")
    assert bits(cwd / "run") == before
    for path in (cwd / "run").glob("vae_set*"):
        path.unlink()
    assert_one_line_error(fork(*command("vae"), cwd=cwd).wait(), 1, "holds", "--overwrite")
    assert bits(cwd / "run") == before
    over = fork(*command("vae"), "--overwrite", cwd=cwd, inject={"signal_at_step": (signal.SIGINT, 2)}).wait()
    assert over.returncode == 130 and "--overwrite" not in over.stdout.split("to go on:")[1]


def test_a_run_with_other_settings_is_refused(stopped_run, fork):
    """The error lists what differs."""
    cwd, _ = stopped_run("vae")
    changed = fork(*command("vae", SMALL | {"lr": 0.5, "batch_size": 2}), cwd=cwd).wait()
    assert_one_line_error(changed, 1, "lr was 0.001, now 0.5", "batch_size was 4, now 2", "--overwrite")


@pytest.mark.parametrize("change", [{"batch_size": 2}, {"lr": 0.1, "seed": 5}, {"block_out_channels": (4, 4)}, {}])
def test_what_no_step_was_taken_with_gives_way(begin, tmp_path, fork, change):
    """Killed in the first step, as where memory is short, and begun again with other settings; or its only set is damaged."""
    cwd, _ = begin("vae")
    killed = fork(*command("vae"), cwd=cwd, inject={"signal_at_step": (signal.SIGKILL, 1)}).wait()
    assert killed.returncode == -signal.SIGKILL and (cwd / "run/vae_set1_step0.json").exists()
    for name in ("vae_train.csv", "vae_ckpt_epoch1_step1.pth"):
        (cwd / "run" / name).write_text("of steps that are lost")
    if not change:
        (cwd / "run/vae_state1_step0.pth").write_bytes(b"")
    words = command("vae", SMALL | change)
    result = fork(*words, cwd=cwd).wait()
    assert result.returncode == 0 and "begins anew, as no step was taken before: " in result.stdout, result.stderr
    assert all(f"{name} was" in result.stdout for name in change)
    (tmp_path / "fresh").mkdir()
    assert fork(*words, cwd=tmp_path / "fresh").wait().returncode == 0
    assert bits(cwd / "run") == bits(tmp_path / "fresh/run")


def test_a_vae_trained_again_before_the_first_step_gives_way(begin, fork):
    cwd, _ = begin("unet")
    fork(*command("unet"), cwd=cwd, inject={"signal_at_step": (signal.SIGKILL, 1)}).wait()
    assert fork(*command("vae", SMALL | {"lr": 0.002}), "--overwrite", cwd=cwd).wait().returncode == 0
    result = fork(*command("unet"), cwd=cwd).wait()
    assert result.returncode == 0 and "(the VAE is another)" in result.stdout, result.stderr


def test_how_pictures_are_made_may_be_corrected_in_a_stopped_and_in_a_finished_run(begin, fork, run_here):
    """And sample.py goes by the newest command; no weight and no figure depends on it."""
    cwd, expected = begin("unet")
    settings = SMALL | {"sample_prompts": ("a dgo",), "sample_steps": 3}
    assert (
        fork(*command("unet", settings), cwd=cwd, inject={"signal_at_step": (signal.SIGINT, 4)}).wait().returncode
        == 130
    )
    corrected = SMALL | {"sample_prompts": ("a dog", "a cat"), "sample_steps": 2}
    result = fork(*command("unet", corrected), cwd=cwd, inject={"signal_at_step": (signal.SIGINT, 1)}).wait()
    assert result.returncode == 130 and "resumed after step 4" in result.stdout, result.stderr
    sampled = ("sample.py", "--prompt", "x", "--run_dir", "run", "--num_images", 1)
    assert run_here(*sampled, cwd=cwd).returncode == 0  # the newest whole epoch was saved before
    assert b"Steps: 2," in (cwd / "run/samples/x_seed0.png").read_bytes()
    assert fork(*command("unet", corrected), cwd=cwd).wait().returncode == 0
    kept = {k: v for k, v in expected.items() if not k.endswith(".png")}
    assert bits(cwd / "run") | kept == bits(cwd / "run")
    again = fork(*command("unet", corrected | {"sample_steps": 4}), cwd=cwd).wait()
    assert again.returncode == 0 and "this run is finished" in again.stdout, again.stderr
    assert run_here(*sampled, cwd=cwd).returncode == 0
    assert b"Steps: 4," in (cwd / "run/samples/x_seed0_2.png").read_bytes()


def test_settings_of_the_other_training_may_change(stopped_run, fork):
    for kind, change in (("vae", {"caption_dropout": 0.1, "guidance_scale": 2.0}), ("unet", {"l1_weight": 0.5})):
        cwd, expected = stopped_run(kind, kind)
        assert fork(*command(kind, SMALL | change), cwd=cwd).wait().returncode == 0
        assert bits(cwd / "run") | expected == bits(cwd / "run")
        finish(fork, kind, cwd, expected)  # with the settings of before it is the same run


def test_a_batch_may_be_computed_in_parts_from_the_middle_of_a_run_on(stopped_run, fork):
    for kind in KINDS:
        cwd, expected = stopped_run(kind, kind)
        result = fork(*command(kind, SMALL | {"grad_accumulation": 2}), cwd=cwd).wait()
        assert result.returncode == 0 and "resumed after step 2" in result.stdout, result.stderr
        assert bits(cwd / "run").keys() == expected.keys()


def test_checkpointed_blocks_give_the_same_bits_from_the_middle_of_a_run_on(stopped_run, fork):
    for kind in KINDS:
        cwd, expected = stopped_run(kind, kind)
        result = fork(*command(kind, SMALL | {"grad_checkpointing": True}), cwd=cwd).wait()
        assert result.returncode == 0 and "resumed after step 2" in result.stdout, result.stderr
        assert bits(cwd / "run") == expected


def pictures_of_mine(folder):
    """Twenty pictures and captions of a user's own -> the settings of a run on them."""
    (folder / "mine/images").mkdir(parents=True)
    for i in range(20):
        Image.new("RGB", (20, 20), (10 * i, 0, 0)).save(folder / f"mine/images/{i}.png")
        (folder / f"mine/images/{i}.txt").write_text(f"red {i}")
    return SMALL | {"dataset": "folder", "data_root": "mine", "max_images": 100}


def test_changed_data_is_refused(tmp_path, fork):
    mine = pictures_of_mine(tmp_path)
    assert fork(*command("vae", mine), cwd=tmp_path).wait().returncode == 0
    at_two = {"signal_at_step": (signal.SIGINT, 2)}
    assert fork(*command("unet", mine), cwd=tmp_path, inject=at_two).wait().returncode == 130
    (tmp_path / "mine/images/3.txt").write_text("blue 3")
    assert_one_line_error(fork(*command("unet", mine), cwd=tmp_path).wait(), 1, "captions are others", "--overwrite")
    (tmp_path / "mine/images/3.txt").write_text("red 3")
    assert fork(*command("unet", mine), cwd=tmp_path).wait().returncode == 0


def test_a_held_out_picture_that_would_be_trained_on_is_refused(monkeypatch):
    """The same pictures in the same order, one less of them held out, are other data."""
    pixels, found = torch.arange(20 * 3 * 4, dtype=torch.uint8).view(20, 3, 2, 2), []
    for first in (17, 18):
        run = SimpleNamespace(world=World(0, 1, torch.device("cpu")), about={})
        parts = slice(0, first), slice(first, 20)
        monkeypatch.setattr("data.open_dataset", lambda cfg, margin, parts=parts: parts)
        monkeypatch.setattr("data.read_pictures", lambda part, cfg, progress: (pixels[part], [["a dog"]] * 20))
        train_vae.read_data(SDConfig(), run)
        found.append(run.about["data"])
    assert found[0] != found[1]


def test_a_vae_trained_again_is_refused(stopped_run, fork):
    cwd, _ = stopped_run("unet")
    other = SMALL | {"lr": 0.002}
    assert fork(*command("vae", other), "--overwrite", cwd=cwd).wait().returncode == 0
    assert_one_line_error(fork(*command("unet"), cwd=cwd).wait(), 1, "the VAE is another", "--overwrite")


def test_a_unet_goes_on_with_the_vae_that_it_began_with_though_that_has_been_trained_further(tmp_path, fork):
    assert fork(*command("vae", SMALL), "--max_steps", STEPS_PER_EPOCH, cwd=tmp_path).wait().returncode == 0
    shutil.copytree(tmp_path / "run", tmp_path / "apart/run")
    assert fork(*command("unet"), cwd=tmp_path / "apart").wait().returncode == 0
    at_two = {"signal_at_step": (signal.SIGINT, 2)}
    assert fork(*command("unet"), cwd=tmp_path, inject=at_two).wait().returncode == 130
    assert fork(*command("vae"), cwd=tmp_path).wait().returncode == 0
    again = fork(*command("unet"), cwd=tmp_path).wait()
    assert again.returncode == 0, again.stderr
    assert "goes on with its own VAE, of epoch 1; --overwrite starts over with that of 2" in again.stdout
    found, expected = bits(tmp_path / "run"), bits(tmp_path / "apart/run")
    assert all(found[name] == expected[name] for name in expected if "unet" in name or "t_ember" in name)
    anew = fork(*command("unet"), "--overwrite", cwd=tmp_path).wait()
    assert "its own VAE" not in anew.stdout and "VAE: run/vae_ckpt_epoch2.pth" in anew.stdout


@pytest.mark.parametrize("what, was", [("threads", 99), ("processor", "another"), ("torch", "1.0")])
def test_another_machine_is_warned_of(stopped_run, fork, what, was):
    cwd, _ = stopped_run("vae")
    for path in (cwd / "run").glob("vae_set*.json"):
        manifest = json.loads(path.read_text())
        manifest["machine"][what] = was
        path.write_text(sign(manifest))
    result = fork(*command("vae"), cwd=cwd).wait()
    assert result.returncode == 0 and f"warning: no longer exact to the bit: {what} was {was}" in result.stderr


def test_a_future_format_is_named(stopped_run, fork):
    cwd, _ = stopped_run("vae")
    path = cwd / "run/vae_set1_step2.json"
    path.write_text(sign(json.loads(path.read_text()) | {"format": 7}))
    assert_one_line_error(fork(*command("vae"), cwd=cwd).wait(), 1, "format 7", "format 1")


BAD_ADAM = {
    "nan": lambda adam: adam | {"exp_avg": adam["exp_avg"] * float("nan")},
    "integers": lambda adam: adam | {"exp_avg_sq": adam["exp_avg_sq"].long()},
    "three steps": lambda adam: adam | {"step": torch.zeros(3)},
    "infinite step": lambda adam: adam | {"step": torch.tensor(float("inf"))},
    "no tensor": lambda adam: adam | {"exp_avg": 3},
    "another shape": lambda adam: {k: torch.zeros(3) for k in ("exp_avg", "exp_avg_sq", "step")},
}
BAD_STATES = {
    **{
        how: lambda good, bad=bad: good | {"adam": [bad(good["adam"][0]), *good["adam"][1:]]}
        for how, bad in BAD_ADAM.items()
    },
    "too few": lambda good: good | {"adam": good["adam"][:3]},
    "empty": lambda good: {},
    "a list": lambda good: [],
    "a step before the first": lambda good: good | {"counters": good["counters"] | {"step": -5}},
    "a step far away": lambda good: good | {"counters": good["counters"] | {"step": 10**9}},
    "counters missing": lambda good: good | {"counters": {"step": 2}},
    "a counter too many": lambda good: good | {"counters": good["counters"] | {"more": 2}},
    "a counter of another kind": lambda good: good | {"counters": good["counters"] | {"count": "2"}},
    "another window": lambda good: good | {"counters": good["counters"] | {"window": torch.zeros(7)}},
    "no tables": lambda good: good | {"csv": 3},
}


@pytest.mark.parametrize("how", BAD_STATES)
def test_a_state_of_another_model_is_refused(stopped_run, run_here, how):
    cwd, _ = stopped_run("vae")
    good = torch.load(cwd / "run/vae_state1_step2.pth", weights_only=True)
    for tag in ("1_step1", "1_step2"):
        forge(cwd / "run", "vae", tag, f"vae_state{tag}.pth", BAD_STATES[how](good))
    assert_one_line_error(run_here(*command("vae"), cwd=cwd), 1, "vae_state1_step2.pth", "--overwrite")


# ---- Which epochs stay ----


@pytest.mark.parametrize("keep, left", [(0, ["2", "4", "5"]), (1, ["5"]), (2, ["4", "5"])])
def test_every_so_many_epochs_stay_and_of_them_the_newest(begin, fork, keep, left):
    """And the one in which a run was stopped is among the newest while it is."""
    cwd, _ = begin("vae")
    settings = SMALL | {"num_epochs": 5, "save_every": 2, "keep_last": keep}
    stop = {"signal_at_step": (signal.SIGINT, 3 * STEPS_PER_EPOCH + 2)}
    assert fork(*command("vae", settings), cwd=cwd, inject=stop).wait().returncode == 130
    assert {"vae_ckpt_epoch3.pth", "vae_set3.json"} <= {p.name for p in (cwd / "run").iterdir()}
    assert fork(*command("vae", settings), cwd=cwd).wait().returncode == 0
    for pattern in ("vae_ckpt_epoch*", "vae_set*"):
        assert sorted(re.findall(r"\d+", p.name)[0] for p in (cwd / "run").glob(pattern)) == left


@pytest.mark.parametrize("n", range(19))
def test_sets_go_as_a_whole_wherever_their_deletion_is_killed(stopped_run, monkeypatch, n):
    """No manifest ever lists what is gone, and what a kill leaves goes at the next call. Epoch 1 goes, 2 stays."""
    cwd, _ = stopped_run("unet")
    monkeypatch.chdir(cwd)
    for path in (cwd / "run").glob("*1_step2*"):
        for tag in "12":
            shutil.copy(path, str(path).replace("1_step2", tag))
    for tag in "12":
        path = cwd / f"run/unet_set{tag}.json"
        path.write_text(sign(json.loads(path.read_text().replace("1_step2", tag)) | {"epoch": int(tag)}))
    args = SimpleNamespace(run_dir="run", overwrite=False, max_steps=None, preset="demo")
    run, calls = checkpoint.Run(args, "unet", SDConfig(**SMALL), World(0, 1, torch.device("cpu"))), []

    def before(path, *rest, real):
        calls.append(path)
        listed = [json.loads(p.read_text())["files"] for p in (cwd / "run").glob("unet_set*.json")]
        assert all((cwd / "run" / name).exists() for names in listed for name in names if "state" not in name)
        if len(calls) == n:
            raise KeyboardInterrupt
        real(path, *rest)

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        for name in ("replace", "remove"):
            patch.setattr(os, name, partial(before, real=getattr(os, name)))
        run.tidy(1)
    assert len(calls) == n or (n == 0 and len(calls) > 18)
    run.tidy(1)
    left = {p.name for p in (cwd / "run").iterdir() if "unet" in p.name or "ember" in p.name}
    weights = {f"{name}2.pth" for name in ("unet_ckpt", "t_ember_ckpt", "ema_unet_ckpt", "unet_state")}
    assert left == weights | {"unet_set2.json"}


# ---- The directory ----


def test_what_a_run_killed_while_it_cleaned_up_has_left_goes_at_the_next_call(begin, fork):
    cwd, _ = begin("vae")
    assert fork(*command("vae", SMALL | {"save_every": 1}), cwd=cwd).wait().returncode == 0
    names = {p.name for p in (cwd / "run").iterdir()}
    left = ["vae_state1.pth", "vae_state2_step4.pth", "vae_ckpt_epoch2_step4.pth", "vae_set2_step4.json"]
    left += ["vae_set2.json.tmp", "config.json.tmp", "vae_train.csv.tmp"]  # beside whole ones
    for name in (*left, "vae_ckpt_epoch2_step5.pth"):
        (cwd / "run" / name).write_bytes((cwd / "run/vae_set2.json").read_bytes())
    again = fork(*command("vae"), cwd=cwd).wait()
    assert again.returncode == 0 and "finished" in again.stdout
    assert {p.name for p in (cwd / "run").iterdir()} == names


def test_two_trainings_in_one_directory_are_refused_and_a_dead_one_is_not_in_the_way(begin, fork):
    cwd, expected = begin("vae")
    one = fork(*command("vae"), cwd=cwd, inject={"hang_at_step": 2})
    wait_for(lambda: one.out.exists() and "hanging" in one.out.read_text())
    assert_one_line_error(fork(*command("vae"), cwd=cwd).wait(), 1, f"process {one.process.pid}", "--run_dir")
    one.process.kill()
    one.process.join()
    finish(fork, "vae", cwd, expected)


def test_overwrite_deletes_what_a_run_writes_and_nothing_else(copy, run_here):
    names = "vae_notes.txt", "unet_ckpt_backup.pth", "vae_set.json", "unet_samples_best.png"
    mine = dict.fromkeys(names, b"mine")
    for name, content in mine.items():
        (copy / "run" / name).write_bytes(content)
    for script in ("train_vae.py", "train_unet.py"):
        assert run_here(script, *TRAIN, "--overwrite", *flags(TINY), "--max_steps", 1, cwd=copy).returncode == 0
    after = files(copy / "run")
    assert {name: after[name] for name in mine} == mine
    assert {n for n in after if n.startswith("unet_ckpt")} == {"unet_ckpt1.pth", "unet_ckpt_backup.pth"}


def test_files_of_an_unknown_run_are_not_deleted(tiny_run, tmp_path, run_here):
    (tmp_path / "run").mkdir()
    shutil.copy(tiny_run / "run/vae_ckpt_epoch2.pth", tmp_path / "run")
    result = run_here("train_vae.py", *TRAIN, *flags(TINY), cwd=tmp_path)
    assert_one_line_error(result, 1, "vae_ckpt_epoch2.pth", "--overwrite")
    assert (tmp_path / "run/vae_ckpt_epoch2.pth").exists()


@pytest.mark.parametrize("how", ["pipe", "deep", "device"])
def test_what_stands_in_the_place_of_config_json_is_not_in_the_way(tmp_path, run_here, how):
    """No script reads it, so whatever it is becomes a fresh one."""
    (tmp_path / "run").mkdir()
    path = tmp_path / "run/config.json"
    path.write_text("[" * 100_000)
    if how != "deep":
        special_file(path, how)
    with no_hang(30):
        result = run_here(*command("vae"), "--max_steps", 1, cwd=tmp_path)
    assert result.returncode == 0 and "train_vae" in json.loads(path.read_text())


@pytest.mark.parametrize("run_dir, word", [("file", "file"), ("file/run", "file"), ("/proc/nothing", "/proc")])
def test_a_run_directory_that_cannot_be_is_named_before_the_data_is_read(tmp_path, run_here, run_dir, word):
    (tmp_path / "file").write_text("mine")
    result = run_here("train_vae.py", "--preset", "demo", *flags(TINY), "--run_dir", run_dir, cwd=tmp_path)
    assert_one_line_error(result, 1, word)
    assert "read training pictures" not in result.stdout
    assert (tmp_path / "file").read_text() == "mine"


def test_a_run_directory_that_vanishes_is_an_error(tmp_path, fork):
    result = fork(*command("vae"), cwd=tmp_path, inject={"remove_run_at_step": 2}).wait()
    assert_one_line_error(result, 1, "run/")


# ---- The disk ----


def test_a_disk_that_fills_up_later_leaves_the_last_set(tmp_path, fork):
    """No file may grow beyond a size that the first sets keep and Adam's state after one step does not."""
    words = ("train_vae.py", *TRAIN, *flags(TINY | {"save_minutes": 0, "optimizer": "adam"}))
    full = fork(*words, cwd=tmp_path, inject={"limit_file_size": 400_000}).wait()
    assert_one_line_error(full, 1, "vae_state1_step1.pth", "make room", "the same command again")
    assert (tmp_path / "run/vae_set1_step0.json").exists() and not list((tmp_path / "run").glob("*.tmp"))
    again = fork(*words, cwd=tmp_path).wait()
    assert again.returncode == 0 and "resumed after step 0" in again.stdout, again.stderr


@pytest.mark.parametrize("number", [1, 2, 5, 12, 20])
def test_a_failing_flush_keeps_the_old_set(tmp_path, fork, number):
    result = fork(*command("vae"), cwd=tmp_path, inject={"fail_fsync": number}).wait()
    assert_one_line_error(result, 1, "run/", "could not be written")
    assert fork(*command("vae"), cwd=tmp_path).wait().returncode == 0


def test_at_every_moment_a_whole_set_is_there(tmp_path, fork):
    """Looked at before each rename and removal of a run that saves after every step and keeps two sets."""
    result = fork(*command("vae"), cwd=tmp_path, inject={"look_at_sets": "vae"}).wait()
    assert result.returncode == 0, result.stderr
    looks = [line for line in result.stdout.splitlines() if line.startswith("whole sets:")]
    assert len(looks) > 40 and "whole sets: 0" not in looks[looks.index("whole sets: 1") :]


# ---- Files that are damaged, foreign, hostile: sampling ----


def weights_of(copy, name="unet_ckpt2.pth"):
    return torch.load(copy / "run" / name, weights_only=True)


class Executes:
    """A pickle that runs a command when it is loaded without care."""

    def __reduce__(self):
        return os.system, ("touch pwned",)


def in_zip(content, size=0):
    """A file as torch.save makes them, with this pickle, of at least that size: else its size alone would give it away."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as z:
        z.writestr("archive/data.pkl", content)
        z.writestr("archive/version", "3\n")
        z.writestr("archive/data/0", bytes(size))
    return data.getvalue()


def with_tail(content, size=0):
    return content + bytes(size)


DAMAGE = {
    "half": lambda data: data[: len(data) // 2],
    "last byte": lambda data: data[:-1],
    "last hundred": lambda data: data[:-100],
    "empty": lambda data: b"",
    "html": lambda data: b"<html>404</html>",
    "pointer": lambda data: b"version https://git-lfs.github.com/spec/v1\n",
    "random": lambda data: bytes(range(256)),
    "zip": lambda data: in_zip(b"hello"),
    "flipped": lambda data: data[:9000] + bytes([data[9000] ^ 4]) + data[9001:],
}
MODEL_FILES = ["unet_ckpt2.pth", "t_ember_ckpt2.pth", "vae_ckpt_epoch2.pth"]


@pytest.mark.parametrize("file", MODEL_FILES)
@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_checkpoint_is_named(copy, run_here, file, how):
    path = copy / "run" / file
    path.write_bytes(DAMAGE[how](path.read_bytes()))
    before = files(copy)
    assert_one_line_error(run_here(*SAMPLE, cwd=copy), 1, file, "restore")
    assert files(copy) == before


@pytest.mark.parametrize("how", ["half", "empty", "html", "pointer", "random", "zip"])
def test_a_damaged_checkpoint_that_its_manifest_vouches_for_is_named(copy, run_here, how):
    """A stranger signs what he sends: behind the checksum stands a reader that trusts nothing either."""
    good = (copy / "run/unet_ckpt2.pth").read_bytes()
    bad = DAMAGE[how](good)
    forge(copy / "run", "unet", "2", "unet_ckpt2.pth", with_tail(bad, len(good) - len(bad)))
    result = run_here(*SAMPLE, cwd=copy)
    assert_one_line_error(result, 1, "unet_ckpt2.pth", "restore")
    assert "weights_only" not in result.stderr


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("wrap", [in_zip, with_tail])
@pytest.mark.parametrize("file", MODEL_FILES)
def test_a_pickle_that_executes_does_not(copy, run_here, monkeypatch, protocol, wrap, file):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    evil = wrap(pickle.dumps({"conv_in.weight": Executes()}, protocol), (copy / "run" / file).stat().st_size)
    forge(copy / "run", "unet", "2", file, evil)
    assert_one_line_error(run_here(*SAMPLE, cwd=copy), 1, file)
    assert not list(copy.rglob("pwned"))


def test_the_pickle_of_the_test_above_does_execute_when_loaded_without_care(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Executes()))
    assert (tmp_path / "pwned").exists()


NO_STATE_DICTS = {
    "module": torch.nn.Linear(2, 2),
    "path": Path("x"),
    "generator": {"rng": np.random.RandomState(0).get_state()},
    "list": [1, 2],
    "number": {"a": 1},
    "number as a name": {3: torch.ones(1)},
}


@pytest.mark.parametrize("what", NO_STATE_DICTS)
def test_what_is_no_state_dict_is_refused(copy, run_here, what):
    forge(copy / "run", "unet", "2", "unet_ckpt2.pth", NO_STATE_DICTS[what])
    assert_one_line_error(run_here(*SAMPLE, cwd=copy), 1, "unet_ckpt2.pth")


CHANGES = {  # of the first tensor of a checkpoint
    "nan": lambda value: value * float("nan"),
    "shape": lambda value: value[:1],
    "dtype": lambda value: value.double(),
    "sparse": lambda value: value.to_sparse(),
    "meta": lambda value: value.to("meta"),
    "nested": lambda value: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "stride": lambda value: torch.ones(1).expand(2**40),
}


@pytest.mark.parametrize("how", [*CHANGES, "missing", "extra", "prefix", "compiled"])
def test_weights_that_do_not_fit_are_refused_with_the_tensor(copy, run_here, how):
    weights = weights_of(copy)
    first = word = next(iter(weights))
    if how in CHANGES:
        weights[first] = CHANGES[how](weights[first])
        word = "no plain weights" if how in ("sparse", "meta", "nested") else first
    elif how == "missing":
        del weights[first]
    elif how == "extra":
        weights[word := "extra"] = torch.ones(1)
    else:
        prefix, word = "module." if how == "prefix" else "_orig_mod.", "UNetLatent"
        weights = {prefix + name: value for name, value in weights.items()}
    forge(copy / "run", "unet", "2", "unet_ckpt2.pth", weights)
    assert_one_line_error(run_here(*SAMPLE, cwd=copy), 1, "unet_ckpt2.pth", word)


@pytest.mark.parametrize("taken", MODEL_FILES)
@pytest.mark.parametrize("put", MODEL_FILES)
@pytest.mark.parametrize("signed", [False, True])
def test_one_model_in_the_place_of_another_is_refused(copy, run_here, taken, put, signed):
    data = (copy / "run" / taken).read_bytes()
    if signed:
        forge(copy / "run", "unet", "2", put, data)
    else:
        (copy / "run" / put).write_bytes(data)
    result = run_here(*SAMPLE, cwd=copy)
    if taken == put:  # the twin
        assert result.returncode == 0
    else:
        assert_one_line_error(result, 1, put)


@pytest.mark.parametrize("settings", [{"seed": 1}, {"unet_block_out_channels": (16, 48)}])
def test_weights_of_other_settings_are_refused(copy, run_here, settings):
    """A U-Net of another run, of the very same shape but another training, and one of another shape."""
    for script in ("train_vae.py", "train_unet.py"):
        words = ("--preset", "demo", "--run_dir", "other", *flags(TINY | settings), "--max_steps", 4)
        assert run_here(script, *words, cwd=copy).returncode == 0
    shutil.copy(copy / "other/unet_ckpt2.pth", copy / "run/unet_ckpt2.pth")
    assert_one_line_error(run_here(*SAMPLE, cwd=copy), 1, "unet_ckpt2.pth: not the file that was saved")
    shutil.copy(copy / "other/unet_set2.json", copy / "run/unet_set2.json")
    assert_one_line_error(run_here(*SAMPLE, cwd=copy), 1, ".pth: not the file that was saved")


@pytest.mark.parametrize("file", ["unet_ckpt2.pth", "vae_ckpt_epoch2.pth", "unet_set2.json", "vae_set2.json"])
@pytest.mark.parametrize("how", ["sparse", "pipe", "folder", "device", "loop", "missing"])
def test_what_is_no_file_of_that_size_is_refused_unread(copy, run_here, file, how):
    special_file(copy / "run" / file, how)
    words = SAMPLE if file != "vae_set2.json" else ("train_unet.py", *TRAIN, "--overwrite", *flags(TINY))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with no_hang():
        result = run_here(*words, cwd=copy)
    assert_one_line_error(result, 1, file.replace("2.json", "" if how == "missing" else "2.json"))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 1 << 20  # KiB


NO_MANIFESTS = {
    "empty": b"",
    "cut": b"{",
    "list": b"[]",
    "number": b"3",
    "little": b'{"format": 1}',
    "deep": b"[" * 100_000,
    "long number": b'{"format": ' + b"9" * 5000 + b"}",
    "surrogate": "\ud800".encode("utf-8", "surrogatepass"),
}


@pytest.mark.parametrize("what", NO_MANIFESTS)
def test_a_manifest_that_is_none_is_refused(copy, run_here, what):
    (copy / "run/unet_set2.json").write_bytes(NO_MANIFESTS[what])
    assert_one_line_error(run_here(*SAMPLE, cwd=copy), 1, "unet_set2.json")


def test_a_changed_setting_in_a_manifest_is_noticed(copy, run_here):
    """One digit of the schedule, in a file that is still good JSON."""
    path = copy / "run/unet_set2.json"
    assert path.read_text().count('"beta_end": 0.02') == 1
    path.write_text(path.read_text().replace('"beta_end": 0.02', '"beta_end": 0.2'))
    assert_one_line_error(run_here(*SAMPLE, cwd=copy), 1, "unet_set2.json")


NONSENSE = [
    {"settings": {"nonsense": 1}},
    {"settings": []},
    {"settings": {"lr": "fast"}},
    {"settings": {"lr": -1}},
    {"files": {}},
    {"files": []},
    {"made_from": {}},
    {"made_from": {"../../etc/passwd": {"bytes": 1, "sha256": ""}}},
    {"files": {"unet_ckpt2.pth": 3}},
    {"format": 99},
    {"made_from": {"vae_ckpt_epoch2.pth": {"bytes": 10**18, "sha256": "x"}}},
    {"finished": 3},
    {"epoch": "2"},
    {"step": None},
]


@pytest.mark.parametrize("change", NONSENSE)
def test_a_signed_manifest_of_nonsense_is_refused(copy, run_here, change):
    path = copy / "run/unet_set2.json"
    path.write_text(sign(json.loads(path.read_text()) | change))
    before = files(copy)
    assert_one_line_error(run_here(*SAMPLE, cwd=copy), 1, "run/")
    assert files(copy) == before


@pytest.mark.parametrize("giant", [{"unet_block_out_channels": [4096, 8192], "time_dim": 16384}, {"timesteps": 10**9}])
def test_a_signed_manifest_of_a_giant_is_refused_before_it_takes_memory(copy, run_here, giant):
    path = copy / "run/unet_set2.json"
    manifest = json.loads(path.read_text())
    path.write_text(sign(manifest | {"settings": manifest["settings"] | giant}))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with no_hang():
        assert_one_line_error(run_here(*SAMPLE, cwd=copy), 1, "run/")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 1 << 19  # KiB


# ---- Numbers that go bad ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", ["poison_step", "infinite_gradient"])
@pytest.mark.parametrize("lazy", [{}, {"lazy_guard": True}])
def test_a_step_that_is_not_finite_is_not_taken(begin, fork, kind, what, lazy):
    cwd, _ = begin(kind)
    result = fork(*command(kind), cwd=cwd, inject={what: 5} | lazy).wait()
    assert_one_line_error(result, 1, "step 5", f"{kind}_set2_step4.json", "--lr")
    for path in (cwd / "run").glob("*.pth"):
        content = torch.load(path, weights_only=True)
        for value in content.values():
            assert not isinstance(value, torch.Tensor) or value.isfinite().all(), path
    assert "resumed after step 4" in fork(*command(kind), cwd=cwd, inject={what: 1}).wait().stdout
