"""Promises of download.py: nothing half under its name, what was cut goes on, what failed is listed, from any server.

The server is a local one that misbehaves as real ones do.
"""

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
from conftest import assert_one_line_error
from PIL import Image

import download


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
    monkeypatch.setattr(download, "SILENCE", 0.5)
    monkeypatch.setattr(download, "SECONDS_BEFORE_RETRY", 0.01)
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
    one.files[f"/{download.ZIP}"] = annotations()
    one.faults, one.times, one.asked, one.ranges, one.resumes = {}, 10**6, Counter(), [], True
    threading.Thread(target=one.serve_forever, daemon=True).start()
    yield one
    one.shutdown()
    one.server_close()


@pytest.fixture
def get(server, run_here, tmp_path):
    def run(*more):
        sha1 = hashlib.sha1(server.files[f"/{download.ZIP}"]).hexdigest()
        return run_here("data.py", "download", "--max_images", 5, "--held_out_images", 3, "--data_root", "coco", "--base_url",
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
    seen = run_here("data.py", "verify", "--data_root", "coco", cwd=tmp_path)
    assert seen.returncode == 0 and "3 pictures in the captions file, but not in the folder" not in seen.stdout
    assert "8 pictures in the captions file, but not in the folder" in seen.stdout


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
def test_a_fault_that_stays_is_listed_and_leaves_no_half_picture(server, get, tmp_path, fault):
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
    assert get().returncode == 0 and len(pictures(tmp_path)) == 8


@pytest.mark.parametrize("fault", ["redirect", "no length"])
def test_what_is_no_fault_works(server, get, tmp_path, fault):
    server.faults = {name: fault for name in server.files if "moved" not in name}
    if fault == "redirect":
        server.files[f"/{download.ZIP}?moved"] = server.files[f"/{download.ZIP}"]
    assert get().returncode == 0 and len(pictures(tmp_path)) == 8


def test_a_zip_that_is_cut_goes_on_where_it_ended(server, get):
    server.files[f"/{download.ZIP}"] = annotations(filler=np.random.RandomState(0).bytes(300_000).hex())
    server.faults, server.times = {f"/{download.ZIP}": "cuts"}, 2
    assert get().returncode == 0
    starts = [int(r.removeprefix("bytes=").removesuffix("-")) for r in server.ranges if r]
    assert len(starts) == 2 and 0 < starts[0] < starts[1]


def test_a_server_that_cannot_go_on_starts_over(server, get):
    server.faults, server.times, server.resumes = {f"/{download.ZIP}": "cuts"}, 1, False
    assert get().returncode == 0


@pytest.mark.parametrize("how", ["checksum", "html", 404, "no zip", "climbs", "absolute", "incomplete"])
def test_a_zip_that_is_not_cocos_is_refused_before_it_is_unpacked(server, get, tmp_path, how):
    name, more = f"/{download.ZIP}", []
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
    sha1 = hashlib.sha1(server.files[f"/{download.ZIP}"]).hexdigest()
    one = fork("data.py", "download", "--max_images", 5, "--held_out_images", 3, "--data_root", "coco", "--base_url",
               f"http://127.0.0.1:{server.server_port}", "--zip_sha1", sha1, cwd=tmp_path)  # fmt: skip
    while not list(tmp_path.rglob("val*.jpg")):
        time.sleep(0.02)
    os.kill(one.process.pid, number)
    assert one.wait(20).returncode == code
    assert all(server.files[name] == data for name, data in pictures(tmp_path).items())
    server.faults = {}
    assert get().returncode == 0 and len(pictures(tmp_path)) == 8


def test_verify_lists_what_is_wrong(server, get, tmp_path, run_here):
    assert get().returncode == 0
    names = sorted((tmp_path / "coco/train2017").iterdir())
    names[0].write_bytes(names[0].read_bytes()[:900])
    Image.new("CMYK", (9, 9)).save(names[1], "JPEG")
    (tmp_path / "coco/train2017/stray.jpg").write_bytes(jpeg(3))
    before = there(tmp_path)
    result = run_here("data.py", "verify", "--data_root", "coco", cwd=tmp_path)
    assert_one_line_error(result, 1, "1 of 8", "--skip_bad")
    for words in (
        f"{names[0]}".split("coco/")[1],
        "1 pictures of mode CMYK",
        "1 pictures in the folder, but not in the captions",
    ):
        assert words in result.stdout, words
    assert there(tmp_path) == before
