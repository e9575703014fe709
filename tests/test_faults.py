"""Hostile and odd input: each row of the fault matrix ends as promised, and its twin without the fault works.

A row promises: exit code 1 (2 for arguments), one `error:` line that names the file or flag, no traceback, and every
file that was there still there, byte for byte. Rows that go on instead say so.

Not promised, and why: weights in safetensors (we read none of our own) and loss scalers (bfloat16 needs none) do not
arise; a picture that vanishes during training does not either, since all are decoded before it; Ctrl-C in the seconds
of loading PyTorch ends in Python's own traceback; torchrun prints its own report below the error line.
"""

import ast
import io
import json
import os
import pickle
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import child
import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, assert_one_line_error, flags, forge, no_hang, run_script, sign
from PIL import Image

import checkpoint
from config import UserError
from data import MAX_PIXELS, read_rgb, read_square

SAMPLE = ("sample.py", "--prompt", "x", "--run_dir", "run", "--steps", 2, "--num_images", 1)
TRAIN = ("--preset", "demo", "--run_dir", "run")


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


@pytest.fixture
def copy(tiny_run, tmp_path):
    """A copy of the finished tiny run, in tmp_path/run."""
    shutil.copytree(tiny_run / "run", tmp_path / "run", ignore=shutil.ignore_patterns("samples"))
    return tmp_path


# ---- B: checkpoints ----


def weights_of(copy, name="unet_ckpt2.pth"):
    return torch.load(copy / "run" / name, weights_only=True)


class Executes:
    """A pickle that runs a command when it is loaded without care."""

    def __reduce__(self):
        return os.system, ("touch pwned",)


