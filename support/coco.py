"""COCO (https://cocodataset.org/#download) over HTTPS: the captions' zip, then single pictures, many at a time.

No server is trusted: a file gets its name when it is whole and has been checked. Whatever stops a download, the same
command goes on from there. What it is not: get_data.py chooses the pictures, data.py reads the captions.
"""

import contextlib
import errno
import hashlib
import os
import random
import shutil
import threading
import time
import urllib.request
import zipfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from http.client import HTTPException
from os.path import basename, dirname, exists, join
from pathlib import Path

from support.errors import UserError
from support.show import Progress

BASE_URL = "https://s3.amazonaws.com/images.cocodataset.org"  # the host of that name has no certificate of its own
ZIP, ZIP_SHA1 = "annotations/annotations_trainval2017.zip", "8551ee4bb5860311e79dace7e79cb91e432e78b3"
MAX_ZIP_BYTES, MAX_JSON_BYTES, MAX_PICTURE_BYTES, CHUNK = 1 << 30, 1 << 30, 32 << 20, 1 << 16
TRIES, SECONDS_BEFORE_RETRY = 4, 1.0  # the pause doubles each time
SILENCE = 10  # seconds without a byte after which a connection is dead
SLOWEST = 20_000  # bytes per second; less is a stalled connection, too, once SILENCE has passed
MOST_CONNECTIONS = 64  # servers and systems bear no more
MOST_IN_A_ROW = 40  # pictures that fail one after the other before the rest is given up


class Failed(Exception):
    """A connection or an answer that another try may better."""


class Refused(Exception):
    """An answer that another try would not change."""


@contextlib.contextmanager
def writing(path):
    """UserError for what the disk refuses. It would refuse every picture and every try, so the download stops."""
    try:
        yield
    except OSError as e:
        if e.errno is None:  # not from the system
            raise
        if e.errno in (errno.EMFILE, errno.ENFILE):
            raise UserError("--connections: too many files are open at once; give fewer") from None
        remedy = "see to the disk and its permissions, then the same command goes on from here"
        raise UserError(f"{path}: {e.strerror}; {remedy}") from None


def fetch(url, path, most, on_chunk):
    """One try to get `url` into `path`, going on where a file of that name ends. Raises Failed, Refused or UserError."""
    have = os.path.getsize(path) if exists(path) else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=SILENCE) as answer:
            goes_on = answer.status == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {have}-")
            have, length = have if goes_on else 0, answer.headers.get("Content-Length", "")
            total = have + int(length) if length.isdigit() else None
            if (total or 0) > most:
                raise Refused(f"{total} bytes, {most} at most were expected")
            with writing(path), open(path, "ab" if goes_on else "wb") as f:
                for chunk in chunks(answer, have, most):
                    f.write(chunk)
                    on_chunk(len(chunk))
                if total is not None and f.tell() != total:
                    raise Failed(f"cut after {f.tell()} of {total} bytes")
    except urllib.error.HTTPError as e:
        if e.code != 416:  # then nothing is left to send; what is there will be checked
            kind = Failed if e.code >= 500 or e.code in (408, 429) else Refused
            raise kind(f"HTTP {e.code} {e.reason}") from None
    except (ValueError, OSError, HTTPException) as e:  # a malformed answer or address; no connection
        raise Failed(f"{type(e).__name__}: {getattr(e, 'reason', e)}") from None


def chunks(answer, have, most):
    """The bytes of an answer as they come. Failed if they stop or trickle, Refused if with `have` they exceed `most`."""
    start, got = time.monotonic(), 0
    try:
        while chunk := answer.read1(CHUNK):
            got, seconds = got + len(chunk), time.monotonic() - start
            if have + got > most:
                raise Refused(f"more than {most} bytes")
            if seconds > SILENCE and got / seconds < SLOWEST:
                raise Failed(f"stalls at {got / seconds:.0f} bytes per second")
            yield chunk
    except (OSError, HTTPException) as e:  # here: an OSError of the file is another matter
        raise Failed(f"{type(e).__name__}: {e}") from None


