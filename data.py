"""Captioned pictures: COCO, your own folder, or painted scenes, decoded once and kept as uint8.

The way of the data: records (a picture's path and its captions) -> read_pictures(): every picture decoded, cropped to a
square and resized, once for all runs -> uint8 (N, 3, S, S), memory-mapped (support/prepared.py) -> batches by index.

What it is not: it downloads nothing (get_data.py does) and knows no model.
COCO captions: Chen et al. 2015 (arXiv 1504.00325); the 2017 release, https://cocodataset.org/#download
"""

import sys

if __name__ == "__main__":  # here, before the seconds that loading PyTorch takes
    print("error: data.py: is no command any more; give python get_data.py download, or verify", file=sys.stderr)
    sys.exit(2)

import hashlib
import json
import math
import multiprocessing
import os
from collections import Counter
from dataclasses import replace
from errno import EACCES, EINVAL, EISDIR, ELOOP, ENAMETOOLONG, ENOENT, ENOTDIR, EPERM
from functools import partial
from os.path import basename, dirname, exists, isdir, join, realpath, relpath

import numpy as np
import PIL
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.utils.data import DataLoader

import scenes
from support import folders, pictures
from support.checkpoint import newest_epoch_set
from support.devices import to_device
from support.errors import UserError, printable, warn
from support.files import Damaged
from support.folders import Folder, clean_caption, first_few, leads_out, read_text, refusal
from support.pictures import read_rgb
from support.prepared import prepare, source_hash
from support.show import progress_bar

FILE_ERRORS = {None, EACCES, EINVAL, EISDIR, ELOOP, ENAMETOOLONG, ENOENT, ENOTDIR, EPERM}  # any other is the machine's
READ_TOGETHER = 16  # pictures; few, so that at the end all processes are done at about the same time
MOST_WORKERS, MOST_NEW_WORKERS = 16, 4  # processes forked off this one; processes that import all anew
TRAIN_SERIES, HELD_OUT_SERIES = 0, 1  # seeds of scenes


class Pictures:
    """Picture files. [i] -> uint8 array (3, S, S), or str: what is wrong.

    allowed: real folders that links may lead to; None: anywhere. of: pictures in the whole set that these are a part of.
    rest: the part of it that is read later. square: how read_square() makes them.
    """

    def __init__(self, records, image_size, allowed, of=None, rest=(), square=("crop", True)):
        self.names, self.captions = [path for path, _ in records], [captions for _, captions in records]
        self.image_size, self.allowed, self.square = image_size, allowed, square
        self.of, self.rest = of or len(records), rest

    def __len__(self):
        return len(self.names)

    def key(self):
        """What the arrays depend on: the files, known by name, size and times, and the code that reads them."""
        stats = [os.stat(path) if exists(path) else None for path in self.names]
        times = [found and (found.st_size, found.st_mtime_ns, found.st_ctime_ns) for found in stats]
        key = {"code": source_hash(pictures, read_square, to_array), "pillow": PIL.__version__, "square": self.square}
        return {"files": fingerprint([*map(basename, self.names)], times), **key}

    def __getitem__(self, i):
        path = self.names[i]
        try:
            return leads_out(path, self.allowed) or self.read(path)
        except MemoryError:
            raise
        except Exception as e:  # decoders raise many kinds, and each means that the file cannot be read
            if getattr(e, "errno", None) in FILE_ERRORS:
                return getattr(e, "strerror", None) or str(e).replace(path, basename(path))  # the set may be moved
            remedy = "see to the disk or the network, or give fewer --num_workers; the same command goes on from here"
            raise OSError(f"{path}: {e.strerror}; {remedy}") from None  # one text: a worker passes nothing else on

    def read(self, path):
        return to_array(read_square(path, self.image_size, *self.square))


class Readable(Pictures):
    """Whether picture files can be read. [i] -> uint8 array (1,), or str: what is wrong."""

    def read(self, path):
        read_rgb(path)
        return np.ones(1, np.uint8)


