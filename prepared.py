"""Arrays that are computed once and kept: decoded pictures, latents, embedded captions. Memory-mapped, so that they take no memory.

Rows are appended to a .part file as they come, their checksums to a .log, so that a build that was stopped goes on after
its last whole row. When all are there the file gets its name, and a manifest says what it was made of and its SHA-256.

What it is not: it knows no pictures and no models. The key says what an array depends on; another key is another file,
and a file that is not what its manifest says is made again, never used.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import zlib

import numpy as np
import torch

from checkpoint import free_megabytes, own_hash, read_file, write_file
from config import UserError

try:
    import fcntl
except ImportError:  # Windows: two builds at once are not noticed there
    fcntl = None

MAX_MANIFEST_BYTES = 64 << 20  # it lists the rows that could not be had


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
        with build_lock(path):
            manifest = check(path, key, row_bytes)  # another process may have built it meanwhile
            if manifest is None:
                if os.path.exists(f"{path}.json"):
                    print(f"warning: {path}: not what was prepared; it is made again")
                print(f"{name}: preparing {count * row_bytes / 1e6:.0f} MB in {path}")
                remove(f"{path}.json", path)
                manifest = build(path, key, row_bytes, count, rows, together)
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
    """The manifest of a whole file, else None."""
    with contextlib.suppress(UserError, ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError):
        manifest = json.loads(read_file(f"{path}.json", MAX_MANIFEST_BYTES))
        size = (key["count"] - len(manifest["bad"])) * row_bytes
        whole = manifest["sha256"] == own_hash(manifest) and manifest["key"] == key and os.path.getsize(path) == size
        if whole and manifest["content"] == file_sha256(path):
            return manifest
    return None


def build(path, key, row_bytes, count, rows, together):
    """Compute the rows that an earlier, stopped build does not have yet -> the manifest; the file then has its name."""
    part, log = f"{path}.part", f"{path}.log"
    try:
        with open(part, "a+b") as f, open(log, "a+", encoding="utf-8", errors="replace") as notes:
            bad, done = whole_rows(f, notes, row_bytes, together)
            if done:
                print(f"{part}: going on after row {done}")
            if shutil.disk_usage(os.path.dirname(path) or ".").free < (count - done) * row_bytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # said now rather than hours later
            for i, row in enumerate(rows(done), done):
                why = row if isinstance(row, str) else None
                data = np.ascontiguousarray(row).tobytes() if why is None else bytes(row_bytes)
                f.write(data)
                notes.write(json.dumps([zlib.crc32(data), why]) + "\n")
                if why is not None:
                    bad[i] = why
            f.flush()
            os.fsync(f.fileno())
            if f.tell() != count * row_bytes:
                raise UserError(f"{part}: {f.tell()} bytes instead of {count * row_bytes}; delete it")
        leave_out(part, path, bad, row_bytes)
        manifest = {"key": key, "bad": {str(i): why for i, why in bad.items()}, "content": file_sha256(path)}
        manifest["sha256"] = own_hash(manifest)
        write_file(f"{path}.json", json.dumps(manifest, indent=1).encode())
        remove(part, log)
        return manifest
    except OSError as e:
        raise UserError(f"{part}: could not be written ({e.strerror}; {count * row_bytes / 1e6:.0f} MB needed in all, "
                        f"{free_megabytes(path)} free); make room, or give another --cache_dir; what is prepared is "
                        "kept") from None  # fmt: skip


def whole_rows(f, notes, row_bytes, together):
    """What a stopped build left: rows count as far as the log has a line with their checksum -> {bad row: why}, number.

    Both files are cut there. A row and its line reach the disk in any order, or not at all, when the power goes.
    """
    f.seek(0)
    notes.seek(0)
    lines = []
    for line in notes:
        with contextlib.suppress(ValueError, TypeError, RecursionError):
            checksum, why = json.loads(line)
            data = f.read(row_bytes)
            if line.endswith("\n") and len(data) == row_bytes and zlib.crc32(data) == checksum:
                lines.append((line, why))
                continue
        break
    lines = lines[: len(lines) - len(lines) % together]
    f.truncate(len(lines) * row_bytes)
    notes.truncate(0)
    notes.writelines(line for line, _ in lines)
    return {i: str(why) for i, (_, why) in enumerate(lines) if why is not None}, len(lines)


@contextlib.contextmanager
def build_lock(path):
    """One builder of a file at a time, the others wait for it; the system frees the lock however that one ends."""
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        f = open(f"{path}.lock", "a")
    except OSError as e:
        raise UserError(f"{path}: cannot be made ({e.strerror}); give another --cache_dir") from None
    with f:
        try:
            if fcntl:
                wait_for_lock(f, path)
        except OSError as e:
            raise UserError(f"{path}: cannot be locked ({e.strerror}); give another --cache_dir") from None
        yield


def wait_for_lock(f, path):
    try:
        fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # either is how a system says that it is taken
        print(f"{path}: waiting for another process that prepares it", flush=True)
        fcntl.lockf(f, fcntl.LOCK_EX)


def leave_out(part, path, bad, row_bytes):
    """Give the file its name, without the bad rows, in bounded memory."""
    if not bad:
        os.replace(part, path)
        return
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
