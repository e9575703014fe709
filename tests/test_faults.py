"""Hostile and odd input, from outside: each row ends as promised, and its twin without the fault works.

A row promises: exit code 1 (2 for arguments), one `error:` line that names the file or flag, no traceback, and every
file that was there still there, byte for byte. Rows that go on instead say so. Rows of one room are beside it
(test_checkpoint.py, test_files.py, ...); here are pictures, captions, prompts, numbers, surroundings, and rules for the
code itself.

Not promised, and why: weights in safetensors (we read none of our own) and loss scalers (bfloat16 needs none) do not
arise; a picture that vanishes during training does not either, since all are decoded before it; Ctrl-C in the seconds
of loading PyTorch ends in Python's own traceback; torchrun prints its own report below the error line.
"""

import ast
import io
import json
import os
import resource
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import (
    ROOT,
    SAMPLE,
    SMALL,
    TINY,
    TRAIN,
    assert_one_line_error,
    files,
    flags,
    no_hang,
    run_script,
    special_file,
)
from PIL import Image

from data import read_square
from support.pictures import MAX_PIXELS, read_rgb

# ---- The disk ----


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


# ---- Pictures ----


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
    "half": JPEG[: len(JPEG) // 2],
    "end missing": JPEG[:-200],
    "header only": JPEG[:200],
    "empty": b"",
    "html": b"<html>",
    "bomb 900 MP": bomb(30_000),
    "bomb 95 MP": bomb(9_750),
    "bomb 51 MP": bomb(7_150),
    "tiff": photo(format="TIFF"),
    "gif": photo("P", format="GIF"),
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "psd": b"8BPS\0\1" + bytes(40),
    "32-bit": png(Image.fromarray(np.full((4, 4), 40_000, np.int32)), format="TIFF"),
}


def my_folder(root, pictures):
    (root / "mine/images").mkdir(parents=True, exist_ok=True)
    for name, content in pictures.items():
        if content is not None:
            (root / "mine/images" / name).write_bytes(content)
        (root / "mine/images" / name).with_suffix(".txt").write_text("a picture")


WITHOUT_SCENES = flags({k: v for k, v in SMALL.items() if k != "dataset"})
MINE = ("--dataset", "folder", "--data_root", "mine", "--run_dir", "run", *WITHOUT_SCENES)


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
        looked = run_here("get_data.py", "verify", "--dataset", "folder", "--data_root", "mine", cwd=tmp_path)
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
    command = ("train_vae.py", *TRAIN, *flags(SMALL | {"num_workers": 2}))
    assert_one_line_error(fork(*command, cwd=tmp_path, inject={"kill_at_picture": 5}).wait(), 1, "--num_workers")
    assert fork(*command, "--max_steps", 1, cwd=tmp_path).wait().returncode == 0


def test_too_few_file_handles_are_one_line(tmp_path, fork):
    command = ("train_vae.py", *TRAIN, *flags(SMALL | {"num_workers": 8}))
    few = fork(*command, cwd=tmp_path, inject={"limit": (resource.RLIMIT_NOFILE, 14)}).wait()
    assert_one_line_error(few, 1, "--num_workers")


@pytest.mark.slow
@pytest.mark.skipif(
    subprocess.run(["unshare", "-rm", "true"]).returncode != 0 if shutil.which("unshare") else True,
    reason="this system does not let us mount a /dev/shm of our own",
)
@pytest.mark.parametrize(
    "how, code", [("size=4k && head -c 4k /dev/zero > /dev/shm/full", 1), ("ro", 1), ("size=1m", 0)]
)
def test_shared_memory_that_is_full_or_read_only_is_one_line(tmp_path, how, code):
    """In a namespace of its own; the last one is the twin."""
    words = [*TRAIN, "--max_steps", "1", *flags(SMALL | {"num_workers": 2})]
    train = shlex.join([sys.executable, str(ROOT / "train_vae.py"), *words])
    mount = f"mount -t tmpfs none /dev/shm -o {how} && {train}"
    result = subprocess.run(["unshare", "-rm", "sh", "-c", mount], cwd=tmp_path, capture_output=True, text=True)
    if code:
        assert_one_line_error(result, code, "--num_workers", "give 0")
    else:
        assert result.returncode == 0, result.stderr


