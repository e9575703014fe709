"""Every setting, once: its name, default, unit and range; the rules between them; the presets.

What it is not: a config framework. One frozen dataclass, one table of rules, two of presets, no torch. The defaults are
the recipe (preset `coco`); a preset states only what differs. support/flags.py makes the flags from the fields.
"""

import math
from dataclasses import dataclass, field, fields
from typing import get_args

from support.errors import UserError

LARGEST = 10**9  # of any number whose range says nothing else: beyond it lie slips of the hand
MAX_SEED = 2**32 - 1  # PyTorch's generator on the CPU uses no more of a seed


def setting(default, text, low=None, high=None, *, choices=None, free=False):
    """A field with its help text and inclusive range (of each entry, if it is a tuple).

    free: may change while a run goes on, because it changes no weights (compile, grad_accumulation: the last bits).
    """
    metadata = {"help": text, "low": low, "high": high, "choices": choices, "free": free}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class SDConfig:
    # data
    dataset: str = setting("coco", "coco, your own folder, or painted scenes", choices=("coco", "folder", "scenes"))
    data_root: str = setting("data/coco", "folder of coco (train2017/, annotations/) or of your pictures", free=True)
    captions_json: str = setting("annotations/captions_train2017.json", "training captions of coco, within data_root")
    max_images: int = setting(40_000, "training pictures, chosen by a hash of their names", 1)
    held_out_images: int = setting(500, "pictures kept out of training, at most a tenth of a set that has none", 1)
    held_out_combinations: int = setting(0, "scenes: combinations of subject, colour, place never trained on", 0, 240)
    image_size: int = setting(128, "side of the square training pictures [pixels]", 8)
    resize: str = setting(
        "crop", "centre crop, white bars or squeezing to a square", choices=("crop", "pad", "squeeze")
    )
    random_crop: int = setting(0, "train_vae.py: crop at random from pictures larger by this [pixels]; 0 = off", 0)
    random_scale: bool = setting(False, "with --random_crop: crops of any size up to the whole picture, shrunk")
    horizontal_flips: bool = setting(False, "mirror half of the pictures; not where captions say left or right")
    captions_per_image: int = setting(0, "captions of a picture that are used, the first so many; 0 = all", 0)
    whole_captions: bool = setting(False, "folder: the text file of a picture is one caption, not one per line")
    follow_links: bool = setting(False, "read links that lead out of data_root, if they are your own", free=True)
    skip_bad: bool = setting(False, "leave out pictures that cannot be read instead of stopping")
    cache_dir: str = setting("data/prepared", "folder for prepared pictures, latents, captions; '' = none", free=True)
    num_workers: int | None = setting(None, "processes that read pictures; 0 = none but the main one", 0, free=True)

    # VAE
    latent_channels: int = setting(4, "channels of the latent", 1)
    block_out_channels: tuple[int, ...] = setting((64, 128, 256, 256), "VAE channels by level; each halves the size", 1)
    layers_per_block: int = setting(2, "VAE resnets per level", 1)
    norm_num_groups: int = setting(32, "groups of the VAE's GroupNorms; divides its channels", 1)
    beta: float = setting(1e-5, "weight of the KL term [MSE per nat]", 0)
    l1_weight: float = setting(0.0, "weight of the L1 reconstruction term; 0 = off", 0)
    ms_ssim_weight: float = setting(0.0, "weight of the MS-SSIM reconstruction term; 0 = off", 0)
    lpips_weight: float = setting(0.0, "weight of LPIPS, by the package lpips and its weights; 0 = off", 0)
    adversarial_weight: float = setting(
        0.0, "how hard a discriminator pulls at the decoder, beside the loss; 0 = off", 0
    )
    adversarial_start: int = setting(0, "steps of training before the discriminator begins", 0)
    matching_weight: float = setting(0.0, "weight of its features' difference in that pull; 0 = off", 0)
    finetune_decoder_of: str = setting("", "run whose decoder train_vae.py goes on training; '' = a new VAE")

    # U-Net
    unet_block_out_channels: tuple[int, ...] = setting((128, 176, 224), "U-Net channels, a level each", 1)
    unet_layers_per_block: int = setting(1, "U-Net resnets and transformers per level", 1)
    unet_norm_num_groups: int = setting(16, "groups of the U-Net's GroupNorms; divides its channels", 1)
    num_heads: int = setting(4, "heads of every attention of the U-Net; divides its channels", 1)
    time_dim: int = setting(512, "width of the time embedding: 4 x the first U-Net channels", 8)

    # text
    text_encoder: str = setting(
        "clip",
        "clip (downloaded), hash (built in: tells words apart), words (built in: learns from the captions which are "
        "alike, too), or a directory with a CLIP text model",
    )
    text_dim: int = setting(512, "width of a token's embedding", 1)
    text_length: int = setting(77, "tokens per caption, longer ones are cut; CLIP takes 77 and no other", 1)

    # diffusion
    timesteps: int = setting(200, "T, the number of noise levels; for flow the scale of the times", 1, 100_000)
    beta_start: float = setting(1e-4, "noise variance added by the first step", 1e-9, 0.999)
    beta_end: float = setting(0.02, "noise variance added by the last step", 1e-9, 0.999)
    scale_betas: bool = setting(False, "betas x 1000 / T: little signal is left at the last step")
    prediction_type: str = setting("epsilon", "what the U-Net predicts", choices=("epsilon", "v_prediction", "flow"))
    flow_time_mean: float = setting(0.0, "flow: times are sigmoid(N(this, 1)); above 0: more of the noisy end", -3, 3)
    caption_dropout: float = setting(0.0, "share of captions replaced by the empty one, which guidance needs", 0, 1)

    # sampling; flags of sample.py and evaluate.py come before these
    sample_steps: int = setting(0, "denoising steps of a picture; 0 = T", 0, 100_000, free=True)
    guidance_scale: float = setting(1.0, "how much the prompt is exaggerated; 1 = not", -LARGEST, free=True)
    guidance_interval: tuple[float, ...] = setting((0.0, 1.0), "times to guide in: 0 clean, 1 noise", 0, 1, free=True)
    guidance_rescale: float = setting(0.0, "how much of the contrast that guidance adds is taken back", 0, 1, free=True)

    # training
    batch_size: int = setting(32, "pictures per optimizer step", 1)
    num_epochs: int = setting(15, "passes over the training pictures", 1)
    init_from: str = setting("", "run from whose trained weights a new one starts; '' = random ones")
    optimizer: str = setting("adam", "adam, or muon for the hidden matrices", choices=("adam", "muon"))
    lr: float = setting(1e-4, "learning rate", 0)
    lr_schedule: str = setting("cosine", "cosine (annealed to 0) or constant", choices=("cosine", "constant"))
    lr_warmup_steps: int = setting(0, "steps over which the learning rate first rises from 0", 0)
    adam_beta2: float = setting(0.999, "decay of Adam's mean of squared gradients", 0, 0.999999)
    weight_decay: float = setting(1e-4, "weight decay (L2) of what Adam trains; Muon's matrices have none", 0)
    max_grad_norm: float = setting(1.0, "gradients are clipped to this norm; 0 = they are not", 0)
    ema_decay: float = setting(0.9999, "decay per step of the averaged U-Net weights", 0, 1)
    ema_warmup: bool = setting(False, "start the average with a short memory: decay at most (1 + step) / (10 + step)")
    grad_accumulation: int = setting(1, "parts a batch is computed in, where memory is short", 1, free=True)
    grad_checkpointing: bool = setting(
        False, "keep of each block its input, compute the rest anew backwards: less memory, more time", free=True
    )
    compile: bool | None = setting(None, "torch.compile the model; auto = on CUDA in runs that gain by it", free=True)
    mixed_precision: str = setting("auto", "auto: bf16 where the processor has it", choices=("auto", "no", "bf16"))
    save_every: int = setting(5, "epochs between checkpoints; the last epoch is always saved", 1, free=True)
    keep_last: int = setting(0, "checkpoints that are kept, the newest so many; 0 = all", 0, free=True)
    save_minutes: float = setting(10.0, "minutes between saves within an epoch; 0 = after every step", 0, free=True)
    tensorboard: bool = setting(False, "write events for TensorBoard too, where it is installed", free=True)
    sample_prompts: tuple[str, ...] = setting(
        ("a dog on the grass", "a red sports car"), "prompts shown at each epoch", free=True
    )
    seed: int = setting(0, "seed of everything that is random", 0, MAX_SEED)

    def __post_init__(self):
        for f in fields(self):
            check_field(f, getattr(self, f.name))
        for name, right, what in rules(self):
            check(right, name, what)

    @property
    def latent_size(self):
        """Side of the latent: each VAE level after the first halves the picture."""
        return self.image_size // 2 ** (len(self.block_out_channels) - 1)


