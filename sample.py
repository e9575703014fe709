"""Make pictures of prompts with a trained run.

  python sample.py --prompt "a red sports car"
  python sample.py --prompt "a dog on the grass" "a blue house at night" --num_images 9 --seed 7
  python sample.py --prompts_file prompts.txt    a prompt per line
  python sample.py                         prompts one by one as they are typed, on a terminal
  python sample.py --prompt "a blue car" --init_image car.png --strength 0.6 [--mask what_to_repaint.png]
  python sample.py --prompt "a red car" "a blue house" --interpolate
  python sample.py --export DIR            the run as a folder that diffusers opens (support/export.py)

Writes one PNG per picture and a grid per prompt, never over an existing file, and says where. Picture k depends on
seed + k alone, apart from rounding. Its `parameters` text says how it was made, for programs that show pictures.
What it is not: no model, schedule or sampler is here; they come from the run directory, diffusion.py and edit.py.
"""

import contextlib
import itertools
import math
import os
import sys
from functools import partial

import numpy as np
import torch
from PIL import PngImagePlugin

from config import MAX_SEED
from diffusion import configured_process, decode, latent_shape, sample
from edit import between_prompts, between_seeds, from_picture, latent_mask
from support import checkpoint, devices, errors, files, flags, models, show
from support.show import parameters
from text_encoder import words_of

IMAGES_PER_BATCH, GRID_PICTURES = 32, 100  # the grid shows the first ones
STRIP_PICTURES, STRIP_STEPS = 8, 8  # the strip's rows, and its columns before the picture itself


def main():
    args = parse_args()
    run_dir = args.run_dir or models.newest_run()
    if args.export:
        from support.export import export_run  # needs safetensors

        opener = export_run(args.export, run_dir, args.ema, args.text_encoder, args.epoch)
        print(f"wrote {args.export} from {run_dir}: opens in diffusers' {opener}, as its README.md shows")
        return

    prompts = [*(args.prompt or []), *(read_prompts(args.prompts_file) if args.prompts_file else [])]
    if args.interpolate is not None and (len(prompts) > 2 or len(prompts) < 2 and args.interpolate == args.seed):
        errors.usage_error("--interpolate: needs two ends; give two prompts, or one and another seed behind the flag")
    device = devices.pick_device()
    cfg, model_name, vae, unet, t_embedder = models.load_models(run_dir, args.ema, device, args.vae, args.epoch)
    options = flags.sampling_options(args, cfg)
    encoder = models.load_text_encoder(run_dir, cfg, args.text_encoder, device, args.epoch)
    known = checkpoint.newest_epoch_set(run_dir, "unet", epoch=args.epoch)[1].get("caption", cfg.sample_prompts[0])
    flags.warn_of_lost_quotes("--prompt", args.prompt or [], known)
    models.warn_of_unknown_words(" ".join([*prompts, args.negative_prompt]), cfg, encoder, errors.warn)
    options |= {"size": args.size, "process": configured_process(cfg)}
    try:
        latent_shape(unet, vae, args.size)
    except ValueError as e:
        errors.usage_error(f"--size: {e}; give others")
    options["edit"] = picture_edit(args, cfg, vae, device) if args.init_image is not None else None
    notes = {"Denoising strength": f"{args.strength:g}"} if args.init_image is not None else {}
    for what, path in ("VAE", args.vae), ("Init image", args.init_image), ("Mask", args.mask):
        notes[what] = errors.printable((path if what == "VAE" else os.path.basename(path)) if path else "")

    out = args.out or os.path.join(run_dir, "samples")
    os.makedirs(out, exist_ok=True)
    autocast = devices.make_autocast(device, args.mixed_precision or cfg.mixed_precision)
    nets, about = (unet, vae, t_embedder, encoder), (model_name, notes)

    def make(groups):
        with contextlib.closing(show.Progress(len(groups) * args.num_images, "sample")) as progress:
            for group in groups:
                make_pictures(group, args, nets, options, autocast, about, out, progress)

    if prompts:
        make([prompts] if args.interpolate is not None else [[prompt] for prompt in prompts])
    for prompt in () if prompts else typed_prompts():
        models.warn_of_unknown_words(prompt, cfg, encoder, errors.warn)
        try:
            make([[prompt]])
        except errors.UserError as e:
            print(f"error: {errors.printable(e)}", file=sys.stderr)


