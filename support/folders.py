"""Which pictures a folder of one's own holds, and their captions, in the layouts that people bring.

A listing (metadata.jsonl or metadata.csv, as of Hugging Face's imagefolder) names pictures relative to itself, and it
alone says which are read. Without one each picture has a text file of its name beside it, in subfolders too. All is
looked at before anything is refused, so that every fault is told at once. docs/own-pictures.md shows the layouts.

What it is not: it opens no picture. COCO's captions are read in data.py.
"""

import csv
import io
import json
import os
import re
from collections import defaultdict
from itertools import pairwise
from os.path import basename, dirname, exists, isdir, join, normpath, realpath, splitext

from support.errors import UserError, printable
from support.files import Damaged, read_file

ENDINGS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".avif")
TEXTS = (".txt", ".caption")  # of two for one picture the first is read
LISTINGS, COLUMNS = ("metadata.jsonl", "metadata.csv"), ("text", "caption", "prompt")
BASES = ("images", "img", "train")  # where one of these is, pictures lie there and nowhere else
MAX_CAPTIONS_BYTES, MAX_CAPTION = 1 << 30, 2000  # COCO has 92 MB; characters, where an encoder takes 77 tokens
NO_MEMORY = "not enough memory to read it; end other programs, or give fewer captions"
LEADS_OUT = "a link that leads out of the data set"
LINK_REMEDY = "give --follow_links if these links are your own"

REMEDIES = {  # what stops a training -> what to do
    "pictures have no caption": "write a .txt of the same name beside each, or move them away",
    "captions files cannot be read": "save them as UTF-8 text",
    "rows of a listing are not as they should be": "mend them: each has a file_name within the folder, and a text",
    "folders hold both metadata.jsonl and metadata.csv": "keep one of them",
    "folders cannot be opened": "see to their permissions",
    "captions or folders are links that lead out of the data set": LINK_REMEDY,
}
NO_CAPTION, NO_TEXT, BAD_ROWS, TWO_LISTINGS, CLOSED, LINKS = REMEDIES
HIDDEN = "hidden files and folders, which are left out"
OTHERS = "files that are neither pictures (JPEG, PNG, WebP, AVIF) nor captions of one, which are left out"
BESIDE = "files and folders beside the folder that is read, which are left out"
EMPTY = "pictures with an empty caption"
WRAPPED = "captions files whose lines look like parts of one sentence; --whole_captions reads a file as one caption"
REPEATS = "folders named for kohya's repeats, which are not used: an epoch shows each picture once"
FOREIGN = (  # names, or endings, of what is no layout of ours; what it is, and what to do
    (("annotations",), "this looks like COCO; give --dataset coco"),
    ((".parquet", ".arrow"), "there are Parquet or Arrow files; save pictures as files and captions as metadata.csv"),
    ((".tar", ".zip", ".tgz", ".7z", ".rar"), "there are archives; unpack them here"),
    (
        (".heic", ".heif", ".tif", ".tiff", ".gif", ".bmp"),
        "there are HEIC, TIFF, GIF or BMP files; convert them to JPEG or PNG",
    ),
    ((".json",), "there are JSON files; write captions as metadata.jsonl, a line with file_name and text for each"),
)
LAYOUTS = "give images/ with a .txt beside each picture, or a metadata.jsonl or metadata.csv"
GOES_ON = (  # a line that ends, or begins, within a sentence
    r"[,;:\u2013\u3001\uff0c-]\n|\n[,;:\u3001\uff0c]|\n(?:and|or|but|of|with|while|which|who|that)\b"
    r"|\b(?:a|an|the|and|or|but|of|with|in|into|on|onto|at|to|for|from|by|near|is|are|his|her|its|their)\n"
)
FULL_STOPS = (".", "!", "?", "\u2026", "\u3002", "\uff01", "\uff1f", "\u0964", '."', ".)")