def rules(c):
    """What settings demand of each other -> (setting, whether it is right, what is wrong; what to do), one by one."""
    flow, last_beta = c.prediction_type == "flow", c.beta_end * (1000 / c.timesteps if c.scale_betas else 1)
    for name in ("beta_start", "beta_end", "scale_betas"):
        unset = getattr(c, name) == SDConfig.__dataclass_fields__[name].default
        yield name, unset or not flow, "flow matching does not use it; leave it out, or give --prediction_type epsilon"
    yield "flow_time_mean", flow or c.flow_time_mean == 0, "is read by flow alone; leave it out"
    yield "beta_start", c.beta_start <= c.beta_end, "is above beta_end; noise must grow with t"
    yield "scale_betas", last_beta < 1, f"makes the last beta {last_beta:.3g}, at least 1; give more --timesteps"
    log_alpha_bar = (math.log1p(-c.beta_start) + math.log1p(-last_beta)) / 2 * c.timesteps
    signal = flow or log_alpha_bar > -200
    yield "beta_end", signal, "leaves no signal long before the last step; give less, or fewer --timesteps"
    yield "sample_steps", flow or c.sample_steps <= c.timesteps, f"above the T of training; give at most {c.timesteps}"
    guidable = c.caption_dropout > 0 or c.guidance_scale == 1
    yield "guidance_scale", guidable, "needs a U-Net trained with --caption_dropout; give both"
    interval = c.guidance_interval
    rising = len(interval) == 2 and interval[0] <= interval[1]
    yield "guidance_interval", rising, f"{' '.join(map(str, interval))}: no interval; give two rising numbers in 0 to 1"
    known = c.dataset == "scenes" or not c.held_out_combinations
    yield "held_out_combinations", known, f"dataset {c.dataset} has no known combinations; give --dataset scenes"
    yield "time_dim", c.time_dim % 8 == 0, f"{c.time_dim} is not a multiple of 8; give one"
    width = 4 * c.unet_block_out_channels[0]
    yield "time_dim", c.time_dim == width, f"is not 4 x the first U-Net channels; give --time_dim {width}"
    factor = 2 ** (len(c.block_out_channels) + len(c.unet_block_out_channels) - 2)
    halves = c.image_size % factor == 0
    yield "image_size", halves, f"{c.image_size} cannot be halved by every level; give a multiple of {factor}"
    yield "random_scale", c.random_crop > 0 or not c.random_scale, "has no larger pictures; give --random_crop too"
    most, least = (3 * c.image_size, "sixteenth") if c.random_scale else (c.image_size, "quarter")
    yield "random_crop", c.random_crop <= most, f"leaves less than a {least} of a picture; give at most {most}"
    lowest = c.latent_size // 2 ** (len(c.unet_block_out_channels) - 1)
    for name, divisor, side in (
        ("block_out_channels", "norm_num_groups", c.latent_size),
        ("unet_block_out_channels", "unet_norm_num_groups", lowest),
        ("unet_block_out_channels", "num_heads", None),
    ):
        channels, number = getattr(c, name), getattr(c, divisor)
        divided = all(count % number == 0 for count in channels)
        yield name, divided, f"must be multiples of {divisor} ({number}); change either"
        varies = side != 1 or min(channels[-2:]) > number
        yield divisor, varies, "leaves each GroupNorm one number, at 1 x 1; give fewer groups or a larger --image_size"
    for name in ("adversarial_start", "matching_weight"):
        used = c.adversarial_weight > 0 or not getattr(c, name)
        yield name, used, f"acts with --adversarial_weight alone; give both, or --{name} 0"
    whole = not (c.compile and c.adversarial_weight)
    yield "compile", whole, "does not go with --adversarial_weight; leave one out"
    seen = c.image_size >= 16 or not c.adversarial_weight
    what = f"its discriminator sees 16 pixels at least, the pictures have {c.image_size}; give larger ones"
    yield "adversarial_weight", seen, what
    fits = c.image_size >= 11 or not c.ms_ssim_weight
    yield "ms_ssim_weight", fits, f"its window is 11 pixels wide, the pictures {c.image_size}; give 0"


