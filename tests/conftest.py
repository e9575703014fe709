"""Fixtures and helpers: tiny settings, a tiny finished run, scripts in this process and in forked ones.

The tests run in two processes side by side; `-n 0` runs them in this one. Tests marked slow run with --slow.
"""

import contextlib
import csv
import hashlib
import importlib
import io
import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a thread for each process; PyTorch reads it when it is loaded
# SD_CODE: a changed copy of the project, for the tests that test these tests (test_sabotage.py)
ROOT = Path(os.environ.get("SD_CODE") or Path(__file__).resolve().parent.parent)
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = f"{ROOT}{os.pathsep}{Path(__file__).parent}"  # for the processes that tests start

from config import PRESETS, SDConfig  # noqa: E402
from support import errors  # noqa: E402

# A whole pipeline in seconds: the demo's structure at the smallest size, with the recipe's diffusion.
TINY = {
    "dataset": "scenes",
    "text_encoder": "hash",
    "image_size": 32,
    "max_images": 24,
    "held_out_images": 8,
    "block_out_channels": (8, 8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "unet_norm_num_groups": 4,
    "unet_block_out_channels": (16, 32),
    "time_dim": 64,
    "text_length": 12,
    "batch_size": 8,
    "num_epochs": 2,
    "num_workers": 0,
    "timesteps": 20,
    "lr": 1e-3,
    "cache_dir": "",
    "prediction_type": "epsilon",
    "flow_time_mean": 0.0,
    "caption_dropout": 0.0,
    "sample_steps": 0,
    "guidance_scale": 1.0,
    "guidance_interval": (0.0, 1.0),
    "ema_decay": 0.99,
    "ema_warmup": False,
}
# Six steps in a third of a second, each of them saved.
SMALL = TINY | {
    "image_size": 16,
    "max_images": 12,
    "held_out_images": 4,
    "block_out_channels": (8, 8),
    "unet_block_out_channels": (8,),
    "time_dim": 32,
    "text_length": 4,
    "text_dim": 16,
    "batch_size": 4,
    "timesteps": 4,
    "save_minutes": 0,
}
STEPS_PER_EPOCH, STEPS = 3, 6
KINDS = ("vae", "unet")
TRAIN = ("--preset", "demo", "--run_dir", "run")
SAMPLE = ("sample.py", "--prompt", "x", "--run_dir", "run", "--steps", 2, "--num_images", 1)

# ---- How the suite runs ----


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Two processes, if pytest-xdist is there and nothing else was asked for."""
    options, is_worker = config.option, hasattr(config, "workerinput")
    if getattr(options, "numprocesses", 0) is None and not is_worker and not options.usepdb:
        options.numprocesses = min(2, os.cpu_count() or 1)
        options.dist = "worksteal" if options.dist == "no" else options.dist


def pytest_collection_modifyitems(config, items):
    left_out = [item for item in items if item.get_closest_marker("slow") and not config.option.slow]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


# ---- Scripts ----


def flags(settings):
    """{"batch_size": 8, "skip_bad": True, "compile": False} -> ["--batch_size", "8", "--skip_bad", "--no-compile"]."""
    words = []
    for name, value in settings.items():
        values = value if isinstance(value, tuple) else () if isinstance(value, bool) else (value,)
        words += [f"--{'no-' if value is False else ''}{name}", *map(str, values)]
    return words


def command(kind, settings=SMALL):
    return f"train_{kind}.py", *TRAIN, *flags(settings)


def run_script(script, *args, cwd, env=None):
    """Run a script as a user would, in `cwd` -> CompletedProcess with text output."""
    command, env = [sys.executable, str(ROOT / script), *map(str, args)], {**os.environ, **(env or {})}
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=280, env=env)


@pytest.fixture
def run_here(monkeypatch, capsys):
    """run_script without a new process, which saves the seconds of importing torch; a traceback fails the test.

    As in forked processes no curves are drawn, and nobody waits for the disk.
    """
    import child

    def run(script, *args, cwd):
        monkeypatch.setattr(child.show, "plot_curves", child.write_panels)
        monkeypatch.setattr(os, "fsync", lambda handle: None)
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", [script, *map(str, args)])
        capsys.readouterr()
        code, message = 0, ""
        try:
            errors.run_script(importlib.import_module(script.removesuffix(".py")).main)
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
        import child  # it loads PyTorch, which the process that only hands out tests can do without

        folder.mkdir(exist_ok=True)
        self.out, self.err = folder / "out", folder / "err"
        argv = [script, *map(str, args)]
        arguments = argv, str(cwd), str(self.out), str(self.err), inject or {}
        self.process = CONTEXT.Process(target=child.run, args=arguments)
        self.process.start()

    def wait(self, seconds=60):
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            pytest.fail(f"still running after {seconds} s: {self.err.read_text()}")
        code = self.process.exitcode
        return subprocess.CompletedProcess([], code, self.out.read_text(), self.err.read_text())


# a changed copy is tested by a process that the fork server has forked, which is as fresh as one
CONTEXT = multiprocessing.get_context("fork" if "SD_CODE" in os.environ else "forkserver")
if "SD_CODE" not in os.environ:
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


def assert_one_line_error(result, code, *words):
    """The promise for every mistake of a user: exit code, one `error:` line last, no traceback."""
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: "), result.stderr
    for word in words:
        assert word in last, (word, last)


# ---- Files and weights ----


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def bits(run):
    """{file: hash} of what a run leaves, without what names the process or the pace."""
    left = [p for p in Path(run).iterdir() if p.is_file() and p.suffix in (".pth", ".csv", ".png")]
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in left}


def rows(path):
    """The rows of a CSV, as dicts of strings."""
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def picture(path, colour=(200, 30, 40)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (60, 40), colour).save(path)


def randomize(module):
    """Fill every weight, the zero-initialised ones too, so that a wrong connection cannot hide."""
    import torch

    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in module.named_parameters():
            scale = 1 / math.sqrt(p[0].numel()) if p.dim() > 1 else 0.1
            p.copy_(torch.randn_like(p) * scale + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
    return module.eval()


def sign(manifest):
    """A manifest as its writer would leave it."""
    from support import checkpoint

    return json.dumps(manifest | {"sha256": checkpoint.own_hash(manifest)})


def forge(run, kind, tag, name, content):
    """Put other bytes, or anything torch.save takes, into one file of a set and into its manifest."""
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


def special_file(path, how):
    """In the place of a file: a giant of holes, a pipe, a folder, an endless device, a link to itself, nothing."""
    path.unlink()
    if how == "sparse":
        with open(path, "wb") as f:
            f.truncate(200 << 30)
    elif how == "pipe":
        os.mkfifo(path)
    elif how == "folder":
        path.mkdir()
    elif how != "missing":
        path.symlink_to("/dev/zero" if how == "device" else path)


# ---- Settings and runs ----


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
        process = Forked(cwd / "process", script, *TRAIN, *flags(TINY), cwd=cwd, inject={"draw_curves": True})
        result = process.wait()
        assert result.returncode == 0, result.stderr
    return cwd


@pytest.fixture
def quick_judge(monkeypatch):
    """evaluate.py with a classifier of a few steps and few real scenes, where nobody looks at what it says."""
    import evaluate
    from support import judges

    monkeypatch.setattr(judges, "CLASSIFIER_SCENES", 64)
    monkeypatch.setattr(judges, "CLASSIFIER_EPOCHS", 1)
    monkeypatch.setattr(evaluate, "REAL_SCENES", 32)


@pytest.fixture
def copy(tiny_run, tmp_path):
    """A copy of the finished tiny run, in tmp_path/run."""
    shutil.copytree(tiny_run / "run", tmp_path / "run", ignore=shutil.ignore_patterns("samples"))
    return tmp_path


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory):
    """kind -> (the run directory's files to start from, bits of the unbroken run), with SMALL settings."""
    found, cwd = {}, tmp_path_factory.mktemp("unbroken")
    for kind in KINDS:
        before = files(cwd / "run")
        # saved at epochs only: how often a run saves must not change what it learns
        result = Forked(cwd / "process", *command(kind, SMALL | {"save_minutes": 60}), cwd=cwd).wait()
        assert result.returncode == 0, result.stderr
        found[kind] = before, bits(cwd / "run")
    return found


@pytest.fixture
def begin(unbroken, tmp_path):
    """begin(kind) -> a fresh directory in which `kind` can be trained, and the bits that it must come to."""

    def make(kind, name="a"):
        before, expected = unbroken[kind]
        (tmp_path / name / "run").mkdir(parents=True)
        for file, data in before.items():
            (tmp_path / name / "run" / file).write_bytes(data)
        return tmp_path / name, expected

    return make


def finish(fork, kind, cwd, expected):
    """Give the command again until the end -> its result; the bits must be those of the unbroken run."""
    result = fork(*command(kind), cwd=cwd).wait()
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    assert bits(cwd / "run") == expected
    assert not list((cwd / "run").glob("*.tmp")) and not list((cwd / "run").glob("*_step*"))
    return result


def wait_for(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.02)


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


@pytest.fixture(scope="session")
def browser():
    """A headless Chromium, where selenium, Chromium and its driver are installed."""
    webdriver = pytest.importorskip("selenium.webdriver")
    from selenium.webdriver.chrome.service import Service

    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("no chromium, or no chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1400,1500"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = webdriver.Chrome(options=options, service=Service(driver))
    yield chrome
    chrome.quit()
