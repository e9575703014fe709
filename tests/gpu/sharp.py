"""The sharp decoder at 128 pixels, on one GPU within ten minutes.

  python tests/gpu/sharp.py DATA OUT            DATA: a folder of captioned pictures (docs/own-pictures.md)
  python tests/gpu/sharp.py DATA OUT --small    the same with tiny nets and few steps, to see that it runs

The recipe's VAE (preset coco), then its decoder finetuned as preset best has it. A U-Net of a few epochs is only there
because evaluate.py asks for one; it measures the reconstructions of both decoders. Prints the seconds of each part, both
tables, and what a step of finetuning costs over one of plain training. The grid is OUT/sharp/vae_pictures_epoch*.png:
pictures, the decoder trained by squared error, the sharp one. What it is not: a test. Nothing passes or fails.
"""

import argparse
import sys
import time
from pathlib import Path

from photographs import SMALL, say, start, wait


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("data")
    parser.add_argument("out", type=Path)
    parser.add_argument("--max_images", type=int, default=6400, help="training pictures; a multiple of 32")
    parser.add_argument("--vae_epochs", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=8, help="of finetuning")
    parser.add_argument("--unet_epochs", type=int, default=2)
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    common = ["--dataset", "folder", "--data_root", str(Path(args.data).resolve()), "--max_images", args.max_images]
    common += ["--text_encoder", "hash", "--text_length", 32, "--cache_dir", args.out / "prepared"]
    common += SMALL.split() if args.small else []

    seconds = {}
    finetuning = ["--finetune_decoder_of", args.out / "mse", "--num_epochs", args.epochs]
    for what, preset, words in (("mse", "coco", ["--num_epochs", args.vae_epochs]), ("sharp", "best", finetuning)):
        begun = time.monotonic()
        wait(start(args, what, "train_vae.py", "--preset", preset, *common, *words))
        seconds[what] = time.monotonic() - begun
    ratio = seconds["sharp"] / args.epochs / (seconds["mse"] / args.vae_epochs)
    say(f"an epoch of finetuning takes {ratio:.2f} x one of plain training, start and compiling included")
    wait(start(args, "mse", "train_unet.py", "--preset", "best", *common, "--num_epochs", args.unet_epochs))
    for words in ([], ["--vae", args.out / "sharp"]):
        wait(start(args, "mse", "evaluate.py", "--num_prompts", 64, *words))
        print((args.out / "mse/evaluate.log").read_text()[-2500:])
    say("done")


if __name__ == "__main__":
    sys.exit(main())