def test_too_little_memory_is_one_line(tmp_path, fork):
    """A batch that does not fit; its twin with a small one does."""
    large = TINY | {"image_size": 512, "batch_size": 24, "block_out_channels": (64, 64, 64)}
    limit = {"limit_memory": 600 << 20}
    result = fork("train_vae.py", *TRAIN, *flags(large), cwd=tmp_path, inject=limit).wait()
    assert_one_line_error(result, 1, "--batch_size", "not enough memory")
    assert fork("train_vae.py", *TRAIN, "--overwrite", *flags(TINY), cwd=tmp_path, inject=limit).wait().returncode == 0


# ---- Captions ----


def coco(root, content):
    """A COCO layout with ten pictures and these captions (an object, or bytes as they are)."""
    (root / "coco/annotations").mkdir(parents=True, exist_ok=True)
    (root / "coco/train2017").mkdir(exist_ok=True)
    for i in range(10):
        (root / f"coco/train2017/{i}.jpg").write_bytes(JPEG)
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    (root / "coco/annotations/captions_train2017.json").write_bytes(data)


GOOD = {
    "images": [{"id": i, "file_name": f"{i}.jpg"} for i in range(10)],
    "annotations": [{"image_id": i, "caption": f"number {i}"} for i in range(10)],
}
COCO = ("--preset", "coco", "--data_root", "coco", "--run_dir", "run", *WITHOUT_SCENES)


def with_image(**change):
    return GOOD | {"images": [GOOD["images"][0] | change, *GOOD["images"][1:]]}


def with_note(**change):
    return GOOD | {"annotations": [GOOD["annotations"][0] | change, *GOOD["annotations"][1:]]}


BAD_CAPTIONS = {
    "no images": {"annotations": []},
    "no annotations": {"images": []},
    "list": [GOOD],
    "number": 3,
    "instances": {"images": GOOD["images"], "annotations": [{"image_id": 1, "bbox": [0, 0, 1, 1]}]},
    "no file name": GOOD | {"images": [{"id": 1}]},
    "no id": GOOD | {"images": [{"file_name": "1.jpg"}]},
    "list for id": with_image(id=[1]),
    "list for image id": with_note(image_id=[1]),
    "caption none": with_note(caption=None),
    "caption number": with_note(caption=3),
    "caption list": with_note(caption=["x"]),
    "name up": with_image(file_name="../../etc/passwd"),
    "name absolute": with_image(file_name="/etc/passwd"),
    "name within": with_image(file_name="a/../../x"),
    "name backslash": with_image(file_name="..\\x.jpg"),
    "name nul": with_image(file_name="a\0.jpg"),
    "name surrogate": with_image(file_name="\ud800.jpg"),
    "name empty": with_image(file_name=""),
    "name number": with_image(file_name=7),
    "cut": json.dumps(GOOD).encode()[:-30],
    "empty": b"",
    "latin-1": json.dumps(GOOD).replace("number 1", "caf\xe9").encode("latin-1"),
    "control byte": json.dumps(GOOD).replace("number 1", "a\1b").encode(),
    "nested": b"[" * 100_000,
    "long number": b'{"images": ' + b"1" * 5000 + b"}",
}


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
    "good": (GOOD, ""),
    "byte order mark": (b"\xef\xbb\xbf" + json.dumps(GOOD).encode(), ""),
    "unknown picture": (
        GOOD | {"annotations": [*GOOD["annotations"], {"image_id": 99, "caption": "x"}]},
        "1 captions of unknown",
    ),
    "blank": (GOOD | {"annotations": [*GOOD["annotations"], {"image_id": 1, "caption": " \n"}]}, "1 empty captions"),
    "without": (GOOD | {"annotations": GOOD["annotations"][1:]}, "1 pictures without a caption"),
    "twice": (GOOD | {"images": [*GOOD["images"], GOOD["images"][0]]}, "1 pictures listed twice"),
    "surrogate": (with_note(caption="a \ud800 b"), ""),
    "escape": (with_note(caption="\x1b[31m red \x07"), ""),
    "emoji": (with_note(caption="\U0001f697 \u202eabc\u200b"), ""),
    "special": (with_note(caption="<|endoftext|> a dog"), ""),
    "100,000 words": (with_note(caption="word " * 100_000), ""),
    "one long word": (with_note(caption="w" * 100_000), ""),
    "nan": (json.dumps(with_note(image_id=float("nan"))).encode(), "1 captions of unknown"),
}


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


