"""The last rungs of the ladder on photographs, at 128 pixels, on one GPU within ten minutes.

  python tests/gpu/photographs.py DATA OUT            DATA: a folder of captioned pictures (docs/own-pictures.md)
  python tests/gpu/photographs.py DATA OUT --small    the same with tiny nets and few steps, to see that it runs

One VAE (preset best) serves all U-Nets. The U-Nets train side by side, for equal steps: `best`, the recipe on the same
latents, and `best` at twice its learning rate. Each is then measured by evaluate.py, `best` at several guidance scales, and
makes pictures of twelve prompts. Prints the seconds of each part and a table; OUT holds the runs, table.json and
prompts.png: a row per prompt, four pictures of each run.
What it is not: a test. Nothing passes or fails.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = [
    "a dog on the grass",
    "a snowboarder in the snow",
    "children in a swimming pool",
    "a man on a beach",
    "a football player in a red shirt",
    "a dog in the water",
    "a person riding a bike",
    "a crowd of people in a street",
    "a climber on a rock",
    "a black dog running in the snow",
    "a little girl in a pink dress",
    "a surfer on a wave",
]
RUNS = {
    "best": ("best", ""),
    "recipe": ("coco", ""),
    "lr 2e-3": ("best", "--lr 2e-3"),
}  # preset, flags of train_unet.py
EVALUATIONS = {  # what is measured: (run, flags of evaluate.py)
    "best": ("best", ""),
    "best, guidance 1": ("best", "--guidance_scale 1"),
    "best, guidance 2": ("best", "--guidance_scale 2"),
    "best, guidance 3.2": ("best", "--guidance_scale 3.2"),
    "recipe": ("recipe", ""),
    "lr 2e-3": ("lr 2e-3", ""),
    "lr 2e-3, guidance 1": ("lr 2e-3", "--guidance_scale 1"),
}
SMALL = "--image_size 32 --block_out_channels 8 16 --norm_num_groups 4 --unet_block_out_channels 16 32 --time_dim 64 "
SMALL += "--unet_norm_num_groups 4"
START = time.monotonic()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("data")
    parser.add_argument("out", type=Path)
    parser.add_argument("--max_images", type=int, default=6400, help="training pictures; a multiple of 32")
    parser.add_argument("--vae_epochs", type=int, default=16)
    parser.add_argument(
        "--unet_epochs", type=int, default=20, help="three U-Nets share the GPU: 30 would not end in time"
    )
    parser.add_argument("--num_prompts", type=int, default=500)
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    args.data = str(Path(args.data).resolve())
    args.out.mkdir(parents=True, exist_ok=True)
    common = (
        f"--dataset folder --data_root {args.data} --max_images {args.max_images} --text_encoder words --text_length 32"
    )
    common = common.split() + ["--cache_dir", str(args.out / "prepared"), *(SMALL.split() if args.small else [])]

    wait(start(args, "vae", "train_vae.py", "--preset", "best", *common, "--num_epochs", args.vae_epochs))
    trainings = []
    for name, (preset, flags) in RUNS.items():
        shutil.copytree(args.out / "vae", args.out / name)
        words = ["--preset", preset, *common, "--num_epochs", args.unet_epochs, *flags.split()]
        trainings.append(start(args, name, "train_unet.py", *words))
    runs, prompts = wait(*trainings), ["--num_prompts", args.num_prompts]
    first, *others = [(title, name, flags) for title, (name, flags) in EVALUATIONS.items() if name in runs]
    measured = wait(start(args, first[0], "evaluate.py", *prompts))  # alone: it trains the judge of words, and keeps it
    pictures = [
        start(args, name, "sample.py", "--prompt", *PROMPTS, "--out", args.out / name / "twelve") for name in runs
    ]
    left_out = shutil.ignore_patterns("twelve", "*.log")
    for title, name, _ in others:
        if title != name:  # files are replaced, never written to: links will do
            shutil.copytree(args.out / name, args.out / title, ignore=left_out, copy_function=os.link)
    evaluations = [start(args, title, "evaluate.py", *prompts, *flags.split()) for title, _, flags in others]
    show_prompts(args, wait(*pictures))
    measured += wait(*evaluations)
    results = {title: json.loads((args.out / title / "evaluation.json").read_text()) for title in measured}
    (args.out / "table.json").write_text(json.dumps(results, indent=1))
    for title, found in results.items():
        print(title, json.dumps({k: found.get(k) for k in ("words", "looks", "distances", "captions")}))
    say("done")


def start(args, what, script, *words):
    """A script of the project on the run OUT/<what>, in a process of its own; its output goes to a .log there."""
    run = args.out / what
    run.mkdir(exist_ok=True)
    log = open(run / f"{script.removesuffix('.py')}.log", "w")
    command = [sys.executable, "-u", str(ROOT / script), "--run_dir", str(run), *map(str, words)]
    env = {"OMP_NUM_THREADS": "2"} | os.environ  # ten at once would get in each other's way
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env)
    return what, time.monotonic(), process, log.name


def wait(*started):
    """-> the runs whose script has ended well; of each other the end of its output is printed. If none has, that is all."""
    well = []
    for what, begun, process, log in started:
        failed, output = process.wait(), Path(log).read_text().strip() or "no output"
        last = output[-3000:] if failed else output.splitlines()[-1][:200]
        say(f"{what}, {Path(log).stem}{' FAILED' * bool(failed)}: {time.monotonic() - begun:.0f} s; {last}")
        well += [] if failed else [what]
    return well or sys.exit("nothing is left to go on with")


def say(text):
    print(f"[{time.monotonic() - START:5.0f} s] {text}", flush=True)


def show_prompts(args, runs):
    """A row per prompt: four pictures of each run."""
    names = [sorted((args.out / name / "twelve").glob("*_seed*.png")) for name in runs]
    side = Image.open(names[0][0]).width
    sheet = Image.new("RGB", (len(names) * 4 * side, len(PROMPTS) * side))
    for column, files in enumerate(names):
        for row, prompt in enumerate(PROMPTS):
            own = [f for f in files if f.name.startswith(prompt.replace(" ", "-") + "_seed")]
            for k, file in enumerate(own[:4]):
                sheet.paste(Image.open(file), ((4 * column + k) * side, row * side))
    sheet.save(args.out / "prompts.png")


if __name__ == "__main__":
    main()
