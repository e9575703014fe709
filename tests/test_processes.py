"""Promises of several processes (torchrun): the same training as one, one writer, all gone when one dies."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, SMALL, TRAIN, assert_one_line_error, flags, picture, rows

from support.processes import World

# twenty steps; 23 pictures over two processes are uneven shares
STEPS = SMALL | {
    "max_images": 230,
    "batch_size": 23,
    "save_every": 50,
    "save_minutes": 60,
    "mixed_precision": "no",
}


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as s:
        return str(s.getsockname()[1])


def together(fork, size, script, run, settings, cwd, code=0):
    """The script in `size` processes with the environment that torchrun gives them -> their results."""
    common = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    words = ("--preset", "demo", "--run_dir", run, *flags(settings))
    ranks = [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]
    all_of_them = [fork(script, *words, cwd=cwd, inject={"environment": rank, "log_every": 1}) for rank in ranks]
    results = [one.wait() for one in all_of_them]
    for result in results:
        assert result.returncode == code, result.stderr
    return results


def column(path, name):
    return torch.tensor([float(row[name]) for row in rows(path)])


def test_two_processes_train_as_one(tmp_path, fork):
    """Loss curves equal to 1e-5 over 20 steps, uneven shares included; the files are written once."""
    for size in (1, 2):
        for script in ("train_vae.py", "train_unet.py"):
            settings = STEPS | {"text_encoder": "words"}
            first, *others = together(fork, size, script, f"run{size}", settings, tmp_path)
            assert first.stdout.count("wrote ") == 1
            assert not any("VAE" in other.stdout or "wrote" in other.stdout for other in others)
    for file, names in (("vae_train.csv", ("loss", "mse", "kl")), ("unet_train.csv", ("loss",))):
        for name in names:
            one, two = (column(tmp_path / run / file, name) for run in ("run1", "run2"))
            assert len(one) == len(two) == 20
            assert ((one - two).abs() / one.abs().clamp(min=1)).max() < 1e-5, (file, name, one, two)
            assert one.std() > 1e-4  # the curve does move
    assert sorted(os.listdir(tmp_path / "run1")) == sorted(os.listdir(tmp_path / "run2"))


def test_what_is_odd_or_wrong_with_the_data_is_told_once(tmp_path, fork):
    """By rank 0, which looks at it first; the other then ends, too."""
    for i in range(20):
        picture(tmp_path / f"mine/images/{i}.png", colour=(9 * i, 99, 40))
        (tmp_path / f"mine/images/{i}.txt").write_text("a red house,\nand a tree")
    settings = SMALL | {
        "dataset": "folder",
        "data_root": "mine",
        "num_epochs": 1,
        "skip_bad": True,
        "cache_dir": "kept",
    }
    told = together(fork, 2, "train_vae.py", "run", settings, tmp_path)
    assert ["look like parts of one sentence" in one.stderr for one in told] == [True, False]
    (tmp_path / "mine/images/3.txt").unlink()
    told = together(fork, 2, "train_vae.py", "new", settings, tmp_path, code=1)
    assert ["pictures have no caption" in one.stderr for one in told] == [True, False]
    for one in told:
        assert_one_line_error(one, 1)


def torchrun(size, script, settings, cwd):
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={size}", "--master_addr=127.0.0.1"]
    command += [f"--master_port={free_port()}", str(ROOT / script), *TRAIN, *flags(settings)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=cwd, start_new_session=True, **pipes)


def epochs_shown(cwd):
    return len(list((cwd / "run").glob("vae_pictures*")))


@pytest.mark.slow
def test_a_stop_is_saved_and_goes_on_with_two_processes(tmp_path, fork):
    """Killed worker: all gone within thirty seconds and the last set whole. SIGTERM: saved. Then to the same end."""
    settings = STEPS | {"max_images": 23, "num_epochs": 20, "save_minutes": 0}
    together(fork, 2, "train_vae.py", "whole", settings, tmp_path)
    for how in ("worker", "launcher"):
        process = torchrun(2, "train_vae.py", settings, tmp_path)
        seen = epochs_shown(tmp_path) if how == "launcher" else 0
        deadline = time.monotonic() + 90
        while epochs_shown(tmp_path) < seen + 3:
            assert process.poll() is None and time.monotonic() < deadline, process.communicate(timeout=5)[1]
            time.sleep(0.02)
        start = time.monotonic()
        children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
        os.kill(*((int(children[1]), signal.SIGKILL) if how == "worker" else (process.pid, signal.SIGTERM)))
        out, _ = process.communicate(timeout=60)
        assert process.returncode != 0 and time.monotonic() - start < 30
        assert how == "worker" or "saved; to go on: torchrun --nproc_per_node=2 " in out
    first, _ = together(fork, 2, "train_vae.py", "run", settings, tmp_path)
    assert "resumed after step" in first.stdout
    for name in ("vae_ckpt_epoch20.pth", "vae_train.csv", "vae_held_out.csv"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "run" / name).read_bytes(), name


def test_a_batch_in_parts_trains_as_a_whole_one(tmp_path, run_here):
    """Gradient accumulation: 23 pictures in uneven parts give the loss curves of the undivided batch; a discriminator's too."""
    short = STEPS | {"max_images": 23, "num_epochs": 5, "adversarial_weight": 0.5, "matching_weight": 1}
    for parts in (1, 3):
        for script in ("train_vae.py", "train_unet.py"):
            command = ("--preset", "demo", "--run_dir", f"run{parts}", "--grad_accumulation", parts, *flags(short))
            assert run_here(script, *command, cwd=tmp_path).returncode == 0
    for file in ("vae_train.csv", "unet_train.csv"):
        whole, divided = (column(tmp_path / run / file, "loss") for run in ("run1", "run3"))
        assert len(whole) == 5 and ((whole - divided).abs() / whole.abs().clamp(min=1)).max() < 1e-5


@pytest.mark.parametrize(
    "environment",
    [
        {"WORLD_SIZE": "2"},
        {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"},
        {"WORLD_SIZE": "two", "RANK": "0", "LOCAL_RANK": "0", "MASTER_PORT": "1"},
    ],
)
def test_half_of_a_launchers_environment_is_one_line(tmp_path, run_here, monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    result = run_here("train_vae.py", *TRAIN, cwd=tmp_path)
    assert_one_line_error(result, 1, "WORLD_SIZE", "torchrun")


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [1, 4, 5, 7, 9])
@pytest.mark.parametrize("parts", [1, 3, 4])
def test_shares_add_up_to_the_mean(processes, count, parts):
    losses = torch.arange(count, dtype=torch.float64) ** 2 + 1
    seen, total, numbers = [], 0.0, set()
    for rank in range(processes):
        world = World(rank, processes, torch.device("cpu"))
        mine, micro_batches = world.share(count), world.micro_batches(count, parts)
        numbers.add(len(micro_batches))
        for part, weight in micro_batches:
            total += losses[mine][part].mean() * weight / processes
            seen += range(count)[mine][part] if weight else []
    assert sorted(seen) == list(range(count)) and abs(total - losses.mean()) < 1e-12
    assert len(numbers) == 1  # each part ends in a common reduction, which a process with fewer would miss


def test_alone_nothing_waits_and_nothing_is_wrapped():
    world, module, tensor = World(0, 1, torch.device("cpu")), torch.nn.Linear(1, 1), torch.ones(3)
    with world.rank0_first():
        world.wait()
    assert world.data_parallel(module) is module and world.average(tensor) is tensor and tensor.sum() == 3
