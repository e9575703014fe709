"""Every setting, once: its name, default, unit and range; the presets; the command-line flags made from them.

What it is not: a config framework. One frozen dataclass, two small tables, one argparse parser, no torch. The defaults are
the recipe (preset `coco`); a preset states only what differs.
"""

import argparse
import math
import os
from dataclasses import dataclass, field, fields
from typing import get_args

LARGEST = 10**9  # of any number whose range says nothing else: beyond it lie slips of the hand
MAX_SEED = 2**32 - 1  # PyTorch's generator on the CPU uses no more of a seed
BETA_RANGE = ("beta_start", "beta_end", "scale_betas")  # settings of the linear schedule alone


class UserError(Exception):
    """Something the user can put right; the message is one line: `<file or flag>: <what>; <what to do>`."""


def printable(text):
    """Text from outside on one line, without control characters, escape codes and lone surrogates."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(str(text).split()))


def setting(default, text, *, low=None, high=None, choices=None, free=False):
    """A field with its help text and inclusive range (of each entry, if it is a tuple).

    free: a resumed run may have another value, because it changes no result (compile its last bits).
    """
    metadata = {"help": text, "low": low, "high": high, "choices": choices, "free": free}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class SDConfig:
    # data
    dataset: str = setting("coco", "coco, folder (your own pictures) or scenes (painted by scenes.py)",
                           choices=("coco", "folder", "scenes"))  # fmt: skip
    data_root: str = setting("data/coco", "folder of the data set: train2017/, val2017/ and annotations/ for coco; "
                             "pictures with captions for folder; not used by scenes", free=True)  # fmt: skip
    captions_json: str = setting("annotations/captions_train2017.json", "training captions of coco, within data_root")
    max_images: int = setting(40_000, "training pictures: a fixed choice of those with captions, by a hash of their names, "
                              "or all if there are no more", low=1)  # fmt: skip
    held_out_images: int = setting(
        500,
        "pictures kept out of training, for the figures of each epoch; without a held-out set at most a tenth",
        low=1,
    )
    held_out_combinations: int = setting(0, "scenes: how many of the 480 combinations of subject, colour and place no training "
                                         "scene shows, for evaluate.py to ask for", low=0, high=240)  # fmt: skip
    image_size: int = setting(128, "side of the square training pictures [pixels]", low=8)
    random_crop: int = setting(0, "pixels by which train_vae.py has its training pictures larger, to crop them at random at "
                               "each step; 0 = off", low=0)  # fmt: skip
    random_scale: bool = setting(False, "train_vae.py, with --random_crop: crops of any size up to the whole picture, shrunk "
                                 "to image_size")  # fmt: skip
    horizontal_flips: bool = setting(False, "mirror half of the training pictures of a step; not for captions that say left "
                                     "and right")  # fmt: skip
    captions_per_image: int = setting(0, "captions of a picture that are used, the first so many; 0 = all", low=0)
    skip_bad: bool = setting(False, "leave out pictures that cannot be read instead of stopping")
    cache_dir: str = setting("data/prepared", "where decoded pictures, latents and embedded captions are kept for the next run "
                             "(for 40,000 COCO pictures and CLIP 2 + 0.3 + 16 GB); '' = pictures and latents in memory only, "
                             "captions embedded at each use", free=True)  # fmt: skip
    num_workers: int | None = setting(None, "processes that read pictures; 0 = none but the main one, auto = one per "
                                      "processor, at most 16, or 4 where each starts anew", low=0, free=True)  # fmt: skip

    # VAE
    latent_channels: int = setting(4, "channels of the latent", low=1)
    block_out_channels: tuple[int, ...] = setting(
        (64, 128, 256, 256), "VAE channels per level; each level after the first halves the resolution", low=1
    )
    layers_per_block: int = setting(2, "VAE resnets per level", low=1)
    norm_num_groups: int = setting(32, "groups of the VAE's GroupNorms; divides its channel counts", low=1)
    beta: float = setting(1e-5, "weight of the KL term [MSE per nat]", low=0)
    l1_weight: float = setting(0.0, "weight of the L1 reconstruction term; 0 = off", low=0)
    ms_ssim_weight: float = setting(0.0, "weight of the MS-SSIM reconstruction term; 0 = off", low=0)
    equivariance: float = setting(0.0, "share of the steps in which turned or halved latents must decode to equally turned "
                                  "or halved pictures (EQ-VAE); 0 = off, 0.5 = half of them", low=0, high=1)  # fmt: skip

    normalize_latents: bool = setting(False, "shift and scale each latent channel to mean 0 and variance 1, by what is "
                                      "measured on the training pictures when the VAE is trained")  # fmt: skip
    finetune_decoder_of: str = setting("", "run directory whose finished VAE train_vae.py goes on with: the decoder alone, so "
                                       "that its U-Net stays valid (sample.py --vae); '' = a new VAE")  # fmt: skip

    # U-Net
    unet_block_out_channels: tuple[int, ...] = setting((128, 176, 224), "U-Net channels per level", low=1)
    unet_layers_per_block: int = setting(1, "U-Net resnets and transformers per level", low=1)
    unet_norm_num_groups: int = setting(16, "groups of the U-Net's GroupNorms; divides its channel counts", low=1)
    num_heads: int = setting(4, "heads of every attention of the U-Net", low=1)
    time_dim: int = setting(512, "width of the time embedding: 4 x the first U-Net channels", low=8)

    # text
    text_encoder: str = setting("clip", "clip (downloaded), hash (embedded), or a directory with a CLIP text model")
    text_dim: int = setting(512, "width of a token's embedding", low=1)
    text_length: int = setting(77, "tokens per caption, longer ones are cut; CLIP takes 77 and no other", low=1)

    # diffusion
    timesteps: int = setting(200, "T, the number of noise levels; for flow only the scale of the times that the U-Net is "
                             "told", low=1, high=100_000)  # fmt: skip
    beta_start: float = setting(1e-4, "noise variance added by the first step", low=1e-9, high=0.999)
    beta_end: float = setting(0.02, "noise variance added by the last step", low=1e-9, high=0.999)
    beta_schedule: str = setting("linear", "linear from beta_start to beta_end, or cosine, which needs neither",
                                 choices=("linear", "cosine"))  # fmt: skip
    scale_betas: bool = setting(
        False, "multiply the linear betas by 1000 / T, so that little signal is left at the last step"
    )
    rescale_betas_zero_snr: bool = setting(False, "shift the schedule so that no signal is left at the last step")
    prediction_type: str = setting("epsilon", "what the U-Net predicts: epsilon (the noise), v_prediction, or flow (flow "
                                   "matching, which has no betas)", choices=("epsilon", "v_prediction", "flow"))  # fmt: skip
    flow_times: str = setting("logit_normal", "times to train flow at: logit_normal (more in the middle) or uniform",
                              choices=("logit_normal", "uniform"))  # fmt: skip
    min_snr_gamma: float = setting(0.0, "signal-to-noise ratio above which a step's loss counts less (epsilon only); "
                                   "0 = off", low=0)  # fmt: skip
    caption_dropout: float = setting(
        0.0, "share of captions replaced by the empty one, which guidance needs", low=0, high=1
    )

    # sampling; flags of sample.py and evaluate.py come before these
    sample_steps: int = setting(0, "denoising steps of a picture; 0 = T", low=0, high=100_000)
    guidance_scale: float = setting(1.0, "how much the prompt is exaggerated; 1 = not", low=-LARGEST)
    guidance_interval: tuple[float, ...] = setting((0.0, 1.0), "part of the schedule to guide in, two numbers: 0 is clean, 1 "
                                                   "pure noise", low=0, high=1)  # fmt: skip

    # training
    batch_size: int = setting(32, "pictures per optimizer step", low=1)
    num_epochs: int = setting(15, "passes over the training pictures", low=1)
    lr: float = setting(1e-4, "learning rate of Adam", low=0)
    lr_schedule: str = setting("cosine", "cosine (annealed to 0) or constant", choices=("cosine", "constant"))
    lr_warmup_steps: int = setting(0, "steps over which the learning rate first rises from 0", low=0)
    adam_beta2: float = setting(0.999, "decay of Adam's mean of squared gradients", low=0, high=0.999999)
    weight_decay: float = setting(1e-4, "weight decay (L2) of Adam", low=0)
    max_grad_norm: float = setting(1.0, "gradients are clipped to this norm; 0 = they are not", low=0)
    ema_decay: float = setting(0.9999, "decay per step of the averaged U-Net weights", low=0, high=1)
    ema_warmup: bool = setting(False, "start the average with a short memory: decay at most (1 + step) / (10 + step)")
    ema_sigma_rel: float = setting(0.0, "width of the average as a share of the training so far, instead of ema_decay: the "
                                   "power function of EDM2; 0 = off", low=0, high=0.28)  # fmt: skip
    grad_accumulation: int = setting(
        1, "parts that a batch is computed in, one after the other, where memory is short", low=1
    )
    compile: bool | None = setting(None, "torch.compile the model: minutes at the start, faster steps after; auto = on CUDA "
                                   "in runs long enough to gain by it", free=True)  # fmt: skip
    mixed_precision: str = setting("auto", "no, bf16 (autocast), or auto: bf16 where the processor computes in it",
                                   choices=("auto", "no", "bf16"))  # fmt: skip
    save_every: int = setting(5, "epochs between checkpoints; the last epoch is always saved", low=1, free=True)
    save_minutes: float = setting(10.0, "minutes between saves within an epoch, the most that a crash can cost; "
                                  "0 = after every step", low=0, free=True)  # fmt: skip
    sample_prompts: tuple[str, ...] = setting(
        ("a dog on the grass", "a red sports car"), "prompts of the sample grid of each epoch"
    )
    seed: int = setting(0, "seed of everything that is random", low=0, high=MAX_SEED)

    def __post_init__(self):
        for f in fields(self):
            _check_range(f, getattr(self, f.name))
        self._check_diffusion()
        _check(self.prediction_type == "flow" or self.sample_steps <= self.timesteps, "sample_steps",
               f"{self.sample_steps} are more than the timesteps of training", f"give at most {self.timesteps}")  # fmt: skip
        _check(self.guidance_scale == 1 or self.caption_dropout > 0, "guidance_scale",
               "has nothing to compare with, unless captions are dropped in training",
               "give --caption_dropout too, or --guidance_scale 1")  # fmt: skip
        low_high = self.guidance_interval
        _check(len(low_high) == 2 and low_high[0] <= low_high[1], "guidance_interval",
               f"{' '.join(map(str, low_high))} is no interval", "give two rising numbers in 0 to 1")  # fmt: skip
        _check(self.ema_sigma_rel == 0 or self.ema_sigma_rel >= 0.01, "ema_sigma_rel",
               f"{self.ema_sigma_rel} is out of range", "give 0.01 to 0.28, or 0")  # fmt: skip
        _check(not (self.ema_warmup and self.ema_sigma_rel), "ema_sigma_rel", "has a warm-up of its own",
               "give --no-ema_warmup")  # fmt: skip
        _check(self.held_out_combinations == 0 or self.dataset == "scenes", "held_out_combinations",
               f"dataset {self.dataset} has no known combinations", "leave it out, or give --dataset scenes")  # fmt: skip
        _check(self.time_dim % 8 == 0, "time_dim", f"{self.time_dim} is not a multiple of 8", "give one")
        _check(self.time_dim == 4 * self.unet_block_out_channels[0], "time_dim", "is not 4 x the first U-Net channels",
               f"give --time_dim {4 * self.unet_block_out_channels[0]}")  # fmt: skip
        for name, divisor in (("block_out_channels", "norm_num_groups"),
                              ("unet_block_out_channels", "unet_norm_num_groups"),
                              ("unet_block_out_channels", "num_heads")):  # fmt: skip
            _check(all(c % getattr(self, divisor) == 0 for c in getattr(self, name)), name,
                   f"must be multiples of {divisor} ({getattr(self, divisor)})", "change either")  # fmt: skip
        factor = 2 ** (len(self.block_out_channels) + len(self.unet_block_out_channels) - 2)
        _check(self.image_size % factor == 0, "image_size", f"{self.image_size} cannot be halved by every level",
               f"give a multiple of {factor}")  # fmt: skip
        _check(self.random_crop > 0 or not self.random_scale, "random_scale", "has no larger pictures to choose from",
               "give --random_crop too")  # fmt: skip
        most, least_seen = (3 * self.image_size, "sixteenth") if self.random_scale else (self.image_size, "quarter")
        _check(self.random_crop <= most, "random_crop", f"{self.random_crop} would leave less than a {least_seen} of a picture",
               f"give at most {most}")  # fmt: skip
        _check(self.equivariance == 0 or self.latent_size % 2 == 0, "equivariance",
               f"needs latents that can be halved, these are {self.latent_size} wide",
               f"give --image_size a multiple of {2 * self.image_size // self.latent_size}")  # fmt: skip
        _check(not (self.equivariance and self.finetune_decoder_of), "equivariance",
               "shapes the latents, which finetuning the decoder leaves as they are", "give one of the two")  # fmt: skip
        lowest = self.latent_size // 2 ** (len(self.unet_block_out_channels) - 1)
        for side, channels, groups in ((self.latent_size, self.block_out_channels[-2:], "norm_num_groups"),
                                       (lowest, self.unet_block_out_channels[-2:], "unet_norm_num_groups")):  # fmt: skip
            _check(side > 1 or min(channels) > getattr(self, groups), groups, "leaves each GroupNorm one number at the lowest "
                   "resolution, which has no variance", "give fewer groups or a larger --image_size")  # fmt: skip
        smallest = self.image_size // (2 if self.equivariance else 1)  # picture that the loss sees
        _check(self.ms_ssim_weight == 0 or smallest >= 11, "ms_ssim_weight",
               f"its window is 11 pixels wide, the smallest picture {smallest}", "give a larger --image_size, or 0")  # fmt: skip

    def _check_diffusion(self):
        """Settings that contradict each other or would not be read."""
        _check(self.beta_start <= self.beta_end, "beta_start", "is above beta_end", "noise must grow with t")
        last = self.beta_end * (1000 / self.timesteps if self.scale_betas else 1)
        log_alpha_bar = sum(math.log1p(-b) for b in (self.beta_start, last)) / 2 * self.timesteps if last < 1 else 0
        flow, cosine = self.prediction_type == "flow", self.beta_schedule == "cosine"
        _check(log_alpha_bar > -200 or flow or cosine, "beta_end", "leaves no signal long before the last step",
               "give smaller betas or fewer --timesteps")  # fmt: skip
        _check(last < 1, "scale_betas", f"makes the last beta {last:.3g}, and it must be below 1",
               f"give more than {1000 * self.beta_end:.0f} --timesteps, or leave the flag out")  # fmt: skip
        unread = (*BETA_RANGE, "beta_schedule", "rescale_betas_zero_snr") if flow else BETA_RANGE if cosine else ()
        for f in (f for f in fields(self) if f.name in unread):
            _check(getattr(self, f.name) == f.default, f.name, f"{'flow matching' if flow else 'cosine'} does not use it",
                   "leave it out" + (", or give --prediction_type epsilon" if flow else ""))  # fmt: skip
        _check(flow or self.flow_times == "logit_normal", "flow_times", "is read by flow alone",
               "give --prediction_type flow, or leave it out")  # fmt: skip
        _check(self.prediction_type == "epsilon" or self.min_snr_gamma == 0, "min_snr_gamma",
               f"weighs the epsilon loss, not that of {self.prediction_type}", "leave it out")  # fmt: skip
        if self.rescale_betas_zero_snr:
            _check(self.prediction_type != "epsilon", "rescale_betas_zero_snr", "leaves no signal at the last step, where "
                   "epsilon tells nothing about the picture", "give --prediction_type v_prediction")  # fmt: skip
            _check(self.timesteps > 1, "rescale_betas_zero_snr", "needs two steps", "give more --timesteps")

    @property
    def latent_size(self):
        """Side of the latent: each VAE level after the first halves the picture."""
        return self.image_size // 2 ** (len(self.block_out_channels) - 1)


# A preset is what differs from the defaults above, for both trainers; VAE_PRESETS adds what differs for train_vae.py.
# The sizes of coco keep the recipe's U-Net of three levels, so that only the VAE knows how large a picture is: latents
# are 16 x 16 (64 and 128 pixels; the lowest level, with the image's self-attention, is 4 x 4) or 32 x 32 (256 and 512;
# 8 x 8). At 64 pixels the VAE has a level less. At 512 it has a level more, so a latent pixel stands for 16 x 16 pixels
# instead of 8 x 8, and four times the channels keep the ratio of numbers, 48 pixel values to one, that 4 have at 8 x 8.
# best is the recipe with what has won on the ladder of RESULTS.md, which was climbed on painted scenes; demo has that too,
# and is sized for two CPU cores and a few minutes: with one group per GroupNorm the small VAE learns faster. Much of a step of
# the U-Net is at this size what any step costs, hence two levels instead of three, and no smaller batches. More scenes
# instead of more epochs, because to paint them costs less than the end of an epoch. No guidance in the first steps, which
# settle a picture's mean colours: there it makes them vary more than those of real ones do. Half of the usual dropped
# captions are enough for it.
WINNERS = {
    "prediction_type": "flow",
    "caption_dropout": 0.1,
    "sample_steps": 50,
    "guidance_scale": 2.0,
    "guidance_interval": (0.0, 0.7),
    "ema_warmup": True,
}
PRESETS = {
    "coco": {},
    "best": {**WINNERS, "ema_decay": 0.999},
    "demo": {
        **WINNERS,
        "dataset": "scenes",
        "max_images": 7000,
        "held_out_images": 256,
        "image_size": 64,
        "block_out_channels": (16, 32, 64),
        "layers_per_block": 1,
        "norm_num_groups": 1,
        "unet_block_out_channels": (48, 96),
        "unet_norm_num_groups": 8,
        "time_dim": 192,
        "text_encoder": "hash",
        "text_length": 12,
        "num_epochs": 3,
        "lr": 2.3e-3,
        "lr_warmup_steps": 60,
        "caption_dropout": 0.05,
        "adam_beta2": 0.99,
        "weight_decay": 0.0,
        "ema_decay": 0.995,
    },
    "coco64": {"image_size": 64, "block_out_channels": (64, 128, 256)},
    "coco256": {"image_size": 256},
    "coco512": {"image_size": 512, "block_out_channels": (64, 128, 256, 256, 256), "latent_channels": 16},
}
COCO_VAE = {"lr_schedule": "constant", "weight_decay": 0.0, "max_grad_norm": 0.0}
VAE_PRESETS = {
    "coco": COCO_VAE,
    "best": COCO_VAE,
    "demo": {"batch_size": 8, "num_epochs": 1, "lr": 2e-3},
    "coco64": COCO_VAE,
    # the same activations at a time as at 128 pixels, and as much KL per pixel: it is a sum, where the MSE is a mean
    "coco256": COCO_VAE | {"grad_accumulation": 4, "beta": 2.5e-6},
    "coco512": COCO_VAE | {"grad_accumulation": 16, "beta": 6.25e-7},
}


def _check(ok, name, what, remedy):
    if not ok:
        raise UserError(f"--{name}: {what}; {remedy}")


def kind_of(f):
    """The type of a field's value, or of a tuple's entries. Where None may stand, which means auto, the other one."""
    return (get_args(f.type) or (f.type,))[0]


def _check_range(f, value):
    """Type, choices, finiteness and range of one field's value."""
    if value is None and f.default is None:
        return
    low, high, choices = (f.metadata[k] for k in ("low", "high", "choices"))
    high = LARGEST if high is None else high
    kind = tuple if isinstance(f.default, tuple) else kind_of(f)
    _check(isinstance(value, (kind, int) if kind is float else kind), f.name, f"{value!r} is of the wrong type",
           f"give a {kind.__name__}")  # fmt: skip
    entries = value if isinstance(value, tuple) else (value,)
    _check(len(entries) > 0, f.name, "is empty", "give at least one value")
    for v in entries:
        if choices:
            _check(v in choices, f.name, f"{v!r} is not a choice", f"choose from {', '.join(choices)}")
        if isinstance(v, float):
            _check(math.isfinite(v), f.name, f"{v} is not a finite number", "give a finite one")
        if isinstance(v, (int, float)):
            _check(low is None or v >= low, f.name, f"{v} is out of range", f"give {low} or more")
            _check(
                v <= high,
                f.name,
                f"{v:.3g} is out of range" if v < 1e300 else "is out of range",
                f"give {high} or less",
            )


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake ends in `error: <flag>: <what>; <what to do>` and exit code 2."""

    def error(self, message):
        message = message.removeprefix("argument ").replace("unrecognized arguments", "unknown flag")
        self.exit(2, f"error: {printable(message)[:500]}; see python {os.path.basename(self.prog)} --help\n")


def add_run_flags(parser):
    """Flags that the trainers share beside the fields of SDConfig."""
    parser.add_argument("--preset", choices=PRESETS, help="coco (the recipe), best (the recipe with what has won since), "
                        "coco64, coco256, coco512 (coco at other sizes) or demo (embedded data, minutes on a CPU); without "
                        "it: coco if its captions are there, else demo")  # fmt: skip
    parser.add_argument("--run_dir", help="folder for everything this run writes (default: runs/<preset>)")
    parser.add_argument("--overwrite", action="store_true", help="start over where a run already is")
    parser.add_argument("--max_steps", type=positive_int, metavar="N", help="stop after N steps as a whole run would")


def positive_int(text):
    digits = (
        text.isascii() and text.isdigit() and len(text) < 20
    )  # int() is slow, then refuses, where they are thousands
    if not digits or not 1 <= int(text) <= LARGEST:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a whole number from 1 to {LARGEST}")
    return int(text)


def add_config_flags(parser, defaults):
    """One flag per field of SDConfig, spelled like the field; a flag not given leaves nothing behind.

    defaults: the SDConfig whose values --help shows.
    """
    for f in fields(SDConfig):
        many, kind = isinstance(f.default, tuple), kind_of(f)
        value = getattr(defaults, f.name)
        shown = "auto" if value is None else " ".join(map(str, value)) if many else value
        options = dict(default=argparse.SUPPRESS, help=f"{f.metadata['help']} (default: {shown})".replace("%", "%%"))
        if kind is bool:
            parser.add_argument(f"--{f.name}", action=argparse.BooleanOptionalAction, **options)
        else:
            parser.add_argument(f"--{f.name}", type=kind, nargs="+" if many else None, metavar=kind.__name__, **options)


VAE_TRAINING = (  # flags that tell nothing to train_unet.py, or mean another thing there
    "random_crop", "random_scale", "beta", "l1_weight", "ms_ssim_weight", "equivariance", "finetune_decoder_of", "batch_size",
    "num_epochs", "lr", "lr_schedule", "lr_warmup_steps", "adam_beta2", "weight_decay", "max_grad_norm", "grad_accumulation",
    "save_every", "save_minutes", "compile",
)  # fmt: skip


def flags_to_hand_on(args):
    """What of the command line of train_vae.py the U-Net of this VAE needs too -> [words]."""
    words = []
    for name in (f.name for f in fields(SDConfig) if hasattr(args, f.name) and f.name not in VAE_TRAINING):
        value = getattr(args, name)
        values = value if isinstance(value, list) else [] if isinstance(value, bool) else [value]
        words += [f"--{'no-' if value is False else ''}{name}", *map(str, values)]
    return words


def choose_preset(args, given):
    """The preset and the reason for it, in the words of the first line that a trainer prints."""
    if args.preset:
        return args.preset, "as --preset says"
    if given.get("dataset") == "scenes":
        return "demo", "because of --dataset scenes"
    for name in ("dataset", "data_root", "captions_json"):
        if name in given:
            return "coco", f"because of --{name}"
    defaults = SDConfig()
    captions = os.path.join(defaults.data_root, defaults.captions_json)
    if os.path.exists(captions):
        return "coco", f"because {captions} is there"
    return "demo", f"because {captions} is not there; README.md says how to get COCO"


def parse_training_args(description, stage, argv=None):
    """Command line of a trainer -> (SDConfig, Namespace of the other flags). stage: "vae" or "unet".

    Later wins: defaults, preset, the preset's VAE stage, flags. Exits with code 2 on a mistake.
    """
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add_run_flags(parser)
    shown = SDConfig(**(PRESETS["coco"] | (VAE_PRESETS["coco"] if stage == "vae" else {})))
    add_config_flags(
        parser.add_argument_group("settings (fields of SDConfig), with the defaults of preset coco"), shown
    )
    args = parser.parse_args(argv)
    names = [f.name for f in fields(SDConfig)]
    given = {n: getattr(args, n) for n in names if hasattr(args, n)}
    args.given = given = {n: tuple(v) if isinstance(v, list) else v for n, v in given.items()}
    args.preset, reason = choose_preset(args, given)
    args.run_dir = os.path.join("runs", args.preset) if args.run_dir is None else args.run_dir
    try:
        _check(args.run_dir, "run_dir", "is empty", "give a folder")
        _check(args.preset != "demo" or given.get("dataset") or not {"data_root", "captions_json"} & set(given), "data_root",
               "preset demo uses no files", "leave out --preset demo, or --data_root and --captions_json")  # fmt: skip
        preset = PRESETS[args.preset] | (VAE_PRESETS[args.preset] if stage == "vae" else {})
        cfg = SDConfig(**(preset | given))
        _check(stage == "vae" or not cfg.finetune_decoder_of, "finetune_decoder_of", "is a flag of train_vae.py",
               "leave it out: a U-Net of that VAE stays valid as it is")  # fmt: skip
        _check(not cfg.finetune_decoder_of or os.path.realpath(cfg.finetune_decoder_of) != os.path.realpath(args.run_dir),
               "run_dir", "holds the VAE to be finetuned, which must stay as it is", "give another folder")  # fmt: skip
    except UserError as e:
        parser.exit(2, f"error: {printable(e)}\n")
    others = ", ".join(name for name in PRESETS if name != args.preset)
    print(f"preset {args.preset}, {reason}; the others, for --preset: {others}")
    return cfg, args
