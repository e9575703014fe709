"""Captioned pictures: COCO, your own folder, or the embedded scenes, decoded once and kept as uint8.

  python data.py download --max_images 40000   COCO's captions and that many of its pictures, into data/coco
  python data.py verify                        what is wrong with the pictures and captions that are there
  python data.py verify --put_aside            the same, and pictures that are damaged are renamed to NAME.damaged, so
                                               that download gets them anew

What it is not: it downloads nothing unasked (how it does is in download.py) and knows no model.

The way of the data: records (a picture and its captions) -> read_pictures: every picture decoded, cropped to
a square and resized, once and for all runs -> uint8 (N, 3, S, S), memory-mapped (prepared.py) -> the trainers take
batches from it by index.

COCO captions: Chen et al. 2015 (arXiv 1504.00325); the 2017 release, https://cocodataset.org/#download
"""

import contextlib
import errno
import hashlib
import json
import math
import multiprocessing
import os
import stat
import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from multiprocessing.pool import ThreadPool

import numpy as np
import PIL
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset, Subset

import download
import scenes
from checkpoint import newest_epoch_set
from config import Parser, SDConfig, UserError, positive_int, printable
from prepared import code_of, prepare
from scenes import make_scene, paint, split_combinations

FORMATS = ("JPEG", "PNG", "WEBP")  # the only decoders that a file from outside gets to see
LISTING = "metadata.jsonl"
ENDINGS = (".jpg", ".jpeg", ".png", ".webp")
READ_TOGETHER = 16  # few, so that at the end no process has much to read while the others have nothing
MOST_WORKERS, MOST_NEW_WORKERS = 16, 4  # copies of this process, and those that import all anew
MAX_PIXELS = 50_000_000  # of a picture; a small file can claim to be a giant
MAX_PICTURE_BYTES = 100 << 20
MAX_CAPTIONS_BYTES = 1 << 30  # COCO's largest captions file has 92 MB
MAX_CAPTION = 2000  # characters: far more than the 77 tokens that an encoder takes
# what the system says of a picture's file; whatever else it says is a fault of the machine, and may pass
OF_THE_FILE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG,
               errno.EINVAL}  # fmt: skip
LISTED = 10  # names that verify prints of each kind
TRAIN_SERIES, HELD_OUT_SERIES = 0, 1  # series of scenes: disjoint by their seed


class Pictures(Dataset):
    """Picture files with captions. records: [(path, [captions])]; [i] -> uint8 array (3, S, S), or str: what is wrong.

    homes: the folders that pictures may lie in, links followed.
    """

    def __init__(self, records, image_size, homes):
        self.homes = homes
        self.names = [path for path, _ in records]
        self.captions = [captions for _, captions in records]
        self.image_size = image_size

    def __len__(self):
        return len(self.names)

    def key(self):
        """What the arrays depend on: the files, known by name, size and times of change, and the code that makes them square."""
        files = hashlib.sha256()
        for path in self.names:
            try:
                found = os.stat(path)
                seen = (os.path.basename(path), found.st_size, found.st_mtime_ns, found.st_ctime_ns)
            except (OSError, ValueError):
                seen = (os.path.basename(path), None)
            files.update(repr(seen).encode())
        code = code_of(read_square, read_rgb, to_rgb, to_array)
        return {"files": files.hexdigest(), "code": code, "pillow": PIL.__version__}

    def __getitem__(self, i):
        try:
            refuse_stray(self.names[i], self.homes)
            return to_array(read_square(self.names[i], self.image_size))
        except MemoryError:
            raise
        except Exception as e:  # decoders raise many kinds for a broken file, and each means that it cannot be read
            if getattr(e, "errno", None) not in {None, *OF_THE_FILE}:  # one text, which is what comes out of a worker
                raise OSError(f"{self.names[i]}: {e.strerror}; see to the disk, the network or give fewer --num_workers, then "
                              "the same command goes on from here") from None  # fmt: skip
            return f"{self.names[i]}: {e}"


