"""Captioned pictures: COCO, your own folder, or the embedded scenes, read once into memory as uint8.

What it is not: it downloads nothing, keeps no files and knows no model.

The way of the data: records (a picture and its captions) -> read_pictures: every picture decoded, cropped to
a square and resized, once -> uint8 (N, 3, S, S) -> the trainers take batches from it by index.

COCO captions: Chen et al. 2015 (arXiv 1504.00325); the 2017 release, https://cocodataset.org/#download
"""

import hashlib
import json
import os

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset

from config import UserError
from scenes import make_scene, paint

FORMATS = ("JPEG", "PNG", "WEBP")  # the only decoders that a file from outside gets to see
ENDINGS = (".jpg", ".jpeg", ".png", ".webp")
TRAIN_SERIES, HELD_OUT_SERIES = 0, 1  # series of scenes: disjoint by their seed


class Pictures(Dataset):
    """Picture files with captions. records: [(path, [captions])]; [i] -> uint8 array (3, S, S), or str: what is wrong."""

    def __init__(self, records, image_size):
        self.names = [path for path, _ in records]
        self.captions = [captions for _, captions in records]
        self.image_size = image_size

    def __len__(self):
        return len(self.names)

    def __getitem__(self, i):
        try:
            return to_array(read_square(self.names[i], self.image_size))
        except Exception as e:  # decoders raise many kinds for a broken file, and each means that it cannot be read
            return f"{self.names[i]}: {e}"


class Scenes(Dataset):
    """`count` painted scenes of one series. [i] -> uint8 array (3, S, S)."""

    def __init__(self, series, count, image_size):
        self.series, self.count, self.image_size = series, count, image_size
        self.captions = [[make_scene(series, i).caption] for i in range(count)]

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        return to_array(paint(make_scene(self.series, i), self.image_size))


def to_array(picture):
    """RGB PIL picture -> uint8 (3, H, W). An array, because a worker passes each tensor in a file of its own."""
    return np.ascontiguousarray(np.asarray(picture).transpose(2, 0, 1))


def read_square(path, size):
    """A file as an upright RGB picture of size x size: the largest centred square, bicubic; OSError if unreadable."""
    with Image.open(path, formats=FORMATS) as picture:
        picture = ImageOps.exif_transpose(picture).convert("RGB")
    return ImageOps.fit(picture, (size, size), Image.Resampling.BICUBIC)


def open_dataset(cfg):
    """-> (training set, held-out set), as cfg.dataset says; each has captions, len() and pictures by index."""
    if cfg.dataset == "scenes":
        return (Scenes(TRAIN_SERIES, cfg.max_images, cfg.image_size),
                Scenes(HELD_OUT_SERIES, cfg.held_out_images, cfg.image_size))  # fmt: skip
    train, held_out = coco_splits(cfg) if cfg.dataset == "coco" else split(folder_records(cfg.data_root), cfg)
    return Pictures(train[: cfg.max_images], cfg.image_size), Pictures(held_out, cfg.image_size)


def coco_splits(cfg):
    """Held-out records come from val2017 if it is there, else from pictures that training does not use."""
    train = coco_records(cfg.data_root, cfg.captions_json)
    head, tail = os.path.split(cfg.captions_json)
    val_json = os.path.join(head, tail.replace("train", "val"))
    val_there = val_json != cfg.captions_json and all(
        os.path.exists(os.path.join(cfg.data_root, p)) for p in (val_json, pictures_folder(val_json))
    )
    if val_there:
        return train, coco_records(cfg.data_root, val_json)[: cfg.held_out_images]
    return split(train, cfg)


