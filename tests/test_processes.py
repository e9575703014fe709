"""Promises of several processes (torchrun): the same training as one, one writer, all gone when one dies."""

import csv
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, TINY, assert_one_line_error, flags

# twenty steps, one to an epoch, so that each has its row; 23 pictures over two processes are uneven shares
STEPS = TINY | {"max_images": 23, "held_out_images": 4, "batch_size": 23, "num_epochs": 20, "timesteps": 4, "save_every": 50,
                "image_size": 16, "block_out_channels": (8, 8), "unet_block_out_channels": (8, 16), "time_dim": 32,
                "mixed_precision": "no"}  # fmt: skip


def launch(processes, script, run, settings, cwd):
    with socket.create_server(("127.0.0.1", 0)) as s:
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={port}",
               "--master_addr=127.0.0.1", str(ROOT / script), "--preset", "demo", "--run_dir", run, *flags(settings)]  # fmt: skip
    return subprocess.Popen(
        command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def finish(process, code=0):
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    return out, err


def column(path, name):
    with open(path, newline="") as f:
        return torch.tensor([float(row[name]) for row in csv.DictReader(f)])


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    """Loss curves equal to 1e-5 over 20 steps, uneven shares included; the files are written once."""
    for processes in (1, 2):
        for script in ("train_vae.py", "train_unet.py"):
            out, _ = finish(launch(processes, script, f"run{processes}", STEPS, tmp_path))
            assert out.count("wrote ") == 1
    for file, names in (("vae_train.csv", ("loss", "mse", "kl")), ("unet_train.csv", ("loss",))):
        for name in names:
            one, two = (column(tmp_path / run / file, name) for run in ("run1", "run2"))
            assert len(one) == len(two) == 20
            assert ((one - two).abs() / one.abs().clamp(min=1)).max() < 1e-5, (file, name, one, two)
    assert one.std() > 1e-4  # the curve does move
    assert sorted(os.listdir(tmp_path / "run1")) == sorted(os.listdir(tmp_path / "run2"))


@pytest.mark.slow
def test_a_stop_is_saved_and_goes_on_with_two_processes(tmp_path):
    """Killed worker: all gone within thirty seconds and the last set whole. SIGTERM: saved. Then to the same end."""
    finish(launch(2, "train_vae.py", "whole", STEPS, tmp_path))
    settings = STEPS | {"save_minutes": 0}
    for how in ("worker", "launcher"):
        process = launch(2, "train_vae.py", "run", settings, tmp_path)
        seen = len(list((tmp_path / "run").glob("vae_pictures*"))) if how == "launcher" else 0
        while len(list((tmp_path / "run").glob("vae_pictures*"))) < seen + 3:
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.02)
        start = time.monotonic()
        children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
        os.kill(*((int(children[1]), signal.SIGKILL) if how == "worker" else (process.pid, signal.SIGTERM)))
        out, _ = process.communicate(timeout=60)
        assert process.returncode != 0 and time.monotonic() - start < 30
        assert how == "worker" or "saved; to go on" in out
    out, _ = finish(launch(2, "train_vae.py", "run", settings, tmp_path))
    assert "resumed after step" in out
    for name in ("vae_ckpt_epoch20.pth", "vae_train.csv", "vae_held_out.csv"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "run" / name).read_bytes(), name


@pytest.mark.slow
def test_a_batch_in_parts_trains_as_a_whole_one(tmp_path, run_here):
    """Gradient accumulation: 23 pictures in uneven parts give the loss curves of the undivided batch."""
    short = STEPS | {"num_epochs": 5}
    for parts in (1, 3):
        for script in ("train_vae.py", "train_unet.py"):
            command = ("--preset", "demo", "--run_dir", f"run{parts}", "--grad_accumulation", parts, *flags(short))
            assert run_here(script, *command, cwd=tmp_path).returncode == 0
    for file in ("vae_train.csv", "unet_train.csv"):
        whole, divided = (column(tmp_path / run / file, "loss") for run in ("run1", "run3"))
        assert len(whole) == 5 and ((whole - divided).abs() / whole.abs().clamp(min=1)).max() < 1e-5


@pytest.mark.slow
def test_a_compiled_model_trains_as_the_plain_one(tmp_path, run_here):
    short = STEPS | {"num_epochs": 2}
    for run, more in (("plain", []), ("compiled", ["--compile"])):
        for script in ("train_vae.py", "train_unet.py"):
            command = ("--preset", "demo", "--run_dir", run, *more, *flags(short))
            assert run_here(script, *command, cwd=tmp_path).returncode == 0
    for file in ("vae_train.csv", "unet_train.csv"):
        plain, compiled = (column(tmp_path / run / file, "loss") for run in ("plain", "compiled"))
        assert (plain - compiled).abs().max() < 1e-4
    names = [p.name for p in sorted((tmp_path / "plain").iterdir())]
    assert names == [p.name for p in sorted((tmp_path / "compiled").iterdir())]


FAILS = """
import atexit, sys
sys.path.insert(0, {root!r})
import torch.distributed as dist
from config import UserError
from training import run_script

def main():
    dist.init_process_group("gloo", init_method="file://{folder}/group", rank=0, world_size=1)
    atexit.register(print, "leaving slowly")
    raise UserError("--lr: too high; give less")

run_script(main)
"""


def test_an_error_beside_other_processes_leaves_at_once(tmp_path):
    """Closing the group, as an ordinary exit does, may wait for ever for what a GPU has begun."""
    code = FAILS.format(root=str(ROOT), folder=tmp_path)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.splitlines()[-1] == "error: --lr: too high; give less"


@pytest.mark.parametrize("environment", [{"WORLD_SIZE": "2"}, {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"},
                                         {"WORLD_SIZE": "two", "RANK": "0", "LOCAL_RANK": "0", "MASTER_PORT": "1"}])  # fmt: skip
def test_half_of_a_launchers_environment_is_one_line(tmp_path, run_here, monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    result = run_here("train_vae.py", "--preset", "demo", "--run_dir", "run", cwd=tmp_path)
    assert_one_line_error(result, 1, "WORLD_SIZE", "torchrun")


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [1, 4, 5, 7, 9])
@pytest.mark.parametrize("parts", [1, 3, 4])
def test_shares_add_up_to_the_mean(processes, count, parts):
    from training import World, parts_of, share_of

    losses = torch.arange(count, dtype=torch.float64) ** 2 + 1
    seen, total, numbers = [], 0.0, set()
    for rank in range(processes):
        world = World(rank, processes, torch.device("cpu"))
        mine = share_of(count, world)
        numbers.add(len(parts_of(count, world, parts)))
        for part, weight in parts_of(count, world, parts):
            total += losses[mine][part].mean() * weight / processes
            seen += range(count)[mine][part] if weight else []
    assert sorted(seen) == list(range(count)) and abs(total - losses.mean()) < 1e-12
    assert len(numbers) == 1  # each part ends in a common reduction, which a process with fewer would miss