def in_zip(content, size=0):
    """A file as torch.save makes them, with this pickle, of at least that size: else its size alone would give it away."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as z:
        z.writestr("archive/data.pkl", content)
        z.writestr("archive/version", "3\n")
        z.writestr("archive/data/0", bytes(size))
    return data.getvalue()


def with_tail(content, size=0):
    return content + bytes(size)


def damage(data, how):
    return {
        "half": data[: len(data) // 2], "last byte": data[:-1], "last hundred": data[:-100], "empty": b"",
        "html": b"<html>404</html>", "pointer": b"version https://git-lfs.github.com/spec/v1\n", "random": bytes(range(256)),
        "zip": in_zip(b"hello"), "flipped": data[:9000] + bytes([data[9000] ^ 4]) + data[9001:],
    }[how]  # fmt: skip


@pytest.mark.parametrize("file", ["unet_ckpt2.pth", "t_ember_ckpt2.pth", "vae_ckpt_epoch2.pth"])
@pytest.mark.parametrize(
    "how", ["half", "last byte", "last hundred", "empty", "html", "pointer", "random", "zip", "flipped"]
)
def test_a_damaged_checkpoint_is_named(copy, run_here, file, how):
    path = copy / "run" / file
    path.write_bytes(damage(path.read_bytes(), how))
    before = files(copy)
    assert_one_line_error(run_here(*SAMPLE, cwd=copy), 1, file, "restore")
    assert files(copy) == before


@pytest.mark.parametrize("how", ["half", "empty", "html", "pointer", "random", "zip"])
def test_a_damaged_checkpoint_that_its_manifest_vouches_for_is_named(copy, run_here, how):
    """A stranger signs what he sends: behind the checksum stands a reader that trusts nothing either."""
    good = (copy / "run/unet_ckpt2.pth").read_bytes()
    bad = damage(good, how)
    forge(copy / "run", "unet", "2", "unet_ckpt2.pth", with_tail(bad, len(good) - len(bad)))
    result = run_here(*SAMPLE, cwd=copy)
    assert_one_line_error(result, 1, "unet_ckpt2.pth", "restore")
    assert "weights_only" not in result.stderr


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("wrap", [in_zip, with_tail])
@pytest.mark.parametrize("file", ["unet_ckpt2.pth", "t_ember_ckpt2.pth", "vae_ckpt_epoch2.pth"])
def test_a_pickle_that_executes_does_not(copy, run_here, monkeypatch, protocol, wrap, file):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    evil = wrap(pickle.dumps({"conv_in.weight": Executes()}, protocol), (copy / "run" / file).stat().st_size)
    forge(copy / "run", "unet", "2", file, evil)
    assert_one_line_error(run_here(*SAMPLE, cwd=copy), 1, file)
    assert not list(copy.rglob("pwned"))


def test_the_pickle_of_the_test_above_does_execute_when_loaded_without_care(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Executes()))
    assert (tmp_path / "pwned").exists()


@pytest.mark.parametrize("content", [
    torch.nn.Linear(2, 2), Path("x"), {"rng": np.random.RandomState(0).get_state()}, [1, 2], {"a": 1}, {3: torch.ones(1)}])  # fmt: skip
def test_what_is_no_state_dict_is_refused(copy, run_here, content):
    forge(copy / "run", "unet", "2", "unet_ckpt2.pth", content)
    assert_one_line_error(run_here(*SAMPLE, cwd=copy), 1, "unet_ckpt2.pth")


def changed(weights, how):
    first, value = next(iter(weights.items()))
    rest = {k: v for k, v in weights.items() if k != first}
    return {
        "nan": rest | {first: value * float("nan")},
        "missing": rest,
        "extra": weights | {"extra": torch.ones(1)},
        "shape": rest | {first: value[:1]},
        "dtype": rest | {first: value.double()},
        "sparse": rest | {first: value.to_sparse()},
        "meta": rest | {first: value.to("meta")},
        "nested": rest | {first: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])},
        "stride": rest | {first: torch.ones(1).expand(2**40)},
        "prefix": {f"module.{k}": v for k, v in weights.items()},
        "compiled": {f"_orig_mod.{k}": v for k, v in weights.items()},
    }[how]


@pytest.mark.parametrize("how", ["nan", "missing", "extra", "shape", "dtype", "sparse", "meta", "nested", "stride",
                                 "prefix", "compiled"])  # fmt: skip
def test_weights_that_do_not_fit_are_refused_with_the_tensor(copy, run_here, how):
    weights = weights_of(copy)
    forge(copy / "run", "unet", "2", "unet_ckpt2.pth", changed(weights, how))
    words = {"extra": "extra", "prefix": "UNetLatent", "compiled": "UNetLatent"}
    words |= dict.fromkeys(("sparse", "meta", "nested"), "no plain weights")
    word = words.get(how, next(iter(weights)))
    assert_one_line_error(run_here(*SAMPLE, cwd=copy), 1, "unet_ckpt2.pth", word)


@pytest.mark.parametrize("taken, put", [
    ("vae_ckpt_epoch2.pth", "unet_ckpt2.pth"), ("t_ember_ckpt2.pth", "unet_ckpt2.pth"),
    ("unet_ckpt2.pth", "vae_ckpt_epoch2.pth"), ("unet_ckpt2.pth", "t_ember_ckpt2.pth")])  # fmt: skip
@pytest.mark.parametrize("signed", [False, True])
def test_one_model_in_the_place_of_another_is_refused(copy, run_here, taken, put, signed):
    data = (copy / "run" / taken).read_bytes()
    if signed:
        forge(copy / "run", "unet", "2", put, data)
    else:
        (copy / "run" / put).write_bytes(data)
    assert_one_line_error(run_here(*SAMPLE, cwd=copy), 1, put)


@pytest.mark.parametrize("settings", [{"seed": 1}, {"unet_block_out_channels": (16, 48)}])
def test_weights_of_other_settings_are_refused(copy, run_here, settings):
    """A U-Net of another run, of the very same shape but another training, and one of another shape."""
    for script in ("train_vae.py", "train_unet.py"):
        command = ("--preset", "demo", "--run_dir", "other", *flags(TINY | settings))
        assert run_here(script, *command, cwd=copy).returncode == 0
    shutil.copy(copy / "other/unet_ckpt2.pth", copy / "run/unet_ckpt2.pth")
    assert_one_line_error(run_here(*SAMPLE, cwd=copy), 1, "unet_ckpt2.pth: not the file that was saved")
    shutil.copy(copy / "other/unet_set2.json", copy / "run/unet_set2.json")
    assert_one_line_error(run_here(*SAMPLE, cwd=copy), 1, ".pth: not the file that was saved")


def special_file(path, how):
    path.unlink()
    if how == "sparse":
        with open(path, "wb") as f:
            f.truncate(200 << 30)
    elif how == "pipe":
        os.mkfifo(path)
    elif how == "folder":
        path.mkdir()
    elif how != "missing":
        path.symlink_to("/dev/zero" if how == "device" else path)


@pytest.mark.parametrize("file", ["unet_ckpt2.pth", "vae_ckpt_epoch2.pth", "unet_set2.json", "vae_set2.json"])
@pytest.mark.parametrize("how", ["sparse", "pipe", "folder", "device", "loop", "missing"])
def test_what_is_no_file_of_that_size_is_refused_unread(copy, run_here, file, how):
    special_file(copy / "run" / file, how)
    command = SAMPLE if file != "vae_set2.json" else ("train_unet.py", *TRAIN, "--overwrite", *flags(TINY))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with no_hang():
        result = run_here(*command, cwd=copy)
    assert_one_line_error(result, 1, file.replace("2.json", "" if how == "missing" else "2.json"))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 1 << 20  # KiB


@pytest.mark.parametrize("content", [
    "", "{", "[]", "3", '{"format": 1}', "[" * 100_000, '{"format": ' + "9" * 5000 + "}", "\ud800".encode("utf-8", "surrogatepass")])  # fmt: skip
def test_a_manifest_that_is_none_is_refused(copy, run_here, content):
    (copy / "run/unet_set2.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert_one_line_error(run_here(*SAMPLE, cwd=copy), 1, "unet_set2.json")


def test_a_changed_setting_in_a_manifest_is_noticed(copy, run_here):
    """One digit of the schedule, in a file that is still good JSON."""
    path = copy / "run/unet_set2.json"
    assert path.read_text().count('"beta_end": 0.02') == 1
    path.write_text(path.read_text().replace('"beta_end": 0.02', '"beta_end": 0.2'))
    assert_one_line_error(run_here(*SAMPLE, cwd=copy), 1, "unet_set2.json")


@pytest.mark.parametrize("change", [
    {"settings": {"nonsense": 1}}, {"settings": []}, {"settings": {"lr": "fast"}}, {"files": {}}, {"files": []}, {"made_from": {}},
    {"made_from": {"../../etc/passwd": {"bytes": 1, "sha256": ""}}}, {"files": {"unet_ckpt2.pth": 3}}, {"format": 99},
    {"made_from": {"vae_ckpt_epoch2.pth": {"bytes": 10**18, "sha256": "x"}}}, {"finished": 3}, {"epoch": "2"}, {"step": None}])  # fmt: skip
def test_a_signed_manifest_of_nonsense_is_refused(copy, run_here, change):
    path = copy / "run/unet_set2.json"
    path.write_text(sign(json.loads(path.read_text()) | change))
    before = files(copy)
    assert_one_line_error(run_here(*SAMPLE, cwd=copy), 1, "run/")
    assert files(copy) == before


@pytest.mark.parametrize("giant", [{"unet_block_out_channels": [4096, 8192], "time_dim": 16384}, {"timesteps": 10**9}])
def test_a_signed_manifest_of_a_giant_is_refused_before_it_takes_memory(copy, run_here, giant):
    path = copy / "run/unet_set2.json"
    manifest = json.loads(path.read_text())
    path.write_text(sign(manifest | {"settings": manifest["settings"] | giant}))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with no_hang():
        assert_one_line_error(run_here(*SAMPLE, cwd=copy), 1, "run/")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 1 << 19  # KiB


def test_another_text_encoder_than_the_trained_one_is_refused(copy, run_here):
    path = copy / "run/unet_set2.json"
    manifest = json.loads(path.read_text())
    assert manifest["text"] == {"hash": 1, "dim": 512, "max_length": 12}
    path.write_text(sign(manifest | {"text": {"clip": "another"}}))
    assert_one_line_error(run_here(*SAMPLE, cwd=copy), 1, "--text_encoder", "unet_set2.json")


@pytest.mark.parametrize("how", ["pipe", "deep", "device"])
def test_what_stands_in_the_place_of_config_json_is_not_in_the_way(tmp_path, run_here, how):
    """No script reads it, so whatever it is becomes a fresh one."""
    (tmp_path / "run").mkdir()
    path = tmp_path / "run/config.json"
    path.write_text("[" * 100_000)
    if how != "deep":
        special_file(path, how)
    with no_hang(30):
        result = run_here("train_vae.py", *TRAIN, *flags(TINY), "--max_steps", 1, cwd=tmp_path)
    assert result.returncode == 0 and "train_vae" in json.loads(path.read_text())


def test_overwrite_deletes_what_a_run_writes_and_nothing_else(copy, run_here):
    mine = {
        name: b"mine" for name in ("vae_notes.txt", "unet_ckpt_backup.pth", "vae_set.json", "unet_samples_best.png")
    }
    for name, content in mine.items():
        (copy / "run" / name).write_bytes(content)
    for script in ("train_vae.py", "train_unet.py"):
        assert run_here(script, *TRAIN, "--overwrite", *flags(TINY), "--max_steps", 1, cwd=copy).returncode == 0
    after = files(copy / "run")
    assert {name: after[name] for name in mine} == mine
    assert {n for n in after if n.startswith("unet_ckpt")} == {"unet_ckpt1.pth", "unet_ckpt_backup.pth"}


def test_adam_state_of_another_model_is_refused(tmp_path, fork):
    command = ("train_vae.py", *TRAIN, *flags(TINY | {"save_minutes": 0}))
    assert fork(*command, cwd=tmp_path, inject={"signal_at_step": (signal.SIGINT, 2)}).wait().returncode == 130
    run = tmp_path / "run"
    good = torch.load(run / "vae_state1_step2.pth", weights_only=True)
    shapes = [{k: torch.zeros(3) for k in ("exp_avg", "exp_avg_sq", "step")} for _ in good["adam"]]
    one = [good["adam"][0] | change for change in (
        {"exp_avg": good["adam"][0]["exp_avg"] * float("nan")}, {"exp_avg_sq": good["adam"][0]["exp_avg_sq"].long()},
        {"step": torch.zeros(3)}, {"step": torch.tensor(float("inf"))}, {"exp_avg": 3})]  # fmt: skip
    entries = [good | {"adam": [bad, *good["adam"][1:]]} for bad in one]
    counts = [good | {"counters": good["counters"] | {"step": n}} for n in (-5, 10**9)]
    for bad in (*entries, *counts, good | {"adam": shapes}, good | {"adam": good["adam"][:3]}, {}, [], good | {"counters": {"step": 2}},
                good | {"csv": 3}, good | {"counters": good["counters"] | {"window": torch.zeros(7)}}):  # fmt: skip
        for tag in ("1_step1", "1_step2"):
            forge(run, "vae", tag, f"vae_state{tag}.pth", bad)
        assert_one_line_error(fork(*command, cwd=tmp_path).wait(), 1, "vae_state1_step2.pth", "--overwrite")


# ---- A: the disk ----


@pytest.fixture
def small_disk(tmp_path):
    """1 MB of file system in tmp_path/disk, full after that; needs Linux with user namespaces."""
    probe = subprocess.run(["unshare", "-rm", "true"], capture_output=True) if shutil.which("unshare") else None
    if probe is None or probe.returncode:
        pytest.skip("no unshare -rm here: a full and a read-only disk cannot be made without privileges")

    def run(size, script, *args, then=""):
        (tmp_path / "disk").mkdir(exist_ok=True)
        words = " ".join(f"'{a}'" for a in (sys.executable, ROOT / script, *args))
        command = f"mount -t tmpfs -o size={size} t disk && cd disk && {then} {words}"
        return subprocess.run(
            ["unshare", "-rm", "sh", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=120
        )

    return run


@pytest.mark.slow
def test_a_full_disk_shows_at_the_start_and_a_read_only_one_too(small_disk):
    assert_one_line_error(
        small_disk("300k", "train_vae.py", *TRAIN, *flags(TINY)), 1, "run/vae_", "MB needed", "make room"
    )
    read_only = small_disk("9m", "train_vae.py", *TRAIN, *flags(TINY), then="mount -o remount,ro disk . ;")
    assert_one_line_error(read_only, 1, "run")
    assert small_disk("9m", "train_vae.py", *TRAIN, *flags(TINY)).returncode == 0


def test_a_disk_that_fills_up_later_leaves_the_last_set(tmp_path, fork):
    """No file may grow beyond a size that the first sets keep and Adam's state after one step does not."""
    command = ("train_vae.py", *TRAIN, *flags(TINY | {"save_minutes": 0}))
    full = fork(*command, cwd=tmp_path, inject={"limit_file_size": 400_000}).wait()
    assert_one_line_error(full, 1, "vae_state1_step1.pth", "make room", "the same command again")
    assert (tmp_path / "run/vae_set1_step0.json").exists() and not list((tmp_path / "run").glob("*.tmp"))
    again = fork(*command, cwd=tmp_path).wait()
    assert again.returncode == 0 and "resumed after step 0" in again.stdout, again.stderr


