"""One script in a forked process, with what a test does to it: a signal at a step, a kill at a write, a full disk.

The fork server imports this once, so that the seconds of loading PyTorch are paid once. Not a test.
"""

import builtins
import errno
import hashlib
import importlib
import json
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot  # noqa: E402, F401
import pytest  # noqa: E402
import torch._dynamo  # noqa: E402, F401  the first step of an optimizer loads it

import data  # noqa: E402
import diffusion  # noqa: E402
import evaluate  # noqa: E402, F401
import sample  # noqa: E402, F401
import train_unet  # noqa: E402
import train_vae  # noqa: E402
import training  # noqa: E402
from support import checkpoint, errors, files, show  # noqa: E402

PLOT_CURVES = show.plot_curves

# ---- The body of the process ----


def run(argv, cwd, out, err, inject):
    """As `python SCRIPT ARGS` in cwd, output into two files."""
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    reopen_output()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the suite itself may run under nohup
    multiprocessing.set_start_method("fork", force=True)  # what a process started from a shell would have
    os.chdir(cwd)
    sys.argv = argv
    os.fsync = lambda handle: None  # a disk takes its time, and nobody pulls the plug here
    show.plot_curves = write_panels
    for what, value in inject.items():
        globals()[what](value)
    try:
        errors.run_script(importlib.import_module(argv[0].removesuffix(".py")).main)
        code = 0
    except SystemExit as e:
        if isinstance(e.code, str):
            print(e.code, file=sys.stderr)
        code = 1 if isinstance(e.code, str) else e.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stdout.flush()
    os._exit(code)


def reopen_output():
    sys.stdout, sys.stderr = (open(n, "w", buffering=1, encoding="utf-8", closefd=False) for n in (1, 2))


def write_panels(path, panels):
    """In the place of the curves, which take longer to draw than the steps of these runs: the numbers in them."""
    files.write_file(path, json.dumps(panels).encode())


def draw_curves(_):
    """The curves as they are, after all."""
    show.plot_curves = PLOT_CURVES


def run_pytest(code, argv, out):
    """pytest in this process, on the copy of the project in `code` (test_sabotage.py)."""
    os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
    os.dup2(1, 2)
    reopen_output()
    project, here = Path(data.__file__).parent, Path(__file__).parent

    def of_the_project(*folders):
        paths = ((name, getattr(module, "__file__", None)) for name, module in list(sys.modules.items()))
        return [name for name, path in paths if path and Path(path).parent in folders]

    for name in of_the_project(project, project / "support", here):
        del sys.modules[name]
    sys.path[:] = [code, *(p for p in sys.path if Path(p) != project)]
    os.environ |= {"SD_CODE": code}
    os.chdir(code)
    status = pytest.main(argv)
    if strays := of_the_project(project, project / "support"):
        print("not of the copy:", *strays)
        status = 9
    sys.stdout.flush()
    os._exit(status)


# ---- What happens to it ----


def at_step(step, action, after=True):
    """Do it after, or instead of, the optimizer's n-th step."""
    real, calls = training.optimizer_step, []

    def optimizer_step(optimizer, lr):
        calls.append(lr)
        if after or len(calls) != step:
            real(optimizer, lr)
        if len(calls) == step:
            action()

    training.optimizer_step = optimizer_step


def signal_at_step(value):
    """(signal, step): sent to the process itself within that step."""
    number, step = value
    at_step(step, lambda: os.kill(os.getpid(), number))


def hang_at_step(step):
    """That step never ends."""

    def hang():
        print("hanging", flush=True)
        while True:
            time.sleep(0.01)

    at_step(step, hang, after=False)


def wait_at_step(value):
    """(file, step): after that step the file appears, and half a second passes."""
    path, step = value
    at_step(step, lambda: (Path(path).touch(), time.sleep(0.5)))


def environment(variables):
    os.environ |= variables


def log_every(steps):
    training.LOG_EVERY = steps


def terminal(path):
    """A pseudo-terminal is what the process is started from, and goes away with."""
    os.setsid()
    handle = os.open(path, os.O_RDWR)  # the first that a new session opens is its own
    for number in (0, 1, 2):
        os.dup2(handle, number)
    reopen_output()


def remove_run_at_step(step):
    """The run directory is deleted by somebody else within that step."""
    at_step(step, lambda: shutil.rmtree("run"))


