"""Promises of support/prepared.py: computed once, the same as computed anew, never half, never of something else."""

import contextlib
import errno
import hashlib
import itertools
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CONTEXT, SMALL, TRAIN, assert_one_line_error, flags, picture

import data
from config import SDConfig
from data import open_dataset, read_pictures, read_rgb
from support import files, prepared
from support.errors import UserError
from support.prepared import mapped, prepare
from support.show import progress_bar

COUNT = 10


class Rows:
    """Counts what is asked of it; may fail at a row; row 3 and 8 cannot be had."""

    def __init__(self, stop_at=COUNT, bad=()):
        self.stop_at, self.bad, self.firsts = stop_at, bad, []

    def __call__(self, first):
        self.firsts.append(first)
        for i in range(first, COUNT):
            if i == self.stop_at:
                raise KeyboardInterrupt
            yield f"row {i} is bad" if i in self.bad else np.full((2, 3), i, np.float32)


def make(folder, rows, key=None, together=1, **more):
    return prepare(str(folder), "rows", key or {"of": "a test"}, (2, 3), np.float32, COUNT, rows, together, **more)


def expected(bad=()):
    return torch.stack([torch.full((2, 3), float(i)) for i in range(COUNT) if i not in bad])


def test_what_is_prepared_is_not_computed_again(tmp_path):
    rows = Rows()
    first, _ = make(tmp_path, rows)
    second, _ = make(tmp_path, rows)
    assert torch.equal(first, expected()) and torch.equal(second, expected()) and rows.firsts == [0]
    assert torch.equal(make("", rows)[0], expected())
    assert sorted(p.suffix for p in tmp_path.iterdir()) == ["", ".json", ".lock"]


def test_another_key_is_another_file(tmp_path):
    rows = Rows()
    for key in ({"of": "a test"}, {"of": "another"}, {"of": "a test", "size": 1}):
        make(tmp_path, rows, key)
    assert rows.firsts == [0, 0, 0] and len(list(tmp_path.glob("*.json"))) == 3


@pytest.mark.parametrize("bad", [(), (3, 8)])
@pytest.mark.parametrize("stop_at", [1, 5, 9])
@pytest.mark.parametrize("together", [1, 4])
def test_a_build_that_was_stopped_goes_on(tmp_path, bad, stop_at, together):
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, Rows(stop_at, bad), together=together)
    rows = Rows(bad=bad)
    found, why = make(tmp_path, rows, together=together)
    assert torch.equal(found, expected(bad)) and why == {i: f"row {i} is bad" for i in bad}
    assert rows.firsts == [stop_at - stop_at % together]
    assert sorted(p.suffix for p in tmp_path.iterdir()) == ["", ".json", ".lock"]


def test_rows_that_cannot_be_had_take_no_room(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, Rows(7, bad=(2, 3)))
    assert sum(p.stat().st_size for p in tmp_path.iterdir() if not p.suffix) == 5 * 24


def test_a_stop_at_the_last_moment_loses_nothing(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("support.prepared.file_sha256", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path, Rows())
    rows = Rows()
    assert torch.equal(make(tmp_path, rows)[0], expected()) and rows.firsts == []


@pytest.mark.parametrize("seconds, first", [(-1, 6), (100, 0)])
def test_a_killed_build_goes_on_after_the_last_rows_that_were_saved(tmp_path, monkeypatch, seconds, first):
    """What comes after them in the file is cut off. Killed here: no save is made at the end, but the file has its rows."""
    monkeypatch.setattr(prepared, "SECONDS_BETWEEN_SAVES", seconds)
    real, append = prepared.save, prepared.append

    def killed(f, kept, rows):
        kept = append(f, kept, rows)
        if kept.done == 7:
            monkeypatch.setattr(prepared, "save", lambda *_: None)
            raise KeyboardInterrupt
        return kept

    with monkeypatch.context() as patch:
        patch.setattr(prepared, "append", killed)
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path, Rows())
    monkeypatch.setattr(prepared, "save", real)
    (file,) = [p for p in tmp_path.iterdir() if not p.suffix]
    assert file.stat().st_size == 7 * 24
    rows = Rows()
    assert torch.equal(make(tmp_path, rows)[0], expected()) and rows.firsts == [first]