class Folder:
    """captions: {path: [captions]}; pictures: all paths found beside text files, those without a caption too.

    wrong: {what stops a training: [where]}; odd: {what does not: [where]}. allowed: real folders that files may lie in,
    or None: anywhere.
    """

    def __init__(self, cfg):
        self.root, self.whole_captions = cfg.data_root, cfg.whole_captions
        self.captions, self.pictures, self.wrong, self.odd = {}, [], defaultdict(list), defaultdict(list)
        if not isdir(self.root):
            raise UserError(f"--data_root {self.root}: no such folder; {LAYOUTS}")
        listings = [join(self.root, name) for name in LISTINGS if exists(join(self.root, name))]
        within = next((name for name in BASES if isdir(join(self.root, name)) and not listings), "")
        base = join(self.root, within) if within else self.root
        self.allowed = None if cfg.follow_links else {realpath(self.root), realpath(base)}
        files, beside = [] if listings else [*self.walk(base)], os.listdir(self.root)
        self.seen = {name.lower() for path in [*beside, *files] for name in (path, splitext(path)[1])}
        self.odd[BESIDE] = [join(self.root, x) for x in beside if within not in ("", x) and not is_hidden(x)]
        try:
            self.read(listings or [path for path in files if basename(path) in LISTINGS], files)
        except MemoryError:
            raise UserError(f"{listings[0] if listings else self.root}: {NO_MEMORY}") from None
        for folder in {self.root, *map(dirname, self.captions)} if listings or within else ():
            self.odd[HIDDEN] += [join(folder, name) for name in list_names(folder) if is_hidden(name)]
        self.odd[HIDDEN] = [*dict.fromkeys(self.odd[HIDDEN])]
        self.odd[EMPTY] = [path for path, captions in self.captions.items() if "" in captions]

    def walk(self, base):
        """The paths of all files below a folder but hidden ones."""
        been = {realpath(base)}

        def closed(e):
            self.wrong[CLOSED].append(f"{e.filename}: {e.strerror}")

        def goes_into(path):
            if why := leads_out(path, self.allowed):
                self.wrong[LINKS].append(f"{path}: {why}")
            seen = realpath(path) in been  # links can lead round in circles
            been.add(realpath(path))
            return not (why or seen or is_hidden(basename(path)) or exists(join(path, ".lock")))  # a run of ours

        for place, folders, names in os.walk(base, onerror=closed, followlinks=True):
            self.odd[HIDDEN] += [join(place, name) for name in folders + names if is_hidden(name)]
            self.odd[REPEATS] += [join(place, name) for name in folders if re.match(r"\d+_", name)]
            folders[:] = [name for name in sorted(folders) if goes_into(join(place, name))]
            yield from (join(place, name) for name in sorted(names) if not is_hidden(name))

    def read(self, listings, files):
        for listing in listings:
            if listing.endswith(".csv") and f"{listing[:-4]}.jsonl" in listings:
                self.wrong[TWO_LISTINGS].append(dirname(listing))
            for number, row in rows(listing, self.text_of(listing) or ""):
                self.read_row(listing, f"{listing}: line {number}", row)
        if not listings:
            self.read_pairs(files)

    def text_of(self, path):
        """A text file's content, or None with what is wrong noted."""
        try:
            if not (why := leads_out(path, self.allowed)):
                return read_text(path)
            self.wrong[LINKS].append(f"{path}: {why}")
        except Damaged as e:
            self.wrong[NO_TEXT].append(str(e).rpartition(";")[0])

    # ---- A listing ----

    def read_row(self, listing, where, row):
        row = row if isinstance(row, dict) else {}
        name, text = row.get("file_name"), next((row[c] for c in COLUMNS if c in row), None)
        if not isinstance(name, str) or not isinstance(text, str):
            self.wrong[BAD_ROWS].append(where)
        elif why := refusal(name):
            self.wrong[BAD_ROWS].append(f"{where}: {printable(name)[:100]!r} {why}")
        elif basename(name).startswith("._"):
            self.odd[HIDDEN].append(f"{where}: {name}")
        else:
            path = join(dirname(listing), name)
            if "\\" in name and not exists(path):  # as Windows writes it
                path = path.replace("\\", "/")
            self.captions.setdefault(normpath(path), []).append(clean_caption(text))

    # ---- A text file beside each picture ----

    def read_pairs(self, files):
        texts = {splitext(path)[0]: path for end in reversed(TEXTS) for path in files if path.lower().endswith(end)}
        self.pictures = [path for path in files if splitext(path)[1].lower() in ENDINGS]
        found = {path: texts.get(splitext(path)[0]) or texts.get(path) for path in self.pictures}
        self.wrong[NO_CAPTION] += [path for path, text in found.items() if text is None]
        self.odd[OTHERS] += sorted({*files} - {*self.pictures, *found.values()})
        for path, text in found.items():
            content = text and self.text_of(text)
            if content is not None:
                lines = [line.strip() for line in content.split("\n") if line.strip()]
                if not self.whole_captions and looks_wrapped(lines):
                    self.odd[WRAPPED].append(text)
                self.captions[path] = [clean_caption(x) for x in ([content] if self.whole_captions else lines or [""])]

    # ---- What was found ----

    def summary(self):
        counts = [*map(len, self.captions.values())]
        each = f"{min(counts)} to {max(counts)}" if min(counts) < max(counts) else max(counts)
        return f"{self.root}: {len(counts)} pictures with {sum(counts)} captions, {each} for each picture"

    def check(self):
        """UserError that lists all kinds of faults, if there are any."""
        faults = [f"{len(x)} {what} ({first_few(x)}); {REMEDIES[what]}" for what, x in self.wrong.items() if x]
        hint = next((what for names, what in FOREIGN if self.seen.intersection(names)), "")
        faults += [] if faults else [f"no pictures with captions; {hint or LAYOUTS}"] * (not self.captions)
        if faults:
            hint = f"; {hint}" if hint and self.wrong[NO_CAPTION] and not self.captions else ""
            raise UserError(f"--data_root {self.root}: {'; '.join(faults)}{hint}")