def test_the_old_file_survives_a_failed_write(tmp_path, monkeypatch):
    (tmp_path / "x").write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", child.fails)
    with pytest.raises(UserError, match="x: could not be written"):
        checkpoint.write_file(str(tmp_path / "x"), b"new")
    assert files(tmp_path) == {"x": b"old"}


def test_a_file_is_flushed_before_it_has_its_name_and_its_folder_after(tmp_path, monkeypatch):
    events, real = [], os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: events.append(os.fstat(handle).st_ino))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("rename"), real(a, b)))
    checkpoint.write_file(str(tmp_path / "x"), b"new")
    assert events == [os.stat(tmp_path / "x").st_ino, "rename", os.stat(tmp_path).st_ino]


@pytest.mark.parametrize("number", [1, 2, 5, 12, 20])
def test_a_failing_flush_keeps_the_old_set(tmp_path, fork, number):
    command = ("train_vae.py", *TRAIN, *flags(TINY | {"save_minutes": 0}))
    result = fork(*command, cwd=tmp_path, inject={"fail_fsync": number}).wait()
    assert_one_line_error(result, 1, "run/", "could not be written")
    assert fork(*command, cwd=tmp_path).wait().returncode == 0


@pytest.mark.parametrize(
    "run_dir, word", [("file", "file"), ("file/run", "file"), ("/proc/nothing", "/proc"), ("", "--run_dir")]
)
def test_a_run_directory_that_cannot_be_is_named_before_the_data_is_read(tmp_path, run_here, run_dir, word):
    (tmp_path / "file").write_text("mine")
    result = run_here("train_vae.py", "--preset", "demo", *flags(TINY), "--run_dir", run_dir, cwd=tmp_path)
    assert_one_line_error(result, 1 if run_dir else 2, word)
    assert "read training pictures" not in result.stdout
    assert (tmp_path / "file").read_text() == "mine"


