"""Fixtures: tiny settings, a tiny finished run, and the directory with real data that `.ci/run` names."""

import contextlib
import hashlib
import importlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

# SD_CODE: a patched copy of the project, for the tests that test these tests (test_sabotage.py).
ROOT = Path(os.environ.get("SD_CODE") or Path(__file__).resolve().parent.parent)
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = f"{ROOT}{os.pathsep}{Path(__file__).parent}"  # for the processes that tests start

import child  # noqa: E402

import checkpoint  # noqa: E402
import training  # noqa: E402
from config import PRESETS, SDConfig  # noqa: E402

# A whole pipeline in seconds: the demo's structure at the smallest size, with the recipe's diffusion.
TINY = {
    "dataset": "scenes", "text_encoder": "hash", "image_size": 32, "max_images": 24, "held_out_images": 8,
    "block_out_channels": (8, 8, 16), "layers_per_block": 1, "norm_num_groups": 4, "unet_norm_num_groups": 4,
    "unet_block_out_channels": (16, 32), "time_dim": 64, "text_length": 12,
    "batch_size": 8, "num_epochs": 2, "num_workers": 0, "timesteps": 20, "lr": 1e-3, "cache_dir": "",
    "prediction_type": "epsilon", "caption_dropout": 0.0, "sample_steps": 0, "guidance_scale": 1.0,
    "guidance_interval": (0.0, 1.0), "ema_decay": 0.99, "ema_warmup": False,
}  # fmt: skip


def flags(settings):
    """{"batch_size": 8, "skip_bad": True, "compile": False} -> ["--batch_size", "8", "--skip_bad", "--no-compile"]."""
    words = []
    for name, value in settings.items():
        values = value if isinstance(value, tuple) else () if isinstance(value, bool) else (value,)
        words += [f"--{'no-' if value is False else ''}{name}", *map(str, values)]
    return words


def run_script(script, *args, cwd, env=None):
    """Run a script as a user would, in `cwd` -> CompletedProcess with text output."""
    return subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, args)],
        cwd=cwd, capture_output=True, text=True, timeout=280, env={**os.environ, **(env or {})},
    )  # fmt: skip


@pytest.fixture
def run_here(monkeypatch, capsys):
    """run_script without a new process, which saves the seconds of importing torch; a traceback fails the test."""

    def run(script, *args, cwd):
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", [script, *map(str, args)])
        capsys.readouterr()
        code, message = 0, ""
        try:
            training.run_script(importlib.import_module(script.removesuffix(".py")).main)
        except SystemExit as e:
            code, message = (1, e.code) if isinstance(e.code, str) else (e.code or 0, "")
        out, err = capsys.readouterr()
        return subprocess.CompletedProcess(args, code, out, err + message)

    return run


class Forked:
    """A script in a process of its own, forked off one that has PyTorch loaded: pid, signals and kill -9 are real.

    inject: what child.py does to it on the way.
    """

    def __init__(self, folder, script, *args, cwd, inject=None):
        folder.mkdir(exist_ok=True)
        self.out, self.err = folder / "out", folder / "err"
        argv = [script, *map(str, args)]
        self.process = CONTEXT.Process(
            target=child.run, args=(argv, str(cwd), str(self.out), str(self.err), inject or {})
        )
        self.process.start()

    def wait(self, seconds=60):
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            pytest.fail(f"still running after {seconds} s: {self.err.read_text()}")
        code = self.process.exitcode
        return subprocess.CompletedProcess([], code, self.out.read_text(), self.err.read_text())


CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["child"])


@pytest.fixture
def fork(tmp_path_factory):
    """fork(script, *args, cwd=...) -> Forked; whatever still runs at the end of the test is killed."""
    started = []

    def start(script, *args, cwd, inject=None):
        started.append(Forked(tmp_path_factory.mktemp("process"), script, *args, cwd=cwd, inject=inject))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()


@contextlib.contextmanager
def no_hang(seconds=10):
    def late(*_):
        raise AssertionError(f"still running after {seconds} s")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def sign(manifest):
    """A manifest as its writer would leave it."""
    return json.dumps(manifest | {"sha256": checkpoint.own_hash(manifest)})


def forge(run, kind, tag, name, content):
    """Put other bytes, or anything torch.save takes, into one file of a set and into its manifest."""
    import io

    import torch

    if not isinstance(content, bytes):
        buffer = io.BytesIO()
        torch.save(content, buffer)
        content = buffer.getvalue()
    (run / name).write_bytes(content)
    path = run / f"{kind}_set{tag}.json"
    manifest = json.loads(path.read_text())
    listed = manifest["files"] if name in manifest["files"] else manifest["made_from"]
    listed[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    path.write_text(sign(manifest))


def assert_one_line_error(result, code, *words):
    """The promise for every mistake of a user: exit code, one `error:` line last, no traceback."""
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: "), result.stderr
    for word in words:
        assert word in last, (word, last)


@pytest.fixture(autouse=True)
def seeded():
    import torch

    torch.manual_seed(0)


@pytest.fixture(params=["coco", "demo"])
def preset(request):
    return SDConfig(**PRESETS[request.param])


@pytest.fixture
def tiny():
    return SDConfig(**TINY)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """A directory in which both trainers have run with TINY settings, into `run`."""
    cwd = tmp_path_factory.mktemp("tiny")
    for script in ("train_vae.py", "train_unet.py"):
        result = run_script(script, "--preset", "demo", "--run_dir", "run", *flags(TINY), cwd=cwd)
        assert result.returncode == 0, result.stderr
    return cwd


@pytest.fixture(scope="session")
def real_data():
    """The directory with coco-mini/ and clip-tokenizer/."""
    path = os.environ.get("SD_TEST_DATA")
    if not path or not os.path.isdir(path):
        pytest.skip("SD_TEST_DATA does not name the directory with coco-mini/ and clip-tokenizer/")
    return Path(path)


@pytest.fixture(scope="session")
def clip_dir(real_data, tmp_path_factory):
    """A CLIP directory with the real tokenizer and config, and random weights."""
    import shutil

    import torch
    from transformers import CLIPConfig, CLIPTextModel

    path = tmp_path_factory.mktemp("clip") / "clip"
    shutil.copytree(real_data / "clip-tokenizer", path)
    path.chmod(0o755)
    for file in path.iterdir():
        file.chmod(0o644)
    torch.manual_seed(0)
    CLIPTextModel(CLIPConfig.from_pretrained(path).text_config).save_pretrained(path)
    return path
