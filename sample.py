"""Make pictures of prompts with a trained run.

  python sample.py --prompt "a red sports car"
  python sample.py --prompt "a dog on the grass" "a blue house at night" --num_images 9 --seed 7
  python sample.py --export DIR            the run as a folder that diffusers opens (export.py)

Writes one PNG per picture and a grid per prompt, never over an existing file, and says where. Picture k depends
on seed + k alone, but for rounding. Each PNG carries prompt and settings in its `parameters` text, where picture
browsers look.
What it is not: no schedule, no model and no sampling formula is here; they come from the run directory and diffusion.py.
"""

import contextlib
import itertools
import math
import os
import re
import sys

import torch
from PIL import PngImagePlugin

from checkpoint import check_text_encoder, load_models, newest_run, write_file
from config import MAX_SEED, Parser, UserError, positive_int, printable
from data import read_pictures_of
from diffusion import configured_process, fitted_start, latent_shape, sample
from export import export_run
from metrics import latent_gaussian
from scenes import unknown_words
from text_encoder import make_text_encoder
from training import (
    Progress,
    add_sampling_flags,
    encode_pictures,
    make_autocast,
    make_grid,
    pick_device,
    png_bytes,
    run_script,
    sampling_options,
    show_progress,
    usage_error,
)

IMAGES_PER_BATCH = 32
GRID_PICTURES = 100
FITTED_PICTURES = 8192  # training pictures that --start fitted looks at
READ_BY_EXPORT = ("export", "run_dir", "ema", "text_encoder")


def main():
    args = parse_args()
    run_dir = args.run_dir or newest_run()
    if args.export is not None:
        opener = export_run(args.export, run_dir, args.ema, args.text_encoder)
        print(f"wrote {args.export} from {run_dir}: opens in diffusers' {opener}, as its README.md shows")
        return
    device = pick_device()
    cfg, model_name, vae, unet, t_embedder = load_models(run_dir, args.ema, device, args.vae)
    model_name += f", VAE: {printable(args.vae)}" if args.vae else ""
    options = sampling_options(args, cfg)
    source = args.text_encoder or cfg.text_encoder
    text_encoder = make_text_encoder(source, cfg.text_dim, cfg.text_length, cfg.text_encoder).to(device).eval()
    check_text_encoder(run_dir, text_encoder)
    for prompt in (*args.prompt, args.negative_prompt) if cfg.dataset == "scenes" else ():
        if words := unknown_words(prompt):
            print(f"warning: no painted scene has {', '.join(words)[:100]!r}; python scenes.py --words lists what they "
                  "have", file=sys.stderr)  # fmt: skip
    autocast = make_autocast(device, args.mixed_precision or cfg.mixed_precision)
    process = configured_process(cfg)
    if args.start == "fitted":
        pixels = read_pictures_of(run_dir, cfg, args.data_root, show_progress)[0]
        if len(pixels) < 2:
            raise UserError("--start: fitted needs the variance of two training pictures or more; leave it out")
        options["start"] = fitted_start(*latent_statistics(vae, pixels, cfg, device), process)
    if args.size:
        options["size"] = check_size(args.size, vae, unet)

    out = args.out or os.path.join(run_dir, "samples")
    os.makedirs(out, exist_ok=True)
    progress = Progress(len(args.prompt) * args.num_images, "sample")
    for prompt in args.prompt:
        images = []
        for first in range(0, args.num_images, IMAGES_PER_BATCH):
            seeds = [args.seed + k for k in range(first, min(first + IMAGES_PER_BATCH, args.num_images))]
            with autocast():
                x = sample(unet, vae, t_embedder, text_encoder, prompt, num_samples=len(seeds),
                           process=process, seeds=seeds, **options).cpu()  # fmt: skip
            for image, seed in zip(x, seeds):
                if not image.isfinite().all():
                    raise UserError(f"{model_name}: gives values that are not numbers; train again with a lower --lr")
                save_png(out, prompt, f"seed{seed}", image, parameters(prompt, options, seed, image, model_name))
            if first < GRID_PICTURES:  # of a thousand pictures the grid shows the first; a view would keep them all
                images.append(x[: GRID_PICTURES - first].clone())
            progress.update(len(seeds))
        images = torch.cat(images)
        grid = make_grid(images, math.ceil(math.sqrt(len(images))))
        path = save_png(out, prompt, "grid", grid, parameters(prompt, options, args.seed, images[0], model_name))
        progress.say(f"wrote {args.num_images} pictures of {prompt!r}, and {path}")
    progress.close()