class Scenes(Dataset):
    """`count` painted scenes of one series. [i] -> uint8 array (3, S, S). combinations: as in make_scene()."""

    def __init__(self, series, count, image_size, combinations=None):
        self.series, self.count, self.image_size, self.combinations = series, count, image_size, combinations
        self.captions = [[self.scene(i).caption] for i in range(count)]

    def scene(self, i):
        return make_scene(self.series, i, self.combinations)

    def __len__(self):
        return self.count

    def key(self):
        """What the arrays depend on, the painter itself included."""
        allowed = "all" if self.combinations is None else fingerprint(sorted(self.combinations))
        return {"series": self.series, "combinations": allowed, "painter": code_of(scenes), "pillow": PIL.__version__}

    def __getitem__(self, i):
        return to_array(paint(self.scene(i), self.image_size))


def to_array(picture):
    """RGB PIL picture -> uint8 (3, H, W). An array, because a worker passes each tensor in a file of its own."""
    return np.ascontiguousarray(np.asarray(picture).transpose(2, 0, 1))


def homes_of(paths, root, dataset):
    """Folders that the pictures `paths` of a data set may lie in once links are followed.

    They are the root, and the folders whose names are the project's own, which users link to where there is room. A
    metadata.jsonl names folders itself.
    """
    named = dataset == "folder" and os.path.exists(os.path.join(root, LISTING))
    return {os.path.realpath(folder) for folder in [root, *(() if named else map(os.path.dirname, paths))]}


def refuse_stray(path, homes):
    """OSError if a file is a link that leads out of the data set, as archives from strangers can hold them."""
    real = os.path.realpath(path)
    if not any(os.path.commonpath([real, home]) == home for home in homes):
        raise OSError(f"a link that leads out of the data set, to {real}")


def read_square(path, size):
    """A file as an upright RGB picture of size x size: the largest centred square, bicubic.

    What is transparent becomes white. Raises one of many kinds of exception if the file cannot be read.
    """
    return ImageOps.fit(read_rgb(path), (size, size), Image.Resampling.BICUBIC)


def read_rgb(path):
    """A file as an upright RGB picture, decoded to its end; asks before it opens, and before it decodes."""
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode) or found.st_size > MAX_PICTURE_BYTES:
        raise OSError(f"not a regular file of at most {MAX_PICTURE_BYTES >> 20} MiB")
    with Image.open(path, formats=FORMATS) as picture:
        if picture.width * picture.height > MAX_PIXELS:
            raise OSError(f"{picture.width} x {picture.height} pixels are more than {MAX_PIXELS}")
        return to_rgb(ImageOps.exif_transpose(picture))


def to_rgb(picture):
    if picture.mode.startswith("I;16"):  # convert() would clip 16 bits at 255 instead of scaling them
        return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8)).convert("RGB")
    if picture.mode in ("I", "F"):
        raise OSError(f"pixels of an unknown range (mode {picture.mode})")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture.convert("RGB")


def open_dataset(cfg, margin=0):
    """-> (training set, held-out set), as cfg.dataset says; each has captions, len() and pictures by index.

    margin: pixels by which training pictures are larger than cfg.image_size, to be cropped by take_views().
    """
    larger = cfg.image_size + margin
    if cfg.dataset == "scenes":
        combinations = split_combinations(cfg.held_out_combinations)[0] if cfg.held_out_combinations else None
        return (Scenes(TRAIN_SERIES, cfg.max_images, larger, combinations),
                Scenes(HELD_OUT_SERIES, cfg.held_out_images, cfg.image_size, combinations))  # fmt: skip
    train, held_out = coco_splits(cfg) if cfg.dataset == "coco" else split(folder_records(cfg.data_root), cfg)
    train, homes = train[: cfg.max_images], homes_of([path for path, _ in train + held_out], cfg.data_root, cfg.dataset)
    return Pictures(train, larger, homes), Pictures(held_out, cfg.image_size, homes)


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
    if count < cfg.held_out_images:
        print(f"{count} of {len(records)} pictures are held out, not the {cfg.held_out_images} of --held_out_images: at most a "
              "tenth, and at least one")  # fmt: skip
    return records[:-count], records[-count:]


def pictures_folder(captions_json):
    """annotations/captions_train2017.json -> train2017, where COCO keeps the pictures."""
    return os.path.basename(captions_json).removeprefix("captions_").removesuffix(".json")


