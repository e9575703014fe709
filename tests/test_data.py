"""Promises of data.py: the same pictures and captions everywhere, nothing skipped in silence."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from config import SDConfig, UserError
from data import (
    Pictures,
    Scenes,
    choose_captions,
    coco_records,
    crop_pictures,
    draw_crops,
    folder_records,
    most_workers,
    number_captions,
    open_dataset,
    read_captions,
    read_picture,
    read_pictures,
    read_square,
)
from support.show import progress_bar


def picture(path, colour=(200, 30, 40), size=(60, 40), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).convert(mode).save(path, **options)


def coco(root, captions):
    """{file name: [captions]} -> a COCO layout under root, with pictures."""
    images = [{"id": i, "file_name": name} for i, name in enumerate(captions)]
    notes = [{"image_id": i, "caption": c} for i, name in enumerate(captions) for c in captions[name]]
    for name in captions:
        picture(root / "train2017" / name)
    (root / "annotations").mkdir(exist_ok=True)
    (root / "annotations/captions_train2017.json").write_text(json.dumps({"images": images, "annotations": notes}))
    return SDConfig(data_root=str(root), image_size=32, num_workers=0, cache_dir="")


# ---- COCO ----


def test_coco_subset_does_not_depend_on_the_order_of_the_file(tmp_path):
    names = {f"{i:012d}.jpg": [f"caption {i}"] for i in range(30)}
    coco(tmp_path / "a", names)
    coco(tmp_path / "b", dict(reversed(names.items())))
    a, b = (coco_records(tmp_path / x, "annotations/captions_train2017.json") for x in "ab")
    strip = lambda records: [(p.rsplit("/", 1)[1], c) for p, c in records]  # noqa: E731
    assert strip(a) == strip(b) != sorted(strip(a))


def test_every_caption_is_kept_and_tidied(tmp_path):
    cfg = coco(tmp_path, {"1.jpg": ["one\n", "  two  words "], "2.jpg": ["three"], "3.jpg": []})
    records = dict(coco_records(cfg.data_root, cfg.captions_json))
    assert sorted(records.values()) == [["one", "two words"], ["three"]]


def test_held_out_pictures_are_not_trained_on(tmp_path):
    cfg = coco(tmp_path, {f"{i}.jpg": ["x"] for i in range(40)})
    train, held_out = open_dataset(cfg)
    assert len(train) == 36 and len(held_out) == 4 and not set(train.names) & set(held_out.names)


def test_val2017_is_held_out_where_it_is(real_data):
    train, held_out = open_dataset(SDConfig(data_root=str(real_data / "coco-mini"), num_workers=0, cache_dir=""))
    assert len(train) == 80 and len(held_out) == 79
    assert "train2017" in train.names[0] and "val2017" in held_out.names[0]


def test_pictures_of_coco_may_lie_under_images(tmp_path):
    cfg = coco(tmp_path, {f"{i}.jpg": ["x"] for i in range(10)})
    before = [part.names for part in open_dataset(cfg)]
    (tmp_path / "images").mkdir()
    (tmp_path / "train2017").rename(tmp_path / "images/train2017")
    after = open_dataset(cfg)
    assert [[name.replace("images/", "") for name in part.names] for part in after] == before
    assert len(read_pictures(after[0], cfg, progress_bar("read"))[0]) == 9


def test_real_coco_pictures_become_rgb_squares(real_data):
    """The set holds a greyscale JPEG and every orientation."""
    cfg = SDConfig(data_root=str(real_data / "coco-mini"), num_workers=2, cache_dir="")
    train, _ = open_dataset(cfg)
    pixels, captions = read_pictures(train, cfg, progress_bar("read"))
    assert pixels.shape == (80, 3, 128, 128) and pixels.dtype == torch.uint8
    assert all(len(c) >= 5 for c in captions)
    assert pixels.float().std(dim=(1, 2, 3)).min() > 5


def test_missing_captions_say_how_to_get_them(tmp_path):
    with pytest.raises(UserError, match="get_data.py download.*--preset demo"):
        open_dataset(SDConfig(data_root=str(tmp_path)))


def test_missing_pictures_folder_is_named(tmp_path):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations/captions_train2017.json").write_text("{}")
    with pytest.raises(UserError, match="train2017: the pictures are not there.*get_data.py download"):
        open_dataset(SDConfig(data_root=str(tmp_path)))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"images": [], "annotations": []}', '{"images": [{"id": 1}], "annotations": []}',
                                     '{"images": [{"id": 1, "file_name": "../x.jpg"}], "annotations": [{"image_id": 1, "caption": "x"}]}'])  # fmt: skip
def test_a_file_that_is_no_captions_file_is_refused(tmp_path, content):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "train2017").mkdir()
    (tmp_path / "annotations/captions_train2017.json").write_text(content)
    with pytest.raises(UserError, match="captions_train2017.json") as e:
        open_dataset(SDConfig(data_root=str(tmp_path)))
    assert "\n" not in str(e.value)


ONE = {"id": 1, "file_name": "1.jpg"}


@pytest.mark.parametrize("unknown, refused", [(6, True), (5, False)])
def test_captions_of_other_pictures_are_the_wrong_file(tmp_path, unknown, refused, capsys):
    path = tmp_path / "captions.json"
    notes = [{"image_id": 1 if i < 5 else 2, "caption": "x"} for i in range(5 + unknown)]
    path.write_text(json.dumps({"images": [ONE], "annotations": notes}))
    if refused:
        with pytest.raises(UserError, match="captions.json: 6 of its 11 captions belong to no picture"):
            read_captions(path)
    else:
        assert read_captions(path) == ({"1.jpg": ["x"] * 5}, {"captions of unknown pictures": 5})


def test_captions_of_an_id_that_two_pictures_have_are_left_out(tmp_path):
    path = tmp_path / "captions.json"
    others = [{"id": 1, "file_name": "2.jpg"}, {"id": 3, "file_name": "3.jpg"}]
    notes = [{"image_id": i, "caption": f"of {i}"} for i in (1, 3)]
    path.write_text(json.dumps({"images": [ONE, *others], "annotations": notes}))
    captions, odd = read_captions(path)
    assert captions == {"1.jpg": [], "2.jpg": [], "3.jpg": ["of 3"]}
    assert odd == {"ids given twice": 1, "captions of unknown pictures": 1, "pictures without a caption": 2}


# ---- Your own folder; layouts are in test_folders.py ----


def own(root, **settings):
    return folder_records(SDConfig(dataset="folder", data_root=str(root), **settings))[0]


@pytest.mark.parametrize("kind", ["images", "metadata.jsonl"])
def test_empty_captions_are_counted(tmp_path, kind, capsys):
    for name, text in {"cat": "a cat", "dog": " \n", "owl": ""}.items():
        picture(tmp_path / f"images/{name}.jpg")
        (tmp_path / f"images/{name}.txt").write_text(text)
        if kind == "metadata.jsonl":
            with open(tmp_path / kind, "a") as f:
                f.write(json.dumps({"file_name": f"images/{name}.jpg", "text": text}) + "\n")
    assert len(own(tmp_path)) == 3
    assert "2 pictures with an empty caption" in capsys.readouterr().out
    for name in ("dog", "owl"):
        (tmp_path / f"images/{name}.txt").write_text(f"one {name}")
    if kind == "images":
        own(tmp_path)
        assert capsys.readouterr() == (f"{tmp_path}: 3 pictures with 3 captions, 1 for each picture\n", "")


def test_a_folder_with_sidecar_captions(tmp_path):
    picture(tmp_path / "images/cat.jpg")
    picture(tmp_path / "images/dog.PNG")
    (tmp_path / "images/cat.txt").write_text("a cat\nthe same cat\n")
    (tmp_path / "images/dog.txt").write_text("a dog")
    records = {p.rsplit("/", 1)[1]: c for p, c in own(tmp_path)}
    assert records == {"cat.jpg": ["a cat", "the same cat"], "dog.PNG": ["a dog"]}


def test_a_folder_with_metadata(tmp_path):
    picture(tmp_path / "images/cat.jpg")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "images/cat.jpg", "text": "a cat"}\n\n')
    ((path, captions),) = own(tmp_path)
    assert captions == ["a cat"] and read_square(path, 16).size == (16, 16)


@pytest.mark.parametrize("lines", ["not json", '{"file_name": "x.jpg"}', '["x.jpg", "text"]'])
def test_a_bad_line_of_metadata_is_named(tmp_path, lines):
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "x.jpg", "text": "x"}\n\n' + lines)
    with pytest.raises(UserError, match="line 3"):
        own(tmp_path)


def test_captions_that_are_not_utf8_are_named(tmp_path):
    picture(tmp_path / "images/cat.jpg")
    (tmp_path / "images/cat.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(UserError, match="cat.txt: not UTF-8"):
        own(tmp_path)
    (tmp_path / "metadata.jsonl").write_bytes(b'{"file_name": "images/cat.jpg", "text": "caf\xe9"}')
    with pytest.raises(UserError, match="metadata.jsonl: not UTF-8.*save them as UTF-8"):
        own(tmp_path)


def test_a_picture_without_a_caption_is_named(tmp_path):
    picture(tmp_path / "images/cat.jpg")
    with pytest.raises(UserError, match="cat.jpg"):
        own(tmp_path)


# ---- Reading ----


@pytest.mark.parametrize("mode, ending", [("L", "jpg"), ("CMYK", "jpg"), ("P", "png"), ("RGBA", "png"), ("1", "png")])
def test_every_mode_becomes_rgb(tmp_path, mode, ending):
    picture(tmp_path / f"x.{ending}", mode=mode)
    assert read_square(tmp_path / f"x.{ending}", 24).mode == "RGB"


def test_squares_are_those_of_other_loaders(tmp_path):
    """As torchvision's Resize and CenterCrop make them: bicubic resize of the shorter side, then the centre."""
    noise = np.random.RandomState(0).randint(0, 255, (12, 20, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((300, 180), Image.Resampling.BICUBIC).save(tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as x:
        theirs = np.asarray(x.resize((106, 64), Image.Resampling.BICUBIC).crop((21, 0, 85, 64)), dtype=float)
    ours = np.asarray(read_square(tmp_path / "x.png", 64), dtype=float)
    assert np.abs(ours - theirs).mean() < 2  # of 255


def test_a_turned_photograph_is_set_upright(tmp_path):
    x = Image.new("RGB", (40, 40), (0, 0, 0))
    x.paste((255, 255, 255), (0, 0, 40, 20))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    x.save(tmp_path / "x.jpg", exif=exif, quality=95)
    upright = read_square(tmp_path / "x.jpg", 8)
    assert max(upright.getpixel((4, 1))) < 30 and min(upright.getpixel((4, 6))) > 225


@pytest.mark.parametrize("resize", ["crop", "pad", "squeeze"])
@pytest.mark.parametrize(
    "mode, ending", [("L", "jpg"), ("CMYK", "jpg"), ("RGBA", "png"), ("LA", "png"), ("I;16", "png")]
)
def test_pictures_to_start_from_are_those_of_training(tmp_path, mode, ending, resize):
    noise, exif = np.random.RandomState(0).randint(0, 255, (30, 50, 4), dtype=np.uint8), Image.Exif()
    exif[0x0112] = 6  # a quarter turned
    image = (
        Image.fromarray(noise[..., 0].astype(np.uint16) << 8)
        if mode == "I;16"
        else Image.fromarray(noise).convert(mode)
    )
    image.save(tmp_path / f"x.{ending}", exif=exif)
    found, size = read_picture(tmp_path / f"x.{ending}", (24, 24), resize)
    assert size == (30, 50) and found.tobytes() == read_square(tmp_path / f"x.{ending}", 24, resize).tobytes()
    wide, _ = read_picture(tmp_path / f"x.{ending}", (32, 16), resize)
    assert (wide.size, wide.mode) == ((32, 16), "RGB")


def spoil(path, how):
    data = path.read_bytes()
    path.unlink()
    if how != "missing":
        path.write_bytes({"cut": data[: len(data) // 2], "empty": b"", "html": b"<html>404</html>"}[how])


@pytest.mark.parametrize("how", ["cut", "empty", "html", "missing"])
def test_unreadable_pictures_are_named_counted_and_skipped_only_on_request(tmp_path, how, capsys):
    cfg = coco(tmp_path, {f"{i}.jpg": [f"caption {i}"] for i in range(6)})
    spoil(tmp_path / "train2017/3.jpg", how)
    data = Pictures(coco_records(cfg.data_root, cfg.captions_json), 32, {str(tmp_path.resolve())})
    with pytest.raises(UserError, match=r"1 of 6 pictures.*3\.jpg.*--skip_bad"):
        read_pictures(data, cfg, progress_bar("read"))
    skipping = SDConfig(data_root=cfg.data_root, image_size=32, num_workers=0, skip_bad=True, cache_dir="")
    pixels, captions = read_pictures(data, skipping, progress_bar("read"))
    assert len(pixels) == len(captions) == 5 and ["caption 3"] not in captions
    assert "3.jpg" in capsys.readouterr().out


def test_workers_change_nothing(tmp_path):
    cfg = SDConfig(dataset="scenes", image_size=32, num_workers=0, cache_dir="")
    for number in (2, None):
        other = SDConfig(dataset="scenes", image_size=32, num_workers=number, cache_dir="")
        a, b = (read_pictures(Scenes(0, 130, 32), c, progress_bar("read"))[0] for c in (cfg, other))
        assert torch.equal(a, b)


def test_there_are_as_many_workers_as_processors_but_not_too_many(monkeypatch):
    there = {"processors": 5, "start": "fork"}
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(there["processors"])), raising=False)
    monkeypatch.setattr("multiprocessing.get_start_method", lambda: there["start"])
    assert [most_workers(count) for count in (1000, 40, 1)] == [5, 3, 1]
    there["processors"] = 64
    assert most_workers(40_000) == 16
    there["start"] = "spawn"
    assert most_workers(40_000) == 4


def test_captions_are_chosen_by_the_seed_among_those_of_their_picture():
    captions = [["a"] * n for n in (4, 1, 5, 2) * 50]
    first_rows, index = number_captions(captions), torch.arange(200).flip(0)
    torch.manual_seed(1)
    rows = choose_captions(first_rows, index)
    torch.manual_seed(1)
    assert torch.equal(rows, choose_captions(first_rows, index))
    owner = [picture for picture, several in enumerate(captions) for _ in several]
    assert [owner[row] for row in rows] == index.tolist()
    place = rows - first_rows[index]
    assert all(set(place[index % 4 == k].tolist()) == set(range(n)) for k, n in enumerate((4, 1, 5, 2)))


# ---- What training sees of a picture ----


def numbered_pixels(count=6, size=12):
    """Every pixel tells where it is from: its picture, row and column in the three channels."""
    n, row, column = np.meshgrid(np.arange(count), np.arange(size), np.arange(size), indexing="ij")
    return torch.from_numpy(np.stack([n, row, column], axis=1).astype(np.uint8))


def test_crops_are_where_and_mirrored_as_they_say():
    pixels, index = numbered_pixels(), torch.tensor([5, 0, 3])
    crops = torch.tensor([[0, 4, 8, 0], [2, 1, 8, 1], [4, 0, 8, 1]])
    found = crop_pictures(pixels, index, crops, 8)
    expected = [pixels[5, :, 0:8, 4:12], pixels[0, :, 2:10, 1:9].flip(2), pixels[3, :, 4:12, 0:8].flip(2)]
    assert torch.equal(found, torch.stack(expected)) and found.dtype == torch.uint8
    assert torch.equal(crop_pictures(pixels, index, torch.tensor([[0, 0, 12, 0]] * 3), 12), pixels[index])


def test_larger_crops_are_shrunk_as_pillow_shrinks():
    """The path of a picture read at its size, so that a random scale has the sharpness of the pictures it stands for."""
    pixels = torch.randint(64, 192, (2, 3, 40, 40), dtype=torch.uint8)
    found = crop_pictures(pixels, torch.tensor([1, 0]), torch.tensor([[3, 5, 30, 0], [10, 0, 30, 1]]), 16)
    crops = (pixels[1, :, 3:33, 5:35], pixels[0, :, 10:40, 0:30].flip(2))
    for x, crop in zip(found, crops, strict=True):
        theirs = Image.fromarray(crop.permute(1, 2, 0).numpy()).resize((16, 16), Image.Resampling.BICUBIC)
        assert (x.permute(1, 2, 0).int() - torch.from_numpy(np.array(theirs)).int()).abs().max() <= 1
    edge = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    edge[..., 16:] = 255  # where bicubic weights overshoot on both sides
    seen = crop_pictures(edge, torch.tensor([0]), torch.tensor([[0, 0, 31, 0]]), 8)[0, 0, 0]
    assert (seen[:3] < 30).all() and (seen[-3:] > 225).all()


def test_random_scales_reach_from_image_size_to_the_whole_evenly_by_ratio():
    cfg = SDConfig(image_size=32, random_crop=96, random_scale=True)
    torch.manual_seed(0)
    crops = [draw_crops(8, cfg) for _ in range(2000)]
    sides = torch.stack([c[0, 2] for c in crops])
    assert all(
        (c[:, 2] == c[0, 2]).all() and (c[:, :2] >= 0).all() and (c[:, :2].amax() + c[0, 2] <= 128) for c in crops
    )
    assert sides.min() == 32 and sides.max() == 128
    octaves = [((sides >= low) & (sides < 2 * low)).float().mean() for low in (32, 64)]
    assert all(abs(share - 0.5) < 0.05 for share in octaves)
    with pytest.raises(UserError, match="--random_scale.*--random_crop"):
        SDConfig(random_scale=True)
    with pytest.raises(UserError, match="--random_crop.*at most 96"):
        SDConfig(image_size=32, random_crop=97, random_scale=True)


def test_crops_are_a_function_of_the_seed_and_reach_every_crop():
    cfg = SDConfig(random_crop=2, horizontal_flips=True)
    torch.manual_seed(0)
    crops = draw_crops(2000, cfg)
    torch.manual_seed(0)
    assert torch.equal(crops, draw_crops(2000, cfg))
    seen, counts = crops.unique(dim=0, return_counts=True)
    assert len(seen) == 3 * 3 * 2 and counts.min() > 60 and (crops[:, 2] == cfg.image_size).all()
    assert not draw_crops(2000, SDConfig())[:, [0, 1, 3]].any()
    assert draw_crops(2000, SDConfig(random_crop=2))[:, 3].sum() == 0


def test_only_training_pictures_are_larger_and_only_on_request(tmp_path):
    cfg = coco(tmp_path, {f"{i}.jpg": ["x"] for i in range(20)})
    for margin in (0, 4):
        train, held_out = open_dataset(cfg, margin)
        sizes = [read_pictures(s, cfg, progress_bar("read"))[0].shape[-1] for s in (train, held_out)]
        assert sizes == [32 + margin, 32]
    assert open_dataset(SDConfig(dataset="scenes", image_size=32), 4)[0][0].shape == (3, 36, 36)
    with pytest.raises(UserError, match="--random_crop.*at most 32"):
        SDConfig(image_size=32, random_crop=33)


@pytest.mark.parametrize("used, expected", [(0, 5), (1, 1), (3, 3), (9, 5)])
def test_the_first_captions_of_a_picture_are_used_as_many_as_asked_for(tmp_path, used, expected):
    """COCO has five each; 0 stands for all."""
    cfg = coco(tmp_path, {f"{i}.jpg": [f"caption {k}" for k in range(5)] for i in range(20)})
    cfg = replace(cfg, captions_per_image=used)
    for some in open_dataset(cfg):
        _, captions = read_pictures(some, cfg, progress_bar("read"))
        assert all(c == [f"caption {k}" for k in range(expected)] for c in captions)


def test_more_pictures_than_there_are_means_all(tmp_path):
    """COCO's full 118k by --max_images 118287 or more; the held-out ones stay out."""
    cfg = replace(coco(tmp_path, {f"{i}.jpg": ["x"] for i in range(40)}), max_images=118_287)
    train, held_out = open_dataset(cfg)
    assert len(train) == 36 and len(held_out) == 4
    assert len(read_pictures(train, cfg, progress_bar("read"))[0]) == 36


def test_what_is_no_picture_of_a_folder_is_said_and_how_many_are_held_out(tmp_path, capsys):
    for i in range(20):
        picture(tmp_path / f"images/{i}.png")
        (tmp_path / f"images/{i}.txt").write_text("a picture")
    for name in ("phone.heic", "phone.txt", "notes.md", ".hidden"):
        (tmp_path / "images" / name).write_text("")
    train, held_out = open_dataset(SDConfig(dataset="folder", data_root=str(tmp_path), held_out_images=8))
    out, err = capsys.readouterr()
    assert (len(train), len(held_out)) == (18, 2) and "2 of 20 pictures are held out" in out
    assert ": 3 files that are neither" in err and all(name in err for name in ("notes.md", "phone.heic", "phone.txt"))
    assert "1 hidden files and folders" in out and ".hidden" in out
