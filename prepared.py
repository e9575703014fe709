"""Arrays that are computed once and kept: decoded pictures, latents. Memory-mapped, so that they take no memory.

Rows are appended to a .part file as they come, so that a build that was stopped goes on after its last whole row. When
all are there the file gets its name, and a manifest says what it was made of and its SHA-256.

What it is not: it knows no pictures and no models. The key says what an array depends on; another key is another file,
and a file that is not what its manifest says is made again, never used.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil

import numpy as np
import torch

from checkpoint import free_megabytes, own_hash, read_file, write_file
from config import UserError

try:
    import fcntl
except ImportError:  # Windows: two builds at once are not noticed there
    fcntl = None

MAX_MANIFEST_BYTES = 64 << 20  # it lists the rows that could not be had
CHUNK_BYTES = 1 << 24


def prepare(folder, name, key, row_shape, dtype, count, rows, together=1):
    """-> tensor (n, *row_shape) of the rows that could be had, and {number of the row: why} of the others.

    key: dict of what the rows depend on. rows(first) yields the rows from number `first` on, arrays of row_shape, or a
    string: why this one cannot be had. together: rows that must be computed in one go, from a multiple of this number.
    folder: where the file is kept; "" keeps it in memory only. UserError if the disk does not take it.
    """
    row_bytes = int(np.prod(row_shape)) * np.dtype(dtype).itemsize
    key = json.loads(json.dumps(key | {"row_shape": row_shape, "dtype": np.dtype(dtype).name, "count": count}))
    if not folder:
        return in_memory(row_shape, dtype, count, rows)
    path = os.path.join(folder, f"{name}-{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]}")
    manifest = check(path, key, row_bytes)
    if manifest is None:
        build(path, key, row_bytes, count, rows, together)
        manifest = check(path, key, row_bytes)
    bad = {int(i): why for i, why in manifest["bad"].items()}
    if len(bad) == count:
        return torch.empty(0, *row_shape), bad
    print(f"{name}: {path}")
    # copy-on-write, because PyTorch wants memory that it might write to
    return torch.from_numpy(np.memmap(path, dtype, "c", shape=(count - len(bad), *row_shape))), bad


def in_memory(row_shape, dtype, count, rows):
    array, bad, good = np.empty((count, *row_shape), dtype), {}, 0
    for i, row in enumerate(rows(0)):
        if isinstance(row, str):
            bad[i] = row
        else:
            array[good], good = row, good + 1
    return torch.from_numpy(array[:good]), bad


def check(path, key, row_bytes):
    """The manifest of a whole file, else None; what is there and not whole is removed, with a warning."""
    if not os.path.exists(f"{path}.json"):
        return None
    with contextlib.suppress(UserError, ValueError, KeyError, TypeError, AttributeError, OSError):
        manifest = json.loads(read_file(f"{path}.json", MAX_MANIFEST_BYTES))
        size = (key["count"] - len(manifest["bad"])) * row_bytes
        whole = manifest["sha256"] == own_hash(manifest) and manifest["key"] == key and os.path.getsize(path) == size
        if whole and manifest["content"] == file_sha256(path):
            return manifest
    print(f"warning: {path}: not what was prepared; it is made again")
    remove(f"{path}.json", path)
    return None


def build(path, key, row_bytes, count, rows, together):
    part, notes = f"{path}.part", f"{path}.bad"
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(part, "ab") as f:
            lock(f, part)
            done = f.tell() // row_bytes
            done -= done % together
            f.truncate(done * row_bytes)
            bad = {i: why for i, why in read_notes(notes) if i < done}
            write_file(notes, "".join(note(i, why) for i, why in bad.items()).encode())
            if done:
                print(f"{part}: going on after row {done}")
            if shutil.disk_usage(os.path.dirname(path) or ".").free < (count - done) * row_bytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # said now rather than hours later
            for i, row in enumerate(rows(done), done):
                if isinstance(row, str):
                    bad[i], row = row, bytes(row_bytes)
                    with open(notes, "a", encoding="utf-8") as n:
                        n.write(note(i, bad[i]))
                f.write(row)
            f.flush()
            os.fsync(f.fileno())
            if f.tell() != count * row_bytes:
                raise UserError(f"{part}: {f.tell()} bytes instead of {count * row_bytes}; delete it")
            if bad:
                leave_out(part, path, bad, row_bytes)
            else:
                os.replace(part, path)
    except OSError as e:
        raise UserError(f"{part}: could not be written ({e.strerror}; {count * row_bytes / 1e6:.0f} MB needed in all, "
                        f"{free_megabytes(path)} free); make room, or give another --cache_dir; what is prepared is "
                        "kept") from None  # fmt: skip
    manifest = {"key": key, "bad": {str(i): why for i, why in bad.items()}, "content": file_sha256(path)}
    write_file(f"{path}.json", json.dumps(manifest | {"sha256": own_hash(manifest)}, indent=1).encode())
    remove(part, notes)


def note(i, why):
    return json.dumps([i, why]) + "\n"


def read_notes(path):
    """-> [(row, why)] of an earlier, stopped build."""
    with contextlib.suppress(FileNotFoundError, ValueError), open(path, encoding="utf-8") as f:
        return [tuple(json.loads(line)) for line in f]
    return []


def lock(f, part):
    """Refuse to append to what another process is appending to; the system frees the lock however that one ends."""
    try:
        if fcntl:
            fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(f"{part}: another process is preparing it; wait for it, or give another --cache_dir") from None


def leave_out(part, path, bad, row_bytes):
    """Copy all rows but the bad ones, in bounded memory."""
    temporary, number = f"{path}.tmp", 0
    with open(part, "rb") as source, open(temporary, "wb") as f:
        while row := source.read(row_bytes):
            if number not in bad:
                f.write(row)
            number += 1
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def file_sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def remove(*paths):
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)