def coco_records(root, captions_json):
    """COCO captions file -> [(path, [captions])] in a fixed order that looks random (by hash of the file name).

    Because the order depends on nothing else, its first n records are the same subset on every machine.
    """
    path, folder = os.path.join(root, captions_json), os.path.join(root, pictures_folder(captions_json))
    if os.path.exists(path) and not os.path.isdir(folder):
        raise UserError(f"{folder}: the pictures are not there; python data.py download gets them")
    captions, odd = read_captions(path)
    if odd:
        print(f"{path}: left out {', '.join(f'{count} {what}' for what, count in odd.items())}")
    return by_hash({os.path.join(folder, name): several for name, several in captions.items() if several})


class DamagedCaptions(UserError):
    """A file that is there, can be read, and is not COCO's captions."""

    def __init__(self, path, what):
        super().__init__(f"{path}: {what}; replace it, as python data.py download does with COCO's own")


def read_captions(path):
    """COCO captions file -> {file name: [captions]}, and a Counter of what is odd in it. UserError if it is no such file."""
    if not os.path.exists(path):
        raise UserError(f"{path}: not there; python data.py download gets it, --data_root says where it is; or "
                        "train with --preset demo, on the embedded data")  # fmt: skip
    if not os.path.isfile(path) or os.path.getsize(path) > MAX_CAPTIONS_BYTES:
        raise DamagedCaptions(path, f"not a file of at most {MAX_CAPTIONS_BYTES >> 20} MiB")
    with enough_memory(path):
        return parse_captions(path)


def parse_captions(path):
    odd, where = Counter(), "content"
    try:
        with open(path, encoding="utf-8-sig") as f:
            content = json.load(f)
        captions, names = {}, {}
        for i, image in enumerate(content["images"]):
            where = f"images[{i}]"
            name = image["file_name"]
            odd["ids given twice"] += image["id"] in names
            # of two pictures with one id nobody can tell whose the captions are
            names[image["id"]] = name if names.get(image["id"], name) == name else None
            if not is_inside(name) or os.path.basename(name) != name:
                raise ValueError(f"{name!r} is not a plain file name")
            odd["pictures listed twice"] += name in captions
            captions.setdefault(name, [])
        for i, note in enumerate(content["annotations"]):
            where = f"annotations[{i}]"
            text, name = clean_caption(note["caption"]), names.get(note["image_id"])
            odd["captions of unknown pictures"] += name is None
            odd["empty captions"] += not text
            if name is not None and text:
                captions[name].append(text)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        reason = f"{where}: {type(e).__name__}: {printable(e)[:200]}"
        raise DamagedCaptions(path, f"not a COCO captions file ({reason})") from None
    unknown, total = odd["captions of unknown pictures"], len(content["annotations"])
    if 2 * unknown > total:
        raise DamagedCaptions(path, f"{unknown} of its {total} captions belong to no picture that it lists")
    if not any(captions.values()):
        raise DamagedCaptions(path, "no picture in it has a caption")
    odd["pictures without a caption"] = sum(not several for several in captions.values())
    return captions, +odd


@contextlib.contextmanager
def enough_memory(path):
    """Where a file of captions is read: the trainers would put a lack of memory down to the batch."""
    try:
        yield
    except MemoryError:
        raise UserError(f"{path}: not enough memory to read it; end other programs, or give fewer captions") from None


def clean_caption(text):
    """A caption on one line, without the lone surrogates that JSON can smuggle in."""
    if not isinstance(text, str):
        raise ValueError(f"a caption that is {type(text).__name__}, not text")
    return " ".join(text[: 4 * MAX_CAPTION].encode("utf-8", "replace").decode().split())[:MAX_CAPTION]


def is_inside(name):
    """Whether a name from a file stays within the folder it is joined to."""
    parts = name.replace("\\", "/").split("/")
    return name.isprintable() and 0 < len(name) < 1000 and not os.path.isabs(name) and ".." not in parts


def by_hash(records):
    return sorted(
        records.items(), key=lambda r: hashlib.sha256(os.path.basename(r[0]).encode("utf-8", "replace")).hexdigest()
    )


def folder_records(root):
    """Your own pictures -> [(path, [captions])], in a fixed order that looks random.

    Either root/metadata.jsonl, a line {"file_name": ..., "text": ...} per caption, file names relative to root;
    or root/images/ with a text file beside each picture (cat.jpg, cat.txt), one caption per line.
    """
    records = read_folder(root)
    if empty := without_words(records):
        print(f"{root}: {len(empty)} pictures have an empty caption; python data.py verify --dataset folder lists them")
    return by_hash(records)


