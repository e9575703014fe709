"""What a data set of very many pictures costs before its first step: seconds and memory per 100,000 pictures.

  python tests/many_pictures.py 5000 50000                  all that the trainers do until they take steps
  python tests/many_pictures.py 100000 1000000 --lists      without reading a picture

The pictures are links to 64 small JPEGs, in sub-folders of 1,000 with a caption beside each, or all in one with COCO's JSON
and five captions each, of which one is used. The VAE is tiny, so that bookkeeping is seen and not arithmetic. Seconds are
those that the processor worked: on a busy machine they hardly change. Memory is the most that the process ever had until
the data is listed, and then its own without what is mapped. What any set costs is taken off: the same for 400 pictures.
What it is not: a test, or a part of CI: a million pictures take 5 GB of disk and many minutes.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import data  # noqa: E402
import training  # noqa: E402
from config import SDConfig  # noqa: E402
from support import encoded, show  # noqa: E402
from text_encoder import WordHashTextEncoder  # noqa: E402
from vae import AutoencoderKL  # noqa: E402

SETTINGS = {
    "image_size": 16,
    "block_out_channels": (4, 4),
    "layers_per_block": 1,
    "norm_num_groups": 1,
    "unet_block_out_channels": (8, 16),
    "unet_norm_num_groups": 4,
    "time_dim": 32,
    "text_encoder": "hash",
    "text_length": 8,
    "text_dim": 16,
    "captions_per_image": 1,
    "num_workers": 0,
    "cache_dir": "prepared",
}
FEW = 400  # pictures of the set whose costs are those of any set


# ---- What is measured, in a process of its own --------------------------------------------------------------


def measure(cfg, lists_only):
    """Do what the trainers do until their first step -> {what: seconds or GB}."""
    figures, start, before = {}, time.process_time(), memory("VmHWM")

    def mark(name):
        nonlocal start
        figures[name], start = time.process_time() - start, time.process_time()

    train, _ = data.open_dataset(cfg)
    figures["GB, the most while listing"] = memory("VmHWM") - before
    mark("list")
    train.key()
    mark("key: names, sizes, times")
    captions = [several[:1] for several in train.captions]
    if not lists_only:
        device, bar = torch.device("cpu"), show.progress_bar("read")
        encoder = WordHashTextEncoder(cfg.text_dim, cfg.text_length)
        about = {"machine": {}, "made_from": {}, "text": encoder.key(), "code": encoded.hash_code()}
        vae = AutoencoderKL(cfg).eval().requires_grad_(False)
        for again in ("", ", kept"):
            pixels, captions = data.read_pictures(train, cfg, bar)
            mark(f"pictures{again}")
            encoded.encode_pictures(vae, pixels, about, device, cfg, "encode")
            mark(f"latents{again}")
            encoded.embed_captions(encoder, captions, about, device, cfg)
            mark(f"embeddings{again}")
        data.fingerprint(pixels)
        figures["GB, at the first step"] = memory("RssAnon")
    data.fingerprint(captions)
    mark("fingerprint")
    plan, first_rows = training.Plan(len(captions), 32, 1, None, 0), data.number_captions(captions)
    for index in plan.batches(1, 0):
        data.choose_captions(first_rows, index)
    mark("order and captions of an epoch")
    return figures


def memory(name):
    """GB. VmHWM: the most that the process ever had (getrusage() counts what its parent had, too); RssAnon: its own now."""
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith(name)).split()[1]) / 1e6


def measured(root, count, layout, lists_only):
    settings = SETTINGS | {"dataset": layout, "data_root": str(root), "max_images": count}
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import many_pictures as m; m.report({settings!r}, {lists_only})"
    found = subprocess.run([sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(found.stdout.splitlines()[-1])


def report(settings, lists_only):
    print(json.dumps(measure(SDConfig(**settings), lists_only)))


# ---- The data sets ----------------------------------------------------------------------------------------


def make_pictures(folder, count, layout):
    """A data set of `count` links to 64 small JPEGs, 1,000 to a folder (COCO: all in one)."""
    originals, noise = Path(folder, "originals"), np.random.RandomState(0)
    originals.mkdir(parents=True)
    for i in range(64):
        Image.fromarray(noise.randint(0, 256, (16, 16, 3), dtype=np.uint8)).save(originals / f"{i}.jpg")
    words = ("red", "small", "old", "bright"), ("dog", "car", "tree", "house"), ("beach", "street", "hill")
    images, annotations = [], []
    for i in range(count):
        place = Path(folder, "train2017") if layout == "coco" else Path(folder, "images", f"{i // 1000:04d}")
        if i % 1000 == 0:
            place.mkdir(parents=True, exist_ok=True)
        os.link(originals / f"{i % 64}.jpg", place / f"{i:08d}.jpg")
        texts = [
            f"a {words[0][(i + k) % 4]} {words[1][i // 4 % 4]} on a {words[2][i % 3]}, number {i}" for k in range(5)
        ]
        if layout == "folder":
            (place / f"{i:08d}.txt").write_text(texts[0])
            continue
        images.append({"id": i, "file_name": f"{i:08d}.jpg", "height": 16, "width": 16})
        annotations += [{"id": 5 * i + k, "image_id": i, "caption": text} for k, text in enumerate(texts)]
    shutil.rmtree(originals)
    if layout == "coco":
        Path(folder, "annotations").mkdir()
        content = {"images": images, "annotations": annotations}
        Path(folder, "annotations", "captions_train2017.json").write_text(json.dumps(content))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("counts", nargs="*", type=int, default=[5_000, 50_000])
    parser.add_argument("--layout", nargs="+", default=["folder", "coco"], choices=("folder", "coco"))
    parser.add_argument("--lists", action="store_true", help="read no picture")
    args = parser.parse_args()
    for layout in args.layout:
        with tempfile.TemporaryDirectory(dir=".") as place:
            figures = {}
            for count in (FEW, *args.counts):
                root, start = Path(place, f"{layout}{count}").absolute(), time.perf_counter()
                make_pictures(root, count, layout)
                print(f"{layout}, {count:,} pictures made in {time.perf_counter() - start:.0f} s", flush=True)
                figures[count] = measured(root, count, layout, args.lists)
                shutil.rmtree(root)
            for what, least in figures[FEW].items():
                each = [(figures[n][what] - least) / (n - FEW) * 1e5 for n in args.counts]
                totals = ", ".join(f"{figures[n][what]:.2f}" for n in (FEW, *args.counts))
                print(f"  {what:32s} {' '.join(f'{x:8.3f}' for x in each)} per 100,000 ({totals} in all)", flush=True)


if __name__ == "__main__":
    main()