def make_pictures(prompts, args, nets, options, autocast, about, out, progress):
    """Sample and save the pictures of a prompt, or of the way from one prompt or seed to another."""
    shown, texts, emerging, (model_name, notes) = [], [], {}, about
    for first in range(0, args.num_images, IMAGES_PER_BATCH):
        numbers = range(args.num_images)[first : first + IMAGES_PER_BATCH]
        asked, places = {"prompt": prompts[0], "seeds": [args.seed + k for k in numbers]}, [{}] * len(numbers)
        if args.interpolate is not None:
            asked, places = interpolation(prompts, args, nets[-1], options["edit"], numbers)
        if args.steps_strip and first == 0:
            asked["watch"] = lambda i, x0: emerging.update({i: x0[:STRIP_PICTURES].clone()})
        with autocast():
            x = sample(*nets, num_samples=len(numbers), **options | asked).cpu()
        for image, seed, k, place in zip(x, asked["seeds"], numbers, places):  # (3, H, W) each
            if not image.isfinite().all():
                raise errors.UserError(f"{model_name}: gives values that are not numbers; train with a lower --lr")
            texts.append(parameters(prompts[0], options, seed, image, model_name, notes | place))
            save_png(out, prompts[0], f"interpolated{k}" if place else f"seed{seed}", image, texts[-1])
        shown += [image.clone() for image in x[: GRID_PICTURES - len(shown)]]  # a view would keep the whole batch
        progress.update(len(numbers))
    paths = [save_png(out, prompts[0], "grid", show.square(shown), texts[0])]
    if args.steps_strip:
        frames = [*decoded_steps(nets[1], emerging), torch.stack(shown[:STRIP_PICTURES])]  # (B, 3, H, W) each
        strip = show.make_grid(torch.stack(frames, dim=1).flatten(0, 1), len(frames))  # a row for each picture
        paths.append(save_png(out, prompts[0], "steps", strip, texts[0]))
        paths.append(save(out, prompts[0], "steps", "webp", show.webp_bytes(map(show.square, frames))))
    what = f"{args.num_images} picture{'s' * (args.num_images > 1)}"
    progress.say(f"wrote {what} of {' to '.join(map(repr, prompts))}, and {', '.join(paths)}")


def decoded_steps(vae, emerging):
    """{level: x0} -> some of them decoded, evenly spread. The last is left out: what comes of it is the picture."""
    last = len(emerging) - 1
    chosen = {round(k * last / STRIP_STEPS) for k in range(STRIP_STEPS)} - {last} if emerging else ()
    return [decode(vae, emerging[sorted(emerging)[k]]).cpu() for k in sorted(chosen)]


def interpolation(prompts, args, encoder, edit, numbers):
    """-> arguments of sample() for these pictures of a way; for each what `parameters` say of its place there."""
    u, leads, asked = [k / (args.num_images - 1) for k in numbers], {}, {"prompt": prompts[0]}
    if len(prompts) > 1:
        asked["prompt"] = between_prompts(encoder, *prompts, torch.tensor(u))
        leads["To prompt"] = " ".join(prompts[1].split())
    if args.interpolate != args.seed:
        seeds = [args.interpolate] * len(u)
        asked["edit"] = lambda sampler: between_seeds(edit(sampler) if edit else sampler, seeds, torch.tensor(u))
        leads["To seed"] = args.interpolate
    return asked | {"seeds": [args.seed] * len(u)}, [{"Interpolation": f"{share:.3g}"} | leads for share in u]


@torch.no_grad()
def picture_edit(args, cfg, vae, device):
    """-> the `edit` of sample() that begins with --init_image and repaints what is white in --mask."""
    import data

    def read(flag, path, *bars):
        try:
            return data.read_picture(path, args.size[::-1] if args.size else [cfg.image_size] * 2, cfg.resize, *bars)
        except Exception as e:  # decoders raise many kinds
            why = getattr(e, "strerror", None) or e
            raise errors.UserError(f"{flag} {path}: {why}; give a JPEG, PNG, WebP or AVIF that can be read") from None

    picture, (width, height) = read("--init_image", args.init_image)
    x = data.to_float(torch.from_numpy(data.to_array(picture))[None], device)
    (z0,), _ = vae.encode(x)  # the mean: the same each time
    repaint = torch.tensor(True)
    if args.mask is not None:
        mask, (w, h) = read("--mask", args.mask, "black")
        if abs(w * height - h * width) > 0.01 * width * h:
            what = f"{w} x {h} pixels are of another shape than the {width} x {height} of --init_image"
            raise errors.UserError(f"--mask {args.mask}: {what}; give a mask of the picture's size")
        repaint = latent_mask(torch.from_numpy(np.asarray(mask.convert("L")) >= 128), z0)
    return partial(from_picture, z0=z0, strength=args.strength, repaint=repaint.to(device))


