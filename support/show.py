"""What a run shows: progress, tables, curves, pictures.

What it is not: it measures nothing.
"""

import csv
import io
import json
import math
import os
import time

import torch
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

from support.files import write_file

FRAME_MS, LAST_FRAME_MS = 250, 2000  # how long an animation shows its frames, and its last one


def progress_bar(what):
    """-> start(total, done), for work that may have nothing left to do and then shows nothing."""
    return lambda total, done: Progress(total, what, done)


class Progress:
    """A bar with rate and time left on a terminal, otherwise a plain line now and then."""

    def __init__(self, total, what, done=0, seconds_between_lines=10):
        self.total, self.what, self.done, self.before, self.pause = total, what, done, done, seconds_between_lines
        silent = dist.is_available() and dist.is_initialized() and dist.get_rank() > 0
        self.bar = tqdm(total=total, desc=what, initial=done, disable=silent or None, dynamic_ncols=True)
        self.start = self.last = time.monotonic()

    def update(self, count=1):
        self.done += count
        self.bar.update(count)
        now = time.monotonic()
        if self.bar.disable and (now - self.last > self.pause or self.done == self.total):
            self.last = now
            rate = (self.done - self.before) / max(now - self.start, 1e-9)
            left = f", {(self.total - self.done) / rate:.0f} s left" if self.total and rate else ""
            print(f"{self.what}: {self.done}/{self.total or '?'}, {rate:.1f}/s{left}", flush=True)

    def say(self, text):
        """Print a line, above the bar if there is one."""
        self.bar.write(text) if not self.bar.disable else print(text, flush=True)

    def close(self):
        self.bar.close()


def append_csv(path, row):
    """Append one row (a dict) to a CSV file, with a header if it is new. What older rows lack stays empty there."""
    row = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
    if os.path.exists(path) and csv_header(path) != list(row):
        write_file(path, csv_text(row, csv_rows(path)).encode())
    text = csv_text(row, [row], header=not os.path.exists(path))
    try:
        with open(path, "a", newline="", encoding="utf-8") as f:
            f.write(text)
    except OSError as e:  # a full disk does not say of which file
        raise OSError(e.errno, e.strerror, path) from None


def csv_text(columns, rows, header=True):
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", extrasaction="ignore")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def csv_header(path):
    with open(path, newline="", encoding="utf-8") as f:
        return next(csv.reader(f), [])


def csv_rows(path):
    with open(path, newline="", encoding="utf-8") as f:
        return list(csv.DictReader(f))


def read_csv(path):
    """A CSV of numbers -> {column: [float]}; empty cells are NaN."""
    rows = csv_rows(path)
    return {name: [float(row[name] or "nan") for row in rows] for name in rows[0]}


def plot_curves(path, panels):
    """Draw {panel title: {label: (steps, values)}} side by side into a PNG."""
    import matplotlib

    matplotlib.use("Agg")  # no window, no display needed
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 3.5), squeeze=False)
    for axis, (title, lines) in zip(axes[0], panels.items()):
        for label, (xs, ys) in lines.items():
            axis.plot(xs, ys, label=label, marker="." if len(xs) < 30 else None)
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=100)
    plt.close(figure)
    write_file(path, png.getvalue())


def make_grid(images, columns, border=2):
    """images: (N, 3, H, W) in [0, 1] -> (3, ...): `columns` pictures to a row, each in a black border [pixels]."""
    n, c, h, w = images.shape
    columns, border = min(columns, n), border if n > 1 else 0  # a single picture needs no frame
    grid = torch.zeros(c, (n + columns - 1) // columns * (h + border) + border, columns * (w + border) + border)
    for i, image in enumerate(images.float().cpu()):
        top, left = i // columns * (h + border) + border, i % columns * (w + border) + border
        grid[:, top : top + h, left : left + w] = image
    return grid


def square(images):
    """(3, H, W) each -> a grid of about as many rows as columns."""
    return make_grid(torch.stack([*images]), math.ceil(math.sqrt(len(images))))


def save_grid(path, images, columns):
    """images: (N, 3, H, W) in [0, 1] -> one PNG, `columns` pictures to a row."""
    write_file(path, png_bytes(make_grid(images, columns)))


def png_bytes(x, **options):
    """x: (3, H, W) in [0, 1] -> the bytes of a PNG."""
    data = io.BytesIO()
    to_pil(x).save(data, format="PNG", **options)
    return data.getvalue()


def webp_bytes(frames):
    """Frames, (3, H, W) in [0, 1] each -> the bytes of an animated WebP, lossless, that repeats for ever."""
    data, (first, *others) = io.BytesIO(), map(to_pil, frames)
    duration = [FRAME_MS] * len(others) + [LAST_FRAME_MS]
    first.save(data, format="WEBP", save_all=True, append_images=others, duration=duration, loop=0, lossless=True)
    return data.getvalue()


def to_pil(x):
    """x: (3, H, W) in [0, 1] -> PIL picture."""
    return Image.fromarray((x.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy())


def parameters(prompt, options, seed, image, model_name, notes=()):
    """The `parameters` text of AUTOMATIC1111's web UI: the prompt, the negative prompt, then one line of settings.

    notes: {setting: value}, further ones. What is "" is left out.
    """
    prompt, negative = (" ".join(text.split()) for text in (prompt, options["negative_prompt"]))
    negative = f"Negative prompt: {negative}\n" if options["negative_prompt"] else ""
    scale, interval, rescale = (options[f"guidance_{name}"] for name in ("scale", "interval", "rescale"))
    settings = {"Steps": options["num_steps"], "Sampler": options["sampler"].upper(), "CFG scale": f"{scale:g}"}
    settings |= {"Seed": seed, "Size": f"{image.shape[2]}x{image.shape[1]}", "Model": model_name, **dict(notes)}
    settings["Eta"] = options["eta"] or ""
    settings["Guidance interval"] = "{:g} to {:g}".format(*interval) if scale != 1 and interval != (0, 1) else ""
    settings["Guidance rescale"] = f"{rescale:g}" if scale != 1 and rescale else ""
    line = ", ".join(f"{name}: {quoted(str(value))}" for name, value in settings.items() if value != "")
    return f"{prompt}\n{negative}{line}".encode("utf-8", "replace").decode()  # no lone surrogates


def quoted(value):
    """As the web UI writes a setting: in JSON's quotes if it holds what could be taken for its end.

    Commas and colons are escaped as well, because many readers cut at each, in quotes or not.
    """
    if not any(c in value for c in ',:"'):
        return value
    return json.dumps(value, ensure_ascii=False).replace(",", r"\u002c").replace(":", r"\u003a")
