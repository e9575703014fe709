"""Promises of support/errors.py: what a user can put right ends in one line; a fault of ours shows its traceback."""

import errno
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, assert_one_line_error, run_script

from support import errors
from support.errors import UserError, printable


def ending(raised):
    def main():
        raise raised

    with pytest.raises(SystemExit) as e:
        errors.run_script(main)
    return e.value.code


@pytest.mark.parametrize(
    "raised, line",
    [
        (UserError("--lr: too high; give less"), "error: --lr: too high; give less"),
        (UserError("a\nb\x1b[31m\udcff"), "error: a b?[31m?"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "error: --batch_size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "not enough memory"),
        (MemoryError(), "not enough memory; give --grad_accumulation 2 or more"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal"), "error: --num_workers"),
        (
            RuntimeError("x\n[..] Connection closed by peer [127.0.0.1]:7"),
            "error: another process of this run has ended",
        ),
        (OSError(errno.EMFILE, os.strerror(errno.EMFILE)), "error: --num_workers: too many files"),
        (PermissionError(errno.EACCES, "Permission denied", "a/b"), "error: a/b: Permission denied; check the path"),
        (OSError("Traceback ...\nOSError: picture.jpg: gone"), "error: picture.jpg: gone"),
    ],
)
def test_what_a_user_can_put_right_is_one_line(raised, line):
    code = ending(raised)
    assert line in code and code.startswith("error: ") and "\n" not in code


@pytest.mark.parametrize(
    "why",
    [
        "CUDA error: no kernel image is available for execution on the device",
        "CUDA error: device kernel image is invalid",
        "CUDA error: the provided PTX was compiled with an unsupported toolchain.",
        "HIP error: invalid device function",
        "The NVIDIA driver on your system is too old (found version 10020).",
    ],
)
def test_a_gpu_without_kernels_is_one_line_that_says_how_to_go_on_without_it(why):
    line = ending(torch.AcceleratorError(f"{why}\nCUDA kernel errors might be asynchronously reported"))
    assert line.startswith(f"error: GPU: the installed PyTorch has no kernels for it or its driver ({why})")
    assert "\n" not in line and "CUDA_VISIBLE_DEVICES=-1" in line and len(line) < 400


def test_a_compiler_that_fails_is_one_line():
    made = type("Unsupported", (RuntimeError,), {"__module__": "torch._dynamo.exc"})
    line = "error: --compile: torch.compile does not work here (no compiler); give --no-compile"
    assert ending(made("no compiler\nand more")) == line


@pytest.mark.parametrize("raised", [RuntimeError("CUDA error: an illegal memory access"), KeyError("x"), ValueError()])
def test_a_fault_of_ours_shows_its_traceback(raised):
    """The first has "memory" in its words, but a smaller batch would not help."""

    def main():
        raise raised

    with pytest.raises(type(raised)):
        errors.run_script(main)


def test_ctrl_c_is_one_line_and_code_130(capsys):
    assert ending(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "stopped by Ctrl-C\n"


def test_text_from_outside_is_made_printable():
    assert printable("a\tb\n c\x00\x1b\ud800é") == "a b c???é"


FAILS = """
import atexit, sys
import torch.distributed as dist
from support.errors import UserError, run_script

def main():
    dist.init_process_group("gloo", init_method="file://{folder}/group", rank=0, world_size=1)
    atexit.register(print, "leaving slowly")
    raise UserError("--lr: too high; give less")

run_script(main)
"""


def test_an_error_beside_other_processes_leaves_at_once(tmp_path):
    """Closing the group, as an ordinary exit does, may wait for ever for what a GPU has begun."""
    command = [sys.executable, "-c", FAILS.format(folder=tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.splitlines()[-1] == "error: --lr: too high; give less"


@pytest.mark.slow
def test_a_mistake_ends_the_same_from_a_shell(tmp_path):
    assert_one_line_error(run_script("train_vae.py", "--epochs", "3", cwd=tmp_path), 2, "--epochs")
