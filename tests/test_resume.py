"""Promises of checkpoint.py: a set is whole or not there, and a stopped run goes on to the bits of an unbroken one.

"Bits" are every file that a finished run leaves: weights, EMA, CSV, curves and grids; the Adam state is compared
through the steps that it leads to.
"""

import hashlib
import json
import random
import signal
import time

import pytest
import torch
from conftest import TINY, assert_one_line_error, flags
from PIL import Image

from config import SDConfig
from data import open_dataset, read_pictures
from training import SAME_SIGNAL, SIGNALS, Interrupts, run_script, show_progress

SMALL = TINY | {"max_images": 12, "held_out_images": 4, "batch_size": 4, "timesteps": 4, "save_minutes": 0,
                "block_out_channels": (8, 8), "unet_block_out_channels": (8, 16), "time_dim": 32, "image_size": 16,
                "text_length": 4, "text_dim": 16}  # fmt: skip
STEPS_PER_EPOCH, STEPS = 3, 6
KINDS = ("vae", "unet")


def command(kind, settings=SMALL):
    return (f"train_{kind}.py", "--preset", "demo", "--run_dir", "run", *flags(settings))


def bits(run):
    """{file: hash} of what a run leaves, without what names the process or the pace."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in run.iterdir()
            if p.is_file() and p.suffix in (".pth", ".csv", ".png")}  # fmt: skip


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """kind -> (directory to start from, bits of the unbroken run)."""
    from conftest import Forked

    found, cwd = {}, tmp_path_factory.mktemp("unbroken")
    for kind in KINDS:
        before = {p.name: p.read_bytes() for p in (cwd / "run").iterdir()} if (cwd / "run").exists() else {}
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


# ---- Exact resume ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", [1, STEPS_PER_EPOCH, STEPS_PER_EPOCH + 1,
                                  *(pytest.param(step, marks=pytest.mark.slow) for step in (2, STEPS))])  # fmt: skip
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
    moments, longest, kills, runs = random.Random(0), 0.6, 0, 0
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


# ---- Damaged, missing, changed ----


def stopped_run(begin, fork, kind, step=2):
    cwd, expected = begin(kind)
    assert fork(*command(kind), cwd=cwd, inject={"signal_at_step": (signal.SIGINT, step)}).wait().returncode == 130
    return cwd, expected


@pytest.mark.parametrize("kind, file", [
    ("vae", "vae_ckpt_epoch1_step2.pth"), ("unet", "unet_ckpt1_step2.pth"), ("unet", "t_ember_ckpt1_step2.pth"),
    ("unet", "ema_unet_ckpt1_step2.pth"), ("unet", "unet_state1_step2.pth"), ("unet", "unet_set1_step2.json")])  # fmt: skip
@pytest.mark.parametrize(
    "how", ["flip", "missing", *(pytest.param(how, marks=pytest.mark.slow) for how in ("cut", "empty"))]
)
def test_a_damaged_newest_set_is_put_aside_for_the_one_before(begin, fork, kind, file, how):
    cwd, expected = stopped_run(begin, fork, kind)
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
def test_a_mutated_set_is_never_gone_on_from(begin, fork, run_here, tmp_path, kind):
    """Thirty mutations of a file of the newest set: refused in one line, or put aside and gone on to the same bits.

    A third of them are vouched for by the manifest; then only a clean answer is promised.
    """
    import shutil

    from conftest import forge, no_hang
    from test_fuzz import assert_clean, mutate

    cwd, expected = stopped_run(begin, fork, kind)
    dice, outcomes = random.Random(5), set()
    names = sorted(p.name for p in (cwd / "run").glob("*1_step2*") if kind in p.name or "ember" in p.name)
    for i in range(30):
        here = tmp_path / str(i)
        shutil.copytree(cwd, here)
        name = dice.choice(names)
        good = (here / "run" / name).read_bytes()
        bad, signed = mutate(good, dice), name.endswith(".pth") and dice.random() < 0.4
        if signed:
            forge(here / "run", kind, "1_step2", name, bad)
        else:
            (here / "run" / name).write_bytes(bad)
        with no_hang(20):
            result = run_here(*command(kind), cwd=here)
        assert_clean(result)
        outcomes.add(result.returncode)
        if result.returncode == 0 and not signed:
            assert bits(here / "run") | expected == bits(here / "run"), name
        shutil.rmtree(here)
    assert 0 in outcomes


def test_nothing_usable_is_an_error_and_not_a_fresh_start(begin, fork):
    cwd, _ = stopped_run(begin, fork, "vae")
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


def test_a_set_of_another_run_is_refused(begin, fork):
    """Files of a run with other settings, copied in whole: the error lists what differs."""
    cwd, _ = stopped_run(begin, fork, "vae")
    changed = fork(*command("vae", SMALL | {"lr": 0.5, "batch_size": 2}), cwd=cwd).wait()
    assert_one_line_error(changed, 1, "lr was 0.001, now 0.5", "batch_size was 4, now 2", "--overwrite")


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


def test_a_held_out_picture_that_would_be_trained_on_is_refused(tmp_path, fork):
    """One of 20 cannot be read and is skipped; without it there are fewer to hold out, and the same to read in all."""
    mine = pictures_of_mine(tmp_path) | {"skip_bad": True}
    order = sorted((tmp_path / "mine/images").glob("*.png"))
    for bad in order:  # one of the training pictures: of those held out, others come first
        whole = bad.read_bytes()
        bad.write_bytes(b"no picture")
        cfg = SDConfig(**mine | {"data_root": str(tmp_path / "mine"), "cache_dir": ""})
        read = [len(read_pictures(s, cfg, show_progress(""))[0]) for s in open_dataset(cfg)]
        if read == [17, 2]:
            break
        bad.write_bytes(whole)
    at_two = {"signal_at_step": (signal.SIGINT, 2)}
    assert fork(*command("vae", mine), cwd=tmp_path, inject=at_two).wait().returncode == 130
    bad.unlink()
    bad.with_suffix(".txt").unlink()
    assert_one_line_error(fork(*command("vae", mine), cwd=tmp_path).wait(), 1, "pictures or their captions are others")


def test_a_vae_trained_again_is_refused(begin, fork):
    cwd, _ = stopped_run(begin, fork, "unet")
    other = SMALL | {"lr": 0.002}
    assert fork(*command("vae", other), "--overwrite", cwd=cwd).wait().returncode == 0
    assert_one_line_error(fork(*command("unet"), cwd=cwd).wait(), 1, "the VAE is another", "--overwrite")


@pytest.mark.parametrize("what, was", [("threads", 99), ("processor", "another"), ("torch", "1.0")])
def test_another_machine_is_warned_of(begin, fork, what, was):
    cwd, _ = stopped_run(begin, fork, "vae")
    for path in (cwd / "run").glob("vae_set*.json"):
        from conftest import sign

        manifest = json.loads(path.read_text())
        manifest["machine"][what] = was
        path.write_text(sign(manifest))
    result = fork(*command("vae"), cwd=cwd).wait()
    assert result.returncode == 0 and f"warning: no longer exact to the bit: {what} was {was}" in result.stderr


def test_a_future_format_is_named(begin, fork):
    from conftest import sign

    cwd, _ = stopped_run(begin, fork, "vae")
    path = cwd / "run/vae_set1_step2.json"
    path.write_text(sign(json.loads(path.read_text()) | {"format": 7}))
    assert_one_line_error(fork(*command("vae"), cwd=cwd).wait(), 1, "format 7", "format 1")


# ---- Signals and the lock ----


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, STEPS_PER_EPOCH])
def test_a_terminal_that_is_closed_saves_the_run(begin, tmp_path, step):
    """A pseudo-terminal goes away, within an epoch and where its end is reported; the system sends the hang-up."""
    import os
    import pty
    import sys

    from conftest import ROOT

    cwd, _ = begin("vae")
    ready = tmp_path / "ready"
    code = f"""