def test_a_stop_within_a_row_leaves_rows_and_sum_together(tmp_path, monkeypatch):
    """The signal comes when the row is in the file already, and not yet among those that are done."""

    def hashed(*data):
        class Stopped:
            def __init__(self, real):
                self.real = real

            def copy(self):
                return Stopped(self.real.copy())

            def update(self, data):
                self.real.update(data)
                if data[:4] == np.float32(5).tobytes():
                    raise KeyboardInterrupt

            def hexdigest(self):
                return self.real.hexdigest()

        return Stopped(real(*data))

    real = prepared.hashlib.sha256
    with monkeypatch.context() as patch:
        patch.setattr(prepared, "file_sha256", lambda *_: hashed())
        patch.setattr(prepared.hashlib, "sha256", lambda *data: real(*data) if data else hashed())
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path, Rows())
    rows = Rows()
    assert torch.equal(make(tmp_path, rows)[0], expected()) and rows.firsts == [5]


def test_a_stopped_build_does_not_trust_what_it_could_not_have(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, Rows(9, bad=(2, 5)))
    rows = Rows(bad=(2,))
    found, why = make(tmp_path, rows, still_bad=lambda i: i == 2)
    assert rows.firsts == [0] and list(why) == [2] and torch.equal(found, expected((2,)))


@pytest.mark.parametrize("stop_at", [COUNT, 7])
def test_a_fault_while_bad_rows_are_looked_at_again_costs_nothing(tmp_path, stop_at):
    with pytest.raises(KeyboardInterrupt) if stop_at < COUNT else contextlib.nullcontext():
        make(tmp_path, Rows(stop_at, bad=(3,)))
    with pytest.raises(OSError, match="stale"):
        make(tmp_path, Rows(), still_bad=lambda i: (_ for _ in ()).throw(OSError("stale")))
    rows = Rows(bad=(3,))
    assert torch.equal(make(tmp_path, rows)[0], expected((3,)))
    assert rows.firsts == ([] if stop_at == COUNT else [stop_at])


def test_an_error_of_the_rows_is_not_put_down_to_the_disk_of_the_cache(tmp_path):
    def rows(first):
        yield from itertools.islice(Rows()(first), 5)
        raise OSError(5, "Input/output error", "a/picture.jpg")

    with pytest.raises(OSError, match="picture.jpg"):
        make(tmp_path, rows)
    rows = Rows()
    assert torch.equal(make(tmp_path, rows)[0], expected()) and rows.firsts == [5]


@pytest.mark.parametrize("how", ["row flipped", "row zeroed", "row cut", "rows gone", "rows more", "manifest torn",
                                 "manifest empty", "manifest gone", "manifest of nonsense", "not UTF-8"])  # fmt: skip
def test_what_a_stopped_build_left_is_used_only_if_it_is_whole(tmp_path, how):
    """A power cut, a full disk, and worse. Rows that came after the last save are no harm."""
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, Rows(7, bad=(3,)))
    (manifest,) = tmp_path.glob("*.json")
    part = manifest.with_suffix("")
    data, text = part.read_bytes(), manifest.read_bytes()
    size = 24  # bytes of a row
    damage = {
        "row flipped": (part, data[: 2 * size + 5] + bytes([data[2 * size + 5] ^ 1]) + data[2 * size + 6 :]),
        "row zeroed": (part, data[: 2 * size] + bytes(size) + data[3 * size :]), "manifest torn": (manifest, text[:-3]),
        "manifest empty": (manifest, b""), "manifest of nonsense": (manifest, b"[1, 2, 3]"),
        "not UTF-8": (manifest, b"\xff" + text), "row cut": (part, data[:-1]), "rows gone": (part, b""),
        "rows more": (part, data + b"0" * 30), "manifest gone": (manifest, None),
    }  # fmt: skip
    file, content = damage[how]
    file.unlink() if content is None else file.write_bytes(content)
    rows = Rows(bad=(3,))
    found, why = make(tmp_path, rows)
    assert torch.equal(found, expected((3,))) and why == {3: "row 3 is bad"}
    assert rows.firsts == [7 if how == "rows more" else 0]


def test_files_and_manifests_are_those_of_before(tmp_path):
    """Pinned: what earlier versions have prepared is read by this one, and not made again."""
    make(tmp_path, Rows(bad=(3,)))
    found = {p.name: hashlib.sha256(p.read_bytes()).hexdigest()[:16] for p in tmp_path.iterdir() if p.suffix != ".lock"}
    name = "rows-bb57f03bfc145107"
    assert found == {name: "ce5b715f0fd5d2fd", f"{name}.json": "d16794201760ed20"}


