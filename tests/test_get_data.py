"""Promises of get_data.py verify: what is wrong or odd is named and counted, and nothing is changed unasked.

What its download promises is in test_coco.py.
"""

import json
import sys

import pytest
from conftest import assert_one_line_error, run_script
from PIL import Image
from test_data import ONE, picture

VERIFY = ("get_data.py", "verify", "--data_root", "coco")


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def coco(tmp_path):
    """A COCO with five pictures to train on and three held out, in tmp_path/coco."""
    (tmp_path / "coco/annotations").mkdir(parents=True)
    for split, count in (("train2017", 5), ("val2017", 3)):
        images = [{"id": i, "file_name": f"{split}{i}.jpg"} for i in range(count)]
        notes = [{"image_id": i, "caption": f"number {i}"} for i in range(count)]
        captions = json.dumps({"images": images, "annotations": notes})
        (tmp_path / f"coco/annotations/captions_{split}.json").write_text(captions)
        for i in range(count):
            picture(tmp_path / f"coco/{split}/{split}{i}.jpg")
    return tmp_path / "coco"


def cut(path):
    path.write_bytes(path.read_bytes()[:-200])


def test_the_old_command_names_the_new_one_before_pytorch_is_loaded(tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text("raise RuntimeError('loaded')")
    for words in (("download", "--max_images", 4), ("verify",), ()):
        result = run_script("data.py", *words, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)})
        assert_one_line_error(result, 2, "python get_data.py")
        assert result.stdout == "" and result.stderr.count("\n") == 1


MISTAKES = {
    "": "download | verify",
    "upload": "upload",
    "download --max_images 0": "--max_images",
    "download --dataset coco": "--dataset",
    "download --connections 65": "--connections",
    "verify --dataset scenes": "--dataset",
    "verify --data x": "--data",
    "verify --dataset folder --put_aside": "--put_aside",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_mistakes_of_the_command_are_one_line(tmp_path, run_here, words):
    assert_one_line_error(run_here("get_data.py", *words.split(), cwd=tmp_path), 2, MISTAKES[words])
    assert not list(tmp_path.iterdir())


def test_verify_lists_what_is_wrong_and_what_is_odd(coco, tmp_path, run_here):
    cut(coco / "train2017/train20170.jpg")
    Image.new("CMYK", (9, 9)).save(coco / "train2017/train20171.jpg", "JPEG")
    (coco / "val2017/val20172.jpg").rename(coco / "val2017/stray.jpg")
    before = files(coco)
    result = run_here(*VERIFY, cwd=tmp_path)
    assert_one_line_error(result, 1, "1 of 7", "--put_aside", "--skip_bad")
    lines = result.stdout.splitlines()
    for what, name in (("1 pictures of mode CMYK", "coco/train2017/train20171.jpg"), ("1 pictures that cannot be read", "train20170.jpg"),
                       ("1 pictures in annotations/captions_val2017.json, but not in coco/val2017", "val20172.jpg"),
                       ("1 pictures in coco/val2017, but not in annotations/captions_val2017.json", "stray.jpg")):  # fmt: skip
        at = [i for i, line in enumerate(lines) if what in line]
        assert len(at) == 1 and name in lines[at[0] + 1], what
    assert files(coco) == before


def test_verify_counts_odd_captions_and_lists_few_of_many_names(coco, tmp_path, run_here):
    path = coco / "annotations/captions_train2017.json"
    content = json.loads(path.read_text())
    content["images"] += [{"id": i, "file_name": f"{i}.jpg"} for i in range(100, 120)] + content["images"][:1]
    content["annotations"] += [{"image_id": 99, "caption": "x"}, {"image_id": 1, "caption": " "}]
    path.write_text(json.dumps(content))
    result = run_here(*VERIFY, cwd=tmp_path)
    assert result.returncode == 0
    for what in ("captions of unknown pictures", "empty captions", "pictures listed twice", "ids given twice"):
        assert f"1 {what} in annotations/captions_train2017.json" in result.stdout
    assert "20 pictures in annotations/captions_train2017.json, but not" in result.stdout
    assert result.stdout.count("\n  1") == 10 and "\n  ...\n" in result.stdout


def test_put_aside_renames_what_is_damaged_and_nothing_else(coco, tmp_path, run_here):
    cut(coco / "val2017/val20170.jpg")
    before = files(coco)
    result = run_here(*VERIFY, "--put_aside", cwd=tmp_path)
    assert result.returncode == 0 and "1 of them are renamed" in result.stdout
    before["val2017/val20170.jpg.damaged"] = before.pop("val2017/val20170.jpg")
    assert files(coco) == before
    assert run_here(*VERIFY, "--put_aside", cwd=tmp_path).returncode == 0 and files(coco) == before


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), MemoryError()])
def test_what_the_system_does_not_let_us_read_is_not_put_aside(coco, tmp_path, run_here, monkeypatch, error):
    before = files(coco)
    monkeypatch.setattr("data.read_rgb", lambda path, *_: (_ for _ in ()).throw(error))
    result = run_here(*VERIFY, "--put_aside", cwd=tmp_path)
    assert_one_line_error(result, 1, "8 of 8", "permissions")
    assert files(coco) == before


def test_verify_needs_no_captions_of_pictures_that_training_does_not_read(coco, tmp_path, run_here):
    (coco / "annotations/captions_val2017.json").unlink()
    assert run_here(*VERIFY, cwd=tmp_path).returncode == 0


@pytest.mark.parametrize("kind", ["images", "metadata.jsonl"])
def test_empty_captions_are_listed(tmp_path, kind, run_here):
    for name, text in {"cat": "a cat", "dog": " \n", "owl": ""}.items():
        picture(tmp_path / f"images/{name}.jpg")
        (tmp_path / f"images/{name}.txt").write_text(text)
        if kind == "metadata.jsonl":
            with open(tmp_path / kind, "a") as f:
                f.write(json.dumps({"file_name": f"images/{name}.jpg", "text": text}) + "\n")
    out = run_here("get_data.py", "verify", "--dataset", "folder", "--data_root", tmp_path, cwd=tmp_path).stdout
    assert "2 pictures with an empty caption\n" in out and "dog.jpg" in out and "owl.jpg" in out and "cat" not in out


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits address space as Linux does")
@pytest.mark.parametrize("kind", ["coco", "folder"])
def test_captions_too_large_for_the_memory_are_named(tmp_path, fork, kind):
    """Of a caption of one word, Python makes objects of some hundred bytes."""
    for i in (1, 2):
        picture(tmp_path / f"train2017/{i}.jpg")
    (tmp_path / "annotations").mkdir()
    name = "annotations/captions_train2017.json" if kind == "coco" else "metadata.jsonl"
    text = "".join(f'{{"file_name": "train2017/{i}.jpg", "text": "x"}}\n' for i in (1, 2)) * 150_000
    if kind == "coco":
        notes = ", ".join(['{"image_id": 1, "caption": "x"}'] * 300_000)
        text = f'{{"images": [{json.dumps(ONE)}], "annotations": [{notes}]}}'
    (tmp_path / name).write_text(text)
    command = "get_data.py", "verify", "--dataset", kind, "--data_root", str(tmp_path)
    small = fork(*command, cwd=tmp_path, inject={"limit_memory": 40 << 20}).wait()
    assert_one_line_error(small, 1, f"{name}: not enough memory")
    assert fork(*command, cwd=tmp_path).wait().returncode == 0