def test_a_run_directory_that_vanishes_is_an_error(tmp_path, fork):
    command = ("train_vae.py", *TRAIN, *flags(TINY | {"save_minutes": 0}))
    result = fork(*command, cwd=tmp_path, inject={"remove_run_at_step": 2}).wait()
    assert_one_line_error(result, 1, "run/")


def test_at_every_moment_a_whole_set_is_there(tmp_path, fork):
    """Looked at before each rename and removal of a run that saves after every step and keeps two sets."""
    command = ("train_vae.py", *TRAIN, *flags(TINY | {"save_minutes": 0}))
    result = fork(*command, cwd=tmp_path, inject={"look_at_sets": "vae"}).wait()
    assert result.returncode == 0, result.stderr
    looks = [line for line in result.stdout.splitlines() if line.startswith("whole sets:")]
    assert len(looks) > 40 and "whole sets: 0" not in looks[looks.index("whole sets: 1") :]


# ---- C: pictures ----


def png(picture, **options):
    data = io.BytesIO()
    picture.save(data, format=options.pop("format", "PNG"), **options)
    return data.getvalue()


def photo(mode="RGB", size=(60, 40), **options):
    noise = np.random.RandomState(0).randint(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return png(Image.fromarray(noise).convert(mode), **options)


def bomb(side):
    """A PNG of a few bytes whose header claims side x side pixels."""
    import struct
    import zlib

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


JPEG = photo(format="JPEG")
BAD_PICTURES = {
    "half": JPEG[: len(JPEG) // 2], "end missing": JPEG[:-200], "header only": JPEG[:200], "empty": b"", "html": b"<html>",
    "bomb 900 MP": bomb(30_000), "bomb 95 MP": bomb(9_750), "bomb 51 MP": bomb(7_150), "tiff": photo(format="TIFF"),
    "gif": photo("P", format="GIF"), "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "psd": b"8BPS\0\1" + bytes(40),
    "32-bit": png(Image.fromarray(np.full((4, 4), 40_000, np.int32)), format="TIFF"),
}  # fmt: skip


def my_folder(root, pictures):
    (root / "mine/images").mkdir(parents=True, exist_ok=True)
    for name, content in pictures.items():
        if content is not None:
            (root / "mine/images" / name).write_bytes(content)
        (root / "mine/images" / name).with_suffix(".txt").write_text("a picture")


MINE = ("--dataset", "folder", "--data_root", "mine", "--run_dir", "run",
        *flags({k: v for k, v in TINY.items() if k != "dataset"}))  # fmt: skip


@pytest.mark.parametrize("what", BAD_PICTURES)
def test_a_bad_picture_stops_the_run_by_name_or_is_left_out_and_counted(tmp_path, run_here, what):
    my_folder(tmp_path, {f"good{i}.png": photo() for i in range(11)} | {"bad.jpg": BAD_PICTURES[what]})
    before = files(tmp_path)
    reason = "pixels" if "bomb" in what else "bad.jpg"
    with no_hang():
        result = run_here("train_vae.py", *MINE, cwd=tmp_path)
    assert_one_line_error(result, 1, "1 of", "bad.jpg", reason, "--skip_bad")
    assert {k: v for k, v in files(tmp_path).items() if not k.startswith("run")} == before
    skipped = run_here("train_vae.py", *MINE, "--skip_bad", "--max_steps", 1, cwd=tmp_path)
    assert skipped.returncode == 0 and "left out 1 of" in skipped.stdout and "bad.jpg" in skipped.stdout


@pytest.mark.parametrize("how", ["pipe", "folder", "device", "loop", "missing"])
def test_a_picture_that_is_no_file_is_named(tmp_path, run_here, how):
    my_folder(tmp_path, {f"good{i}.png": photo() for i in range(11)} | {"bad.jpg": b"x"})
    listing = [
        json.dumps({"file_name": f"images/{n}", "text": "x"}) for n in sorted(os.listdir(tmp_path / "mine/images"))
    ]
    (tmp_path / "mine/metadata.jsonl").write_text("\n".join(line for line in listing if ".txt" not in line))
    special_file(tmp_path / "mine/images/bad.jpg", how)
    with no_hang():
        result = run_here("train_vae.py", *MINE, cwd=tmp_path)
    assert_one_line_error(result, 1, "1 of", "bad.jpg", "--skip_bad")


@pytest.mark.parametrize("layout", ["listed", "listed folder", "beside", "caption", "coco"])
def test_a_link_out_of_the_data_set_is_refused(tmp_path, run_here, layout):
    """Twins: the same link to a place within, and the folder of a fixed name kept elsewhere by a link."""
    if layout == "coco":
        coco(tmp_path, GOOD)
        images, command, word = tmp_path / "coco/train2017", COCO, "1.jpg"
    else:
        my_folder(tmp_path, {f"good{i}.png": photo() for i in range(11)})
        images, command, word = tmp_path / "mine/images", MINE, "good1.txt" if layout == "caption" else "good1.png"
    if layout.startswith("listed"):
        names = [f"images/{p.name}" for p in images.glob("*.png")]
        (tmp_path / "mine/metadata.jsonl").write_text(
            "".join(json.dumps({"file_name": n, "text": "x"}) + "\n" for n in names)
        )
    within, outside = images / f"kept{Path(word).suffix}s", tmp_path / "outside"
    moved = images if layout == "listed folder" else images / word
    os.replace(moved, outside)
    moved.symlink_to(outside)
    before = files(tmp_path)
    result = run_here("train_vae.py", *command, cwd=tmp_path)
    assert_one_line_error(result, 1, images.name if moved == images else word, "a link that leads out", "outside")
    assert {k: v for k, v in files(tmp_path).items() if not k.startswith("run")} == before
    if command == MINE and layout != "caption":
        looked = run_here("data.py", "verify", "--dataset", "folder", "--data_root", "mine", cwd=tmp_path)
        assert looked.returncode == 1 and "a link that leads out" in looked.stdout
    moved.unlink()
    if layout == "listed folder":
        os.replace(outside, images)
    else:
        os.replace(outside, within)
        moved.symlink_to(within)
        if layout != "listed":
            os.replace(images, outside)
            images.symlink_to(outside)
            os.unlink(moved)
            moved.symlink_to(outside / within.name)
    assert run_here("train_vae.py", *command, "--max_steps", 1, cwd=tmp_path).returncode == 0


def test_pictures_that_are_others_now_are_warned_of_where_they_are_measured(tmp_path, run_here):
    """evaluate.py and --start fitted; twins: the same folder, and the same folder elsewhere."""
    my_folder(tmp_path, {f"{i}.png": photo() for i in range(12)})
    for script in ("train_vae.py", "train_unet.py"):
        assert run_here(script, *MINE, cwd=tmp_path).returncode == 0
    commands = (("evaluate.py", "--run_dir", "run", "--num_prompts", 2, "--steps", 2), (*SAMPLE, "--start", "fitted"))
    os.replace(tmp_path / "mine", tmp_path / "moved")
    for command in commands:
        assert_one_line_error(run_here(*command, cwd=tmp_path), 1, "mine/images", "--data_root")
        same = run_here(*command, "--data_root", "moved", cwd=tmp_path)
        assert same.returncode == 0 and "warning" not in same.stderr
    assert_one_line_error(run_here(*SAMPLE, "--data_root", "moved", cwd=tmp_path), 2, "--data_root")
    (tmp_path / "moved/images/3.txt").write_text("another")
    for command in commands:
        other = run_here(*command, "--data_root", "moved", cwd=tmp_path)
        assert other.returncode == 0 and "warning: --data_root moved" in other.stderr


def test_all_bad_or_none_is_an_error(tmp_path, run_here):
    my_folder(tmp_path, {f"{i}.jpg": b"x" for i in range(4)})
    assert_one_line_error(run_here("train_vae.py", *MINE, "--skip_bad", cwd=tmp_path), 1, "none of", "can be read")
    shutil.rmtree(tmp_path / "mine/images")
    (tmp_path / "mine/images").mkdir()
    assert_one_line_error(run_here("train_vae.py", *MINE, cwd=tmp_path), 1, "--data_root", "no pictures")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr"])
def test_odd_modes_become_rgb(tmp_path, mode):
    kind = "JPEG" if mode in ("CMYK", "YCbCr") else "PNG"
    (tmp_path / "x.jpg").write_bytes(photo(mode, format=kind))
    assert read_square(tmp_path / "x.jpg", 16).mode == "RGB"


def test_what_is_transparent_becomes_white_whatever_colour_lies_under_it(tmp_path):
    Image.new("RGBA", (8, 8), (200, 0, 0, 0)).save(tmp_path / "x.png")
    assert read_square(tmp_path / "x.png", 4).getpixel((1, 1)) == (255, 255, 255)
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 200, 0, 0])
    palette.save(tmp_path / "p.png", transparency=1)
    assert read_square(tmp_path / "p.png", 4).getpixel((1, 1)) == (255, 255, 255)


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path):
    Image.fromarray(np.full((8, 8), 0x4000, np.uint16)).save(tmp_path / "x.png")
    assert read_square(tmp_path / "x.png", 4).getpixel((1, 1)) == (64, 64, 64)


