"""Whole files or none: writing and reading that a crash, a full disk or a hostile file cannot half do.

What it is not: it knows no formats.
"""

import contextlib
import errno
import hashlib
import os
import shutil
import stat

from support.errors import UserError

try:
    import fcntl
except ImportError:  # Windows: there two processes at once are not noticed
    fcntl = None


class Damaged(UserError):
    """A file is missing or is not what was saved."""


def write_file(path, data):
    """Bytes under a temporary name, flushed to the disk, read back, renamed: the name never shows half a file."""
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        with open(temporary, "rb") as f:
            if f.read() != data:
                raise OSError(errno.EIO, "it does not read back as written")
        os.replace(temporary, path)
        sync_folder(os.path.dirname(path))
    except OSError as e:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise UserError(
            f"{path}: could not be written ({e.strerror}; {len(data) / 1e6:.1f} MB needed, {free_megabytes(path)} free); "
            "make room or mend the disk, then give the same command again: what was saved before is whole"
        ) from None


def free_megabytes(path):
    try:
        return f"{shutil.disk_usage(os.path.dirname(path) or '.').free / 1e6:.1f} MB"
    except OSError:
        return "nothing"


def sync_folder(folder):
    """Put renames on the disk too, where a folder can be opened for that."""
    if os.name == "posix":
        handle = os.open(folder or ".", os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def read_file(path, most):
    """The bytes of a regular file of at most `most` bytes. Pipes and giants are refused unopened."""
    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            raise Damaged(f"{path}: not a regular file; restore it")
        if found.st_size > most:
            raise Damaged(f"{path}: {found.st_size} bytes, {most} at most were expected; restore it")
        with open(path, "rb") as f:
            return f.read(most + 1)
    except FileNotFoundError:
        raise Damaged(f"{path}: missing; restore it") from None
    except OSError as e:
        raise Damaged(f"{path}: cannot be read ({e.strerror}); restore it") from None


def entry_of(data):
    """What a manifest says of a file's bytes."""
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def lock(f, wait=False, shared=False):
    """Lock an open file -> whether it could be had. The system frees it however this process ends."""
    try:
        if fcntl:
            fcntl.lockf(f, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except (BlockingIOError, PermissionError):  # either is how a system says that it is taken
        return False
    return True


def remove(*paths):
    """Remove files, if they are there."""
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)
