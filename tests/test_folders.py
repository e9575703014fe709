"""Promises of support/folders.py: people's layouts are read as they are meant, and every fault is told in one go."""

import json
import os
import shutil
from dataclasses import replace

import pytest
from conftest import SMALL, assert_one_line_error, files, flags, picture

from config import SDConfig
from data import by_hash, folder_records, open_dataset, read_pictures
from support.folders import Folder, looks_wrapped, refusal
from support.show import progress_bar

VERIFY = ("get_data.py", "verify", "--dataset", "folder", "--data_root", "mine")
TRAIN = ("train_vae.py", "--dataset", "folder", "--data_root", "mine", "--run_dir", "run", "--max_steps", 1)
TRAIN += tuple(flags({k: v for k, v in SMALL.items() if k not in ("dataset", "max_images")}))


def mine(root, names="images/p{:03}.jpg", count=14, text="a {}. square", ending=".txt"):
    """Captioned squares of many colours under root/mine -> root/mine."""
    for i in range(count):
        path = root / "mine" / names.format(i)
        picture(path, (15 * i, 200 - 10 * i, 90))
        if ending:
            path.with_suffix(ending).write_text(text.format(i))
    return root / "mine"


def listed(root, rows, name="metadata.jsonl"):
    """Squares and a listing of them -> root/mine. rows: [(file name, text)]."""
    for i, (file, _) in enumerate(rows):
        picture((root / "mine" / name).parent / file.replace("\\", "/"), (9 * i % 256, 90, 90))
    lines = [json.dumps({"file_name": file, "text": text}) for file, text in rows]
    if name.endswith(".csv"):
        lines = ["file_name,text", *(f'"{file}","{text}"' for file, text in rows)]
    (root / "mine" / name).write_text("\n".join(lines), encoding="utf-8")
    return root / "mine"


def cfg_of(root, **settings):
    return SDConfig(
        **{"dataset": "folder", "data_root": str(root), "image_size": 32, "num_workers": 0, "cache_dir": ""} | settings
    )


def found(root, **settings):
    """{path within root: captions}."""
    records, _ = folder_records(cfg_of(root, **settings))
    return {os.path.relpath(path, root): captions for path, captions in records}


# ---- Hidden files ----


