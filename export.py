"""A trained run as a folder that diffusers opens: StableDiffusionPipeline if it was trained with CLIP, else its models.

  python sample.py --export DIR

Writes, all of it or nothing: vae/ and unet/ (safetensors, float32), scheduler/, README.md (a model card with the
training's facts and code that runs), and with CLIP text_encoder/, tokenizer/ and model_index.json, which make it a
pipeline. A run with the embedded encoder gets text_encoder.py instead, whose embeddings the pipeline takes.
What it is not: diffusers, which is never imported here, nor a conversion: the modules of vae.py and unet.py bear
diffusers' names already. This is the room for what else its format wants to be told.

Format: what diffusers' own save_pretrained() writes. Opened with diffusers 0.42 beside transformers 5.24, and with 0.35
beside 4.57.
"""

import contextlib
import json
import os
import shutil

import torch
from safetensors.torch import save

import text_encoder
from checkpoint import check_text_encoder, load_models, plain_weights, read_file, read_manifest, sync_folder, write_file
from config import UserError, printable
from text_encoder import CLIP_NAME, CLIP_REVISION, ClipTextEncoder, make_text_encoder
from training import read_csv

DIFFUSERS = "0.35.0"  # whose format this is; below 0.9 the pipeline would overrule the size of the latents
WEIGHTS = "diffusion_pytorch_model.safetensors"
MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline", "_diffusers_version": DIFFUSERS,
    "vae": ["diffusers", "AutoencoderKL"], "unet": ["diffusers", "UNet2DConditionModel"],
    "scheduler": ["diffusers", "DDPMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
    "safety_checker": [None, None], "feature_extractor": [None, None], "image_encoder": [None, None],
    "requires_safety_checker": False,
}  # fmt: skip


def export_run(folder, run_dir, ema=False, source=None):
    """Write the newest epoch of a run to `folder`, which must not exist or be empty -> the class that opens it.

    source: "clip" or the directory of the run's CLIP, if it is no longer where training found it. UserError or
    OSError, in one line, if anything cannot be read or written; then there is no such folder.
    """
    if os.path.lexists(folder) and not (os.path.isdir(folder) and not os.listdir(folder)):
        raise UserError(f"--export {folder}: is there already, and not an empty folder; give another name")
    cfg, name, vae, unet, t_embedder = load_models(run_dir, ema, torch.device("cpu"))
    encoder = make_text_encoder(source or cfg.text_encoder, cfg.text_dim, cfg.text_length, cfg.text_encoder)
    check_text_encoder(run_dir, encoder)
    with_clip = isinstance(encoder, ClipTextEncoder)
    pipeline = with_clip and cfg.prediction_type != "flow"  # which StableDiffusionPipeline does not drive
    if cfg.normalize_latents:
        raise UserError("--export: diffusers' pipeline knows no latents that are normalised by channel; train without "
                        "--normalize_latents")  # fmt: skip
    with whole_folder(folder) as new:
        unet_weights = plain_weights(unet)
        unet_weights |= {f"time_embedding.{k}": v for k, v in plain_weights(t_embedder).items()}
        write_model(os.path.join(new, "vae"), vae_config(cfg), plain_weights(vae), WEIGHTS)
        write_model(os.path.join(new, "unet"), unet_config(cfg), unet_weights, WEIGHTS)
        write_json(os.path.join(new, "scheduler", "scheduler_config.json"), scheduler_config(cfg))
        if with_clip:
            write_clip(new, encoder)
        else:
            write_file(os.path.join(new, "text_encoder.py"), read_file(text_encoder.__file__, most=1 << 20))
        if pipeline:
            write_json(os.path.join(new, "model_index.json"), MODEL_INDEX)
        card = model_card(cfg, run_dir, name, vae, unet_weights, with_clip)
        write_file(os.path.join(new, "README.md"), card.encode())
    return "StableDiffusionPipeline" if pipeline else "AutoencoderKL and UNet2DConditionModel"


# ---- Files ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def whole_folder(folder):
    """-> a new folder beside `folder` that takes its name when the block ends well, and is deleted otherwise."""
    folder = os.path.abspath(folder)
    new = f"{folder}.{os.getpid()}.tmp"
    os.makedirs(new)
    try:
        yield new
        if os.path.isdir(folder):
            os.rmdir(folder)  # an empty one; Windows does not rename onto it
        os.rename(new, folder)
        sync_folder(os.path.dirname(folder))
    except OSError as e:
        raise UserError(f"--export {folder}: could not be written ({e.strerror or e}); mend that, or give another "
                        "name") from None  # fmt: skip
    finally:
        shutil.rmtree(new, ignore_errors=True)


