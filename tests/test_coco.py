"""Promises of get_data.py download: nothing half under its name, what was cut goes on, what failed is listed.

The server is a local one that misbehaves as real ones do.
"""

import errno
import hashlib
import http.server
import io
import json
import os
import signal
import socketserver
import threading
import time
import zipfile
from collections import Counter

import numpy as np
import pytest
from conftest import assert_one_line_error, no_hang, wait_for
from PIL import Image

from config import UserError
from support import coco
from support.files import Damaged


def jpeg(i):
    data = io.BytesIO()
    Image.fromarray(np.random.RandomState(i).randint(0, 256, (48, 64, 3), dtype=np.uint8)).save(data, "JPEG")
    return data.getvalue()


def captions(split, count):
    images = [{"id": i, "file_name": f"{split}{i}.jpg"} for i in range(count)]
    return json.dumps(
        {"images": images, "annotations": [{"image_id": i, "caption": f"number {i}"} for i in range(count)]}
    )


def annotations(**more):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as z:
        for name, split in (("train", "train"), ("val", "val")):
            z.writestr(f"annotations/captions_{name}2017.json", captions(split, 8))
        z.writestr("annotations/instances_train2017.json", "not wanted")
        for name, text in more.items():
            z.writestr(name, text)
    return data.getvalue()