def kill_at(value):
    """(tag, n): kill -9 at the n-th write, sync, rename or removal of the save of that set, before it is done."""
    tag, n = value
    state = {"on": False, "count": 0}

    def point():
        state["count"] += state["on"]
        if state["count"] == n:
            os.kill(os.getpid(), signal.SIGKILL)

    class HalfWritten:
        """A file whose write is cut in the middle if the kill falls there."""

        def __init__(self, f):
            self.f = f

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.f.close()

        def __getattr__(self, name):
            return getattr(self.f, name)

        def write(self, data):
            self.f.write(data[: len(data) // 2])
            self.f.flush()
            point()
            self.f.write(data[len(data) // 2 :])

    real_open = builtins.open

    def watched_open(path, mode="r", *args, **options):
        f = real_open(path, mode, *args, **options)
        name = os.path.basename(str(path))
        if "w" in mode and name.endswith(".tmp") and "_step" in name:
            state["on"] = tag in name
        if not state["on"] or "w" not in mode:
            return f
        point()
        return HalfWritten(f)

    builtins.open = watched_open
    for name in ("fsync", "replace", "remove"):
        setattr(os, name, before(point, getattr(os, name)))


def before(point, function):
    def wrapped(*args, **options):
        point()
        return function(*args, **options)

    return wrapped


def fails(*_):
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def fail_fsync(number):
    """The n-th flush to the disk fails, as on a dying disk."""
    calls = []

    def fsync(handle):
        calls.append(handle)
        if len(calls) == number:
            fails()

    os.fsync = fsync


def limit_file_size(size):
    """No file can grow beyond that, as on a disk that fills up; the system then answers "file too large"."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def limit(value):
    resource.setrlimit(value[0], (value[1], value[1]))


def limit_memory(more):
    """`more` bytes of address space beyond what PyTorch takes to be loaded."""
    pages = int(open("/proc/self/statm").read().split()[0])
    limit((resource.RLIMIT_AS, pages * os.sysconf("SC_PAGE_SIZE") + more))


def slow_steps(pauses):
    """{words of a prompt: seconds that app.py then takes more for each step}; it prints each step."""
    import app

    real = app.sample

    def slow_sample(*args, watch, **options):
        pause = next((seconds for words, seconds in pauses.items() if words in args[-1]), 0)

        def watch_slowly(i, x0):
            time.sleep(pause)
            print(f"{args[-1]}, step {i}", flush=True)
            watch(i, x0)

        return real(*args, watch=watch_slowly, **options)

    app.sample = slow_sample


def kill_at_picture(index):
    """The process that reads that picture is killed: a worker as by a system short of memory, or the trainer itself."""
    real = data.Scenes.__getitem__

    def item(self, i):
        if i == index:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, i)

    data.Scenes.__getitem__ = item


def look_at_sets(kind):
    """Before each rename and removal: print how many sets are whole, by reading all that their manifests list."""

    def look():
        whole = 0
        for tag in checkpoint.sets_of("run", kind):
            listed = json.load(open(f"run/{kind}_set{tag}.json"))["files"]
            there = {name: open(f"run/{name}", "rb").read() for name in listed if os.path.exists(f"run/{name}")}
            hashes = {name: hashlib.sha256(content).hexdigest() for name, content in there.items()}
            weights = [name for name in listed if "state" not in name]
            whole += all(hashes.get(name) == listed[name]["sha256"] for name in weights)
        print(f"whole sets: {whole}")

    for name in ("replace", "remove"):
        setattr(os, name, before(look, getattr(os, name)))


def poison_step(step):
    """The loss of that step is NaN."""
    calls = []

    def poisoned(loss):
        calls.append(loss)
        return loss * float("nan") if len(calls) == step else loss

    vae_loss, unet_loss = train_vae.vae_loss, diffusion.prediction_loss
    train_vae.vae_loss = lambda *a: (lambda loss, *rest: (poisoned(loss), *rest))(*vae_loss(*a))
    # in the training alone: diffusion.py itself measures held-out losses by it
    train_unet.diffusion = SimpleNamespace(**vars(diffusion) | {"prediction_loss": lambda *a: poisoned(unet_loss(*a))})


def infinite_gradient(step):
    """The loss of that step is finite, one entry of its gradient is not."""
    real, calls = training.clip_gradients, []

    def clip_gradients(optimizer, max_grad_norm):
        calls.append(max_grad_norm)
        if len(calls) == step:
            optimizer.param_groups[0]["params"][0].grad[0, 0, 0, 0] = float("inf")
        return real(optimizer, max_grad_norm)

    training.clip_gradients = clip_gradients


def lazy_guard(_):
    """Judge steps as on a GPU: the optimizer leaves bad ones out, and a look comes later."""
    real = training.FiniteGuard.__init__

    def init(self, device, run):
        real(self, device, run)
        self.lazy = True

    training.FiniteGuard.__init__ = init