@pytest.mark.parametrize("size", [(1, 1), (5000, 1), (1, 5000), (3, 7)])
def test_odd_sizes_have_a_square(tmp_path, size):
    Image.new("RGB", size, (1, 2, 3)).save(tmp_path / "x.png")
    assert read_square(tmp_path / "x.png", 16).size == (16, 16)
    assert read_rgb(tmp_path / "x.png").size == size and size[0] * size[1] < MAX_PIXELS


def test_a_reading_process_that_is_killed_is_one_line(tmp_path, fork):
    command = ("train_vae.py", *TRAIN, *flags(TINY | {"num_workers": 2}))
    assert_one_line_error(fork(*command, cwd=tmp_path, inject={"kill_worker_at": 5}).wait(), 1, "--num_workers")
    assert fork(*command, "--max_steps", 1, cwd=tmp_path).wait().returncode == 0


def test_too_few_file_handles_are_one_line(tmp_path, fork):
    command = ("train_vae.py", *TRAIN, *flags(TINY | {"num_workers": 8}))
    few = fork(*command, cwd=tmp_path, inject={"limit": (resource.RLIMIT_NOFILE, 14)}).wait()
    assert_one_line_error(few, 1, "--num_workers")


@pytest.mark.slow
@pytest.mark.skipif(subprocess.run(["unshare", "-rm", "true"]).returncode != 0 if shutil.which("unshare") else True,
                    reason="this system does not let us mount a /dev/shm of our own")  # fmt: skip