def read_folder(root):
    listing, images = os.path.join(root, LISTING), os.path.join(root, "images")
    listed = os.path.exists(listing)
    with enough_memory(listing if listed else images):
        records = jsonl_records(root, listing) if listed else sidecar_records(images)
    if not records:
        raise UserError(f"--data_root {root}: no pictures with captions; give images/ with a .txt beside each picture, "
                        "or a metadata.jsonl")  # fmt: skip
    return records


def without_words(records):
    return sorted(path for path, captions in records.items() if "" in captions)


def jsonl_records(root, listing):
    records = {}
    for number, line in enumerate(read_lines(listing), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not is_inside(row["file_name"]):
                raise ValueError
            records.setdefault(os.path.join(root, row["file_name"]), []).append(clean_caption(row["text"]))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise UserError(
                f'{listing}: line {number} is not {{"file_name": ..., "text": ...}} with a name within the folder; mend it'
            ) from None
    return records


def read_lines(path):
    """The lines of a text file, blank ones among them."""
    if os.path.exists(path) and (not os.path.isfile(path) or os.path.getsize(path) > MAX_CAPTIONS_BYTES):
        raise UserError(f"{path}: not a text file of at most {MAX_CAPTIONS_BYTES >> 20} MiB; replace it")
    try:
        with open(path, encoding="utf-8-sig") as f:
            return list(f)
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text; save it as UTF-8") from None


def sidecar_records(folder):
    if not os.path.isdir(folder):
        raise UserError(f"{folder}: not there; --data_root must hold images/ or metadata.jsonl (with --dataset folder)")
    records, names = {}, os.listdir(folder)
    pictures = [name for name in names if os.path.splitext(name)[1].lower() in ENDINGS]
    warn_of_others(folder, {*names} - {*pictures} - {f"{os.path.splitext(name)[0]}.txt" for name in pictures})
    for name in pictures:
        captions_file = os.path.join(folder, f"{os.path.splitext(name)[0]}.txt")
        if not os.path.exists(captions_file):
            raise UserError(f"{os.path.join(folder, name)}: has no caption; write {captions_file}, or move it away")
        try:
            refuse_stray(captions_file, {os.path.realpath(folder)})
        except (OSError, ValueError) as e:  # ValueError: a link to another drive, on Windows
            raise UserError(f"{captions_file}: {e}; replace it by the file itself") from None
        captions = [clean_caption(line) for line in read_lines(captions_file) if line.strip()]
        records[os.path.join(folder, name)] = captions or [""]
    return records


def warn_of_others(folder, names):
    others = sorted(name for name in names if not name.startswith("."))
    if others:
        shown = "; ".join(others[:3]) + ("; ..." if len(others) > 3 else "")
        print(f"warning: {folder}: {len(others)} files or folders are neither JPEG, PNG or WebP nor captions of one, and are "
              f"left out ({printable(shown)[:300]})", file=sys.stderr)  # fmt: skip


def read_pictures(dataset, cfg, start_progress):
    """Read a whole set in parallel -> (uint8 (N, 3, S, S), captions: N lists of strings).

    start_progress(total, done) -> an object whose update() is called for each picture, and close() at the end.
    Pictures that cannot be read are named and counted; they stop the run unless cfg.skip_bad.
    """
    size = dataset.image_size
    num_workers = most_workers(len(dataset)) if cfg.num_workers is None else cfg.num_workers
    check_processes(num_workers)

    def rows(first):
        rest = Subset(dataset, range(first, len(dataset)))
        progress = start_progress(len(dataset), first)
        for batch in DataLoader(rest, batch_size=READ_TOGETHER, num_workers=num_workers, collate_fn=list):
            for row in batch:
                progress.update()
                yield row
        progress.close()

    def still_bad(i):  # a permission, or where links lead, can change and the file not
        return isinstance(dataset[i], str)

    pixels, bad = prepare(cfg.cache_dir, "pictures", dataset.key(), (3, size, size), np.uint8, len(dataset), rows,
                          still_bad=still_bad)  # fmt: skip
    if bad:
        report_bad(list(bad.values()), len(dataset), cfg.skip_bad)
    if not len(pixels):
        raise UserError(f"--data_root {cfg.data_root}: none of its {len(dataset)} pictures can be read; check the path")
    used = cfg.captions_per_image or None
    return pixels, [captions[:used] for i, captions in enumerate(dataset.captions) if i not in bad]


def read_pictures_of(run_dir, cfg, data_root, start_progress):
    """What a finished run was trained on -> pixels, captions, held-out pixels, held-out captions, as read_pictures() has them.

    data_root: where that is now, if it has moved; None: where it was. Warns if it is not what it was; another release of
    Pillow, which may decode a JPEG a little differently, is no reason to stop.
    """
    if data_root is not None and cfg.dataset == "scenes":
        raise UserError(
            f"--data_root {data_root}: the run was trained on painted scenes, which are no files; leave it out"
        )
    cfg = cfg if data_root is None else replace(cfg, data_root=data_root)
    found = []
    for dataset, what in zip(open_dataset(cfg), ("training", "held-out")):
        found += read_pictures(dataset, cfg, start_progress(f"read {what} pictures"))
    if fingerprint(*found) != newest_epoch_set(run_dir, "unet")[1].get("data"):
        print(f"warning: --data_root {cfg.data_root}: its pictures or captions are not those that the run in {run_dir} was "
              "trained on; restore them, or say where they are", file=sys.stderr)  # fmt: skip
    return found


def most_workers(count):
    """How many processes read `count` pictures where nobody says: one per processor, fewer where starting one is dear."""
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = MOST_WORKERS if multiprocessing.get_start_method() == "fork" else MOST_NEW_WORKERS
    return min(there, limit, math.ceil(count / READ_TOGETHER))


def check_processes(num_workers):
    """UserError where no process can be started: PyTorch would find out too late to end without a traceback."""
    try:
        if num_workers:
            multiprocessing.Lock()  # lies in shared memory
    except OSError as e:
        raise UserError(f"--num_workers: no processes can be started ({e.strerror}; is /dev/shm full or read-only?); "
                        "make room there, or give 0") from None  # fmt: skip


def report_bad(bad, total, skip):
    shown = "; ".join(printable(b)[:300] for b in bad[:3]) + ("; ..." if len(bad) > 3 else "")
    if not skip:
        raise UserError(f"--data_root: {len(bad)} of {total} pictures cannot be read ({shown}); replace them (COCO's: "
                        "python data.py verify --put_aside, then download), or leave them out with --skip_bad")  # fmt: skip
    print(f"left out {len(bad)} of {total} pictures that cannot be read ({shown})")


def fingerprint(*parts):
    """SHA-256 of tensors and lists: the same if and only if a training would see the same.

    Between two tensors there must be a list, or a row could go from one to the other unseen.
    """
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.numpy() if isinstance(part, torch.Tensor) else json.dumps(part).encode())
    return digest.hexdigest()