import sys, time, pathlib; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import training, train_vae
calls, real = [], training.optimizer_step
def optimizer_step(optimizer, lr):
    real(optimizer, lr); calls.append(lr)
    if len(calls) == {step}: pathlib.Path({str(ready)!r}).touch(); time.sleep(1)
train_vae.optimizer_step = optimizer_step
sys.argv = {[str(w) for w in command("vae", SMALL | {"save_minutes": 60, "save_every": 50})]!r}
training.run_script(train_vae.main)
"""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(cwd)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
        os.execv(sys.executable, [sys.executable, "-c", code])
    deadline = time.monotonic() + 60
    while not ready.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGHUP
    assert list((cwd / "run").glob(f"vae_set*_step{step}.json"))


def test_the_second_signal_stops_at_once_and_the_old_set_is_whole(begin, fork):
    """The first is answered only after the step; the step here never ends. One that comes by two ways is one signal."""
    cwd, expected = begin("vae")
    one = fork(*command("vae"), cwd=cwd, inject={"hang_at_step": 2})
    deadline = time.monotonic() + 30
    while "hanging" not in one.out.read_text() if one.out.exists() else True:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    import os

    for _ in range(2):
        os.kill(one.process.pid, signal.SIGINT)
        time.sleep(0.3)
    assert one.process.exitcode is None and "once more stops at once" in one.err.read_text()
    time.sleep(SAME_SIGNAL)
    os.kill(one.process.pid, signal.SIGINT)
    assert one.wait(5).returncode == 130
    finish(fork, "vae", cwd, expected)


def test_a_signal_that_is_ignored_stays_so():
    """nohup has hang-ups ignored, and a shell script Ctrl-C for what it starts in the background."""
    before, found = {number: signal.getsignal(number) for number in SIGNALS}, []
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        interrupts = Interrupts(10, 0)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN and signal.getsignal(signal.SIGTERM) == interrupts.ask
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        run_script(lambda: [Interrupts(10, 0), found.append(signal.getsignal(signal.SIGTERM))])
        assert found == [signal.SIG_IGN]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_what_a_run_killed_while_it_cleaned_up_has_left_goes_at_the_next_call(begin, fork):
    cwd, _ = begin("vae")
    assert fork(*command("vae", SMALL | {"save_every": 1}), cwd=cwd).wait().returncode == 0
    names = {p.name for p in (cwd / "run").iterdir()}
    for name in ("vae_state1.pth", "vae_state2_step4.pth", "vae_ckpt_epoch2_step4.pth", "vae_set2_step4.json",
                 "vae_ckpt_epoch2_step5.pth"):  # fmt: skip
        (cwd / "run" / name).write_bytes((cwd / "run/vae_set2.json").read_bytes())
    again = fork(*command("vae"), cwd=cwd).wait()
    assert again.returncode == 0 and "finished" in again.stdout
    assert {p.name for p in (cwd / "run").iterdir()} == names


def test_two_trainings_in_one_directory_are_refused_and_a_dead_one_is_not_in_the_way(begin, fork):
    cwd, expected = begin("vae")
    one = fork(*command("vae"), cwd=cwd, inject={"hang_at_step": 2})
    while "hanging" not in one.out.read_text() if one.out.exists() else True:
        time.sleep(0.02)
    assert_one_line_error(fork(*command("vae"), cwd=cwd).wait(), 1, f"process {one.process.pid}", "--run_dir")
    one.process.kill()
    one.process.join()
    finish(fork, "vae", cwd, expected)


def test_save_minutes_bounds_what_a_kill_costs(begin, fork):
    """With saves only at epochs a kill in epoch 2 costs its steps; with --save_minutes 0 it costs none."""
    for minutes, resumed in ((60, STEPS_PER_EPOCH), (0, STEPS_PER_EPOCH + 1)):
        cwd, _ = begin("vae", f"minutes{minutes}")
        settings = SMALL | {"save_minutes": minutes, "save_every": 1}
        at_step = {"signal_at_step": (signal.SIGKILL, STEPS_PER_EPOCH + 2)}
        fork(*command("vae", settings), cwd=cwd, inject=at_step).wait()
        assert f"resumed after step {resumed}" in fork(*command("vae", settings), cwd=cwd).wait().stdout


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
