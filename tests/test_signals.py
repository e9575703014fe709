"""Promises of support/signals.py: a signal to stop is heard after the step, a second one at once."""

import os
import pty
import shlex
import signal
import sys
import time

import pytest
from conftest import SMALL, STEPS_PER_EPOCH, command, finish, wait_for

from support import signals
from support.errors import run_script
from support.signals import SAME_SIGNAL, SIGNALS, Interrupts


@pytest.fixture
def handlers():
    """What the system does on each signal is the same again after the test."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("step", [2, STEPS_PER_EPOCH])
def test_a_terminal_that_is_closed_saves_the_run(begin, fork, tmp_path, step):
    """A pseudo-terminal goes away, within an epoch and where its end is reported; the system sends the hang-up."""
    cwd, _ = begin("vae")
    ours, theirs = pty.openpty()
    inject = {"terminal": os.ttyname(theirs), "wait_at_step": (str(tmp_path / "ready"), step)}
    one = fork(*command("vae", SMALL | {"save_minutes": 60, "save_every": 50}), cwd=cwd, inject=inject)
    wait_for((tmp_path / "ready").exists)
    os.close(ours)
    os.close(theirs)
    assert one.wait().returncode == 128 + signal.SIGHUP
    assert list((cwd / "run").glob(f"vae_set*_step{step}.json"))


def test_the_second_signal_stops_at_once_and_the_old_set_is_whole(begin, fork):
    """The first is answered only after the step; the step here never ends. One that comes by two ways is one signal."""
    cwd, expected = begin("vae")
    one = fork(*command("vae"), cwd=cwd, inject={"hang_at_step": 2})
    wait_for(lambda: one.out.exists() and "hanging" in one.out.read_text())
    for _ in range(2):
        os.kill(one.process.pid, signal.SIGINT)
        time.sleep(0.3)
    assert one.process.exitcode is None and "once more stops at once" in one.err.read_text()
    time.sleep(SAME_SIGNAL)
    os.kill(one.process.pid, signal.SIGINT)
    assert one.wait(5).returncode == 130
    finish(fork, "vae", cwd, expected)


def test_a_signal_that_is_ignored_stays_so(handlers):
    """nohup has hang-ups ignored, and a shell script Ctrl-C for what it starts in the background."""
    found = []
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    interrupts = Interrupts(10, 0)
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN and signal.getsignal(signal.SIGTERM) == interrupts.ask
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    run_script(lambda: [Interrupts(10, 0), found.append(signal.getsignal(signal.SIGTERM))])
    assert found == [signal.SIG_IGN]


def test_a_save_is_due_by_the_clock_and_on_a_signal_and_on_rank_0_alone(handlers, monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    first, second = Interrupts(10, 0), Interrupts(10, 1)
    assert not first.save_is_due()
    now[0] = 600.0
    assert first.save_is_due() and not second.save_is_due()
    first.saved(3)
    assert not first.save_is_due()
    for each in (first, second):
        each.ask(signal.SIGTERM, None)
    assert first.save_is_due() and not second.save_is_due()
    assert capsys.readouterr().err.count("once more stops at once") == 1


@pytest.mark.parametrize(
    "environment, words",
    [
        ({}, "python train_vae.py --run_dir 'my run'"),
        ({"LOCAL_WORLD_SIZE": "4"}, "torchrun --nproc_per_node=4 train_vae.py --run_dir 'my run'"),
        (
            {"LOCAL_WORLD_SIZE": "4", "GROUP_WORLD_SIZE": "2", "MASTER_ADDR": "a"},
            "torchrun --nnodes=2 --node_rank=0 --master_addr=a --nproc_per_node=4 train_vae.py --run_dir 'my run'",
        ),
    ],
)
def test_the_command_that_goes_on_can_be_pasted(handlers, monkeypatch, capsys, environment, words):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["train_vae.py", "--run_dir", "my run", "--overwrite"])
    interrupts = Interrupts(10, 0)
    interrupts.ask(signal.SIGINT, None)
    with pytest.raises(SystemExit, match="130"):
        interrupts.saved(7)
    assert capsys.readouterr().out == f"stopped after step 7, saved; to go on: {words}\n"
    assert shlex.split(words)[-1] == "my run"
