"""Arrays that are computed once and kept: decoded pictures, latents, embedded captions. Mapped: they take no memory.

A file holds rows one after the other. The manifest beside it says what they are made of, how many there are, their
SHA-256, and why some could not be had; of those the file holds nothing. While a file is built, the manifest is saved
every few seconds and at a stop, and the next build goes on after the rows that it names. Rows are used only if their
SHA-256 is as the manifest says, be the file whole or not.

What it is not: it knows no pictures and no models. The key says what an array depends on; another key is another file,
and a file that is not what its manifest says is made again, never used.
"""

import contextlib
import errno
import hashlib
import inspect
import itertools
import json
import os
import shutil
import time
import warnings
from typing import NamedTuple

import numpy as np
import torch

from support.checkpoint import own_hash
from support.errors import UserError
from support.files import free_megabytes, lock, read_file, remove, write_file

MAX_MANIFEST_BYTES = 64 << 20  # it lists the rows that could not be had
SECONDS_BETWEEN_SAVES = 10  # of a build's manifest: what a kill -9 or a power cut costs


class Rows(NamedTuple):
    """What a file holds: the rows before number `done`, but for the bad ones, {number: why}. sha256: a hash object."""

    done: int
    bad: dict
    sha256: object


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
    kept = rows_kept(path, key, row_bytes, still_bad)
    if kept.done < count:
        with build_lock(path):
            kept = rows_kept(path, key, row_bytes, still_bad)  # another process may have built it meanwhile
            if kept.done < count:
                if not kept.done and os.path.exists(f"{path}.json"):
                    print(f"warning: {path}: not what was prepared, or lacks what can be had now; it is made again")
                print(f"{name}: preparing {count * row_bytes / 1e6:.0f} MB in {path}")
                build(path, key, row_bytes, kept, rows, together)
                kept = rows_kept(path, key, row_bytes)
    if kept.done < count:  # where locks do not hold, two builds end up in one file
        raise UserError(
            f"{path}: was written to or removed while it was made; let no two runs use a --cache_dir at once on this file "
            "system, then give the same command again"
        )
    if len(kept.bad) == count:
        return torch.empty(0, *row_shape), kept.bad
    print(f"{name}: {path}")
    return mapped(path, dtype, (count - len(kept.bad), *row_shape)), kept.bad


def source_hash(*objects):
    """SHA-256 of the source of functions, classes or modules, for a key: rows of older code are not used."""
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


def rows_kept(path, key, row_bytes, still_bad=lambda i: True):
    """-> Rows: none, if the file is not what its manifest says, or lacks what can be had now."""
    nothing = kept = Rows(0, {}, hashlib.sha256())
    with contextlib.suppress(UserError, ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError):
        manifest = json.loads(read_file(f"{path}.json", MAX_MANIFEST_BYTES))
        if manifest["sha256"] == own_hash(manifest) and manifest["key"] == key:
            done, bad = manifest.get("done", key["count"]), {int(i): why for i, why in manifest["bad"].items()}
            sha256 = file_sha256(path, (done - len(bad)) * row_bytes)
            kept = Rows(done, bad, sha256) if sha256.hexdigest() == manifest["content"] else nothing
    # still_bad() is outside: what it raises is no fault of the file, and must not cost it
    return kept if all(map(still_bad, kept.bad)) else nothing


def file_sha256(path, size):
    """-> hash object of the first `size` bytes of a file."""
    sha256 = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(min(size, 1 << 20)):
            sha256.update(block)
            size -= len(block)
    return sha256


# ---- Building -------------------------------------------------------------------------------------------


def build(path, key, row_bytes, kept, rows, together):
    """Compute the rows that are not kept yet. Whatever stops it, the next build goes on with what it leaves."""
    count, size, last_save = key["count"], key["count"] * row_bytes, time.monotonic()
    with disk_errors(path, size):
        if kept.done:
            print(f"{path}: going on after row {kept.done}")
        else:
            remove(f"{path}.json", path)  # not cut to nothing: another process may have mapped it
        if shutil.disk_usage(os.path.dirname(path)).free < (count - kept.done) * row_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # say it now rather than hours later
        f = open(path, "ab", buffering=0)
    with f:
        f.truncate((kept.done - len(kept.bad)) * row_bytes)
        computed = iter(rows(kept.done))
        try:
            while part := list(itertools.islice(computed, together)):
                with disk_errors(path, size):
                    kept = append(f, kept, part)
                    if time.monotonic() - last_save > SECONDS_BETWEEN_SAVES:
                        save(path, f, key, kept)
                        last_save = time.monotonic()
        finally:
            with disk_errors(path, size):
                save(path, f, key, kept)
    if kept.done != count:
        raise ValueError(f"{kept.done} rows instead of {count}")


def append(f, kept, rows):
    """Write the next rows -> Rows, all of them or, if this is stopped, none."""
    data = b"".join(row.tobytes() for row in rows if not isinstance(row, str))
    if f.write(data) < len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    sha256 = kept.sha256.copy()
    sha256.update(data)
    bad = {number: row for number, row in enumerate(rows, kept.done) if isinstance(row, str)}
    return Rows(kept.done + len(rows), kept.bad | bad if bad else kept.bad, sha256)


def save(path, f, key, kept):
    """Write the manifest of the rows in the file, once they are on the disk."""
    if not kept.done:
        return
    os.fsync(f.fileno())
    manifest = {"key": key, "bad": {str(i): why for i, why in kept.bad.items()}, "content": kept.sha256.hexdigest()}
    if kept.done < key["count"]:
        manifest["done"] = kept.done
    manifest["sha256"] = own_hash(manifest)
    write_file(f"{path}.json", json.dumps(manifest, indent=1).encode())


@contextlib.contextmanager
def disk_errors(path, size):
    """Of what writes a file of `size` bytes: UserError instead of OSError, which does not say of which file it is."""
    try:
        yield
    except OSError as e:
        raise UserError(
            f"{path}: could not be written ({e.strerror}; {size / 1e6:.0f} MB needed in all, {free_megabytes(path)} free); "
            "make room, or give another --cache_dir; what is prepared is kept"
        ) from None


@contextlib.contextmanager
def build_lock(path):
    """One builder of a file at a time, the others wait for it; the system frees the lock however that one ends."""
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        f = open(f"{path}.lock", "a")
        if not lock(f):
            print(f"{path}: waiting for another process that prepares it", flush=True)
            lock(f, wait=True)
    except OSError as e:
        raise UserError(f"{path}: cannot be made or locked ({e.strerror}); give another --cache_dir") from None
    with f:
        yield