def choose_captions(first_rows, index):
    """One caption of each picture in index, drawn from PyTorch's global generator -> their numbers (B,).

    first_rows: (N + 1,) from number_captions().
    """
    first, count = first_rows[index], first_rows[index + 1] - first_rows[index]
    return first + (torch.rand(len(index), dtype=torch.float64) * count).long()


def draw_mirrored(count, cfg):
    """Which of `count` pictures are seen mirrored, drawn from PyTorch's global generator -> (count,), 1 or 0."""
    return (torch.rand(count) < 0.5).long() if cfg.horizontal_flips else torch.zeros(count, dtype=torch.long)


def draw_views(count, cfg):
    """How `count` pictures are seen, drawn likewise -> (count, 4): top, left and side of the crop, and whether it is mirrored.

    The side is cfg.image_size, or with cfg.random_scale log-uniform from there to the whole picture; the same for all,
    so that they can be shrunk in one go.
    """
    side, whole = cfg.image_size, cfg.image_size + cfg.random_crop
    if cfg.random_scale:
        side = round(side * (whole / side) ** torch.rand(()).item())
    corners = torch.randint(whole - side + 1, (count, 2))
    return torch.column_stack([corners, torch.full((count,), side), draw_mirrored(count, cfg)])


def take_views(pixels, index, views, size):
    """Pictures by their numbers, seen as draw_views() says: uint8 (N, 3, S, S) -> (B, 3, size, size)."""
    top, left, side, mirrored = views.T[:, :, None]  # (B, 1) each
    if pixels.shape[-1] == size and not mirrored.any():
        # index_select copies whole rows, where [] goes number by number
        return pixels.index_select(0, index.to(pixels.device, non_blocking=pixels.is_cuda))
    along = torch.arange(int(side[0]))
    rows, columns = top + along, left + torch.where(mirrored == 1, side - 1 - along, along)  # (B, side) each
    index, rows, columns = (i.to(pixels.device, non_blocking=pixels.is_cuda) for i in (index, rows, columns))
    taken = pixels[index[:, None, None], :, rows[:, :, None], columns[:, None]]  # (B, side, side, 3)
    taken = taken.permute(0, 3, 1, 2)
    return taken if len(along) == size else shrunk(taken, size)