def write_json(path, settings):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    write_file(path, (json.dumps(settings, indent=2) + "\n").encode())


def write_model(folder, settings, weights, name):
    """config.json and the weights in float32. Not by safetensors' save_file(), whose files others may not read."""
    write_json(os.path.join(folder, "config.json"), settings)
    write_file(os.path.join(folder, name), save({k: v.float() for k, v in weights.items()}, {"format": "pt"}))


def write_clip(folder, encoder):
    """Text model and tokenizer; what the pipeline does otherwise than our encoder (padding, length) is set in them."""
    settings = json.loads(encoder.model.config.to_json_string())
    settings |= {"architectures": ["CLIPTextModel"], "dtype": "float32"}
    # the prefix is that of the hub's files; transformers 5 reads names with and without it, 4 only with it
    weights = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in plain_weights(encoder.model).items()}
    write_model(os.path.join(folder, "text_encoder"), settings, weights, "model.safetensors")
    tokenizer = encoder.tokenizer
    tokenizer.pad_token, tokenizer.model_max_length = tokenizer.eos_token, encoder.max_length
    write_tokenizer(os.path.join(folder, "tokenizer"), tokenizer)


def write_tokenizer(folder, tokenizer):
    try:
        tokenizer.save_pretrained(folder)
        tokenizer.backend_tokenizer.model.save(folder)  # vocab.json and merges.txt, which transformers 4 asks for
    except Exception as e:  # what the library raises when the disk is full has no class of its own
        raise OSError(f"tokenizer: {e}") from None
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        write_file(path, read_file(path, most=1 << 30))  # again, because the library does not flush to the disk


# ---- Settings in diffusers' names -----------------------------------------------------------------------


def vae_config(cfg):
    n = len(cfg.block_out_channels)
    return {
        "_class_name": "AutoencoderKL", "_diffusers_version": DIFFUSERS, "sample_size": cfg.image_size,
        "in_channels": 3, "out_channels": 3, "latent_channels": cfg.latent_channels,
        "down_block_types": ["DownEncoderBlock2D"] * n, "up_block_types": ["UpDecoderBlock2D"] * n,
        "block_out_channels": cfg.block_out_channels, "layers_per_block": cfg.layers_per_block,
        "norm_num_groups": cfg.norm_num_groups, "act_fn": "silu", "mid_block_add_attention": True,
        "use_quant_conv": False, "use_post_quant_conv": False,
        "scaling_factor": 1.0,  # latents are used as they come
    }  # fmt: skip


def unet_config(cfg):
    n = len(cfg.unet_block_out_channels)
    return {
        "_class_name": "UNet2DConditionModel", "_diffusers_version": DIFFUSERS, "sample_size": cfg.latent_size,
        "in_channels": cfg.latent_channels, "out_channels": cfg.latent_channels,
        "down_block_types": ["CrossAttnDownBlock2D"] * n, "mid_block_type": "UNetMidBlock2DCrossAttn",
        "up_block_types": ["CrossAttnUpBlock2D"] * n, "only_cross_attention": [True] * (n - 1) + [False],
        "block_out_channels": cfg.unet_block_out_channels, "layers_per_block": cfg.unet_layers_per_block,
        "norm_num_groups": cfg.unet_norm_num_groups, "norm_eps": 1e-5, "act_fn": "silu",
        "cross_attention_dim": cfg.text_dim, "use_linear_projection": True,
        "attention_head_dim": cfg.num_heads,  # in this class the number of heads, whatever it is called
        "time_embedding_dim": cfg.time_dim, "flip_sin_to_cos": True, "freq_shift": 0,  # cosines first
    }  # fmt: skip


def noise_schedule(cfg):
    """What the U-Net was trained on."""
    if cfg.prediction_type == "flow":
        return {"num_train_timesteps": cfg.timesteps, "shift": 1.0}
    scale = 1000 / cfg.timesteps if cfg.scale_betas else 1.0
    schedule = {"beta_schedule": "linear", "beta_start": scale * cfg.beta_start, "beta_end": scale * cfg.beta_end}
    if cfg.beta_schedule == "cosine":
        schedule = {"beta_schedule": "squaredcos_cap_v2"}
    return {"num_train_timesteps": cfg.timesteps, "prediction_type": cfg.prediction_type, **schedule,
            "rescale_betas_zero_snr": cfg.rescale_betas_zero_snr}  # fmt: skip