def check(right, name, what):
    if not right:
        raise UserError(f"--{name}: {what}")


def check_field(f, value):
    """Type, choices, finiteness and range of one field's value."""
    if value is None and f.default is None:
        return
    low, high, choices = (f.metadata[name] for name in ("low", "high", "choices"))
    high = LARGEST if high is None else high
    kind, entries = kind_of(f), value if isinstance(value, tuple) else (value,)
    right_type = all(isinstance(v, (kind, int) if kind is float else kind) for v in entries)
    right_type &= isinstance(value, tuple) == isinstance(f.default, tuple)
    check(right_type, f.name, f"{value!r} is of the wrong type; give a {kind.__name__}")
    check(len(entries) > 0, f.name, "is empty; give at least one value")
    for v in entries:
        if choices:
            check(v in choices, f.name, f"{v!r} is not a choice; choose from {', '.join(choices)}")
        if isinstance(v, float):
            check(math.isfinite(v), f.name, f"{v} is not a finite number; give a finite one")
        if isinstance(v, (int, float)):
            check(low is None or v >= low, f.name, f"{v} is out of range; give {low} or more")
            shown = f"{v:.3g} " if v < 1e300 else ""  # an int may be too large for a float
            check(v <= high, f.name, f"{shown}is out of range; give {high} or less")


