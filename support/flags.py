"""Command lines: the flags made from the fields of SDConfig, the preset that is chosen, the flags of sampling.

What it is not: it holds no defaults of the training; those are in config.py.
"""

import argparse
import os
from dataclasses import fields, replace

from config import FINETUNING_PRESETS, LARGEST, PRESETS, VAE_PRESETS, SDConfig, check, kind_of
from samplers import SAMPLERS, choose_sampler
from support.errors import UserError, printable, usage_error, warn
from support.signals import command_line

VAE_TRAINING = (  # flags that tell train_unet.py nothing, or another thing
    "random_crop random_scale beta l1_weight ms_ssim_weight lpips_weight adversarial_weight adversarial_start matching_weight "
    "finetune_decoder_of batch_size num_epochs init_from optimizer lr lr_schedule lr_warmup_steps adam_beta2 weight_decay "
    "max_grad_norm grad_accumulation grad_checkpointing save_every keep_last save_minutes compile"
)
PRESET_HELP = (
    "coco (the recipe), best (the recipe with what has won since), best64 (the same at 64 pixels, for a laptop), coco64, "
    "coco256, coco512 (coco at other sizes) or demo (built-in data, minutes on a CPU); default: coco if its captions are "
    "there, else demo"
)


SETTINGS = [f.name for f in fields(SDConfig)]
GUIDANCE = "guidance_scale", "guidance_interval", "guidance_rescale"  # of a run; flags of sampling come before them


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake ends in `error: <flag>: <what>; <what to do>` and exit code 2."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message):
        message = message.removeprefix("argument ").replace("unrecognized arguments", "unknown flag")
        self.exit(2, f"error: {printable(message)[:500]}; see python {os.path.basename(self.prog)} --help\n")


def positive_int(text):
    digits = text.isascii() and text.isdigit() and len(text) < 20  # int() of thousands of digits is slow
    if not digits or not 1 <= int(text) <= LARGEST:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a whole number from 1 to {LARGEST}")
    return int(text)


# ---- Training -------------------------------------------------------------------------------------------


def parse_training_args(description, stage, argv=None):
    """Command line of a trainer -> (SDConfig, Namespace of the other flags). stage: "vae" or "unet".

    Later wins: defaults, preset, the preset's VAE stage, its finetuning, flags. Exits with code 2 on a mistake.
    """
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, help=PRESET_HELP)
    parser.add_argument("--run_dir", help="folder for everything this run writes (default: runs/<preset>)")
    parser.add_argument("--overwrite", action="store_true", help="start over where a run already is")
    parser.add_argument("--max_steps", type=positive_int, metavar="N", help="stop after N steps as a whole run would")
    group = parser.add_argument_group("settings (fields of SDConfig), with the defaults of preset coco")
    add_config_flags(group, SETTINGS, preset_config("coco", stage))
    args = parser.parse_args(argv)
    args.given = given = given_settings(args, SETTINGS)
    args.preset, reason = choose_preset(args.preset, given)
    args.run_dir = os.path.join("runs", args.preset) if args.run_dir is None else args.run_dir
    try:
        check(args.run_dir, "run_dir", "is empty; give a folder")
        own_files = {"data_root", "captions_json"} & set(given) and not given.get("dataset")
        what = "preset demo uses no files; leave out --preset demo, or --data_root and --captions_json"
        check(args.preset != "demo" or not own_files, "data_root", what)
        cfg = preset_config(args.preset, stage, given)
        check_sources(cfg, args.run_dir, stage)
    except UserError as e:
        usage_error(e)
    others = ", ".join(name for name in PRESETS if name != args.preset)
    if os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK") == "0":
        print(f"preset {args.preset}, {reason}; the others, for --preset: {others}")
    return cfg, args


def preset_config(preset, stage, given=()):
    """A preset as a trainer sees it, with the settings that the user has given."""
    given, vae = dict(given), VAE_PRESETS[preset] if stage == "vae" else {}
    sharper = FINETUNING_PRESETS.get(preset, {}) if stage == "vae" and given.get("finetune_decoder_of") else {}
    settings = PRESETS[preset] | vae | sharper | given
    if settings.get("prediction_type") != "flow" and "flow_time_mean" not in given:
        settings.pop("flow_time_mean", None)  # the preset's, which flow alone reads
    return SDConfig(**settings)


def add_config_flags(parser, names, shown=None):
    """One flag per field of SDConfig, spelled like the field; a flag not given leaves nothing behind.

    shown: the SDConfig whose values --help shows as defaults; without it they are those of a run.
    """
    for f in (f for f in fields(SDConfig) if f.name in names):
        many, kind, value = isinstance(f.default, tuple), kind_of(f), getattr(shown, f.name, "the run's")
        text = "auto" if value is None else " ".join(map(str, value)) if isinstance(value, tuple) else value
        options = dict(default=argparse.SUPPRESS, help=f"{f.metadata['help']} (default: {text})".replace("%", "%%"))
        if kind is bool:
            parser.add_argument(f"--{f.name}", action=argparse.BooleanOptionalAction, **options)
        else:
            parser.add_argument(f"--{f.name}", type=kind, nargs="+" if many else None, metavar=kind.__name__, **options)


def given_settings(args, names):
    """-> {name: value} of those settings that are on the command line."""
    given = {name: getattr(args, name) for name in names if hasattr(args, name)}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


def choose_preset(asked, given):
    """The preset and the reason for it, in the words of the first line that a trainer prints."""
    if asked:
        return asked, "as --preset says"
    if given.get("dataset") == "scenes":
        return "demo", "because of --dataset scenes"
    for name in ("dataset", "data_root", "captions_json"):
        if name in given:
            return "coco", f"because of --{name}"
    captions = os.path.join(SDConfig.data_root, SDConfig.captions_json)
    if os.path.exists(captions):
        return "coco", f"because {captions} is there"
    return "demo", f"because {captions} is not there; README.md says how to get COCO"