@pytest.mark.parametrize(
    "how, code", [("size=4k && head -c 4k /dev/zero > /dev/shm/full", 1), ("ro", 1), ("size=1m", 0)]
)
def test_shared_memory_that_is_full_or_read_only_is_one_line(tmp_path, how, code):
    """In a namespace of its own; the last one is the twin."""
    train = shlex.join([sys.executable, str(ROOT / "train_vae.py"), *TRAIN, "--max_steps", "1",
                        *flags(TINY | {"num_workers": 2, "cache_dir": ""})])  # fmt: skip
    mount = f"mount -t tmpfs none /dev/shm -o {how} && {train}"
    result = subprocess.run(["unshare", "-rm", "sh", "-c", mount], cwd=tmp_path, capture_output=True, text=True)
    if code:
        assert_one_line_error(result, code, "--num_workers", "give 0")
    else:
        assert result.returncode == 0, result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train_vae.py", "sample.py", "data.py"])
def test_a_torchvision_for_another_torch_is_said_before_anything_else(tmp_path, script):
    """A stand-in that fails as the real one does when it finds operators missing."""
    broken = "raise RuntimeError('operator torchvision::nms does not exist')"
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision/__init__.py").write_text(broken)
    words = {"train_vae.py": TRAIN, "sample.py": SAMPLE[1:], "data.py": ("verify",)}[script]
    result = run_script(script, *words, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)})
    assert_one_line_error(result, 1, "torchvision", "nms", "pip install")
    assert sorted(os.listdir(tmp_path)) == ["torchvision"]


def test_too_little_memory_is_one_line(tmp_path, fork):
    """A batch that does not fit; its twin with a small one does."""
    large = TINY | {"image_size": 512, "batch_size": 24, "block_out_channels": (64, 64, 64)}
    limit = {"limit_memory": 600 << 20}
    result = fork("train_vae.py", *TRAIN, *flags(large), cwd=tmp_path, inject=limit).wait()
    assert_one_line_error(result, 1, "--batch_size", "not enough memory")
    assert fork("train_vae.py", *TRAIN, "--overwrite", *flags(TINY), cwd=tmp_path, inject=limit).wait().returncode == 0


# ---- D: captions ----


def coco(root, content):
    """A COCO layout with ten pictures and these captions (an object, or bytes as they are)."""
    (root / "coco/annotations").mkdir(parents=True, exist_ok=True)
    (root / "coco/train2017").mkdir(exist_ok=True)
    for i in range(10):
        (root / f"coco/train2017/{i}.jpg").write_bytes(JPEG)
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    (root / "coco/annotations/captions_train2017.json").write_bytes(data)


GOOD = {"images": [{"id": i, "file_name": f"{i}.jpg"} for i in range(10)],
        "annotations": [{"image_id": i, "caption": f"number {i}"} for i in range(10)]}  # fmt: skip
COCO = ("--preset", "coco", "--data_root", "coco", "--run_dir", "run",
        *flags({k: v for k, v in TINY.items() if k != "dataset"}))  # fmt: skip


def with_image(**change):
    return GOOD | {"images": [GOOD["images"][0] | change, *GOOD["images"][1:]]}


def with_note(**change):
    return GOOD | {"annotations": [GOOD["annotations"][0] | change, *GOOD["annotations"][1:]]}