@pytest.mark.parametrize("names", ["images/p{:03}.jpg", "10_cat/p{:03}.jpg", "images/a/p{:03}.jpg"])
def test_what_systems_leave_beside_files_is_left_out_and_counted(tmp_path, run_here, names):
    root = mine(tmp_path, names)
    folder = (root / names).parent
    for name in ("._p003.jpg", "._p003.txt", ".DS_Store", "Thumbs.db"):
        (folder / name).write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X")
    (root / "__MACOSX").mkdir()
    (folder / ".cache").mkdir()
    shutil.copy(folder / "p003.jpg", folder / ".cache/x.jpg")
    result = run_here(*TRAIN, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    count = 6
    assert f"{count} hidden files and folders, which are left out" in result.stdout and "p003" not in result.stderr
    seen = run_here(*VERIFY, cwd=tmp_path)
    assert seen.returncode == 0 and f"{count} hidden files and folders" in seen.stdout and "._p003.txt" in seen.stdout


def test_hidden_files_in_a_listing_are_left_out(tmp_path, run_here):
    root = listed(tmp_path, [(f"{i}.jpg", "x") for i in range(14)])
    (root / "._3.jpg").write_bytes(b"\0\5\x16\7")
    with open(root / "metadata.jsonl", "a") as f:
        f.write('\n{"file_name": "._3.jpg", "text": "x"}')
    assert run_here(*TRAIN, cwd=tmp_path).returncode == 0
    assert "2 hidden" in run_here(*VERIFY, cwd=tmp_path).stdout  # the line, and the file


# ---- The order ----

CLASSES = ("cup", "box", "jar", "pan")


@pytest.mark.parametrize(
    "names", [["rgb.png"] * 10, [f"{i:04}.png" for i in range(10)], [f"view{i % 3}.png" for i in range(10)]]
)
def test_classes_are_mixed_whatever_their_files_are_called(tmp_path, names):
    """The same names in many folders say nothing; their paths do."""
    rows = [(f"{kind}/{i}/{name}", kind) for kind in CLASSES for i, name in enumerate(names)]
    cfg = cfg_of(listed(tmp_path, rows), held_out_images=4, max_images=20)
    train, held_out = open_dataset(cfg)
    assert len(train) == 20 and {c for (c,) in train.captions} == {*CLASSES}
    assert len({c for (c,) in held_out.captions}) > 1
    moved = shutil.copytree(tmp_path / "mine", tmp_path / "elsewhere")
    assert open_dataset(replace(cfg, data_root=str(moved)))[0].captions == train.captions


def test_the_order_of_names_that_differ_is_that_of_older_code():
    """By a hash of the file name alone, wherever the folder is: unfinished runs go on."""
    names = [f"p{i}.jpg" for i in range(6)]
    order = ["p1.jpg", "p3.jpg", "p0.jpg", "p2.jpg", "p5.jpg", "p4.jpg"]
    for records in (by_hash({f"a/b/{name}": [] for name in names}, "a"), by_hash({name: [] for name in names})):
        assert [os.path.basename(path) for path, _ in records] == order


# ---- Names ----


@pytest.mark.parametrize(
    "name",
    [
        "a\u3000b.jpg",
        "a\u00a0b.jpg",
        "a\u202fb.jpg",
        "a\u200db.jpg",
        "\u202eb.jpg",
        "\ufeffx.jpg",
        "a..b.jpg",
        "./c.jpg",
        "d\\e.jpg",
    ],
)
def test_names_of_all_scripts_are_accepted(tmp_path, name):
    root = listed(tmp_path, [(f"{i}.jpg", "x") for i in range(12)] + [(name, "here")])
    train, held_out = open_dataset(cfg_of(root))
    assert ["here"] in train.captions + held_out.captions
    for part in (train, held_out):
        assert len(read_pictures(part, cfg_of(root), progress_bar("read"))[0]) == len(part)


@pytest.mark.parametrize("name, why", [("a\nb.jpg", "U+000A"), ("a\0b", "U+0000"), ("a\x7f", "U+007F"), ("\udcff.jpg", "U+DCFF"), ("../a", "leads out"),
                                       ("..\\a", "leads out"), ("/a", "leads out"), ("\\a", "leads out"), ("", "leads out"), ("a" * 1000, "too long")])  # fmt: skip
def test_names_that_are_refused_say_why(tmp_path, run_here, name, why):
    assert why in refusal(name)
    root = listed(tmp_path, [(f"{i}.jpg", "x") for i in range(3)])
    with open(root / "metadata.jsonl", "a") as f:
        f.write("\n" + json.dumps({"file_name": name, "text": "x"}))
    assert_one_line_error(run_here(*TRAIN, cwd=tmp_path), 1, "metadata.jsonl: line 4", why)


# ---- Captions over several lines ----

WRAPPED = [
    "A large brown dog sits in the grass next to\na red ball, looking at the camera.",
    "a large brown dog sits in the\ngrass",
    "The dog sits\nin the shade.",
    "A dog, a ball,\na tree",
    "a dog\nwith a ball",
    "\u4e00\u6761\u72d7\uff0c\n\u5750\u5728\u8349\u5730\u4e0a\u3002",
]
SEPARATE = [
    "a cat\nthe same cat",
    "A cat.\nThe same cat.",
    "A cat\nIt is black",
    "a cat",
    "1girl",
    "",
    "ein Hund\nein brauner Hund",
]


@pytest.mark.parametrize("text", WRAPPED + SEPARATE)
def test_lines_that_are_parts_of_a_sentence_are_told_from_captions(text):
    assert bool(looks_wrapped(text.split("\n") if text else [])) == (text in WRAPPED)


def test_a_paragraph_for_each_picture_is_noticed_and_can_be_one_caption(tmp_path, run_here):
    root = mine(tmp_path, text=WRAPPED[0])
    result = run_here(*TRAIN, cwd=tmp_path)
    assert result.returncode == 0 and "14 pictures with 28 captions, 2 for each picture" in result.stdout
    assert (
        "warning: mine: 14 captions files whose lines look like parts of one sentence; --whole_captions"
        in result.stderr
    )
    seen = run_here(*VERIFY, cwd=tmp_path)
    assert (
        seen.returncode == 0
        and "28 captions, 2 for each" in seen.stdout
        and "14 captions files whose lines" in seen.stdout
    )
    whole = run_here(*TRAIN, "--whole_captions", "--overwrite", cwd=tmp_path)
    assert "14 captions, 1 for each" in whole.stdout and "sentence" not in whole.stderr
    assert found(root, whole_captions=True)["images/p001.jpg"] == [WRAPPED[0].replace("\n", " ")]


# ---- Faults are collected ----


def test_all_faults_are_told_in_one_go(tmp_path, run_here):
    root = mine(tmp_path)
    for i in range(5):
        (root / f"images/p{i:03}.txt").write_bytes("caf\u00e9".encode("cp1252"))
    (root / "images/p005.txt").write_bytes("a cat".encode("utf-16"))
    (root / "images/p006.txt").write_bytes("a cat".encode("utf-16-le"))  # which is UTF-8, too
    for i in (7, 8, 9):
        (root / f"images/p{i:03}.txt").unlink()
    for i in (8, 10):
        (root / f"images/p{i:03}.jpg").write_bytes(b"cut")
    before = files(root)
    result = run_here(*TRAIN, cwd=tmp_path)
    assert_one_line_error(
        result, 1, "7 captions files cannot be read", "p000.txt", "3 pictures have no caption", "p007.jpg", "; ..."
    )
    seen = run_here(*VERIFY, cwd=tmp_path)
    assert_one_line_error(seen, 1, "7 captions files", "3 pictures have no caption", "2 of 14 pictures cannot be read")
    assert "14 captions" not in seen.stdout and "4 pictures with 4 captions, 1 for each picture" in seen.stdout
    for name in [f"p{i:03}.txt" for i in range(7)] + [f"p{i:03}.jpg" for i in (7, 8, 9, 10)]:
        assert name in seen.stdout
    assert files(root) == before


def test_all_bad_rows_of_a_listing_are_told_in_one_go(tmp_path, run_here):
    root = listed(tmp_path, [(f"{i}.jpg", "x") for i in range(4)])
    with open(root / "metadata.jsonl", "a") as f:
        f.write(
            '\n{"file_name": "0.jpg"}\nnot json\n{"file_name": "0.jpg", "text": 7}\n[]\n{"file_name": "0.jpg", "text": null}'
        )
    assert_one_line_error(run_here(*TRAIN, cwd=tmp_path), 1, "5 rows", "line 5", "line 6", "line 7", "...")
    out = run_here(*VERIFY, cwd=tmp_path).stdout
    assert all(f"line {i}\n" in out for i in range(5, 10))


# ---- Links ----


@pytest.mark.parametrize("what", ["picture", "caption", "folder", "listing"])
def test_links_of_ones_own_are_followed_on_request(tmp_path, run_here, what):
    root = listed(tmp_path, [(f"{i}.jpg", "x") for i in range(14)]) if what == "listing" else mine(tmp_path)
    name = {
        "picture": "images/p003.jpg",
        "caption": "images/p003.txt",
        "folder": "images/more",
        "listing": "metadata.jsonl",
    }[what]
    if what == "folder":
        mine(tmp_path, "images/more/m{}.jpg", 3)
    os.replace(root / name, tmp_path / "outside")
    (root / name).symlink_to(tmp_path / "outside")
    for command in (TRAIN, VERIFY):
        assert_one_line_error(run_here(*command, cwd=tmp_path), 1, "--follow_links if these links are your own")
        followed = run_here(
            *command, "--follow_links", "--overwrite"[: 11 * (command == TRAIN)] or "--follow_links", cwd=tmp_path
        )
        assert followed.returncode == 0, followed.stderr
    assert len(found(root, follow_links=True)) == (17 if what == "folder" else 14)


def test_a_run_within_the_folder_is_no_part_of_it(tmp_path, run_here):
    mine(tmp_path, "p{:03}.jpg")
    for _ in range(2):
        result = run_here(*TRAIN[:6], "mine/run", *TRAIN[7:], "--overwrite", cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    assert list((tmp_path / "mine/run").glob("*.png"))


def test_links_in_circles_end(tmp_path):
    root = mine(tmp_path, "images/a/p{}.jpg", 4)
    (root / "images/a/up").symlink_to("..")
    (root / "images/a/there").symlink_to("up")
    assert len(found(root)) == 4


# ---- Layouts ----


@pytest.mark.parametrize(
    "name",
    ["metadata.csv", "train/metadata.csv", "train/metadata.jsonl", "images/metadata.csv", "data/train/metadata.jsonl"],
)
def test_listings_of_imagefolder_are_read_with_captions_as_written(tmp_path, name):
    texts = ["None", "NA", "007", "null", "nan", "1e3", "a, b", "TRUE"]
    root = listed(tmp_path, [(f"x/{i}.jpg", text) for i, text in enumerate(texts)], name)
    folder = os.path.dirname(name)
    assert found(root) == {os.path.join(folder, f"x/{i}.jpg"): [text] for i, text in enumerate(texts)}


@pytest.mark.parametrize("text", ["file_name;text\n0.jpg;a, b\n1.jpg;c\n", "\ufefffile_name,text\r\n0.jpg,\"a, b\"\r\n1.jpg,c\r\n", "file_name\ttext\n0.jpg\ta, b\n1.jpg\tc",
                                  'id,file_name,caption\n1,0.jpg,"a, b"\n2,1.jpg,c\n', "File_Name, Text\n0.jpg, \"a,\n b\"\n1.jpg, c",
                                  'file_name,text,text\n0.jpg,"a, b",x\n1.jpg,c,y\n'])  # fmt: skip
def test_tables_of_several_programs_are_read(tmp_path, text):
    (tmp_path / "metadata.csv").write_text(text, newline="")
    assert found(tmp_path) == {"0.jpg": ["a, b"], "1.jpg": ["c"]}


@pytest.mark.parametrize(
    "text",
    [
        "image,label\n0.jpg,3\n",
        "file_name,text\n0.jpg,a, b\n",
        "file_name,text\n0.jpg\n",
        'file_name,text\n0.jpg,"open\n',
    ],
)
def test_a_table_that_does_not_fit_is_named(tmp_path, run_here, text):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/metadata.csv").write_text(text)
    assert_one_line_error(run_here(*TRAIN, cwd=tmp_path), 1, "metadata.csv", "line 2", "file_name")


@pytest.mark.parametrize("names, ending", [("10_cat/{}.jpg", ".txt"), ("img/5_a cat/{}.jpg", ".caption"), ("{}.JPG", ".txt"), ("{}.jfif", ".TXT"),
                                           ("cats/black/{}.webp", ".txt"), ("images/cats/{}.PNG", ".Caption"), ("train/cats/{}.jpe", ".txt"),
                                           ("00000/{}.avif", ".txt")])  # fmt: skip
def test_text_files_beside_pictures_are_found_in_every_layout(tmp_path, names, ending):
    root = mine(tmp_path, names, 4, ending=ending)
    assert found(root) == {names.format(i): [f"a {i}. square"] for i in range(4)}
    train, held_out = open_dataset(cfg_of(root))
    assert len(read_pictures(train, cfg_of(root), progress_bar("read"))[0]) == 3 and len(held_out) == 1


def test_what_is_beside_the_folder_that_is_read_is_said(tmp_path, run_here, capsys):
    mine(tmp_path)
    mine(tmp_path, "more/x{}.jpg", 3)
    assert len(found(tmp_path / "mine")) == 14
    assert "1 files and folders beside the folder that is read" in capsys.readouterr().err
    assert "mine/more" in run_here(*VERIFY, cwd=tmp_path).stdout


def test_repeats_of_kohya_are_said_to_be_not_used(tmp_path, capsys):
    found(mine(tmp_path, "img/10_cat/{}.jpg"))
    assert "1 folders named for kohya's repeats" in capsys.readouterr().err


FOREIGN = {
    "cup/1.jpg": "write a .txt of the same name beside each",  # a folder for each class
    "data/train-00000-of-00001.parquet": "Parquet",
    "00000.tar": "unpack",
    "mine.zip": "unpack",
    "annotations/captions_train2017.json": "--dataset coco",
    "images/1.heic": "HEIC",
    "1.tif": "TIFF",
    "captions.json": "metadata.jsonl",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_layouts_that_are_not_read_are_recognised(tmp_path, run_here, name):
    path = tmp_path / "mine" / name
    picture(path) if name.endswith("jpg") else (path.parent.mkdir(parents=True), path.write_bytes(b"x"))
    for command in (TRAIN, VERIFY):
        assert_one_line_error(run_here(*command, cwd=tmp_path), 1, "--data_root mine", FOREIGN[name])


def test_two_listings_in_one_folder_are_not_guessed_between(tmp_path, run_here):
    listed(tmp_path, [("1.jpg", "x"), ("2.jpg", "y")])
    listed(tmp_path, [("1.jpg", "z"), ("2.jpg", "y")], "metadata.csv")
    assert_one_line_error(run_here(*TRAIN, cwd=tmp_path), 1, "both metadata.jsonl and metadata.csv", "keep one")


def test_a_folder_that_is_not_there_is_named(tmp_path, run_here):
    assert_one_line_error(run_here(*TRAIN, cwd=tmp_path), 1, "--data_root mine: no such folder")


# ---- Bad pictures and the split ----


def test_bad_pictures_are_left_out_before_the_split(tmp_path, run_here):
    """The only held-out picture is the damaged one, of which no name tells."""
    root = mine(tmp_path)
    name = open_dataset(cfg_of(root))[1].names[0]
    with open(name, "r+b") as f:
        f.truncate(300)
    assert_one_line_error(run_here(*TRAIN, cwd=tmp_path), 1, "1 of 14 pictures cannot be read", os.path.basename(name))
    result = run_here(*TRAIN, "--skip_bad", "--cache_dir", "kept", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "left out 1 of 14 pictures" in result.stdout and result.stdout.count("left out") == 1
    assert "1 of 13 pictures are held out" in result.stdout
    cfg = cfg_of(root, skip_bad=True, held_out_images=2)
    parts = open_dataset(cfg)
    assert [len(read_pictures(part, cfg, progress_bar("read"))[0]) for part in parts] == [12, 1]
    again = run_here(*TRAIN, "--skip_bad", "--cache_dir", "kept", "--overwrite", cwd=tmp_path)
    assert "left out 1 of 14 pictures" in again.stdout and "look at all" not in again.stderr


def test_the_share_held_out_is_of_what_can_be_read(tmp_path):
    root = mine(tmp_path, count=20)
    for i in range(3):
        (root / f"images/p{i:03}.jpg").write_bytes(b"x")
    cfg = cfg_of(root, skip_bad=True, max_images=16)
    assert [len(part) for part in open_dataset(cfg)] == [16, 1]


def test_bad_pictures_of_both_parts_are_counted_at_once(tmp_path, run_here):
    root = mine(tmp_path)
    train, held_out = open_dataset(cfg_of(root))
    for name in (train.names[0], train.names[5], held_out.names[0]):
        with open(name, "r+b") as f:
            f.truncate(300)
    assert_one_line_error(run_here(*TRAIN, cwd=tmp_path), 1, "3 of 14 pictures", os.path.basename(held_out.names[0]))


def test_a_moved_data_set_has_its_present_names_in_errors(tmp_path, run_here):
    root = mine(tmp_path)
    (root / "images/p003.jpg").write_bytes(b"no picture")
    os.remove(root / "images/p004.jpg")
    (root / "images/p004.jpg").symlink_to("nowhere.jpg")
    train = [*TRAIN, "--cache_dir", "kept"]
    assert_one_line_error(run_here(*train, cwd=tmp_path), 1, "mine/images/p003.jpg: ", "mine/images/p004.jpg: ")
    os.replace(root, tmp_path / "archive 2026")
    train[train.index("mine")] = "archive 2026"
    result = run_here(*train, cwd=tmp_path)
    assert_one_line_error(result, 1, "archive 2026/images/p003.jpg: cannot identify image file")
    assert "mine" not in result.stderr


def test_verify_finds_a_set_without_faults_in_order(tmp_path, run_here):
    mine(tmp_path)
    result = run_here(*VERIFY, cwd=tmp_path)
    assert (
        result.returncode == 0
        and "wrong, training stops: nothing" in result.stdout
        and "odd, training goes on: nothing" in result.stdout
    )
    assert Folder(cfg_of(tmp_path / "mine")).captions