class Scenes:
    """`count` painted scenes of one series. [i] -> uint8 array (3, S, S). combinations: as in make_scene()."""

    def __init__(self, series, count, image_size, combinations=None):
        self.series, self.image_size, self.combinations = series, image_size, combinations
        self.scenes = [scenes.make_scene(series, i, combinations) for i in range(count)]
        self.captions = [[scene.caption] for scene in self.scenes]

    def __len__(self):
        return len(self.scenes)

    def key(self):
        """What the arrays depend on: the series, and the code that paints it."""
        allowed, code = fingerprint(sorted(self.combinations or ())), source_hash(scenes)
        return {"series": self.series, "combinations": allowed, "painter": code, "pillow": PIL.__version__}

    def __getitem__(self, i):
        return to_array(scenes.paint(self.scenes[i], self.image_size))


def to_array(picture):
    """RGB PIL picture -> uint8 (3, H, W). An array: a worker would pass each tensor in a file of its own."""
    return np.ascontiguousarray(np.asarray(picture).transpose(2, 0, 1))


def read_square(path, size, resize="crop", profiles=True):
    """A file as an upright RGB picture of size x size, bicubic; resize: as in config.py, profiles: as of read_rgb()."""
    picture, square = read_rgb(path, profiles), ((size, size), Image.Resampling.BICUBIC)
    if resize == "pad":
        return ImageOps.pad(picture, *square, color="white")
    return picture.resize(*square) if resize == "squeeze" else ImageOps.fit(picture, *square)


def read_picture(path, size, resize, bars="white"):
    """A file as an upright RGB picture of size (width, height), made as read_square() makes squares, and its own size."""
    picture = read_rgb(path)
    fit = {"crop": ImageOps.fit, "pad": partial(ImageOps.pad, color=bars), "squeeze": Image.Image.resize}[resize]
    return fit(picture, size, Image.Resampling.BICUBIC), picture.size


def open_dataset(cfg, margin=0):
    """-> (training set, held-out set), as cfg.dataset says; each has captions, len() and pictures by index.

    margin: pixels by which training pictures are larger than cfg.image_size, for crop_pictures().
    """
    size, number = cfg.image_size, cfg.held_out_images
    if cfg.dataset == "scenes":
        combinations, _ = scenes.split_combinations(cfg.held_out_combinations)
        train = Scenes(TRAIN_SERIES, cfg.max_images, size + margin, combinations)
        return train, Scenes(HELD_OUT_SERIES, number, size, combinations)
    if cfg.dataset == "coco":
        names = captions_files(cfg.data_root, cfg.captions_json)
        train, *val = (coco_records(cfg.data_root, name) for name in names)
        paths = [path for path, _ in [*train, *(val[0] if val else ())]]
        allowed = None if cfg.follow_links else coco_folders(paths, cfg.data_root)
    else:
        (train, allowed), val = folder_records(cfg), []
    # runs on COCO began with colours as they are stored, and go on so
    options = {"allowed": allowed, "square": (cfg.resize, cfg.dataset != "coco")}
    if val:
        return Pictures(train[: cfg.max_images], size + margin, **options), Pictures(val[0][:number], size, **options)
    train, held_out = split(readable(train, allowed, cfg) if cfg.skip_bad else train, cfg)
    train = train[: cfg.max_images]
    options["of"] = len(train) + len(held_out)
    held_out = Pictures(held_out, size, **options)
    return Pictures(train, size + margin, rest=held_out, **options), held_out


def readable(records, allowed, cfg):
    """The records whose pictures can be read; the others are counted and named."""
    dataset = Readable(records, cfg.image_size, allowed)
    _, bad = read_rows(dataset, cfg, progress_bar("look at all pictures"), "readable", (1,))
    leave_out(dataset, bad, cfg)
    return [record for i, record in enumerate(records) if i not in bad]