def kind_of(f):
    """The type of a field's value, or of a tuple's entries; of a field that may be None (auto), the other type."""
    return (get_args(f.type) or (f.type,))[0]


# ---- Presets: what differs from the defaults above, for both trainers ------------------------------------

FLOW_WINS = {  # what won on the ladders of docs/notebook.md
    "prediction_type": "flow",
    "flow_time_mean": 0.5,
    "sample_steps": 50,
    "caption_dropout": 0.05,
    "adam_beta2": 0.99,
    "weight_decay": 0.0,
    "ema_warmup": True,
}
PHOTOGRAPHS = {  # a caption says little about a photograph, and most of it at the noisy end
    **FLOW_WINS,
    "guidance_scale": 2.8,
    "guidance_interval": (0.3, 0.7),  # in the first steps it costs variety, in the last ones it changes nothing
    "optimizer": "muon",
    "lr_warmup_steps": 100,
}
SMALL_NETS = {  # for two CPU cores
    "image_size": 64,
    "block_out_channels": (16, 32, 64),
    "layers_per_block": 1,
    "norm_num_groups": 1,  # the small VAE learns faster with it
    "unet_block_out_channels": (48, 96),  # two levels: at this size much of a step is what any step costs
    "unet_norm_num_groups": 8,
    "time_dim": 192,
    "text_encoder": "hash",
    "lr": 2.3e-3,
    "ema_decay": 0.995,
}
PRESETS = {
    "coco": {},  # the recipe
    "best": {**PHOTOGRAPHS, "lr": 1e-3, "ema_decay": 0.999},
    "best64": {  # an hour of one core for 6,400 pictures
        **PHOTOGRAPHS,
        **SMALL_NETS,
        "text_encoder": "words",
        "text_length": 32,
        "num_epochs": 36,
    },
    "demo": {  # painted scenes, in minutes
        **FLOW_WINS,
        **SMALL_NETS,
        "dataset": "scenes",
        "max_images": 3700,
        "held_out_images": 256,
        "unet_block_out_channels": (48, 80),
        "text_length": 12,
        "num_epochs": 3,
        "batch_size": 16,
        "optimizer": "muon",
        "lr": 4e-3,
        "lr_warmup_steps": 30,
        "guidance_scale": 2.0,
        "guidance_interval": (0.0, 0.7),  # in the first steps it makes the mean colours of scenes vary too much
    },
    # other sizes keep the U-Net; 256 and 512 have 48 pixel values to each latent number, as 128 has
    "coco64": {"image_size": 64, "block_out_channels": (64, 128, 256)},
    "coco256": {"image_size": 256},
    "coco512": {"image_size": 512, "block_out_channels": (64, 128, 256, 256, 256), "latent_channels": 16},
}
COCO_VAE = {"lr_schedule": "constant", "weight_decay": 0.0, "max_grad_norm": 0.0}
VAE_PRESETS = {  # what differs besides for train_vae.py; with the recipe's beta a fifth of the error is noise of the latents
    "coco": COCO_VAE,
    "best": {"optimizer": "adam", "lr": 5e-4, "beta": 1e-6},
    "best64": {"batch_size": 8, "num_epochs": 3, "lr": 2.5e-3, "beta": 1e-6},
    "demo": {"max_images": 1920, "batch_size": 4, "num_epochs": 1, "lr": 2.5e-3, "beta": 1e-6},
    "coco64": COCO_VAE,
    # parts of a batch as large as at 128 pixels, and as much KL per pixel: the KL is a sum, the MSE a mean
    "coco256": COCO_VAE | {"grad_accumulation": 4, "beta": 2.5e-6},
    "coco512": COCO_VAE | {"grad_accumulation": 16, "beta": 6.25e-7},
}
SHARPER = {"adversarial_weight": 0.7, "matching_weight": 20.0}
FINETUNING_PRESETS = {  # what differs besides for train_vae.py --finetune_decoder_of
    "best": SHARPER,
    "best64": {**SHARPER, "optimizer": "adam", "lr": 5e-4, "num_epochs": 4},
    "demo": {
        **SHARPER,
        "max_images": 7000,
        "batch_size": 8,
        "num_epochs": 3,
        "optimizer": "adam",
        "lr": 5e-4,
        "lr_warmup_steps": 60,
    },
}