@pytest.fixture
def server(monkeypatch):
    """A server of a small COCO. .faults: {path: how it misbehaves}, .times: how often; .asked: what was asked of it."""
    monkeypatch.setattr(coco, "SILENCE", 0.5)
    monkeypatch.setattr(coco, "SECONDS_BEFORE_RETRY", 0.01)
    files = {f"/train2017/train{i}.jpg": jpeg(i) for i in range(8)} | {
        f"/val2017/val{i}.jpg": jpeg(100 + i) for i in range(8)
    }

    class Answer(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_GET(self):
            s = self.server
            s.asked[self.path] += 1
            s.ranges.append(self.headers.get("Range"))
            fault = s.faults.get(self.path) if s.asked[self.path] <= s.times else None
            data = s.files.get(self.path)
            if fault in (404, 503) or data is None:
                return self.reply(fault or 404, b"<html>sorry</html>")
            if fault == "redirect":
                return self.reply(302, b"", Location=f"http://127.0.0.1:{s.server_port}{self.path}?moved")
            if fault == "elsewhere":
                return self.reply(302, b"", Location="file:///etc/passwd")
            if fault == "loop":
                return self.reply(302, b"", Location=self.path)
            if fault == "html":
                return self.reply(200, b"<html>log in</html>")
            if fault == "not http":
                return self.wfile.write(b"hello\r\n\r\n")
            if fault == "silent":
                return time.sleep(1.5)
            start = 0
            if s.resumes and (asked := self.headers.get("Range")):
                start = int(asked.removeprefix("bytes=").removesuffix("-"))
            self.send_response(206 if start else 200)
            length = len(data) - start
            lie = {"says more": 1000, "says less": -1000}.get(fault, 0)
            if fault != "no length":
                self.send_header("Content-Length", str(10**12 if fault == "says giant" else length + lie))
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            self.send_header("Connection", "close")
            self.end_headers()
            half = data[start : start + length // 2]
            if fault == "drips":
                for byte in half:
                    self.wfile.write(bytes([byte]))
                    time.sleep(0.02)
            self.wfile.write(half if fault in ("cuts", "stalls") else data[start:])
            self.wfile.flush()
            if fault == "stalls":
                time.sleep(1.5)
            self.close_connection = True

        def reply(self, code, body, **headers):
            self.send_response(code)
            for name, value in {"Content-Length": str(len(body)), "Connection": "close", **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)
            self.close_connection = True

        def handle_one_request(self):
            try:
                self.path_without = super().handle_one_request()
            except (ConnectionError, ValueError):
                self.close_connection = True

    class Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
        daemon_threads = True

        def handle_error(self, *_):
            pass

    one = Server(("127.0.0.1", 0), Answer)
    one.files = files | {f"{path}?moved": data for path, data in files.items()}
    one.files[f"/{coco.ZIP}"] = annotations()
    one.faults, one.times, one.asked, one.ranges, one.resumes = {}, 10**6, Counter(), [], True
    threading.Thread(target=one.serve_forever, args=(0.01,), daemon=True).start()
    yield one
    one.shutdown()
    one.server_close()


@pytest.fixture
def get(server, run_here, tmp_path):
    def run(*more):
        sha1 = hashlib.sha1(server.files[f"/{coco.ZIP}"]).hexdigest()
        return run_here("get_data.py", "download", "--max_images", 5, "--held_out_images", 3, "--data_root", "coco", "--base_url",
                        f"http://127.0.0.1:{server.server_port}", "--zip_sha1", sha1, *more, cwd=tmp_path)  # fmt: skip

    return run


def there(tmp_path):
    return {
        str(p.relative_to(tmp_path / "coco")): p.read_bytes() for p in (tmp_path / "coco").rglob("*") if p.is_file()
    }


def pictures(tmp_path):
    return {f"/{name}": data for name, data in there(tmp_path).items() if name.endswith(".jpg")}


def test_the_subset_that_training_reads_is_what_is_downloaded(server, get, tmp_path, run_here):
    result = get()
    assert result.returncode == 0, result.stderr
    found = pictures(tmp_path)
    assert len(found) == 8 and all(server.files[name] == data for name, data in found.items())
    assert sum(name.startswith("/train2017") for name in found) == 5
    rest = set(there(tmp_path)) - {name[1:] for name in found}
    assert rest == {"annotations/captions_train2017.json", "annotations/captions_val2017.json"}
    small = ["--image_size", 32, "--block_out_channels", 8, 8, "--norm_num_groups", 4, "--max_images", 5, "--held_out_images", 3,
             "--unet_block_out_channels", 16, 32, "--time_dim", 64, "--num_workers", 0, "--max_steps", 1]  # fmt: skip
    trained = run_here("train_vae.py", "--data_root", "coco", "--run_dir", "run", *small, cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    seen = run_here("get_data.py", "verify", "--data_root", "coco", cwd=tmp_path)
    assert seen.returncode == 0 and "3 pictures in annotations/captions_train2017.json, but not" in seen.stdout
    assert "5 pictures in annotations/captions_val2017.json, but not" in seen.stdout


def test_the_same_command_again_asks_for_nothing_that_is_there(server, get, tmp_path):
    assert get().returncode == 0
    asked = server.asked.copy()
    (gone := tmp_path / "coco" / next(iter(pictures(tmp_path)))[1:]).unlink()
    assert get().returncode == 0
    assert sum((server.asked - asked).values()) == 1 and gone.exists()


@pytest.mark.parametrize("fault", [503, "cuts", "stalls", "silent", "says more", "html", "drips", "not http"])
def test_a_fault_that_passes_is_tried_again(server, get, tmp_path, fault):
    server.faults, server.times = (
        {"/train2017/train1.jpg": fault, "/train2017/train5.jpg": fault, "/val2017/val0.jpg": fault},
        1,
    )
    result = get()
    assert result.returncode == 0, result.stderr
    assert len(pictures(tmp_path)) == 8 and not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize("fault", [404, 503, "cuts", "stalls", "silent", "says more", "says less", "says giant", "html", "loop",
                                   "elsewhere", "not http"])  # fmt: skip
def test_a_fault_that_stays_is_listed_and_leaves_no_half_picture(server, get, tmp_path, monkeypatch, fault):
    if fault in ("stalls", "silent"):
        monkeypatch.setattr(coco, "SILENCE", 0.1)
    server.faults = {f"/train2017/train{i}.jpg": fault for i in range(8)}
    start = time.monotonic()
    result = get("--connections", 8)
    assert_one_line_error(result, 1, "5 of 8 pictures", "the same command again")
    assert len([line for line in result.stderr.splitlines() if "train2017/train" in line]) == 5
    assert time.monotonic() - start < 20
    found = pictures(tmp_path)
    assert len(found) == 3 and all(server.files[name] == data for name, data in found.items())
    assert not list(tmp_path.rglob("*.part"))
    server.faults = {}
    monkeypatch.setattr(coco, "SILENCE", 5)
    assert get().returncode == 0 and len(pictures(tmp_path)) == 8


@pytest.mark.parametrize("fault", ["redirect", "no length"])
def test_what_is_no_fault_works(server, get, tmp_path, fault):
    server.faults = {name: fault for name in server.files if "moved" not in name}
    if fault == "redirect":
        server.files[f"/{coco.ZIP}?moved"] = server.files[f"/{coco.ZIP}"]
    assert get().returncode == 0 and len(pictures(tmp_path)) == 8


def test_a_zip_that_is_cut_goes_on_where_it_ended(server, get):
    server.files[f"/{coco.ZIP}"] = annotations(filler=np.random.RandomState(0).bytes(300_000).hex())
    server.faults, server.times = {f"/{coco.ZIP}": "cuts"}, 2
    assert get().returncode == 0
    starts = [int(r.removeprefix("bytes=").removesuffix("-")) for r in server.ranges if r]
    assert len(starts) == 2 and 0 < starts[0] < starts[1]


def test_a_server_that_cannot_go_on_starts_over(server, get):
    server.faults, server.times, server.resumes = {f"/{coco.ZIP}": "cuts"}, 1, False
    assert get().returncode == 0


def spoil_member(data, how):
    """A zip whose first member is encrypted, or is a deflate stream that cannot be (its checksum is the server's own)."""
    data = bytearray(data)
    if how == "encrypted":
        data[6] |= 1
        data[data.index(b"PK\1\2") + 8] |= 1
    elif how == "broken stream":
        name, extra = data[26] + 256 * data[27], data[28] + 256 * data[29]
        data[30 + name + extra] = 7  # a block of a kind that does not exist
    return bytes(data)


@pytest.mark.parametrize("how", ["encrypted", "broken stream", None])
def test_a_zip_that_does_not_unpack_is_refused(server, get, tmp_path, how):
    name = f"/{coco.ZIP}"
    server.files[name] = spoil_member(server.files[name], how)
    result = get()
    if how is None:
        assert result.returncode == 0, result.stderr
    else:
        assert_one_line_error(result, 1, "annotations_trainval2017.zip", "download it again")
        assert not [n for n in there(tmp_path) if n.endswith((".json", ".jpg", ".zip"))]


@pytest.mark.parametrize("how", ["checksum", "html", 404, "no zip", "climbs", "absolute", "incomplete"])
def test_a_zip_that_is_not_cocos_is_refused_before_it_is_unpacked(server, get, tmp_path, how):
    name, more = f"/{coco.ZIP}", []
    if how in ("html", 404):
        server.faults = {name: how}
    elif how == "checksum":
        more = ["--zip_sha1", "0" * 40]
    elif how == "no zip":
        server.files[name] = b"PK not really"
    elif how == "incomplete":
        data = io.BytesIO()
        zipfile.ZipFile(data, "w").close()
        server.files[name] = data.getvalue()
    else:
        server.files[name] = annotations(**{"../pwned" if how == "climbs" else "/tmp/pwned": "x"})
    result = get(*more)
    assert_one_line_error(result, 1, "annotations_trainval2017.zip")
    assert not [n for n in there(tmp_path) if n.endswith((".json", ".jpg"))] and not list(tmp_path.rglob("pwned"))


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_download_stopped_leaves_nothing_half_and_the_next_goes_on(server, get, tmp_path, fork, number, code):
    server.faults = {f"/train2017/train{i}.jpg": "drips" for i in range(8)}
    sha1 = hashlib.sha1(server.files[f"/{coco.ZIP}"]).hexdigest()
    one = fork("get_data.py", "download", "--max_images", 5, "--held_out_images", 3, "--data_root", "coco", "--base_url",
               f"http://127.0.0.1:{server.server_port}", "--zip_sha1", sha1, cwd=tmp_path)  # fmt: skip
    wait_for(lambda: list(tmp_path.rglob("train*.jpg*")))  # one that drips is under way
    os.kill(one.process.pid, number)
    assert one.wait(20).returncode == code
    assert all(server.files[name] == data for name, data in pictures(tmp_path).items())
    server.faults = {}
    assert get().returncode == 0 and len(pictures(tmp_path)) == 8


def test_a_download_stopped_before_all_pictures_are_asked_for_ends_at_once(server, get, monkeypatch):
    """The threads are at work from the first submit() on; Ctrl-C between two must let them go as later."""
    monkeypatch.setattr(coco, "SILENCE", 60)
    server.faults = {f"/train2017/train{i}.jpg": "drips" for i in range(8)}
    real, calls = coco.ThreadPoolExecutor.submit, []

    def stopped(*args):
        calls.append(args)
        if len(calls) == 6:
            while not any("train2017" in path for path in server.asked):
                time.sleep(0.01)
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(coco.ThreadPoolExecutor, "submit", stopped)
    with no_hang(8):
        assert get().returncode == 130


@pytest.mark.parametrize("whole", [True, False])
def test_a_zip_of_the_users_own_stays(server, get, tmp_path, whole):
    """It is used where it is the right one."""
    own = tmp_path / "coco/annotations_trainval2017.zip"
    own.parent.mkdir()
    data = server.files[f"/{coco.ZIP}"] if whole else b"something else"
    own.write_bytes(data)
    assert get().returncode == 0 and own.read_bytes() == data
    assert server.asked[f"/{coco.ZIP}"] == (not whole)
    assert [p.name for p in own.parent.glob("*.zip*")] == [own.name]


def test_more_connections_than_any_server_bears_are_refused(get):
    assert_one_line_error(get("--connections", coco.MOST_CONNECTIONS + 1), 2, "--connections")


def test_too_few_file_handles_are_not_put_down_to_the_disk(tmp_path):
    with pytest.raises(UserError, match="--connections: too many files"), coco.writing(tmp_path / "x"):
        raise OSError(errno.EMFILE, "Too many open files", "x")


# ---- What no other try would better ----

ZIP_FILE, JSON_FILE = "downloaded_annotations_trainval2017.zip.part", "annotations/captions_train2017.json.part"


@pytest.mark.parametrize("which", ["picture", ZIP_FILE, JSON_FILE])
def test_a_full_disk_stops_everything_at_once(server, get, tmp_path, which, monkeypatch):
    """/dev/full answers every write as a full disk does."""
    monkeypatch.setattr(coco, "SECONDS_BEFORE_RETRY", 2)
    parts = [f"train2017/train{i}.jpg.part" for i in range(8)] if which == "picture" else [which]
    for part in parts:
        path = tmp_path / "coco" / part
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to("/dev/full")
    result = get("--connections", 1)
    assert_one_line_error(result, 1, "train2017/train" if which == "picture" else which, "No space left on device")
    assert "base_url" not in result.stderr
    tries = [count for path, count in server.asked.items() if "train2017/" in path]
    assert tries == [] if which != "picture" else tries in ([1], [1, 1])  # another may be under way
    for part in parts:
        (tmp_path / "coco" / part).unlink(missing_ok=True)
    before = {n for n in there(tmp_path) if not n.endswith(".part")}
    asked = server.asked[f"/{coco.ZIP}"]
    assert get().returncode == 0 and len(pictures(tmp_path)) == 8
    assert before <= set(there(tmp_path)) | {"downloaded_annotations_trainval2017.zip"}
    assert server.asked[f"/{coco.ZIP}"] == asked + (which == ZIP_FILE)  # what was there was not asked for again


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_what_may_not_be_written_stops_everything_at_once(server, get, tmp_path, monkeypatch, number):
    """Only told so: root, who may run this test, is permitted everything."""

    def refused(path, mode="r", *args, **options):
        if "train2017/" in str(path) and "r" not in mode:
            raise OSError(number, os.strerror(number), path)
        return open(path, mode, *args, **options)

    monkeypatch.setattr(coco, "open", refused, raising=False)
    assert_one_line_error(get("--connections", 1), 1, "coco/train2017/train", os.strerror(number), "permissions")
    assert [count for path, count in server.asked.items() if "train2017/" in path] in ([1], [1, 1])
    monkeypatch.undo()
    assert get().returncode == 0 and len(pictures(tmp_path)) == 8


def test_it_gives_up_when_nothing_comes_any_more(server, get, tmp_path, monkeypatch):
    monkeypatch.setattr(coco, "MOST_IN_A_ROW", 3)
    server.faults = {f"/train2017/train{i}.jpg": 503 for i in range(8)}
    server.faults |= {f"/val2017/val{i}.jpg": 503 for i in range(8)}
    result = get("--connections", 1)
    assert_one_line_error(result, 1, "--base_url: 3 pictures in a row", "HTTP 503", "the same command")
    assert len([path for path in server.asked if path.endswith(".jpg")]) in (3, 4)  # one may be under way
    server.faults = {}
    assert get().returncode == 0 and len(pictures(tmp_path)) == 8


def test_failures_among_successes_do_not_end_it(server, get, tmp_path, monkeypatch):
    monkeypatch.setattr(coco, "MOST_IN_A_ROW", 6)
    server.faults = {f"/train2017/train{i}.jpg": 404 for i in range(8)}
    assert_one_line_error(get("--connections", 1), 1, "5 of 8 pictures")
    assert len(pictures(tmp_path)) == 3


def test_a_download_stopped_while_it_unpacks_goes_on_without_another_zip(server, get, tmp_path, monkeypatch):
    real = coco.shutil.copyfileobj

    def stopped(source, f):
        f.write(source.read(50))
        raise KeyboardInterrupt

    monkeypatch.setattr(coco.shutil, "copyfileobj", stopped)
    assert get().returncode == 130
    assert not [n for n in there(tmp_path) if n.endswith(".json")]
    monkeypatch.setattr(coco.shutil, "copyfileobj", real)
    assert get().returncode == 0 and len(pictures(tmp_path)) == 8
    assert server.asked[f"/{coco.ZIP}"] == 1
    assert not [n for n in there(tmp_path) if n.endswith((".part", ".zip"))]


def test_a_zip_that_changes_between_its_parts_is_had_anew(server, get, tmp_path):
    name = f"/{coco.ZIP}"
    server.files[name] = annotations(filler=np.random.RandomState(0).bytes(300_000).hex())
    server.faults, server.times = {name: "cuts"}, coco.TRIES
    assert_one_line_error(get(), 1, "cut after", "the same command again")
    assert (tmp_path / "coco" / ZIP_FILE).exists()
    server.files[name] = annotations(filler=np.random.RandomState(1).bytes(300_000).hex())
    assert get().returncode == 0 and len(pictures(tmp_path)) == 8
    assert server.ranges.count(None) >= 2  # from its start, once more


# ---- What is there and damaged ----


@pytest.mark.parametrize("content", [b"", b"{}", "half", "others"])
def test_a_damaged_captions_file_is_put_aside_and_had_anew(server, get, tmp_path, content):
    assert get().returncode == 0
    path = tmp_path / "coco/annotations/captions_train2017.json"
    good = path.read_bytes()
    others = good.replace(b'"image_id": ', b'"image_id": 1')
    damaged = {"half": good[: len(good) // 2], "others": others}.get(content, content)
    path.write_bytes(damaged)
    result = get()
    assert result.returncode == 0 and "Renamed to captions_train2017.json.damaged" in result.stdout
    assert path.read_bytes() == good and path.with_name(f"{path.name}.damaged").read_bytes() == damaged
    asked = server.asked.copy()
    assert get().returncode == 0 and server.asked == asked  # a whole one stays


def test_captions_that_may_not_be_read_are_not_put_aside(server, get, tmp_path, monkeypatch):
    """Only told so: root, who may run this test, is permitted everything."""
    assert get().returncode == 0
    before = there(tmp_path)

    def refused(path, most):
        raise Damaged(f"{path}: cannot be read (Permission denied); restore it")

    monkeypatch.setattr("support.folders.read_file", refused)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert_one_line_error(get(), 1, "captions_train2017.json: cannot be read")
    assert there(tmp_path) == before


def test_damaged_pictures_can_be_put_aside_and_had_anew(server, get, tmp_path, run_here):
    assert get().returncode == 0
    good = pictures(tmp_path)
    path = next((tmp_path / "coco/train2017").iterdir())
    path.write_bytes(path.read_bytes()[:900])
    verify = "get_data.py", "verify", "--data_root", "coco"
    assert_one_line_error(run_here(*verify, cwd=tmp_path), 1, "1 of 8", "--put_aside")
    assert get().returncode == 0 and pictures(tmp_path) != good  # download alone decodes nothing that is there
    result = run_here(*verify, "--put_aside", cwd=tmp_path)
    assert result.returncode == 0 and "1 of them are renamed" in result.stdout and len(pictures(tmp_path)) == 7
    assert get().returncode == 0 and pictures(tmp_path) == good
    before = there(tmp_path)
    assert run_here(*verify, "--put_aside", cwd=tmp_path).returncode == 0 and there(tmp_path) == before