def split(records, cfg):
    """Take the held-out records, at most a tenth, off the end."""
    if len(records) < 2:
        raise UserError(f"--data_root {cfg.data_root}: fewer than two captioned pictures; give more, one is held out")
    wanted, count = cfg.held_out_images, max(1, min(cfg.held_out_images, len(records) // 10))
    if count < wanted:
        why = f"not the {wanted} of --held_out_images: at most a tenth, and at least one"
        print(f"{count} of {len(records)} pictures are held out, {why}")
    return records[:-count], records[-count:]


def by_hash(records, root=""):
    """{path: captions} -> [(path, captions)] by a hash of the file names: the first n are the same on every machine.

    Of pictures in several folders whose file names are the same, by a hash of the path within root.
    """
    counts = Counter(map(basename, records))

    def place(path):
        name = basename(path) if counts[basename(path)] == 1 else relpath(path, root or None).replace(os.sep, "/")
        return hashlib.sha256(name.encode("utf-8", "replace")).digest(), name

    return [(path, records[path]) for path in sorted(records, key=place)]


def folder_records(cfg):
    """-> [(path, [captions])] of your own pictures, by_hash(); the real folders that they may lie in, None: anywhere."""
    found = Folder(cfg)
    found.check()
    print(found.summary())
    for what, where in found.odd.items():
        if where:
            tell = print if what in (folders.HIDDEN, folders.EMPTY) else warn
            tell(f"{cfg.data_root}: {len(where)} {what} ({first_few(where)})")
    return by_hash(found.captions, cfg.data_root), found.allowed


def coco_folders(paths, root):
    """Real folders that COCO's pictures may lie in: the root, and train2017/ and so on, which may be links themselves."""
    return {realpath(folder) for folder in {root, *map(dirname, paths)}}


def pictures_folder(captions_json, root=""):
    """annotations/captions_train2017.json -> train2017, where COCO keeps the pictures, or images/train2017."""
    name = basename(captions_json).removeprefix("captions_").removesuffix(".json")
    within = join("images", name)
    return within if isdir(join(root, within)) and not isdir(join(root, name)) else name


def captions_files(root, captions_json):
    """The captions file of training and, if it is there with its pictures, that of val2017 -> [names within root]."""
    val = join(dirname(captions_json), basename(captions_json).replace("train", "val"))
    val_there = val != captions_json and exists(join(root, val)) and isdir(join(root, pictures_folder(val, root)))
    return [captions_json, val] if val_there else [captions_json]


def coco_records(root, captions_json):
    """-> [(path, [captions])] of the pictures that have captions, by_hash()."""
    path, folder = join(root, captions_json), join(root, pictures_folder(captions_json, root))
    if exists(path) and not isdir(folder):
        raise UserError(f"{folder}: the pictures are not there; python get_data.py download gets them")
    captions, odd = read_captions(path)
    if odd:
        print(f"{path}: left out {', '.join(f'{count} {what}' for what, count in odd.items())}")
    return by_hash({join(folder, name): several for name, several in captions.items() if several})


def read_captions(path):
    """COCO captions file -> {file name: [captions]}, Counter of what is odd in it. UserError if it is no such file."""
    if not exists(path):
        remedy = "python get_data.py download gets it, --data_root says where it is, --dataset folder is for your own"
        raise UserError(f"{path}: not there; {remedy}; or train with --preset demo, on the built-in data")
    remedy = "replace it, as python get_data.py download does with COCO's own"
    captions, names, odd, where = {}, {}, Counter(), "content"
    try:
        content = json.loads(read_text(path))
        for i, image in enumerate(content["images"]):
            where, name, number = f"images[{i}]", image["file_name"], image["id"]
            if refusal(name) or basename(name) != name:
                raise ValueError(f"{name!r} {refusal(name) or 'is not a plain file name'}")
            odd["ids given twice"] += number in names
            odd["pictures listed twice"] += name in captions
            # of two pictures with one id nobody can tell whose the captions are
            names[number] = name if names.get(number, name) == name else None
            captions.setdefault(name, [])
        for i, note in enumerate(content["annotations"]):
            where = f"annotations[{i}]"
            text, name = clean_caption(note["caption"]), names.get(note["image_id"])
            odd["captions of unknown pictures"] += name is None
            odd["empty captions"] += not text
            if name is not None and text:
                captions[name].append(text)
    except MemoryError:  # the trainers would put it down to the batch
        raise UserError(f"{path}: {folders.NO_MEMORY}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        reason = f"{where}: {type(e).__name__}: {printable(e)[:200]}"
        raise Damaged(f"{path}: not a COCO captions file ({reason}); {remedy}") from None
    unknown, total = odd["captions of unknown pictures"], len(content["annotations"])
    if 2 * unknown > total:
        raise Damaged(f"{path}: {unknown} of its {total} captions belong to no picture that it lists; {remedy}")
    if not any(captions.values()):
        raise Damaged(f"{path}: no picture in it has a caption; {remedy}")
    odd["pictures without a caption"] = sum(not several for several in captions.values())
    return captions, +odd


def read_dataset(cfg, margin=0):
    """-> training pictures, their captions, held-out pictures, theirs: read_pictures() of both sets of open_dataset()."""
    sets = zip(open_dataset(cfg, margin), ("training", "held-out"))
    return [x for part, what in sets for x in read_pictures(part, cfg, progress_bar(f"read {what} pictures"))]


def read_pictures(dataset, cfg, start_progress):
    """Read a whole set in parallel -> (uint8 (N, 3, S, S), captions: N lists of strings).

    start_progress(total, done) -> an object whose update() is called for each picture, and close() at the end.
    Pictures that cannot be read are named and counted; they stop the run unless cfg.skip_bad.
    """
    shape = (3, dataset.image_size, dataset.image_size)
    pixels, bad = read_rows(dataset, cfg, start_progress, "pictures", shape)
    if bad:
        leave_out(dataset, bad, cfg)
    good = [i for i in range(len(dataset)) if i not in bad]
    if isinstance(dataset, Pictures):
        warn_of_dark([dataset.names[i] for i in good], pixels)
    used = cfg.captions_per_image or None
    return pixels, [dataset.captions[i][:used] for i in good]


def read_rows(dataset, cfg, start_progress, name, shape):
    """What dataset[i] gives of all pictures, by several processes -> uint8 (n, *shape), {number: why} of the others."""
    count = len(dataset)
    num_workers = most_workers(count) if cfg.num_workers is None else cfg.num_workers
    try:
        if num_workers:
            multiprocessing.Lock()  # where none can be had, PyTorch would not end without a traceback
    except OSError as e:
        what = f"no processes can be started ({e.strerror}; is /dev/shm full or read-only?)"
        raise UserError(f"--num_workers: {what}; make room there, or give 0") from None

    def rows(first):
        progress, rest = start_progress(count, first), range(first, count)
        for batch in DataLoader(dataset, READ_TOGETHER, sampler=rest, num_workers=num_workers, collate_fn=list):
            for row in batch:
                progress.update()
                yield row
        progress.close()

    def still_bad(i):  # a permission, or where links lead, can change and the file not
        return isinstance(dataset[i], str)

    return prepare(cfg.cache_dir, name, dataset.key(), shape, np.uint8, count, rows, still_bad=still_bad)


def leave_out(dataset, bad, cfg):
    """Say which pictures of a set cannot be read; UserError unless cfg.skip_bad, or if none can."""
    whys = [f"{dataset.names[i]}: {why}" for i, why in bad.items()]
    if not cfg.skip_bad:
        rest = ((name, dataset.rest[i]) for i, name in enumerate(getattr(dataset.rest, "names", ())))
        whys += [f"{name}: {row}" for name, row in rest if isinstance(row, str)]
    which = f"{len(whys)} of {dataset.of} pictures"
    if whys and not cfg.skip_bad:
        remedy = "replace them (COCO's: python get_data.py verify --put_aside, then download)"
        remedy = folders.LINK_REMEDY if all(folders.LEADS_OUT in why for why in whys) else remedy
        shown = f"{which} cannot be read ({first_few(whys)})"
        raise UserError(f"--data_root: {shown}; {remedy}, or leave them out with --skip_bad")
    if whys:
        print(f"left out {which} that cannot be read ({first_few(whys)})")
    if len(bad) == len(dataset):
        raise UserError(f"--data_root {cfg.data_root}: none of its {len(bad)} pictures can be read; check the path")


def warn_of_dark(names, pixels):
    """Name the pictures that are nearly black, with the range of values in their files."""
    brightest = [part.amax(dim=(1, 2, 3)) for part in pixels.split(512)]
    dark = (torch.cat(brightest) < pictures.DARK).nonzero().flatten().tolist() if brightest else []
    ranges = [
        f"{names[i]}{detail}"
        for i in dark
        for what, detail in pictures.look_at(names[i], pictures.oddities)
        if what == pictures.NEARLY_BLACK
    ]
    if ranges:
        warn(f"{len(ranges)} {pictures.NEARLY_BLACK} ({first_few(ranges)})")


def most_workers(count):
    """How many processes read `count` pictures if nobody says: one per processor, fewer where starting one is slow."""
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = MOST_WORKERS if multiprocessing.get_start_method() == "fork" else MOST_NEW_WORKERS
    return min(there, limit, math.ceil(count / READ_TOGETHER))


def read_pictures_of(run_dir, cfg, data_root):
    """What a finished run was trained on -> pixels, captions, held-out pixels, held-out captions.

    data_root: where the data is now, if it has moved, else None. Only warns if the pictures or captions are others:
    another release of Pillow may decode a JPEG a little differently.
    """
    if data_root is not None and cfg.dataset == "scenes":
        raise UserError(f"--data_root {data_root}: the run was trained on painted scenes, not on files; leave it out")
    cfg = cfg if data_root is None else replace(cfg, data_root=data_root)
    found = read_dataset(cfg)
    if fingerprint(*found) != newest_epoch_set(run_dir, "unet")[1].get("data"):
        what = f"its pictures or captions are not those that the run in {run_dir} was trained on"
        warn(f"--data_root {cfg.data_root}: {what}; restore them, or say where they are")
    return found


def fingerprint(*parts):
    """SHA-256 of tensors and lists: the same if and only if a training would see the same.

    Between two tensors there must be a list, or a row could go from one to the other unseen.
    """
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.numpy() if isinstance(part, torch.Tensor) else json.dumps(part).encode())
    return digest.hexdigest()


def number_captions(captions):
    """N lists of captions -> (N + 1,): the number of each picture's first caption, counted through all pictures."""
    return torch.tensor([0, *map(len, captions)]).cumsum(0)


def choose_captions(first_rows, index):
    """Draw one caption of each picture in index -> their numbers (B,). first_rows: (N + 1,) from number_captions()."""
    first, count = first_rows[index], first_rows[index + 1] - first_rows[index]
    return first + (torch.rand(len(index), dtype=torch.float64) * count).long()


def draw_mirrored(count, cfg):
    """Draw which of `count` pictures are seen mirrored -> (count,), 1 or 0."""
    return (torch.rand(count) < 0.5).long() if cfg.horizontal_flips else torch.zeros(count, dtype=torch.long)


def draw_crops(count, cfg):
    """Draw how `count` pictures are seen -> (count, 4): top, left and side of the crop, and whether it is mirrored.

    The side is cfg.image_size, or with cfg.random_scale log-uniform from there to the whole picture. It is the same for
    all, so that they can be shrunk in one go.
    """
    side, whole = cfg.image_size, cfg.image_size + cfg.random_crop
    if cfg.random_scale:
        side = round(side * (whole / side) ** torch.rand(()).item())
    corners = torch.randint(whole - side + 1, (count, 2))
    return torch.column_stack([corners, torch.full((count,), side), draw_mirrored(count, cfg)])


def crop_pictures(pixels, index, crops, size):
    """Pictures by their numbers, cropped as draw_crops() says: uint8 (N, 3, S, S) -> (B, 3, size, size)."""
    top, left, side, mirrored = crops.T[:, :, None]  # (B, 1) each
    if pixels.shape[-1] == size and not mirrored.any():
        return pixels.index_select(0, to_device(index, pixels.device))  # copies whole rows, where [] goes by number
    along = torch.arange(int(side[0]))
    rows, columns = top + along, left + torch.where(mirrored == 1, side - 1 - along, along)  # (B, side) each
    index, rows, columns = (to_device(i, pixels.device) for i in (index, rows, columns))
    x = pixels[index[:, None, None], :, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)  # (B, 3, side, side)
    if len(along) == size:
        return x
    x = F.interpolate(x.float(), (size, size), mode="bicubic", antialias=True)  # as read_square() shrinks
    return x.round().clamp(0, 255).byte()


def to_float(pixels, device):
    """uint8 pictures (B, 3, H, W) -> float32 in [-1, 1] on `device`."""
    return to_device(pixels, device).float().div_(127.5).sub_(1.0)