def list_names(folder):
    return os.listdir(folder) if os.access(folder, os.R_OK | os.X_OK) and isdir(folder) else []


def is_hidden(name):
    """What systems leave beside people's files: .DS_Store, ._cat.jpg, __MACOSX and the like."""
    return name.startswith(".") or name.lower() in ("__macosx", "@eadir", "thumbs.db", "desktop.ini")


def leads_out(path, allowed):
    """Says so if a file is a link to a place outside these real folders, as an archive from a stranger may hold it."""
    real = realpath(path)
    within = allowed is None or any(real == folder or real.startswith(join(folder, "")) for folder in allowed)
    return "" if within else f"{LEADS_OUT}, to {real}"


def refusal(name):
    """Why a name from a file may not be joined to its folder, or ""."""
    if odd := re.search(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", name):
        return f"has the character U+{ord(odd[0]):04X}"
    parts = name.replace("\\", "/").split("/")
    if ".." in parts or not parts[0] or os.path.isabs(name):
        return "leads out of the folder"
    return "" if len(name) < 1000 else "is too long"


def rows(listing, text):
    """The rows of a listing -> (number of the line, {column: value}, or something else where the line is wrong)."""
    if listing.endswith(".csv"):
        delimiter = next((c for c in ",;\t" if c in text.partition("\n")[0]), ",")
        reader = csv.reader(io.StringIO(text, ""), delimiter=delimiter, skipinitialspace=True, strict=True)
        try:
            columns = [name.strip().lower() for name in next(reader, ())]
            for row in filter(None, reader):  # None, NA, 007 stay text; of columns named alike the first counts
                yield reader.line_num, dict(zip(columns[::-1], row[::-1])) if len(row) == len(columns) else None
        except csv.Error:
            yield reader.line_num, None
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError):
                yield number, None


def looks_wrapped(lines):
    """Whether lines look like parts of one sentence: one goes on in the next, or the last alone has a full stop."""
    ends = [line.endswith(FULL_STOPS) for line in lines]
    lower = any(b[0].islower() and lines[0][0].isupper() and not end for end, (_, b) in zip(ends, pairwise(lines)))
    return lower or bool(re.search(GOES_ON, "\n".join(lines))) or sum(ends) == 1 and ends[-1] and len(ends) > 1


def read_text(path):
    try:
        text = read_file(path, MAX_CAPTIONS_BYTES).decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:  # as in English text of UTF-16
        raise Damaged(f"{path}: not UTF-8 text; save it as UTF-8")
    return text


def clean_caption(text):
    """A caption on one line, without the lone surrogates that JSON can smuggle in."""
    return " ".join(text[: 4 * MAX_CAPTION].encode("utf-8", "replace").decode().split())[:MAX_CAPTION]


def first_few(names):
    return "; ".join(printable(name)[:300] for name in names[:3]) + ("; ..." if len(names) > 3 else "")