def parse_args():
    parser = Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--prompt", nargs="+", action="extend", help="one or more prompts, each in quotes")
    what.add_argument("--export", metavar="DIR", help="make no pictures, but a folder that diffusers opens; goes with "
                      "--run_dir, --ema and --text_encoder")  # fmt: skip
    parser.add_argument("--num_images", type=positive_int, default=4, help="pictures per prompt (default: 4)")
    add_sampling_flags(parser)
    parser.add_argument("--data_root", help="where the training pictures are, if they have moved")
    parser.add_argument("--size", type=positive_int, nargs=2, metavar=("HEIGHT", "WIDTH"),
                        help="of the pictures, in pixels (default: as in training)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="picture k is drawn from seed + k (default: 0)")
    parser.add_argument("--mixed_precision", choices=("auto", "no", "bf16"),
                        help="bf16 autocast; auto: where the processor computes in it (default: as in training)")  # fmt: skip
    parser.add_argument("--ema", action="store_true", help="use the averaged weights instead of the trained ones")
    parser.add_argument("--text_encoder", help="clip, hash or a directory, if not what the run was trained with")
    parser.add_argument("--run_dir", help="a finished run (default: the newest of runs/<preset>)")
    parser.add_argument("--vae", metavar="RUN_DIR", help="decode with the VAE of another run, whose encoder must be the same: "
                        "one of train_vae.py --finetune_decoder_of")  # fmt: skip
    parser.add_argument("--out", help="folder for the pictures (default: <run_dir>/samples)")
    args = parser.parse_args()
    if args.prompt is None and args.export is None:
        parser.error("--prompt: is missing; give a prompt in quotes, or --export DIR")
    if args.export == "":
        parser.error("--export: is empty; give a folder")
    for name, value in vars(args).items() if args.export is not None else ():
        if name not in READ_BY_EXPORT and value != parser.get_default(name):
            parser.error(f"--{name}: --export does not use it")
    if args.size and args.start == "fitted":
        parser.error("--start: fitted is for pictures of the training size; leave out --size")
    if args.data_root is not None and args.start != "fitted":
        parser.error("--data_root: is read by --start fitted alone; leave it out")
    if not 0 <= args.seed <= MAX_SEED - args.num_images:
        parser.error(f"--seed: {args.seed} is out of range; give 0 to {MAX_SEED - args.num_images}")
    return args


def latent_statistics(vae, pixels, cfg, device):
    """Mean (D,) and covariance (D, D) of the latents of training pictures, uint8 (N, 3, S, S)."""
    pixels = pixels[:FITTED_PICTURES]
    pixels = torch.cat([pixels, pixels.flip(3)]) if cfg.horizontal_flips else pixels
    return latent_gaussian(*encode_pictures(vae, pixels, device, Progress(len(pixels), "encode pictures")))


def check_size(size, vae, unet):
    """(height, width) if the models can make such pictures; else ends with code 2 and one line."""
    try:
        latent_shape(unet, vae, size)
    except ValueError as e:
        usage_error(f"--size: {e}; give others")
    return tuple(size)


def parameters(prompt, options, seed, image, model_name):
    """The `parameters` text of AUTOMATIC1111's web UI: the prompt, the negative one, then one line of settings."""
    lines = [" ".join(prompt.split())]
    if options["negative_prompt"]:
        lines.append(f"Negative prompt: {' '.join(options['negative_prompt'].split())}")
    low, high = options["guidance_interval"]
    guided_in_part = options["guidance_scale"] != 1 and (low, high) != (0, 1)
    extra = [f", Eta: {options['eta']}"] if options["eta"] else []
    extra += [f", Guidance interval: {low:g} to {high:g}"] if guided_in_part else []  # a comma would end the entry
    extra += [", Start: fitted"] if "start" in options else []
    lines.append(f"Steps: {options['num_steps']}, Sampler: {options['sampler'].upper()}, CFG scale: "
                 f"{options['guidance_scale']:g}, Seed: {seed}, Size: {image.shape[2]}x{image.shape[1]}, Model: {model_name}"
                 + "".join(extra))  # fmt: skip
    return "\n".join(lines)


def save_png(folder, prompt, ending, image, text):
    """Save (3, H, W) in [0, 1] under a free name made from the prompt -> the path."""
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", text.encode("utf-8", "replace").decode())
    slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower())[:60].strip("-") or "prompt"
    path = free_name(os.path.join(folder, f"{slug}_{ending}"))
    write_file(path, png_bytes(image, pnginfo=info))
    return path


def free_name(stem):
    """A path that is not taken. Its .tmp, where write_file() writes, is made here: another sample.py takes another name."""
    for number in itertools.count(1):
        path = f"{stem}{f'_{number}' if number > 1 else ''}.png"
        with contextlib.suppress(FileExistsError):
            open(f"{path}.tmp", "xb").close()
            if not os.path.exists(path):
                return path
            os.remove(f"{path}.tmp")


if __name__ == "__main__":
    run_script(main)