BAD_CAPTIONS = {
    "no images": {"annotations": []}, "no annotations": {"images": []}, "list": [GOOD], "number": 3,
    "instances": {"images": GOOD["images"], "annotations": [{"image_id": 1, "bbox": [0, 0, 1, 1]}]},
    "no file name": GOOD | {"images": [{"id": 1}]}, "no id": GOOD | {"images": [{"file_name": "1.jpg"}]},
    "list for id": with_image(id=[1]), "list for image id": with_note(image_id=[1]),
    "caption none": with_note(caption=None), "caption number": with_note(caption=3), "caption list": with_note(caption=["x"]),
    "name up": with_image(file_name="../../etc/passwd"), "name absolute": with_image(file_name="/etc/passwd"),
    "name within": with_image(file_name="a/../../x"), "name backslash": with_image(file_name="..\\x.jpg"),
    "name nul": with_image(file_name="a\0.jpg"), "name surrogate": with_image(file_name="\ud800.jpg"),
    "name empty": with_image(file_name=""), "name number": with_image(file_name=7),
    "cut": json.dumps(GOOD).encode()[:-30], "empty": b"", "latin-1": json.dumps(GOOD).replace("number 1", "caf\xe9").encode("latin-1"),
    "control byte": json.dumps(GOOD).replace("number 1", "a\1b").encode(), "nested": b"[" * 100_000,
    "long number": b'{"images": ' + b"1" * 5000 + b"}",
}  # fmt: skip


@pytest.mark.parametrize("what", BAD_CAPTIONS)
def test_a_captions_file_that_is_wrong_is_named_with_the_place(tmp_path, run_here, what):
    coco(tmp_path, BAD_CAPTIONS[what])
    assert_one_line_error(run_here("train_vae.py", *COCO, cwd=tmp_path), 1, "captions_train2017.json")


@pytest.mark.parametrize("how", ["sparse", "pipe", "folder", "device"])
def test_a_captions_file_that_is_no_file_is_refused_unread(tmp_path, run_here, how):
    coco(tmp_path, GOOD)
    special_file(tmp_path / "coco/annotations/captions_train2017.json", how)
    with no_hang():
        result = run_here("train_vae.py", *COCO, cwd=tmp_path)
    assert_one_line_error(result, 1, "captions_train2017.json")


ODD_CAPTIONS = {
    "good": (GOOD, ""), "byte order mark": (b"\xef\xbb\xbf" + json.dumps(GOOD).encode(), ""),
    "unknown picture": (GOOD | {"annotations": [*GOOD["annotations"], {"image_id": 99, "caption": "x"}]}, "1 captions of unknown"),
    "blank": (GOOD | {"annotations": [*GOOD["annotations"], {"image_id": 1, "caption": " \n"}]}, "1 empty captions"),
    "without": (GOOD | {"annotations": GOOD["annotations"][1:]}, "1 pictures without a caption"),
    "twice": (GOOD | {"images": [*GOOD["images"], GOOD["images"][0]]}, "1 pictures listed twice"),
    "surrogate": (with_note(caption="a \ud800 b"), ""), "escape": (with_note(caption="\x1b[31m red \x07"), ""),
    "emoji": (with_note(caption="\U0001f697 \u202eabc\u200b"), ""), "special": (with_note(caption="<|endoftext|> a dog"), ""),
    "100,000 words": (with_note(caption="word " * 100_000), ""), "one long word": (with_note(caption="w" * 100_000), ""),
    "nan": (json.dumps(with_note(image_id=float("nan"))).encode(), "1 captions of unknown"),
}  # fmt: skip