def scheduler_config(cfg):
    """Our ddpm() with all T steps: fixed_large is sigma_t^2 = beta_t. For flow matching our euler().

    trailing starts at T - 1, as spaced_timesteps() does; leading would ask for step T, which is none. The pipeline
    complains of any other steps_offset than 1, which trailing does not read.
    """
    if cfg.prediction_type == "flow":
        return {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "_diffusers_version": DIFFUSERS,
            **noise_schedule(cfg),
        }
    return {
        "_class_name": "DDPMScheduler", "_diffusers_version": DIFFUSERS, **noise_schedule(cfg),
        "variance_type": "fixed_large", "clip_sample": False, "timestep_spacing": "trailing", "steps_offset": 1,
    }  # fmt: skip


# ---- The model card -------------------------------------------------------------------------------------

OPEN_PIPELINE = """\
pipe = StableDiffusionPipeline.from_pretrained(".")  # this folder
prompt = {{"prompt": {prompt!r}, "num_images_per_prompt": 4}}
"""

OPEN_MODELS = """\
pipe = StableDiffusionPipeline(  # from this folder
    AutoencoderKL.from_pretrained("vae"), None, None, UNet2DConditionModel.from_pretrained("unet"),
    DDPMScheduler.from_pretrained("scheduler"), None, None, requires_safety_checker=False)
text_encoder = WordHashTextEncoder({dim}, {length})
prompt = {{"prompt_embeds": text_encoder([{prompt!r}] * 4)}}
"""

FLOW_WITH_CLIP = """\
tokenizer, text_model = CLIPTokenizer.from_pretrained("tokenizer"), CLIPTextModel.from_pretrained("text_encoder")
ids = tokenizer([{prompt!r}] * 4, padding="max_length", max_length={length}, truncation=True, return_tensors="pt").input_ids
prompt_embeds = text_model(ids).last_hidden_state
"""

FLOW_WITH_HASH = """\
prompt_embeds = WordHashTextEncoder({dim}, {length})([{prompt!r}] * 4)
"""

FLOW = """\
vae, unet = AutoencoderKL.from_pretrained("vae"), UNet2DConditionModel.from_pretrained("unet")
scheduler, steps = FlowMatchEulerDiscreteScheduler.from_pretrained("scheduler"), {steps}
scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])
shape = (unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
z = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in range(4)])
with torch.no_grad():  # the noise of `sample.py --seed 0`
    for t in scheduler.timesteps:
        z = scheduler.step(unet(z, t, prompt_embeds).sample, t, z).prev_sample
    images = (vae.decode(z).sample.clamp(-1, 1) + 1) / 2  # (4, 3, H, W)
to_pil_image(images[0]).save("picture.png")
"""

SAMPLE = """\
noise = [torch.Generator().manual_seed(seed) for seed in range(4)]  # the noise of `sample.py --seed 0`
images = pipe(**prompt, num_inference_steps={steps}, guidance_scale=1, generator=noise).images
images[0].save("picture.png")

# In fewer steps. DDPMScheduler itself wants all {steps}: with fewer it adds noise after its last step.
pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
images = pipe(**prompt, num_inference_steps={few}, guidance_scale=1, generator=noise).images
"""

CARD = """\
---
license: {licence}
library_name: diffusers
pipeline_tag: text-to-image
tags: [latent-diffusion, text-to-image]
---

# Text to image, {size} x {size} pixels, trained from scratch

A latent diffusion model: a VAE of {vae_size:.2f}M parameters and a U-Net of {unet_size:.2f}M, both trained from random
weights; {text}. This is epoch {epoch} of {epochs}, {weights}.

What it is not: a fine-tuned Stable Diffusion, or fit for more than study. There is no safety checker.

```python
{snippet}```

| training | |
|---|---|
{facts}

| made from | SHA-256 |
|---|---|
{files}

{terms}
"""

DATA = {  # what it is, the licence of weights trained on it in the hub's words, the same in plain ones
    "coco": ("COCO 2017", "mit", "Licence of the weights: MIT. COCO's annotations are CC BY 4.0; its pictures belong to their "
             "photographers on Flickr."),
    "folder": ("pictures of the trainer's own", "other", "Under which licence the weights are is for whoever has trained them "
               "to say. The pictures are not part of it."),
    "scenes": ("scenes painted by the project", "mit", "Licence of the weights: MIT. The pictures were painted by the project "
               "itself."),
}  # fmt: skip