def get(url, path, check, most, on_chunk, keep_part=False):
    """Fetch into path.part, with retries; check(path.part); rename -> None, or why it could not be had.

    on_chunk(bytes) is called for what arrives; it may raise Refused. UserError if the file cannot be written.
    """
    part, why = f"{path}.part", ""
    for attempt in range(TRIES):
        time.sleep(SECONDS_BEFORE_RETRY * 2 ** (attempt - 1) if attempt else 0)
        try:
            on_chunk(0)
            fetch(url, part, most, on_chunk)
            check(part)
            with writing(path):
                os.replace(part, path)
            return None
        except UserError:
            raise
        except (Failed, Refused) as e:
            why = str(e)
            if isinstance(e, Refused):
                break
        except Exception as e:  # from check: what came is wrong, and decoders say so in many ways
            why = f"{type(e).__name__}: {e}"
            Path(part).unlink(missing_ok=True)
    if not keep_part:
        Path(part).unlink(missing_ok=True)
    return why


def get_captions(root, names, base_url, sha1):
    """The captions files `names`, within COCO's zip and within root, unless they are there."""
    wanted = [name for name in names if not exists(join(root, name))]
    if not wanted:
        return
    os.makedirs(join(root, "annotations"), exist_ok=True)
    url, theirs, ours = f"{base_url}/{ZIP}", join(root, basename(ZIP)), join(root, f"downloaded_{basename(ZIP)}")

    def sha1_of(path):
        with open(path, "rb") as f:
            return hashlib.file_digest(f, "sha1").hexdigest()

    def check(path):
        if (found := sha1_of(path)) != sha1:
            raise ValueError(f"SHA-1 is {found}, {sha1} was expected")

    # the user's own, or what an earlier command was stopped from unpacking
    source = next((path for path in (theirs, ours) if exists(path) and sha1_of(path) == sha1), None)
    if source is None:
        print(f"captions: {url}")
        source, progress = ours, Progress(None, "captions (bytes)")
        why = get(url, source, check, MAX_ZIP_BYTES, progress.update, keep_part=True)
        progress.close()
        if why:
            raise UserError(f"--base_url: {url}: {why}; give the same command again, or another --base_url")
    wrong = unpack(source, wanted, root)
    if source == ours:
        os.remove(source)
    if wrong:
        raise UserError(f"{source}: not COCO's annotations: {wrong}; download it again")


def unpack(path, names, root):
    """These members of a zip, each whole before it has its name -> what is wrong with the zip, or None."""
    try:
        with zipfile.ZipFile(path) as z:
            if stray := [n for n in z.namelist() if n[:1] == "/" or ".." in n.replace("\\", "/").split("/")]:
                return f"holds a file {stray[0]!r} that leads out of its folder"
            for name in names:
                if z.getinfo(name).file_size > MAX_JSON_BYTES:
                    return f"{name} unpacks to more than {MAX_JSON_BYTES} bytes"
                part = join(root, f"{name}.part")
                with writing(part), z.open(name) as source, open(part, "wb") as f:
                    shutil.copyfileobj(source, f)
                os.replace(part, join(root, name))
    except (UserError, MemoryError):
        raise
    except Exception as e:  # a broken or encrypted zip: zipfile and its decompressors raise many kinds
        if getattr(e, "errno", None):  # the zip may be as it should
            raise
        return f"{type(e).__name__}: {e}"


def get_pictures(jobs, read, connections):
    """jobs: [(url, path)]. read(path): decodes a file, or raises -> [(path, why)] of what could not be had."""
    for folder in {dirname(path) for _, path in jobs}:
        os.makedirs(folder, exist_ok=True)
    missing = [(url, path) for url, path in jobs if not exists(path)]
    random.shuffle(missing)  # pictures that a server lacks must not always come first, and stop all others
    print(f"pictures: {len(jobs) - len(missing)} are there, {len(missing)} to get")
    failed, in_a_row, stop, progress = [], 0, threading.Event(), Progress(len(missing), "pictures")

    def refuse_when_stopped(_):
        if stop.is_set():
            raise Refused("stopped")

    with ThreadPoolExecutor(connections) as pool:
        try:
            waiting = {pool.submit(get, *job, read, MAX_PICTURE_BYTES, refuse_when_stopped): job for job in missing}
            for done in as_completed(waiting):
                (url, path), why = waiting[done], done.result()
                in_a_row = in_a_row + 1 if why else 0
                failed += [(path, why)] if why else []
                if in_a_row >= MOST_IN_A_ROW:
                    what = f"{in_a_row} pictures in a row could not be had (the last: {url}: {why})"
                    remedy = "check the network or give another --base_url, then the same command goes on from here"
                    raise UserError(f"--base_url: {what}; {remedy}")
                progress.update()
        except BaseException:  # Ctrl-C, a full disk, no network: let the threads go
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    progress.close()
    return sorted(failed)
