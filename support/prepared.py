"""Arrays that are computed once and kept: decoded pictures, latents, embedded captions. Memory-mapped: they take no memory.

Rows are appended to a .part file as they come, their checksums to a .log, so that a build that was stopped goes on after
its last whole row. When all are there the file gets its name, and a manifest says what it was made of and its SHA-256.
For a row that cannot be had the log says why, and the file holds nothing.

What it is not: it knows no pictures and no models. The key says what an array depends on; another key is another file,
and a file that is not what its manifest says is made again, never used.
"""

import contextlib
import errno
import hashlib
import inspect
import json
import os
import shutil
import warnings
import zlib

import numpy as np
import torch

from support.checkpoint import own_hash
from support.errors import UserError
from support.files import free_megabytes, read_file, remove, write_file

try:
    import fcntl
except ImportError:  # Windows: two builds at once do not wait for each other there
    fcntl = None

MAX_MANIFEST_BYTES = 64 << 20  # it lists the rows that could not be had


class RowsFailed(Exception):
    """An error of whoever computes the rows, on its way past what handles those of the disk."""


def prepare(folder, name, key, row_shape, dtype, count, rows, together=1, still_bad=lambda i: True):
    """-> tensor (n, *row_shape) of the rows that could be had, and {number of the row: why} of the others.

    key: dict of what the rows depend on. rows(first) yields the rows from number `first` on, arrays of row_shape, or a
    string: why this one cannot be had. together: rows that must be computed in one go, from a multiple of this number.
    still_bad(i): asked before a file is used without row i. folder: where the file is kept; "" keeps it in memory only.
    UserError if the disk does not take it.
    """
    row_bytes = int(np.prod(row_shape)) * np.dtype(dtype).itemsize
    key = json.loads(json.dumps(key | {"row_shape": row_shape, "dtype": np.dtype(dtype).name, "count": count}))
    if not folder:
        return in_memory(row_shape, dtype, count, rows)
    path = os.path.join(folder, f"{name}-{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]}")
    manifest = check(path, key, row_bytes, still_bad)
    if manifest is None:
        with build_lock(path):
            manifest = check(path, key, row_bytes, still_bad)  # another process may have built it meanwhile
            if manifest is None:
                if os.path.exists(f"{path}.json"):
                    print(f"warning: {path}: not what was prepared, or lacks what can be had now; it is made again")
                print(f"{name}: preparing {count * row_bytes / 1e6:.0f} MB in {path}")
                remove(f"{path}.json", path)
                manifest = build(path, key, row_bytes, count, rows, together, still_bad)
    bad = {int(i): why for i, why in manifest["bad"].items()}
    if len(bad) == count:
        return torch.empty(0, *row_shape), bad
    print(f"{name}: {path}")
    return mapped(path, dtype, (count - len(bad), *row_shape)), bad


def source_hash(*objects):
    """SHA-256 of the source of functions, classes or modules, for a key: rows that older code has made are not used."""
    return hashlib.sha256("".join(map(inspect.getsource, objects)).encode()).hexdigest()


def in_memory(row_shape, dtype, count, rows):
    array, bad, good = np.empty((count, *row_shape), dtype), {}, 0
    for i, row in enumerate(rows(0)):
        if isinstance(row, str):
            bad[i] = row
        else:
            array[good], good = row, good + 1
    return torch.from_numpy(array[:good]), bad


def mapped(path, dtype, shape):
    """A file as a tensor that nobody may write to; UserError if it cannot be mapped.

    Read-only, not copy-on-write: Linux maps no more of that than there is memory for.
    """
    try:
        array = np.memmap(path, dtype, "r", shape=shape)
    except OSError as e:
        raise UserError(
            f"{path}: cannot be mapped into memory ({e.strerror}); raise the limit on address space (ulimit -v), or give "
            "fewer --max_images"
        ) from None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(array)


def check(path, key, row_bytes, still_bad):
    """The manifest of a whole file that lacks nothing but what cannot be had, else None."""
    whole = False
    with contextlib.suppress(UserError, ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError):
        manifest = json.loads(read_file(f"{path}.json", MAX_MANIFEST_BYTES))
        size = (key["count"] - len(manifest["bad"])) * row_bytes
        bad = [int(i) for i in manifest["bad"]]
        whole = manifest["sha256"] == own_hash(manifest) and manifest["key"] == key and os.path.getsize(path) == size
        whole = whole and manifest["content"] == file_sha256(path)
    # still_bad() is outside: what it raises is no fault of the file, and must not cost it
    return manifest if whole and all(map(still_bad, bad)) else None