def model_card(cfg, run_dir, name, vae, unet_weights, with_clip):
    """README.md. name: of the U-Net's file, without its ending."""
    manifest = read_manifest(run_dir, "unet", name.split("unet_ckpt")[1])
    used = (f"{name}.pth", name.removeprefix("ema_").replace("unet_", "t_ember_") + ".pth", *manifest["made_from"])
    entries = manifest["files"] | manifest["made_from"]
    return CARD.format(
        size=cfg.image_size, vae_size=count(vae.state_dict()), unet_size=count(unet_weights),
        text=text_facts(cfg, with_clip), epoch=manifest["epoch"], epochs=cfg.num_epochs,
        weights="the weights averaged over training" if name.startswith("ema_") else "the weights as trained",
        snippet=snippet(cfg, with_clip),
        facts="\n".join(f"| {what} | {value} |" for what, value in training_facts(cfg, run_dir, manifest).items()),
        files="\n".join(f"| {file} | `{entries[file]['sha256']}` |" for file in used),
        licence=DATA[cfg.dataset][1], terms=DATA[cfg.dataset][2],
    )  # fmt: skip


def count(weights):
    return sum(v.numel() for v in weights.values()) / 1e6


def snippet(cfg, with_clip):
    """Code that makes pictures when it is run in the exported folder."""
    values = {"prompt": printable(cfg.sample_prompts[0]), "dim": cfg.text_dim, "length": cfg.text_length}
    values |= {"steps": cfg.timesteps, "few": min(20, (cfg.timesteps + 1) // 2)}
    ours = "from text_encoder import WordHashTextEncoder  # the file in this folder"
    if cfg.prediction_type == "flow":
        lines = ["import torch", "from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, UNet2DConditionModel",
                 "from torchvision.transforms.functional import to_pil_image"]  # fmt: skip
        lines += ["from transformers import CLIPTextModel, CLIPTokenizer"] if with_clip else [ours]
        return "\n".join(lines) + "\n\n" + ((FLOW_WITH_CLIP if with_clip else FLOW_WITH_HASH) + FLOW).format(**values)
    classes = ["StableDiffusionPipeline", "DPMSolverMultistepScheduler"]
    classes += [] if with_clip else ["AutoencoderKL", "DDPMScheduler", "UNet2DConditionModel"]
    lines = ["import torch", f"from diffusers import {', '.join(sorted(classes))}"]
    lines += [] if with_clip else [ours]
    body = (OPEN_PIPELINE if with_clip else OPEN_MODELS) + SAMPLE
    return "\n".join(lines) + "\n\n" + body.format(**values)


def text_facts(cfg, with_clip):
    if not with_clip:
        return "its text encoder, in text_encoder.py, makes a fixed random vector of each word and is not trained"
    which = f"{CLIP_NAME} at {CLIP_REVISION}" if cfg.text_encoder == "clip" else "a CLIP text model"
    return f"its text encoder is {which}, frozen"


def training_facts(cfg, run_dir, manifest):
    """What the run's settings, manifests and CSVs say -> {what: text}; what is no longer there is left out."""
    steps, size = manifest["step"], cfg.batch_size
    facts = {
        "data": f"{DATA[cfg.dataset][0]}, at most {cfg.max_images:,} pictures",
        "noise": ", ".join(f"{what} {value}" for what, value in noise_schedule(cfg).items()),
        "VAE": vae_facts(run_dir, manifest),
        "U-Net": f"{steps:,} steps of {size} pictures: {steps * size:,} seen, or less by an epoch's smaller last batch",
        "U-Net, training loss": from_csv("{:.4f}", run_dir, "unet_train.csv", steps, "loss"),
        "U-Net, held-out loss": from_csv("{:.4f}", run_dir, "unet_held_out.csv", steps, "loss"),
        "seed, preset": f"{cfg.seed}, {manifest['preset']}",
        "PyTorch": f"{manifest['machine']['torch']} on {manifest['machine']['device']}",
    }
    return {what: text for what, text in facts.items() if text}


def vae_facts(run_dir, manifest):
    tag = next(iter(manifest["made_from"])).removeprefix("vae_ckpt_epoch").removesuffix(".pth")
    try:
        vae = read_manifest(run_dir, "vae", tag)
    except UserError:
        return ""
    step, size = vae["step"], vae["cfg"].batch_size
    figures = from_csv("; held-out MSE {:.4f} in [-1, 1] ({:.1f} dB), latent mean {:.3f}, std {:.3f}", run_dir,
                       "vae_held_out.csv", step, "mse", "psnr_db", "latent_mean", "latent_std")  # fmt: skip
    return f"{step:,} steps of {size} pictures: {step * size:,} seen{figures}"


def from_csv(text, run_dir, name, step, *columns):
    """`text` with the values of a CSV's last row up to a step; "" if the file or the row is not there."""
    try:
        table = read_csv(os.path.join(run_dir, name))
        row = max(i for i, s in enumerate(table["step"]) if s <= step)
        return text.format(*(table[c][row] for c in columns))
    except (OSError, ValueError, KeyError, IndexError, TypeError):  # deleted, or edited by hand
        return ""