def split(records, cfg):
    """Take the held-out records, at most a tenth, off the end."""
    if len(records) < 2:
        raise UserError(
            f"--data_root {cfg.data_root}: fewer than two pictures with captions; give more, one is held out"
        )
    count = max(1, min(cfg.held_out_images, len(records) // 10))
    return records[:-count], records[-count:]


def pictures_folder(captions_json):
    """annotations/captions_train2017.json -> train2017, where COCO keeps the pictures."""
    return os.path.basename(captions_json).removeprefix("captions_").removesuffix(".json")


def coco_records(root, captions_json):
    """COCO captions file -> [(path, [captions])] in a fixed order that looks random (by hash of the file name).

    Because the order depends on nothing else, its first n records are the same subset on every machine.
    """
    path = os.path.join(root, captions_json)
    if not os.path.exists(path):
        raise UserError(f"{path}: not there; README.md, 'Training on COCO', says how to get it, and --data_root where "
                        "it is; or --preset demo for the embedded data")  # fmt: skip
    folder = os.path.join(root, pictures_folder(captions_json))
    if not os.path.isdir(folder):
        raise UserError(f"{folder}: the pictures are not there; README.md, 'Training on COCO', says how to get them")
    try:
        with open(path, encoding="utf-8-sig") as f:
            content = json.load(f)
        captions = {}
        for a in content["annotations"]:
            captions.setdefault(a["image_id"], []).append(" ".join(a["caption"].split()))
        names = {image["id"]: image["file_name"] for image in content["images"]}
        outside = [name for name in names.values() if os.path.basename(name) != name]
        records = [(os.path.join(folder, names[i]), captions[i]) for i in names if i in captions]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise UserError(f"{path}: not a COCO captions file ({type(e).__name__}: {e}); download it again") from None
    if outside:
        raise UserError(f"{path}: {outside[0]!r} is not a plain file name; download it again")
    if not records:
        raise UserError(f"{path}: no picture in it has a caption; download it again")
    return sorted(records, key=lambda r: name_hash(r[0]))


def folder_records(root):
    """Your own pictures -> [(path, [captions])], in a fixed order that looks random.

    Either root/metadata.jsonl, a line {"file_name": ..., "text": ...} per caption, file names relative to root;
    or root/images/ with a text file beside each picture (cat.jpg, cat.txt), one caption per line.
    """
    listing = os.path.join(root, "metadata.jsonl")
    records = jsonl_records(root, listing) if os.path.exists(listing) else sidecar_records(os.path.join(root, "images"))
    if not records:
        raise UserError(f"--data_root {root}: no pictures with captions; give images/ with a .txt beside each picture, "
                        "or a metadata.jsonl")  # fmt: skip
    return sorted(records.items(), key=lambda r: name_hash(r[0]))


def jsonl_records(root, listing):
    records = {}
    for number, line in enumerate(read_lines(listing), 1):
        try:
            row = json.loads(line)
            records.setdefault(os.path.join(root, row["file_name"]), []).append(" ".join(row["text"].split()))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f'{listing}: line {number} is not {{"file_name": ..., "text": ...}}; mend it') from None
    return records


def read_lines(path):
    """The lines of a text file that are not blank."""
    try:
        with open(path, encoding="utf-8-sig") as f:
            return [line for line in f if line.strip()]
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text; save it as UTF-8") from None


def sidecar_records(folder):
    if not os.path.isdir(folder):
        raise UserError(f"{folder}: not there; --data_root must hold images/ or metadata.jsonl (with --dataset folder)")
    records = {}
    for name in os.listdir(folder):
        stem, ending = os.path.splitext(name)
        if ending.lower() in ENDINGS:
            captions_file = os.path.join(folder, stem + ".txt")
            if not os.path.exists(captions_file):
                raise UserError(f"{os.path.join(folder, name)}: has no caption; write {captions_file}, or move it away")
            captions = [" ".join(line.split()) for line in read_lines(captions_file)]
            records[os.path.join(folder, name)] = captions or [""]
    return records


def name_hash(path):
    return hashlib.sha256(os.path.basename(path).encode("utf-8", "replace")).hexdigest()


def read_pictures(dataset, cfg, progress):
    """Read a whole set in parallel -> (uint8 (N, 3, S, S), captions: N lists of strings).

    progress.update() is called for each picture, progress.close() at the end.
    Pictures that cannot be read are named and counted; they stop the run unless cfg.skip_bad.
    """
    loader = DataLoader(dataset, batch_size=64, num_workers=cfg.num_workers, collate_fn=list)
    pixels = torch.empty(len(dataset), 3, cfg.image_size, cfg.image_size, dtype=torch.uint8)
    good, bad = [], []
    for i, result in enumerate(result for batch in loader for result in batch):
        if isinstance(result, str):
            bad.append(result)
        else:
            pixels[len(good)] = torch.from_numpy(result)
            good.append(i)
        progress.update()
    progress.close()
    if bad:
        report_bad(bad, len(dataset), cfg.skip_bad)
    if not good:
        raise UserError(f"--data_root {cfg.data_root}: none of its {len(dataset)} pictures can be read; check the path")
    return pixels[: len(good)], [dataset.captions[i] for i in good]


def report_bad(bad, total, skip):
    shown = "; ".join(bad[:3]) + ("; ..." if len(bad) > 3 else "")
    if not skip:
        raise UserError(f"--data_root: {len(bad)} of {total} pictures cannot be read ({shown}); replace them, or leave "
                        "them out with --skip_bad")  # fmt: skip
    print(f"left out {len(bad)} of {total} pictures that cannot be read ({shown})")


def choose_captions(captions, index):
    """One caption of each picture in index, drawn from PyTorch's global generator."""
    return [captions[i][torch.randint(len(captions[i]), ()).item()] for i in index.tolist()]