def shrunk(pictures, size):
    """uint8 pictures (B, 3, S, S) -> (B, 3, size, size), bicubic as read_square()."""
    x = F.interpolate(pictures.float(), (size, size), mode="bicubic", antialias=True)
    return x.round().clamp(0, 255).byte()


def number_captions(captions):
    """N lists of captions -> (N + 1,): the number of each picture's first caption, counted through all pictures."""
    return torch.tensor([0, *(len(several) for several in captions)]).cumsum(0)


# ---- Commands -------------------------------------------------------------------------------------------


def main():
    parser = Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="download | verify")
    defaults = SDConfig()
    get = commands.add_parser("download", help="COCO's captions and a subset of its pictures", allow_abbrev=False)
    look = commands.add_parser("verify", help="list what is wrong with a data set", allow_abbrev=False)
    for command in (get, look):
        command.add_argument("--data_root", default=defaults.data_root, help=f"(default: {defaults.data_root})")
    get.add_argument("--max_images", type=positive_int, default=defaults.max_images,
                     help=f"training pictures (default: {defaults.max_images})")  # fmt: skip
    get.add_argument("--held_out_images", type=positive_int, default=defaults.held_out_images,
                     help=f"pictures of val2017, held out (default: {defaults.held_out_images})")  # fmt: skip
    get.add_argument("--base_url", default=download.BASE_URL, help="a mirror with COCO's paths (default: %(default)s)")
    get.add_argument("--zip_sha1", default=download.ZIP_SHA1, help="checksum of the captions' zip, if not COCO's own")
    get.add_argument("--connections", type=positive_int, default=16, help=f"pictures at a time, at most {download.MOST_CONNECTIONS} (default: 16)")  # fmt: skip
    look.add_argument("--dataset", choices=("coco", "folder"), default="coco", help="(default: coco)")
    look.add_argument("--put_aside", action="store_true", help="rename COCO's damaged pictures to NAME.damaged")
    args = parser.parse_args()
    if args.command == "download" and args.connections > download.MOST_CONNECTIONS:
        parser.error(
            f"argument --connections: {args.connections} are too many, give at most {download.MOST_CONNECTIONS}"
        )
    if args.command == "verify" and args.put_aside and args.dataset != "coco":
        parser.error("argument --put_aside: is for coco, which can be downloaded anew; replace your own pictures")
    sys.exit((download_coco if args.command == "download" else verify)(args))


def download_coco(args):
    """Captions, then the pictures that training with the same --max_images reads. -> exit code"""
    train_json = SDConfig().captions_json
    jsons = [train_json, train_json.replace("train", "val")]
    for captions_json in jsons:
        put_aside_damaged_captions(os.path.join(args.data_root, captions_json))
    download.get_captions(args.data_root, jsons, args.base_url, args.zip_sha1)
    jobs = []
    for captions_json, count in zip(jsons, (args.max_images, args.held_out_images)):
        captions, _ = read_captions(os.path.join(args.data_root, captions_json))
        folder = pictures_folder(captions_json)
        names = [name for name, _ in by_hash({name: several for name, several in captions.items() if several})[:count]]
        jobs += [(f"{args.base_url}/{folder}/{name}", os.path.join(args.data_root, folder, name)) for name in names]
    failed = download.get_pictures(jobs, read_rgb, args.connections)
    for path, why in failed:
        print(f"{path}: {printable(why)}", file=sys.stderr)
    if failed:
        raise UserError(f"--base_url: {len(failed)} of {len(jobs)} pictures could not be had (listed above); give the "
                        "same command again for these alone, or train with --skip_bad")  # fmt: skip
    print(f"{len(jobs)} pictures are in {args.data_root}; next: python train_vae.py")


def put_aside_damaged_captions(path):
    """A captions file that no training could read makes room for another; it is kept, for it may be somebody's own."""
    if os.path.exists(path):
        try:
            read_captions(path)
        except DamagedCaptions as e:
            os.replace(path, f"{path}.damaged")
            print(f"{printable(e)}. Renamed to {os.path.basename(path)}.damaged")