def typed_prompts():
    """Prompts as they are typed, up to an empty line or Ctrl-D."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401, input() then knows the arrow keys
    sys.stdin.reconfigure(errors="replace")
    with contextlib.suppress(EOFError):
        while prompt := input("prompt (nothing to end): ").strip():
            yield prompt


def parse_args():
    parser = flags.Parser(description=__doc__.split("\n\n")[0])
    add, what = parser.add_argument, parser.add_mutually_exclusive_group().add_argument
    what("--prompt", nargs="+", action="extend", help="one or more prompts, each in quotes")
    what("--export", metavar="DIR", help="a folder for diffusers; goes with --run_dir, --epoch, --ema, --text_encoder")
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
    add("--init_image", metavar="FILE", help="begin with this picture, cut or squeezed as the run's training pictures")
    add("--strength", type=float, help="of --init_image: 0 keeps it, 1 forgets it (default: 0.75; with --mask 1)")
    add("--mask", metavar="FILE", help="repaint --init_image where this is white or transparent, keep it where black")
    what = "the pictures lead from the first prompt to the second, or from --seed to SEED, or both"
    add("--interpolate", type=int, nargs="?", const=math.inf, metavar="SEED", help=what)
    add("--steps_strip", action="store_true", help="also a strip and an animation of how the pictures emerge")
    add("--out", help="folder for the pictures (default: <run_dir>/samples)")
    args = parser.parse_args()
    typed = args.export is None and sys.stdin and sys.stdin.isatty()
    if not (args.prompt or args.prompts_file or args.export or typed):
        parser.error("--prompt: is missing; give a prompt in quotes, a --prompts_file, or a folder with --export DIR")
    for name, value in vars(args).items() if args.export else ():
        if name not in ("export", "run_dir", "epoch", "ema", "text_encoder") and value != parser.get_default(name):
            parser.error(f"--{name}: --export does not use it")
    for name in ("strength", "mask"):
        if getattr(args, name) is not None and args.init_image is None:
            parser.error(f"--{name}: goes with --init_image FILE, which is missing")
    if args.strength is None:
        args.strength = 1.0 if args.init_image is None or args.mask is not None else 0.75
    args.interpolate = args.seed if args.interpolate == math.inf else args.interpolate
    for name, most in ("seed", MAX_SEED - args.num_images), ("strength", 1), ("interpolate", MAX_SEED):
        if not 0 <= (getattr(args, name) or 0) <= most:
            parser.error(f"--{name}: {getattr(args, name)} is out of range; give 0 to {most}")
    if args.interpolate is not None and args.num_images < 2:
        parser.error("--interpolate: has two ends; give --num_images 2 or more")
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
    info.add_text("parameters", text)
    return save(folder, prompt, ending, "png", show.png_bytes(image, pnginfo=info))


def save(folder, prompt, ending, kind, data):
    """Save bytes under a free name made from the prompt -> the path."""
    slug = "-".join(words_of(prompt.replace("_", " "), version=1))[:60].encode()[:150].decode(errors="ignore")
    slug = slug.strip("-") or "prompt"
    path = free_name(os.path.join(folder, f"{slug}_{ending}"), kind)
    files.write_file(path, data)
    return path


def free_name(stem, kind):
    """A path that is not taken. Makes the .tmp that write_file() will fill: another sample.py then takes another name."""
    for number in itertools.count(1):
        path = f"{stem}{f'_{number}' if number > 1 else ''}.{kind}"
        with contextlib.suppress(FileExistsError):
            open(f"{path}.tmp", "xb").close()
            if not os.path.exists(path):
                return path
            os.remove(f"{path}.tmp")


if __name__ == "__main__":
    errors.run_script(main)
