"""COCO over HTTPS: the captions' zip with its checksum, then single pictures, many at a time; what was cut goes on.

What it is not: it chooses no pictures and reads no captions (data.py does), and it trusts no server: a file gets its
name only when it is whole and has been checked, so that whatever stops a download, the same command goes on from there.

Source: https://cocodataset.org/#download. The host images.cocodataset.org has no certificate of its own name, so the
addresses are those of the bucket behind it.
"""

import contextlib
import errno
import hashlib
import http.client
import os
import random
import shutil
import threading
import time
import urllib.error
import urllib.request
import zipfile
from concurrent.futures import ThreadPoolExecutor, as_completed

from config import UserError

BASE_URL = "https://s3.amazonaws.com/images.cocodataset.org"
ZIP = "annotations/annotations_trainval2017.zip"
ZIP_SHA1 = "8551ee4bb5860311e79dace7e79cb91e432e78b3"
MAX_ZIP_BYTES, MAX_JSON_BYTES, MAX_PICTURE_BYTES = 1 << 30, 1 << 30, 32 << 20
TRIES, SECONDS_BEFORE_RETRY = 4, 1.0  # the pause doubles each time
SILENCE = 10  # seconds without a byte after which a connection counts as dead
SLOWEST = 20_000  # bytes per second below which a server counts as stalling, after SILENCE
CHUNK = 1 << 16
MOST_CONNECTIONS = 64  # a server's patience and a system's threads have an end
MOST_IN_A_ROW = 40  # pictures that fail one after the other before it is no use to ask for the rest


class Failed(Exception):
    """A connection or an answer that another try may better."""


class Refused(Exception):
    """An answer that another try would not change."""


class NotCaptions(UserError):
    """A whole zip that does not hold what it should."""


@contextlib.contextmanager
def writing(path):
    """What the disk refuses it refuses every picture, and every try: UserError, which stops the download."""
    try:
        yield
    except OSError as e:
        if e.errno is None:  # not from the system
            raise
        if e.errno in (errno.EMFILE, errno.ENFILE):
            raise UserError("--connections: too many files are open at once; give fewer") from None
        raise UserError(f"{path}: {e.strerror}; see to the disk and its permissions, then the same command goes on from "
                        "here") from None  # fmt: skip


def fetch(url, path, most, on_chunk):
    """One try to get `url` into `path`, going on where a file of that name ends. Raises Failed, Refused or UserError."""
    have = os.path.getsize(path) if os.path.exists(path) else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=SILENCE) as answer:
            goes_on = answer.status == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {have}-")
            have = have if goes_on else 0
            length = answer.headers.get("Content-Length", "")
            total = have + int(length) if length.isdigit() else None
            if (total or 0) > most:
                raise Refused(f"{total} bytes, {most} at most were expected")
            with writing(path), open(path, "ab" if goes_on else "wb") as f:
                copy(answer, f, have, most, on_chunk)
                if total is not None and f.tell() != total:
                    raise Failed(f"cut after {f.tell()} of {total} bytes")
    except urllib.error.HTTPError as e:
        if e.code == 416:  # nothing is left to send; what is there will be checked
            return
        kind = Failed if e.code >= 500 or e.code in (408, 429) else Refused
        raise kind(f"HTTP {e.code} {e.reason}") from None
    except (ValueError, OSError, http.client.HTTPException) as e:  # a malformed answer or address; no connection
        raise Failed(f"{type(e).__name__}: {getattr(e, 'reason', e)}") from None


def copy(answer, f, have, most, on_chunk):
    start, got = time.monotonic(), 0
    while chunk := receive(answer):
        f.write(chunk)
        got += len(chunk)
        seconds = time.monotonic() - start
        if have + got > most:
            raise Refused(f"more than {most} bytes")
        if seconds > SILENCE and got / seconds < SLOWEST:
            raise Failed(f"stalls at {got / seconds:.0f} bytes per second")
        on_chunk(len(chunk))


def receive(answer):
    try:
        return answer.read1(CHUNK)
    except (OSError, http.client.HTTPException) as e:  # here, because an OSError of the file is another matter
        raise Failed(f"{type(e).__name__}: {e}") from None


def get(url, path, check, most, on_chunk, keep_part=False):
    """Fetch with retries into path.part, check(path.part), then rename -> None, or why it could not be had.

    on_chunk(bytes) is called for what arrives; it may raise Refused. UserError if the file cannot be written.
    """
    part, why = f"{path}.part", ""
    for attempt in range(TRIES):
        if attempt:
            time.sleep(SECONDS_BEFORE_RETRY * 2 ** (attempt - 1))
        try:
            on_chunk(0)
            fetch(url, part, most, on_chunk)
            check(part)
            with writing(path):
                os.replace(part, path)
            return None
        except UserError:
            raise
        except Refused as e:
            why = str(e)
            break
        except Failed as e:
            why = str(e)
        except Exception as e:  # from check: what came is wrong, and decoders say so in many ways
            why = f"{type(e).__name__}: {e}"
            remove(part)
    if not keep_part:
        remove(part)
    return why