@pytest.mark.parametrize(
    "how", ["flip", "cut", "gone", "manifest cut", "manifest of another key", "manifest is a folder", "deep"]
)
def test_a_damaged_file_is_made_again_and_never_used(tmp_path, capsys, how):
    make(tmp_path, Rows())
    (data,) = [p for p in tmp_path.iterdir() if p.suffix == ""]
    manifest = data.with_name(f"{data.name}.json")
    content = data.read_bytes()
    if how == "flip":
        data.write_bytes(content[:50] + bytes([content[50] ^ 1]) + content[51:])
    elif how == "cut":
        data.write_bytes(content[:-1])
    elif how == "gone":
        data.unlink()
    elif how == "manifest cut":
        manifest.write_text(manifest.read_text()[:-20])
    elif how == "manifest of another key":
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"key": {}}))
    elif how == "deep":
        manifest.write_text("[" * 100_000)
    else:
        manifest.unlink()
        manifest.symlink_to("/dev/null")
    rows = Rows()
    assert torch.equal(make(tmp_path, rows)[0], expected()) and rows.firsts == [0]
    assert "made again" in capsys.readouterr().out


def test_a_manifest_that_was_changed_is_not_believed(tmp_path):
    """Nothing but its own sum tells that it was row 3 that could not be had."""
    make(tmp_path, Rows(bad=(3,)))
    (manifest,) = tmp_path.glob("*.json")
    manifest.write_text(manifest.read_text().replace('"3": ', '"4": '))
    rows = Rows(bad=(3,))
    assert list(make(tmp_path, rows)[1]) == [3] and rows.firsts == [0]


def slow_build(folder, begun):
    def rows(first):
        begun.set()
        for row in Rows()(first):
            time.sleep(0.05)
            yield row

    make(folder, rows)


@contextlib.contextmanager
def other_builder(folder):
    """A process in the middle of the same preparation."""
    begun = CONTEXT.Event()
    other = CONTEXT.Process(target=slow_build, args=(folder, begun))
    other.start()
    assert begun.wait(60)
    yield other
    other.join(60)


def test_of_two_builds_at_once_one_waits_for_the_other(tmp_path, capsys):
    with other_builder(tmp_path) as other:
        rows = Rows()
        assert torch.equal(make(tmp_path, rows)[0], expected()) and rows.firsts == []
        assert "waiting for another process" in capsys.readouterr().out
    assert other.exitcode == 0


@pytest.mark.parametrize("removed", [False, True])
@pytest.mark.parametrize("stop_at", [2, 7, COUNT])
def test_where_locks_do_not_hold_two_builds_never_end_in_a_wrong_file(tmp_path, monkeypatch, stop_at, removed):
    """The other build begins when this one is at row 5, and is stopped at row `stop_at` or gets to its end; the
    folder's files may have been removed before. A whole file of the other's is as good."""
    monkeypatch.setattr(files, "fcntl", None)
    rows = Rows()

    def interfering(first):
        for i, row in enumerate(rows(first)):
            if i == 5:
                for path in tmp_path.iterdir() if removed else ():
                    path.unlink()
                with contextlib.suppress(KeyboardInterrupt):
                    make(tmp_path, Rows(stop_at))
            yield row

    whole = stop_at == COUNT
    with contextlib.nullcontext() if whole else pytest.raises(UserError, match="rows-.*: was written to or removed"):
        assert torch.equal(make(tmp_path, interfering)[0], expected())
    assert torch.equal(make(tmp_path, Rows())[0], expected())


def test_who_waits_for_a_build_that_is_killed_goes_on_with_it(tmp_path):
    with other_builder(tmp_path) as other:
        threading.Timer(0.2, other.kill).start()
        rows = Rows()
        assert torch.equal(make(tmp_path, rows)[0], expected()) and len(rows.firsts) == 1
    assert other.exitcode == -signal.SIGKILL


def test_a_changed_picture_is_read_again(tmp_path):
    for i in range(10):
        picture(tmp_path / f"mine/images/{i}.png", (10 * i, 0, 0))
        (tmp_path / f"mine/images/{i}.txt").write_text("x")
    cfg = SDConfig(dataset="folder", data_root=str(tmp_path / "mine"), image_size=32, num_workers=0,
                   cache_dir=str(tmp_path / "prepared"))  # fmt: skip
    before, _ = read_pictures(open_dataset(cfg)[0], cfg, progress_bar("read"))
    picture(Path(open_dataset(cfg)[0].names[0]), (0, 0, 250))
    after, _ = read_pictures(open_dataset(cfg)[0], cfg, progress_bar("read"))
    assert torch.equal(before[1:], after[1:]) and not torch.equal(before[0], after[0])


