"""How a mistake ends: one line on stderr, `error: <file or flag>: <what>; <what to do>`, and exit code 1 or 2.

What it is not: a logger. It imports nothing of the project, and PyTorch only when a script runs, so config.py can use it.
"""

import contextlib
import errno
import os
import re
import signal
import sys

from support.signals import SIGNALS

ANOTHER_ENDED = ("Connection closed by peer", "Connection reset by peer", "remote process exited")  # gloo, NCCL
NO_KERNELS = (
    "kernel image|invalid device function|unsupported toolchain|driver version|driver on your system|NoBinaryForGpu"
)
OUT_OF_MEMORY = ("out of memory", "allocate memory", "not enough memory", "ALLOC_FAILED")  # GPU, CPU, Windows, cuBLAS


class UserError(Exception):
    """Something the user can put right; the message is one line: `<file or flag>: <what>; <what to do>`."""


def printable(text):
    """Text from outside on one line, without control characters, escape codes and lone surrogates."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(str(text).split()))


def run_script(main):
    """Run a script's main(). What the user can put right ends in one line on stderr and exit code 1."""
    handlers = {s: signal.getsignal(s) for s in SIGNALS}
    make_output_safe()
    if handlers[signal.SIGTERM] != signal.SIG_IGN:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        main()
        if group := process_group():
            group.barrier()  # rank 0 may still be writing
            group.destroy_process_group()
    except BrokenPipeError:  # whoever read our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (UserError, OSError, RuntimeError, MemoryError) as e:
        message = explain(e)
        if message is None:  # a fault of ours: show the traceback
            raise
        fail(message)
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        sys.exit(130)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def explain(e):
    """-> what a user can do about an error, of the system's and PyTorch's too, or None if nothing."""
    if isinstance(e, UserError):
        return str(e)
    last_line = str(e).strip().split("\n")[-1].removeprefix("OSError: ")  # of another process's error: what it was
    if isinstance(e, OSError):
        if e.errno in (errno.EMFILE, errno.ENFILE):
            return "--num_workers: too many files are open at once; give fewer, or 0"
        return f"{e.filename}: {e.strerror}; check the path, its permissions and the disk" if e.filename else last_line
    if type(e).__module__.startswith(("torch._dynamo", "torch._inductor")):
        why = str(e).strip().splitlines()[0][:200]
        return f"--compile: torch.compile does not work here ({why}); give --no-compile"
    if re.search(NO_KERNELS, str(e)):
        why = str(e).strip().splitlines()[0][:200]
        return (
            f"GPU: the installed PyTorch has no kernels for it or its driver ({why}); install a build for it (pytorch.org), "
            "or set CUDA_VISIBLE_DEVICES=-1 in the environment to run on the CPU"
        )
    if "DataLoader worker" in str(e):
        return "--num_workers: a process that reads pictures died; give fewer, or 0"
    if isinstance(e, MemoryError) or any(words in str(e) for words in OUT_OF_MEMORY):
        return (
            "--batch_size (of sample.py --size): not enough memory; give --grad_accumulation 2 or more, or "
            "--grad_checkpointing, which keep the result and may change in mid-run, a smaller batch or size, or fewer "
            "--max_images"
        )
    if any(words in str(e) for words in ANOTHER_ENDED):
        remedy = "mend that, and the same command goes on from the last save"
        return f"another process of this run has ended and says why ({last_line}); {remedy}"
    return None


def make_output_safe():
    """Keep working when stdout is closed from the start, or cannot show a character of a file's name."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")
        setattr(sys, name, stream)
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def warn(text):
    """One line on stderr; of several processes rank 0 alone speaks."""
    group = process_group()
    if not (group and group.get_rank()):
        print(f"warning: {text}", file=sys.stderr)


def process_group():
    """torch.distributed, where torchrun has started this process among others; else None."""
    group = getattr(sys.modules.get("torch"), "distributed", None)
    return group if group and group.is_available() and group.is_initialized() else None


def usage_error(message):
    """Exit with code 2 and one line."""
    print(f"error: {printable(message)}", file=sys.stderr)
    sys.exit(2)


def fail(message):
    """Exit with code 1 and one line."""
    if sys.stderr.isatty():
        print(file=sys.stderr)  # leave the line of a progress bar
    message = f"error: {printable(message)}"
    if process_group():  # a plain exit would close the group, and may wait for ever for what a GPU has begun
        with contextlib.suppress(OSError, ValueError):
            print(message, file=sys.stderr, flush=True)
            sys.stdout.flush()
        os._exit(1)
    sys.exit(message)