def check_sources(cfg, run_dir, stage):
    """--finetune_decoder_of is for train_vae.py. What it or --init_from names stays as it is: the run is another."""
    source = cfg.finetune_decoder_of
    remedy = "is a flag of train_vae.py; leave it out: a U-Net of that VAE stays valid as it is"
    check(stage == "vae" or not source, "finetune_decoder_of", remedy)
    check(not (source and cfg.init_from), "init_from", "--finetune_decoder_of says where to start; leave one out")
    for used, what in ((source, "holds the VAE to be finetuned"), (cfg.init_from, "is what --init_from names")):
        own_folder = not used or os.path.realpath(used) != os.path.realpath(run_dir)
        check(own_folder, "run_dir", f"{what}, which must stay as it is; give another folder")


def flags_to_hand_on(given):
    """What of the command line of train_vae.py the U-Net of this VAE needs too -> [words]."""
    return flag_words({name: value for name, value in given.items() if name not in VAE_TRAINING.split()})


def flag_words(given):
    words = []
    for name, value in given.items():
        values = value if isinstance(value, tuple) else () if isinstance(value, bool) else (value,)
        words += [f"--{'no-' if value is False else ''}{name}", *map(str, values)]
    return words


def training_command(kind, run_dir, manifest):
    """A command with the settings of a training's manifest; it states what its preset does not."""
    cfg, preset = manifest["cfg"], manifest.get("preset")
    preset = preset if preset in PRESETS else "coco"
    source = {"finetune_decoder_of": cfg.finetune_decoder_of} if cfg.finetune_decoder_of else {}
    usual = preset_config(preset, kind, source)
    given = source | {name: getattr(cfg, name) for name in SETTINGS if getattr(cfg, name) != getattr(usual, name)}
    if steps := manifest["settings"].get("max_steps"):
        given["max_steps"] = steps
    return command_line("python", f"train_{kind}.py", "--preset", preset, "--run_dir", run_dir, *flag_words(given))


# ---- Sampling -------------------------------------------------------------------------------------------


def example_caption(captions):
    """The first caption with a word in it, to show what this data is asked for with. captions: lists of strings."""
    return printable(next((text for texts in captions for text in texts if text.strip()), ""))


def sampling_command(prompt, *words):
    """A command of sample.py that can be pasted into a shell, whatever the prompt."""
    asked = [f"--prompt={prompt}"] if prompt.startswith("-") else ["--prompt", prompt]
    return command_line("python", "sample.py", *words, *asked)


def warn_of_lost_quotes(flag, prompts, known):
    """One line if several prompts are single words, where the captions that the run knows are phrases."""
    words = [printable(prompt) for prompt in prompts if len(prompt.split()) == 1]
    if len(words) > 1 and " " in f"{known}":
        what = f"{len(words)} prompts are single words; if they are one, put it in quotes"
        warn(f"{flag}: {what}: {command_line(flag, ' '.join(words))}")


def add_sampling_flags(parser):
    """What sample.py and evaluate.py ask of diffusion.sample()."""
    add = parser.add_argument
    add("--steps", type=positive_int, help="denoising steps, at most T but for flow (default: the run's sample_steps)")
    add("--sampler", choices=SAMPLERS, help="ddpm, ddim or dpmpp_2m; for flow euler or heun (default: ddpm, euler)")
    add("--eta", type=float, default=0.0, help="randomness of ddim, 0 to 1 (default: 0)")
    add_config_flags(parser, GUIDANCE)
    add("--negative_prompt", default="", help="what guidance leads away from (default: the empty caption)")


def sampling_options(args, cfg):
    """The flags as arguments of sample(); ends with code 2 and one line if they do not fit the run or each other."""
    try:
        return check_sampling(args, cfg, warn)
    except UserError as e:
        usage_error(e)


def check_sampling(args, cfg, warn):
    """The flags as arguments of sample(); UserError if they do not fit the run or each other, warn(line) in doubt."""
    steps, flow = args.steps or cfg.sample_steps or cfg.timesteps, cfg.prediction_type == "flow"
    guidance = {name: getattr(cfg, name) for name in GUIDANCE} | given_settings(args, GUIDANCE)
    scale = guidance["guidance_scale"]
    ddim = "leave it out" if flow else "give --sampler ddim, or leave it out"
    check(flow or steps <= cfg.timesteps, "steps", f"{steps} is out of range; give 1 to {cfg.timesteps}")
    check(0 <= args.eta <= 1, "eta", f"{args.eta} is out of range; give 0 to 1")
    check(args.eta == 0 or args.sampler == "ddim", "eta", f"is read by ddim alone; {ddim}")
    replace(cfg, **guidance, caption_dropout=cfg.caption_dropout or 1.0)  # where it was 0, there is a warning below
    lacking = "acts by guidance alone; give a --guidance_scale above 1"
    check(scale != 1 or not args.negative_prompt, "negative_prompt", lacking)
    try:
        sampler = choose_sampler(cfg.prediction_type, args.sampler)
    except ValueError as e:
        raise UserError(f"--sampler: {e}") from None
    if scale != 1 and not cfg.caption_dropout:
        warn("the run was trained without --caption_dropout; guidance has nothing to compare with")
    options = {"num_steps": steps, "sampler": sampler, "eta": args.eta, "guidance_scale": scale}
    return options | {"negative_prompt": args.negative_prompt} | guidance