def verify(args):
    """Decode every picture that has captions; print what is wrong and what is odd. -> exit code"""
    files, odd = coco_files(args.data_root) if args.dataset == "coco" else folder_files(args.data_root)
    bad, modes = look_at_all(files, homes_of(files, args.data_root, args.dataset))
    for what, names in (odd | modes).items():
        print_names(what, names, LISTED)
    print_names("pictures that cannot be read", [f"{path}: {why}" for path, (why, _) in bad.items()], len(bad))
    aside = put_aside(bad) if args.put_aside else []
    if aside:
        print(f"{len(aside)} of them are renamed to NAME.damaged; python data.py download --data_root {args.data_root} "
              "gets anew those that training reads")  # fmt: skip
    if len(bad) > len(aside):
        raise UserError(f"--data_root {args.data_root}: {len(bad) - len(aside)} of {len(files)} pictures cannot be read "
                        f"(listed above); {remedy(args)}, or train with --skip_bad")  # fmt: skip
    return 0


def remedy(args):
    if args.dataset == "folder":
        return "replace them"
    if args.put_aside:
        return "see to their permissions, the disk and the memory, for they need not be damaged"
    return f"python data.py verify --put_aside --data_root {args.data_root} and then download replace them"


def look_at_all(files, homes):
    """-> {path: (why it cannot be read, whether it is damaged)}, {what is odd about its mode: [paths]}"""
    from training import Progress  # which imports matplotlib, and nothing else here needs it

    bad, odd, progress = {}, {}, Progress(len(files), "verify")
    with ThreadPool(os.cpu_count()) as pool:
        for path, (mode, why, damaged) in zip(files, pool.imap(partial(look_at, homes=homes), files)):
            if why:
                bad[path] = why, damaged
            elif mode not in ("RGB", "L"):
                odd.setdefault(f"pictures of mode {mode}, which become RGB", []).append(path)
            progress.update()
    progress.close()
    return bad, odd


def print_names(what, names, most):
    print(f"{len(names)} {what}")
    for name in [*names[:most], "..."] if len(names) > most else names:
        print(f"  {printable(name)}")


def put_aside(bad):
    """Rename what is damaged, and not what the system did not let us read. -> the paths that it was"""
    aside = [path for path, (_, damaged) in bad.items() if damaged]
    for path in aside:
        os.replace(path, f"{path}.damaged")
    return aside


def coco_files(root):
    """-> the pictures that are there and have captions, and {what is odd: [where]}."""
    files, odd = [], {}
    train_json = SDConfig().captions_json
    for captions_json in (train_json, train_json.replace("train", "val")):
        folder = os.path.join(root, pictures_folder(captions_json))
        if captions_json != train_json and not (
            os.path.isdir(folder) and os.path.exists(os.path.join(root, captions_json))
        ):
            continue  # as in coco_splits()
        captions, found = read_captions(os.path.join(root, captions_json))
        there = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        for what, names in (("pictures in the captions file, but not in the folder", set(captions) - there),
                            ("pictures in the folder, but not in the captions file", there - set(captions)),
                            ("pictures without a caption", {n for n in captions if not captions[n]})):  # fmt: skip
            odd.setdefault(what, []).extend(os.path.join(folder, name) for name in sorted(names))
        for what in ("pictures listed twice", "ids given twice", "captions of unknown pictures", "empty captions"):
            odd.setdefault(what, []).extend([captions_json] * found[what])
        files += [os.path.join(folder, name) for name in sorted(there & set(captions))]
    return files, odd


def folder_files(root):
    records = read_folder(root)
    return sorted(records), {"pictures with an empty caption": without_words(records)}


def look_at(path, homes):
    """-> mode of a picture; what is wrong with it ("" if nothing is); whether that is a damage of the file."""
    try:
        refuse_stray(path, homes)
        read_rgb(path)
        with Image.open(path, formats=FORMATS) as picture:
            return picture.mode, "", False
    except Exception as e:  # as in Pictures
        from_system = isinstance(e, MemoryError) or getattr(e, "errno", None) is not None
        return "", f"{type(e).__name__}: {e}", not from_system


if __name__ == "__main__":
    from training import run_script

    run_script(main)
