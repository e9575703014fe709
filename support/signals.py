"""When to save within an epoch, and how to stop: Ctrl-C, SIGTERM and hang-ups finish the step and save first.

What it is not: it saves nothing itself; checkpoint.py asks it and does.
"""

import contextlib
import os
import shlex
import signal
import stat
import subprocess
import sys
import time

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
SAME_SIGNAL = 1.0  # seconds: torchrun passes on what its processes may have been sent anyway, so two within it are one


class Interrupts:
    """A save is due every `minutes`, and after the step in which a signal to stop has come."""

    def __init__(self, minutes, rank):
        self.seconds, self.rank = 60 * minutes, rank
        self.signal, self.asked, self.last_save = None, None, time.monotonic()
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores hang-ups: leave that so
                signal.signal(number, self.ask)

    def ask(self, number, frame):
        if self.signal:  # asked twice: stop at once, the last set stays as it is
            if time.monotonic() - self.asked > SAME_SIGNAL:
                os._exit(128 + number)
            return
        self.signal, self.asked = number, time.monotonic()
        if number == getattr(signal, "SIGHUP", None):
            leave_terminal()
        if self.rank == 0:  # the others go on until rank 0 has saved and left, which ends them all
            print("\nfinishing the step and saving; once more stops at once", file=sys.stderr, flush=True)

    def save_is_due(self):
        """Whether rank 0 must save now. The other ranks never decide: their clocks and signals differ."""
        return self.rank == 0 and (self.signal is not None or time.monotonic() - self.last_save >= self.seconds)

    def saved(self, step):
        """Note that a set has been saved; exit with code 128 + signal if one has asked for that."""
        self.last_save = time.monotonic()
        if self.signal:
            command = command_line(*launcher(), *(word for word in sys.argv if word != "--overwrite"))
            print(f"stopped after step {step}, saved; to go on: {command}", flush=True)
            sys.exit(128 + self.signal)


def leave_terminal():
    """After a hang-up the terminal is gone: send output nowhere instead of failing."""
    for number in (1, 2):
        with contextlib.suppress(OSError):
            if stat.S_ISCHR(os.fstat(number).st_mode):
                os.dup2(os.open(os.devnull, os.O_WRONLY), number)


def command_line(*words):
    """Words as they can be pasted into a shell."""
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def launcher():
    """The words before the script's name in the command that started this run."""
    processes, nodes = (os.environ.get(name, "1") for name in ("LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE"))
    if processes == nodes == "1":
        return ["python"]
    address = [f"--nnodes={nodes}", "--node_rank=0", f"--master_addr={os.environ.get('MASTER_ADDR')}"]
    return ["torchrun", *(address if nodes != "1" else []), f"--nproc_per_node={processes}"]
