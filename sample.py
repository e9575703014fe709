"""Make pictures of prompts with a trained run.

  python sample.py --prompt "a red sports car"
  python sample.py --prompt "a dog on the grass" "a blue house at night" --num_images 9 --seed 7
  python sample.py --prompts_file prompts.txt    a prompt per line
  python sample.py --export DIR            the run as a folder that diffusers opens (support/export.py)

Writes one PNG per picture and a grid per prompt, never over an existing file, and says where. Picture k depends on
seed + k alone, apart from rounding. Its `parameters` text says how it was made, for programs that show pictures.
What it is not: no model, schedule or sampler is here; they come from the run directory and diffusion.py.
"""

import contextlib
import itertools
import math
import os
import sys

import torch
from PIL import PngImagePlugin

import scenes
from config import MAX_SEED
from diffusion import configured_process, latent_shape, sample
from support import checkpoint, devices, errors, files, flags, models, show
from support.show import parameters, quoted
from text_encoder import words_of

IMAGES_PER_BATCH, GRID_PICTURES = 32, 100  # the grid shows the first ones


def main():
    args = parse_args()
    run_dir = args.run_dir or models.newest_run()
    if args.export:
        from support.export import export_run  # needs safetensors

        opener = export_run(args.export, run_dir, args.ema, args.text_encoder, args.epoch)
        print(f"wrote {args.export} from {run_dir}: opens in diffusers' {opener}, as its README.md shows")
        return

    prompts = [*(args.prompt or []), *(read_prompts(args.prompts_file) if args.prompts_file else [])]
    device = devices.pick_device()
    cfg, model_name, vae, unet, t_embedder = models.load_models(run_dir, args.ema, device, args.vae, args.epoch)
    model_name += f", VAE: {quoted(errors.printable(args.vae))}" if args.vae else ""
    options = flags.sampling_options(args, cfg)
    encoder = models.load_text_encoder(run_dir, cfg, args.text_encoder, device, args.epoch)
    known = checkpoint.newest_epoch_set(run_dir, "unet", epoch=args.epoch)[1].get("caption", cfg.sample_prompts[0])
    flags.warn_of_lost_quotes("--prompt", args.prompt or [], known)
    if odd := scenes.warning_of(" ".join([*prompts, args.negative_prompt]), cfg):
        print(f"warning: {odd}", file=sys.stderr)
    autocast = devices.make_autocast(device, args.mixed_precision or cfg.mixed_precision)
    options |= {"size": args.size, "process": configured_process(cfg)}
    try:
        latent_shape(unet, vae, args.size)
    except ValueError as e:
        errors.usage_error(f"--size: {e}; give others")

    out = args.out or os.path.join(run_dir, "samples")
    os.makedirs(out, exist_ok=True)
    progress = show.Progress(len(prompts) * args.num_images, "sample")
    for prompt in prompts:
        shown = []
        for first in range(0, args.num_images, IMAGES_PER_BATCH):
            seeds = range(args.seed, args.seed + args.num_images)[first : first + IMAGES_PER_BATCH]
            with autocast():
                x = sample(unet, vae, t_embedder, encoder, prompt, num_samples=len(seeds), seeds=seeds, **options).cpu()
            for image, seed in zip(x, seeds):  # (3, H, W) each
                if not image.isfinite().all():
                    raise errors.UserError(f"{model_name}: gives values that are not numbers; train with a lower --lr")
                save_png(out, prompt, f"seed{seed}", image, parameters(prompt, options, seed, image, model_name))
            shown += [image.clone() for image in x[: GRID_PICTURES - len(shown)]]  # a view would keep the whole batch
            progress.update(len(seeds))
        grid = show.make_grid(torch.stack(shown), math.ceil(math.sqrt(len(shown))))
        path = save_png(out, prompt, "grid", grid, parameters(prompt, options, args.seed, shown[0], model_name))
        progress.say(f"wrote {args.num_images} pictures of {prompt!r}, and {path}")
    progress.close()


def parse_args():
    parser = flags.Parser(description=__doc__.split("\n\n")[0])
    add, what = parser.add_argument, parser.add_mutually_exclusive_group().add_argument
    what("--prompt", nargs="+", action="extend", help="one or more prompts, each in quotes")
    what(
        "--export",
        metavar="DIR",
        help="make a folder for diffusers; goes with --run_dir, --epoch, --ema, --text_encoder",
    )
    add("--prompts_file", metavar="FILE", help="more prompts, one per line")
    add("--num_images", type=flags.positive_int, default=4, help="pictures per prompt (default: 4)")
    flags.add_sampling_flags(parser)
    add("--size", type=flags.positive_int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="pixels (default: as trained)")
    add("--seed", type=int, default=0, help="picture k is drawn from seed + k (default: 0)")
    add("--mixed_precision", choices=("auto", "no", "bf16"), help="bf16 autocast (default: as in training)")
    add("--epoch", type=flags.positive_int, metavar="N", help="use the weights of this epoch (default: the newest)")
    add("--ema", action="store_true", help="use the averaged weights instead of the trained ones")
    add("--text_encoder", help="clip, hash or a directory, if not what the run was trained with")
    add("--run_dir", help="a finished run (default: the newest of runs/<preset>)")
    add("--vae", metavar="RUN_DIR", help="decode with this run's VAE, made by train_vae.py --finetune_decoder_of")
    add("--out", help="folder for the pictures (default: <run_dir>/samples)")
    args = parser.parse_args()
    if not (args.prompt or args.prompts_file or args.export):
        parser.error("--prompt: is missing; give a prompt in quotes, a --prompts_file, or a folder with --export DIR")
    for name, value in vars(args).items() if args.export else ():
        if name not in ("export", "run_dir", "epoch", "ema", "text_encoder") and value != parser.get_default(name):
            parser.error(f"--{name}: --export does not use it")
    if not 0 <= args.seed <= MAX_SEED - args.num_images:
        parser.error(f"--seed: {args.seed} is out of range; give 0 to {MAX_SEED - args.num_images}")
    return args


def read_prompts(path):
    """-> the lines of a UTF-8 file that are not blank."""
    try:
        lines = files.read_file(path, 1 << 24).decode("utf-8-sig").replace("\r", "\n").split("\n")
    except files.Damaged as e:
        raise errors.UserError(f"--prompts_file {str(e).removesuffix('; restore it')}; give another") from None
    except UnicodeDecodeError:
        raise errors.UserError(f"--prompts_file {path}: not UTF-8 text; save it as UTF-8") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise errors.UserError(f"--prompts_file {path}: holds no prompt; write one per line")
    return prompts


def save_png(folder, prompt, ending, image, text):
    """Save (3, H, W) in [0, 1] under a free name made from the prompt -> the path."""
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", text.encode("utf-8", "replace").decode())
    slug = "-".join(words_of(prompt.replace("_", " "), version=1))[:60].encode()[:150].decode(errors="ignore")
    slug = slug.strip("-") or "prompt"
    path = free_name(os.path.join(folder, f"{slug}_{ending}"))
    files.write_file(path, show.png_bytes(image, pnginfo=info))
    return path


def free_name(stem):
    """A path that is not taken. Makes the .tmp that write_file() will fill: another sample.py then takes another name."""
    for number in itertools.count(1):
        path = f"{stem}{f'_{number}' if number > 1 else ''}.png"
        with contextlib.suppress(FileExistsError):
            open(f"{path}.tmp", "xb").close()
            if not os.path.exists(path):
                return path
            os.remove(f"{path}.tmp")


if __name__ == "__main__":
    errors.run_script(main)