def test_another_folder_with_pictures_of_the_same_names_sizes_and_times_is_not_mistaken_for_it(tmp_path):
    found = []
    for folder, value in (("a", 10), ("b", 90)):
        for i in range(4):
            path = tmp_path / folder / f"images/{i}.png"
            picture(path, (value, 0, 0))
            path.with_suffix(".txt").write_text("x")
            os.utime(path, ns=(0, 0))
        cfg = SDConfig(dataset="folder", data_root=str(tmp_path / folder), image_size=32, num_workers=0,
                       cache_dir=str(tmp_path / "prepared"))  # fmt: skip
        found.append(read_pictures(open_dataset(cfg)[0], cfg, progress_bar("read"))[0])
    assert not torch.equal(*found)


def test_pictures_that_can_be_read_again_are_no_longer_left_out(tmp_path, monkeypatch):
    """The file of a picture need not change when its permission does, or that of a folder above it."""
    for i in range(20):
        picture(tmp_path / f"mine/images/{i}.png", (10 * i, 0, 0))
        (tmp_path / f"mine/images/{i}.txt").write_text(str(i))
    cfg = SDConfig(dataset="folder", data_root=str(tmp_path / "mine"), image_size=32, num_workers=0, skip_bad=True,
                   cache_dir=str(tmp_path / "prepared"))  # fmt: skip
    training = open_dataset(cfg)[0]

    def refused(path, *profiles):
        if path == training.names[4]:
            raise PermissionError(13, "Permission denied", path)
        return read_rgb(path, *profiles)

    with monkeypatch.context() as patch:
        patch.setattr("data.read_rgb", refused)
        before, captions = read_pictures(training, cfg, progress_bar("read"))
        assert len(before) == len(captions) == len(training) - 1
        read_pictures(training, cfg, lambda total, done: pytest.fail("as long as it lasts the file is as it should be"))
    after, captions = read_pictures(training, cfg, progress_bar("read"))
    assert len(after) == len(captions) == len(training)
    assert torch.equal(torch.cat([after[:4], after[5:]]), before)


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), OSError(116, "Stale file handle"), MemoryError()])
def test_a_fault_of_the_machine_is_not_kept_as_one_of_the_picture(tmp_path, monkeypatch, error):

    picture(tmp_path / "0.png", (1, 2, 3))
    one = data.Pictures([(str(tmp_path / "0.png"), ["x"])], 32, {str(tmp_path)})
    named = "0.png" if isinstance(error, OSError) else None
    with monkeypatch.context() as patch:
        patch.setattr(data, "read_rgb", lambda path, *_: (_ for _ in ()).throw(error))
        with pytest.raises(type(error), match=named):
            one[0]
    assert one[0].shape == (3, 32, 32)


def test_a_full_disk_is_one_line_and_what_is_prepared_is_kept(tmp_path, fork):
    command = ("train_vae.py", *TRAIN, *flags(SMALL | {"cache_dir": "prepared"}))
    full = fork(*command, cwd=tmp_path, inject={"limit_file_size": 5_000}).wait()
    assert_one_line_error(full, 1, "prepared/pictures-", "--cache_dir", "make room")
    result = fork(*command, cwd=tmp_path).wait()
    assert result.returncode == 0 and "going on after row" in result.stdout


def read_all(folder, grown):
    """Prepare 150 MB, then read them in batches in random order; `grown` becomes what that takes of memory [MB]."""

    def own():
        line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
        return int(line.split()[1]) / 1024

    def rows(first):
        return (np.full((3, 128, 128), i % 256, np.uint8) for i in range(first, 3000))

    before = own()
    x, _ = prepare(folder, "pixels", {}, (3, 128, 128), np.uint8, 3000, rows)
    for index in torch.randperm(3000).split(32):
        x[index].float().mean()
    grown.value = own() - before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_prepared_arrays_take_no_memory_of_their_own(tmp_path):
    """What grows is page cache, which the system can take back."""
    grown = CONTEXT.Value("d", 1e9)
    process = CONTEXT.Process(target=read_all, args=(str(tmp_path), grown))
    process.start()
    process.join()
    assert grown.value < 40


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/meminfo")
def test_a_prepared_file_may_be_larger_than_the_memory(tmp_path):
    lines = Path("/proc/meminfo").read_text().splitlines()
    memory = sum(1024 * int(line.split()[1]) for line in lines if line.startswith(("MemTotal", "SwapTotal")))
    path = tmp_path / "sparse"
    with open(path, "wb") as f:
        f.truncate(2 * memory)
        f.seek(-1, os.SEEK_END)
        f.write(b"\7")
    rows = mapped(path, np.uint8, (2 * memory // 64, 64))
    assert rows[-1, -1] == 7 and rows[0, 0] == 0


def test_a_file_that_cannot_be_mapped_is_named(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(np, "memmap", refuse)
    with pytest.raises(UserError, match="rows-.*: cannot be mapped into memory"):
        make(tmp_path, Rows())