# ---- Prompts, names, numbers ----


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "   ",
        "\U0001f697",
        "\u202eabc",
        "word " * 5000,
        "\x1b[31mred\x1b[0m",
        "a\nb",
        "<|endoftext|> dog",
        "\udcff\udcfe",
        "../../x",
        "/etc/passwd",
        ".",
        "a" * 300,
        "CON",
        "x\x07y",
    ],
)
def test_any_prompt_gives_a_picture_in_its_folder(tiny_run, tmp_path, run_here, prompt):
    result = run_here(SAMPLE[0], *SAMPLE[3:], "--out", tmp_path / "out", f"--prompt={prompt}", cwd=tiny_run)
    assert result.returncode == 0, result.stderr
    written = [p.name for p in (tmp_path / "out").iterdir()]
    assert len(written) == 2 and all(len(name) <= 200 and name.isascii() for name in written)
    assert os.listdir(tmp_path) == ["out"]
    assert "\x1b" not in result.stdout + result.stderr and "\x07" not in result.stdout + result.stderr
    assert len(result.stderr) < 500


@pytest.mark.parametrize(
    "argv",
    [["--steps", s] for s in ("0", "-1", "21", "100000", "1.5", "nan", "")]
    + [["--seed", s] for s in ("-1", str(2**32), str(2**64), "1.5", "abc")]
    + [["--num_images", s] for s in ("0", "-3", "1e6", "x")]
    + [["--sampler", "magic"], ["--unknown", "1"], ["--prompt"]],
)
def test_numbers_out_of_range_are_mistakes_of_the_arguments(tiny_run, run_here, argv):
    assert_one_line_error(run_here(*SAMPLE, *argv, cwd=tiny_run), 2, argv[0])


@pytest.mark.parametrize(
    "argv",
    [
        ["--num_epochs", "0"],
        ["--num_epochs", "-1"],
        ["--num_epochs", "1e9"],
        ["--batch_size", "0"],
        ["--lr", "nan"],
        ["--lr", "-1"],
        ["--lr", "inf"],
        ["--num_workers", "-1"],
        ["--image_size", "0"],
        ["--image_size", "7"],
        ["--max_steps", "0"],
        ["--nonsense", "1"],
        ["--seed", str(2**32)],
        ["--timesteps", "0"],
        ["--beta_end", "2"],
        ["--save_minutes", "-1"],
        ["--dataset", "x"],
        ["--resume"],
    ],
)
@pytest.mark.parametrize("script", ["train_vae.py", "train_unet.py"])
def test_settings_out_of_range_are_mistakes_of_the_arguments(tmp_path, run_here, script, argv):
    assert_one_line_error(run_here(script, "--preset", "demo", *argv, cwd=tmp_path), 2, argv[0])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("out", ["run/config.json", "run/config.json/x", "/proc/x"])
def test_an_output_folder_that_cannot_be_is_named(copy, run_here, out):
    before = files(copy)
    assert_one_line_error(run_here(*SAMPLE, "--out", out, cwd=copy), 1, out.removesuffix("/x"))
    assert files(copy) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    "shell",
    [
        "{python} {train} >&-",
        "{python} {train} 2>&-",
        "{python} {train} --run_dir $'\\xff'",
        "{python} {train} | head -c 1",
        "{python} {sample} | head -c 1",
        "{python} {sample} >&-",
        "{python} {sample} 2>&-",
        "LANG=C LC_ALL=C {python} {sample}",
        "env -u HOME {python} {sample}",
        "mkdir gone; cd gone; rmdir ../gone; {python} {absolute}",
    ],
)
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
    paths = [*ROOT.glob("*.py"), *ROOT.glob("support/*.py")]
    return {str(path.relative_to(ROOT)): ast.parse(path.read_text()) for path in paths}


def test_every_load_is_of_weights_only():
    nodes = ((name, node) for name, tree in product_trees().items() for node in ast.walk(tree))
    calls = [(name, node) for name, node in nodes if isinstance(node, ast.Call)]
    loads = [(name, call) for name, call in calls if ast.unparse(call.func) in ("torch.load", "load")]
    assert loads
    for name, call in loads:
        assert any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in call.keywords), name


def test_nothing_dangerous_is_used():
    names = {"pickle", "joblib", "marshal", "shelve", "yaml"}
    calls = {"eval", "exec", "os.system", "os.popen", "ImageMath.unsafe_eval"}
    text = {"shell=True", "allow_pickle=True", "trust_remote_code=True", "extractall"}
    text |= {"MAX_IMAGE_PIXELS", "LOAD_TRUNCATED_IMAGES"}
    for name, tree in product_trees().items():
        source = (ROOT / name).read_text()
        assert not [word for word in text if word in source], name
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                modules = {a.name for a in node.names} | {getattr(node, "module", None)}
                assert not modules & names, name
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in calls, name