def remove(path):
    with contextlib.suppress(FileNotFoundError):
        os.remove(path)


def get_captions(root, jsons, base_url, sha1):
    """The captions files `jsons` (paths within COCO's zip and within root), unless they are there."""
    from training import Progress

    wanted = [name for name in jsons if not os.path.exists(os.path.join(root, name))]
    if not wanted:
        return
    os.makedirs(os.path.join(root, "annotations"), exist_ok=True)
    theirs, url = os.path.join(root, os.path.basename(ZIP)), f"{base_url}/{ZIP}"
    path = os.path.join(root, f"downloaded_{os.path.basename(ZIP)}")

    def check(part):
        with open(part, "rb") as f:
            found = hashlib.file_digest(f, "sha1").hexdigest()
        if found != sha1:
            raise ValueError(f"SHA-1 is {found}, {sha1} was expected")

    if is_whole(theirs, check):
        return extract(theirs, wanted, root)
    if not is_whole(path, check):  # it is, if a former command was stopped while it unpacked
        print(f"captions: {url}")
        progress = Progress(None, "captions (bytes)")
        why = get(url, path, check, MAX_ZIP_BYTES, progress.update, keep_part=True)
        progress.close()
        if why:
            raise UserError(f"--base_url: {url}: {why}; give the same command again, or another --base_url")
    try:
        extract(path, wanted, root)
    except NotCaptions:
        remove(path)  # nobody else's, and another download must not meet it
        raise
    remove(path)


def is_whole(path, check):
    try:
        check(path)
    except (FileNotFoundError, ValueError):
        return False
    return True


def extract(path, names, root):
    """Only these members, each whole before it has its name; a zip with names that lead elsewhere is refused entirely."""
    try:
        with zipfile.ZipFile(path) as z:
            for info in z.infolist():
                if info.filename.startswith("/") or ".." in info.filename.replace("\\", "/").split("/"):
                    raise ValueError(f"holds a file {info.filename!r} that leads out of its folder")
            for name in names:
                if z.getinfo(name).file_size > MAX_JSON_BYTES:
                    raise ValueError(f"{name} unpacks to more than {MAX_JSON_BYTES} bytes")
                part = os.path.join(root, f"{name}.part")
                with writing(part), z.open(name) as source, open(part, "wb") as f:
                    shutil.copyfileobj(source, f)
                os.replace(part, os.path.join(root, name))
    except (UserError, MemoryError):
        raise
    except Exception as e:  # a broken or encrypted zip: zipfile and its decompressors raise many kinds
        if getattr(e, "errno", None):  # the zip may be as it should
            raise
        raise NotCaptions(f"{path}: not COCO's annotations: {e}; download it again") from None


def get_pictures(jobs, read, connections):
    """jobs: [(url, path)], read: decodes a file or raises -> [(path, why)] of what could not be had."""
    from training import Progress

    for folder in {os.path.dirname(path) for _, path in jobs}:
        os.makedirs(folder, exist_ok=True)
    missing = [(url, path) for url, path in jobs if not os.path.exists(path)]
    # in another order each time: pictures that a server lacks must not always come first, and stop all others
    random.shuffle(missing)
    print(f"pictures: {len(jobs) - len(missing)} are there, {len(missing)} to get")
    failed, in_a_row, stop, progress = [], 0, threading.Event(), Progress(len(missing), "pictures")

    def refuse_when_stopped(_):
        if stop.is_set():
            raise Refused("stopped")

    with ThreadPoolExecutor(connections) as pool:
        try:
            waiting = {
                pool.submit(get, url, path, read, MAX_PICTURE_BYTES, refuse_when_stopped): (url, path)
                for url, path in missing
            }
            for done in as_completed(waiting):
                (url, path), why = waiting[done], done.result()
                failed += [(path, why)] if why else []
                in_a_row = in_a_row + 1 if why else 0
                refuse_when_hopeless(in_a_row, url, why)
                progress.update()
        except BaseException:  # Ctrl-C, a full disk, no network: let the threads go
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    progress.close()
    return sorted(failed)


def refuse_when_hopeless(in_a_row, url, why):
    if in_a_row >= MOST_IN_A_ROW:
        raise UserError(f"--base_url: {in_a_row} pictures in a row could not be had (the last: {url}: {why}); check the "
                        "network or give another --base_url, then the same command goes on from here")  # fmt: skip