@pytest.mark.parametrize("what", ODD_CAPTIONS)
def test_odd_captions_go_on_and_what_is_left_out_is_counted(tmp_path, run_here, what):
    content, said = ODD_CAPTIONS[what]
    coco(tmp_path, content)
    for script in ("train_vae.py", "train_unet.py"):
        result = run_here(script, *COCO, "--max_steps", 1, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        assert said in result.stdout and "\x1b" not in result.stdout + result.stderr
        assert len(result.stderr) < 2000
        assert ("left out" in result.stdout) == bool(said)


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "images/../../x.png", "a\0b", "", 3, None])
def test_names_in_a_listing_of_ones_own_stay_in_the_folder(tmp_path, run_here, name):
    my_folder(tmp_path, {f"good{i}.png": photo() for i in range(11)})
    (tmp_path / "secret.png").write_bytes(photo())
    (tmp_path / "mine/metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "x"}))
    assert_one_line_error(run_here("train_vae.py", *MINE, cwd=tmp_path), 1, "metadata.jsonl", "line 1")


# ---- S: prompts, names, numbers ----


@pytest.mark.parametrize("prompt", [
    "", "   ", "\U0001f697", "\u202eabc", "word " * 5000, "\x1b[31mred\x1b[0m", "a\nb", "<|endoftext|> dog", "\udcff\udcfe",
    "../../x", "/etc/passwd", ".", "a" * 300, "CON", "x\x07y"])  # fmt: skip
def test_any_prompt_gives_a_picture_in_its_folder(tiny_run, tmp_path, run_here, prompt):
    result = run_here(SAMPLE[0], *SAMPLE[3:], "--out", tmp_path / "out", f"--prompt={prompt}", cwd=tiny_run)
    assert result.returncode == 0, result.stderr
    written = [p.name for p in (tmp_path / "out").iterdir()]
    assert len(written) == 2 and all(len(name) <= 200 and name.isascii() for name in written)
    assert os.listdir(tmp_path) == ["out"]
    assert "\x1b" not in result.stdout + result.stderr and "\x07" not in result.stdout + result.stderr
    assert len(result.stderr) < 500


@pytest.mark.parametrize("argv", [
    ["--steps", s] for s in ("0", "-1", "21", "100000", "1.5", "nan", "")] + [
    ["--seed", s] for s in ("-1", str(2**32), str(2**64), "1.5", "abc")] + [
    ["--num_images", s] for s in ("0", "-3", "1e6", "x")] + [["--sampler", "magic"], ["--unknown", "1"], ["--prompt"]])  # fmt: skip
def test_numbers_out_of_range_are_mistakes_of_the_arguments(tiny_run, run_here, argv):
    assert_one_line_error(run_here(*SAMPLE, *argv, cwd=tiny_run), 2, argv[0])


@pytest.mark.parametrize("argv", [
    ["--num_epochs", "0"], ["--num_epochs", "-1"], ["--num_epochs", "1e9"], ["--batch_size", "0"], ["--lr", "nan"], ["--lr", "-1"],
    ["--lr", "inf"], ["--num_workers", "-1"], ["--image_size", "0"], ["--image_size", "7"], ["--max_steps", "0"], ["--nonsense", "1"],
    ["--seed", str(2**32)], ["--timesteps", "0"], ["--beta_end", "2"], ["--save_minutes", "-1"], ["--dataset", "x"], ["--resume"]])  # fmt: skip
@pytest.mark.parametrize("script", ["train_vae.py", "train_unet.py"])
def test_settings_out_of_range_are_mistakes_of_the_arguments(tmp_path, run_here, script, argv):
    assert_one_line_error(run_here(script, "--preset", "demo", *argv, cwd=tmp_path), 2, argv[0])
    assert not list(tmp_path.iterdir())


def test_weights_that_the_last_step_made_useless_are_not_called_finished(tmp_path, run_here):
    """The loss of the only step is fine; what comes after it is not."""
    command = (*TRAIN, "--overwrite", *flags(TINY | {"lr": 1e9, "lr_warmup_steps": 0}), "--max_steps", 1)
    assert_one_line_error(run_here("train_vae.py", *command, cwd=tmp_path), 1, "--lr", "step 1", "set1_step0")
    assert [p.name for p in (tmp_path / "run").glob("vae_set*")] == ["vae_set1_step0.json"]


def test_pictures_that_are_not_numbers_are_not_written(copy, run_here):
    weights = weights_of(copy, "vae_ckpt_epoch2.pth")
    forge(copy / "run", "unet", "2", "vae_ckpt_epoch2.pth", {k: torch.full_like(v, 3e38) for k, v in weights.items()})
    assert_one_line_error(run_here(*SAMPLE, cwd=copy), 1, "not numbers")
    assert not list(copy.rglob("*_seed0.png"))


@pytest.mark.parametrize("out", ["run/config.json", "run/config.json/x", "/proc/x"])
def test_an_output_folder_that_cannot_be_is_named(copy, run_here, out):
    before = files(copy)
    assert_one_line_error(run_here(*SAMPLE, "--out", out, cwd=copy), 1, out.removesuffix("/x"))
    assert files(copy) == before


@pytest.mark.slow
@pytest.mark.parametrize("shell", [
    "{python} {train} >&-", "{python} {train} 2>&-", "{python} {train} --run_dir $'\\xff'", "{python} {train} | head -c 1",
    "{python} {sample} | head -c 1", "{python} {sample} >&-", "{python} {sample} 2>&-", "LANG=C LC_ALL=C {python} {sample}",
    "env -u HOME {python} {sample}", "mkdir gone; cd gone; rmdir ../gone; {python} {absolute}"])  # fmt: skip
def test_odd_surroundings_are_survived(copy, shell):
    command = shell.format(
        python=sys.executable,
        train=f"{ROOT}/train_vae.py --preset demo --overwrite --max_steps 1 " + " ".join(map(str, flags(TINY))),
        sample=f"{ROOT}/sample.py --prompt é --run_dir run --steps 1 --num_images 1",
        absolute=f"{ROOT}/sample.py --prompt x --run_dir {copy}/run --steps 1 --num_images 1",
    )
    result = subprocess.run(["bash", "-c", command], cwd=copy, capture_output=True, text=True, timeout=100)
    assert "Traceback" not in result.stdout + result.stderr, result.stderr
    assert "Exception ignored" not in result.stderr, result.stderr


@pytest.mark.slow
def test_the_documented_commands_answer_the_same_from_a_shell(copy):
    """One row each of B, C and S through the real command line, with their twin."""
    assert run_script(*SAMPLE, cwd=copy).returncode == 0
    (copy / "run/unet_ckpt2.pth").write_bytes(b"")
    assert_one_line_error(run_script(*SAMPLE, cwd=copy), 1, "unet_ckpt2.pth")


# ---- Rules for the code itself ----


def product_trees():
    return {path.name: ast.parse(path.read_text()) for path in ROOT.glob("*.py")}


def test_every_load_is_of_weights_only():
    calls = [
        (name, call)
        for name, tree in product_trees().items()
        for call in ast.walk(tree)
        if isinstance(call, ast.Call)
        and ast.unparse(call.func) in ("torch.load", "load")
        and "json" not in ast.unparse(call)
    ]
    loads = [(n, c) for n, c in calls if ast.unparse(c.func) == "torch.load"]
    assert loads
    for name, call in loads:
        assert any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in call.keywords), name


def test_nothing_dangerous_is_used():
    names = {"pickle", "joblib", "marshal", "shelve", "yaml"}
    calls = {"eval", "exec", "os.system", "os.popen", "ImageMath.unsafe_eval"}
    text = {
        "shell=True",
        "allow_pickle=True",
        "trust_remote_code=True",
        "MAX_IMAGE_PIXELS",
        "LOAD_TRUNCATED_IMAGES",
        "extractall",
    }
    for name, tree in product_trees().items():
        source = (ROOT / name).read_text()
        assert not [word for word in text if word in source], name
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                modules = {a.name for a in node.names} | {getattr(node, "module", None)}
                assert not modules & names, name
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in calls, name