# ---- Building -------------------------------------------------------------------------------------------


def build(path, key, row_bytes, count, rows, together, still_bad):
    """Compute the rows that an earlier, stopped build does not have yet -> the manifest; the file then has its name."""
    part, log = f"{path}.part", f"{path}.log"
    try:
        with open(part, "a+b") as f, open(log, "a+", encoding="utf-8", errors="replace") as notes:
            bad, done = whole_rows(f, notes, row_bytes, together, still_bad)
            if done:
                print(f"{part}: going on after row {done}")
            if shutil.disk_usage(os.path.dirname(path) or ".").free < (count - done) * row_bytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # say it now rather than hours later
            append(f, notes, numbered(rows, done, count), bad)
            check_size(part, f, (count - len(bad)) * row_bytes)
        # hash it before it has its name: the manifest must follow at once, a file without one is worth nothing
        manifest = {"key": key, "bad": {str(i): why for i, why in bad.items()}, "content": file_sha256(part)}
        manifest["sha256"] = own_hash(manifest)
        os.replace(part, path)
        write_file(f"{path}.json", json.dumps(manifest, indent=1).encode())
        remove(log)
        return manifest
    except RowsFailed as e:
        raise e.__cause__ from None
    except OSError as e:
        raise UserError(
            f"{part}: could not be written ({e.strerror}; {count * row_bytes / 1e6:.0f} MB needed in all, "
            f"{free_megabytes(path)} free); make room, or give another --cache_dir; what is prepared is kept"
        ) from None


def numbered(rows, first, count):
    """(number, row) of the rows from `first` on; ValueError if they are not as many as there should be."""
    number = first
    try:
        for row in rows(first):
            yield number, row
            number += 1
    except OSError as e:
        raise RowsFailed from e
    if number != count:
        raise ValueError(f"{number} rows instead of {count}")


def append(f, notes, rows, bad):
    for number, row in rows:
        why = row if isinstance(row, str) else None
        data = np.ascontiguousarray(row) if why is None else b""
        f.write(data)
        notes.write(json.dumps([zlib.crc32(data, number), why]) + "\n")
        if why is not None:
            bad[number] = why
    f.flush()
    os.fsync(f.fileno())


def check_size(part, f, size):
    """UserError if the file holds not just what was written: where locks do not hold, two builds end up in one file."""
    written = os.fstat(f.fileno())
    if written.st_size != size or not os.path.samestat(written, os.stat(part)):
        raise UserError(
            f"{part}: was written to or removed while it was made; let no two runs use a --cache_dir at once on this file "
            "system, then give the same command again"
        )


def whole_rows(f, notes, row_bytes, together, still_bad):
    """What a stopped build left -> {bad row: why}, number of rows; both files are cut there.

    A row counts if the log has a line with its checksum: row and line reach the disk in any order, or not at all, when
    the power goes. A row that could not be had must still be so. A checksum begins with the row's number, so that rows
    which two builds have written in turns do not pass.
    """
    f.seek(0)
    notes.seek(0)
    lines, whys = [], []
    for line in notes:
        with contextlib.suppress(ValueError, TypeError, RecursionError):
            checksum, why = json.loads(line)
            size = row_bytes if why is None else 0
            data = f.read(size)
            if line.endswith("\n") and len(data) == size and zlib.crc32(data, len(lines)) == checksum:
                lines.append(line)
                whys.append(why)
                continue
        break
    done = first_mended(whys, still_bad)
    done -= done % together
    f.truncate(whys[:done].count(None) * row_bytes)
    notes.truncate(0)
    notes.writelines(lines[:done])
    return {i: str(why) for i, why in enumerate(whys[:done]) if why is not None}, done


def first_mended(whys, still_bad):
    """The number of the first row that could not be had and now can, else how many there are."""
    try:
        return next((i for i, why in enumerate(whys) if why is not None and not still_bad(i)), len(whys))
    except OSError as e:
        raise RowsFailed from e


@contextlib.contextmanager
def build_lock(path):
    """One builder of a file at a time, the others wait for it; the system frees the lock however that one ends."""
    what = "made"
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(f"{path}.lock", "a") as f:
            what = "locked"
            wait_for_lock(f, path)
            what = None
            yield
    except OSError as e:
        if what is None:
            raise
        raise UserError(f"{path}: cannot be {what} ({e.strerror}); give another --cache_dir") from None


def wait_for_lock(f, path):
    if not fcntl:
        return
    try:
        fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # either is how a system says that it is taken
        print(f"{path}: waiting for another process that prepares it", flush=True)
        fcntl.lockf(f, fcntl.LOCK_EX)


def file_sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
