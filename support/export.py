"""A trained run as a folder that diffusers opens: StableDiffusionPipeline if it was trained with CLIP, else its models.

  python sample.py --export DIR

Writes everything or nothing: vae/ and unet/ (safetensors, float32), scheduler/, README.md (a model card with code that
runs), and with CLIP text_encoder/, tokenizer/ and model_index.json, which make it a pipeline. A run with the built-in
encoder gets text_encoder.py instead; the pipeline takes its embeddings.
What it is not: diffusers, which is never imported here, nor a conversion: vae.py and unet.py use its names already.
Format: what diffusers' save_pretrained() writes. Opened with diffusers 0.42 and transformers 5.24, and 0.35 and 4.57.
"""

import contextlib
import json
import os
import shutil

import torch
from safetensors.torch import save

import text_encoder
from support import checkpoint, errors, files, models, show
from text_encoder import CLIP_NAME, CLIP_REVISION, ClipTextEncoder

DIFFUSERS = "0.35.0"  # whose format this is; below 0.9 the pipeline would overrule the size of the latents
MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": DIFFUSERS,
    "vae": ["diffusers", "AutoencoderKL"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "scheduler": ["diffusers", "DDPMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    **dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder"), [None, None]),
    "requires_safety_checker": False,
}


def export_run(folder, run_dir, ema=False, source=None, epoch=None):
    """Write an epoch of a run, the newest if none is named, to `folder`, which must not exist or be empty -> the class that opens it.

    source: "clip" or the directory of the run's CLIP, if it has moved. UserError or OSError, in one line, if anything
    cannot be read or written; then there is no such folder.
    """
    if os.path.lexists(folder) and not (os.path.isdir(folder) and not os.listdir(folder)):
        raise errors.UserError(f"--export {folder}: is there already, and not an empty folder; give another name")
    cfg, name, vae, unet, t_embedder = models.load_models(run_dir, ema, torch.device("cpu"), epoch=epoch)
    encoder = models.load_text_encoder(run_dir, cfg, source, torch.device("cpu"), epoch)
    with_clip = isinstance(encoder, ClipTextEncoder)
    pipeline = with_clip and cfg.prediction_type != "flow"  # StableDiffusionPipeline cannot sample flow
    unet_weights = checkpoint.plain_weights(unet)
    unet_weights |= {f"time_embedding.{k}": v for k, v in checkpoint.plain_weights(t_embedder).items()}
    with whole_folder(folder) as new:
        write_model(f"{new}/vae/diffusion_pytorch_model.safetensors", vae_config(cfg), checkpoint.plain_weights(vae))
        write_model(f"{new}/unet/diffusion_pytorch_model.safetensors", unet_config(cfg), unet_weights)
        write_json(f"{new}/scheduler/scheduler_config.json", scheduler_config(cfg))
        if with_clip:
            write_clip(new, encoder)
        else:
            files.write_file(f"{new}/text_encoder.py", files.read_file(text_encoder.__file__, most=1 << 20))
        if cfg.text_encoder == "words":
            files.write_file(f"{new}/word_vectors.safetensors", save(encoder.words))
        if pipeline:
            write_json(f"{new}/model_index.json", MODEL_INDEX)
        sizes = [sum(v.numel() for v in weights.values()) / 1e6 for weights in (vae.state_dict(), unet_weights)]
        files.write_file(f"{new}/README.md", model_card(cfg, run_dir, name, sizes, encoder).encode())
    return "StableDiffusionPipeline" if pipeline else "AutoencoderKL and UNet2DConditionModel"


@contextlib.contextmanager
def whole_folder(folder):
    """-> a new folder beside `folder`, which gets its name if the block ends well and is deleted otherwise."""
    folder = os.path.abspath(folder)
    new = f"{folder}.{os.getpid()}.tmp"
    os.makedirs(new)
    try:
        yield new
        if os.path.isdir(folder):
            os.rmdir(folder)  # it is empty; Windows does not rename onto it
        os.rename(new, folder)
        files.sync_folder(os.path.dirname(folder))
    except OSError as e:
        why = f"could not be written ({e.strerror or e}); mend that, or give another name"
        raise errors.UserError(f"--export {folder}: {why}") from None
    finally:
        shutil.rmtree(new, ignore_errors=True)


def write_json(path, settings):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    files.write_file(path, (json.dumps(settings, indent=2) + "\n").encode())


def write_model(path, settings, weights):
    """Weights in float32, and config.json beside them. Not by safetensors' save_file(): others may not read its files."""
    write_json(f"{os.path.dirname(path)}/config.json", settings)
    files.write_file(path, save({k: v.float() for k, v in weights.items()}, {"format": "pt"}))


def write_clip(folder, encoder):
    """Text model and tokenizer, with padding and length set as our encoder has them."""
    settings = json.loads(encoder.model.config.to_json_string())
    settings |= {"architectures": ["CLIPTextModel"], "dtype": "float32"}
    # the prefix is that of the hub's files: transformers 5 reads names with and without it, 4 only with it
    weights = checkpoint.plain_weights(encoder.model)
    weights = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in weights.items()}
    write_model(f"{folder}/text_encoder/model.safetensors", settings, weights)
    tokenizer, folder = encoder.tokenizer, f"{folder}/tokenizer"
    tokenizer.pad_token, tokenizer.model_max_length = tokenizer.eos_token, encoder.max_length
    try:
        tokenizer.save_pretrained(folder)
        tokenizer.backend_tokenizer.model.save(folder)  # vocab.json and merges.txt, which transformers 4 asks for
    except Exception as e:  # what the library raises when the disk is full has no class of its own
        raise OSError(f"tokenizer: {e}") from None
    for name in os.listdir(folder):  # again, because the library does not flush to the disk
        files.write_file(f"{folder}/{name}", files.read_file(f"{folder}/{name}", most=1 << 30))


def vae_config(cfg):
    n = len(cfg.block_out_channels)
    return {
        "_class_name": "AutoencoderKL", "_diffusers_version": DIFFUSERS, "sample_size": cfg.image_size,
        "in_channels": 3, "out_channels": 3, "latent_channels": cfg.latent_channels,
        "down_block_types": ["DownEncoderBlock2D"] * n, "up_block_types": ["UpDecoderBlock2D"] * n,
        "block_out_channels": cfg.block_out_channels, "layers_per_block": cfg.layers_per_block,
        "norm_num_groups": cfg.norm_num_groups, "act_fn": "silu", "mid_block_add_attention": True,
        "use_quant_conv": False, "use_post_quant_conv": False, "scaling_factor": 1.0,  # latents are used as they come
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
        "attention_head_dim": cfg.num_heads,  # in this class the number of heads, despite its name
        "time_embedding_dim": cfg.time_dim, "flip_sin_to_cos": True, "freq_shift": 0,  # cosines first
    }  # fmt: skip


def noise_schedule(cfg):
    """What the U-Net was trained on."""
    if cfg.prediction_type == "flow":
        return {"num_train_timesteps": cfg.timesteps, "shift": 1.0}
    scale = 1000 / cfg.timesteps if cfg.scale_betas else 1.0
    schedule = {"beta_schedule": "linear", "beta_start": scale * cfg.beta_start, "beta_end": scale * cfg.beta_end}
    return {"num_train_timesteps": cfg.timesteps, "prediction_type": cfg.prediction_type} | schedule


def scheduler_config(cfg):
    """Our euler() for flow matching, else our ddpm() with all T steps: fixed_large is sigma_t^2 = beta_t.

    trailing starts at T - 1, as we do. It does not read steps_offset, but the pipeline warns of any other than 1.
    """
    flow = cfg.prediction_type == "flow"
    name = "FlowMatchEulerDiscreteScheduler" if flow else "DDPMScheduler"
    config = {"_class_name": name, "_diffusers_version": DIFFUSERS} | noise_schedule(cfg)
    ddpm = {"rescale_betas_zero_snr": False, "variance_type": "fixed_large", "clip_sample": False}
    return config if flow else config | ddpm | {"timestep_spacing": "trailing", "steps_offset": 1}


# ---- The model card -------------------------------------------------------------------------------------

OPEN_PIPELINE = """\
pipe = StableDiffusionPipeline.from_pretrained(".")  # this folder
prompt = {{"prompt": {prompt!r}, "num_images_per_prompt": 4}}
"""

OPEN_MODELS = """\
pipe = StableDiffusionPipeline(  # from this folder
    AutoencoderKL.from_pretrained("vae"), None, None, UNet2DConditionModel.from_pretrained("unet"),
    DDPMScheduler.from_pretrained("scheduler"), None, None, requires_safety_checker=False)
text_encoder = WordHashTextEncoder({dim}, {length}{words})
prompt = {{"prompt_embeds": text_encoder([{prompt!r}] * 4)}}
"""

FLOW_WITH_CLIP = """\
tokenizer, text_model = CLIPTokenizer.from_pretrained("tokenizer"), CLIPTextModel.from_pretrained("text_encoder")
ids = tokenizer([{prompt!r}] * 4, padding="max_length", max_length={length}, truncation=True, return_tensors="pt").input_ids
prompt_embeds = text_model(ids).last_hidden_state
"""

FLOW_WITH_HASH = "prompt_embeds = WordHashTextEncoder({dim}, {length}{words})([{prompt!r}] * 4)\n"

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
Image.fromarray((images[0] * 255).round().byte().permute(1, 2, 0).numpy()).save("picture.png")
"""

SAMPLE = """\
noise = [torch.Generator().manual_seed(seed) for seed in range(4)]  # the noise of `sample.py --seed 0`
images = pipe(**prompt, num_inference_steps={steps}, guidance_scale=1, generator=noise).images
images[0].save("picture.png")

# In fewer steps. DDPMScheduler itself wants all {steps}: with fewer it adds noise after its last step.
pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
images = pipe(**prompt, num_inference_steps={few}, guidance_scale=1, generator=noise).images
"""

DATA = {"coco": "COCO 2017", "folder": "pictures of the trainer's own", "scenes": "scenes painted by the project"}
TERMS = {
    "coco": "Licence of the weights: MIT. COCO's annotations are CC BY 4.0; its pictures belong to their photographers on Flickr.",
    "folder": "Under which licence the weights are is for whoever has trained them to say. The pictures are not part of it.",
    "scenes": "Licence of the weights: MIT. The pictures were painted by the project itself.",
}


def model_card(cfg, run_dir, name, sizes, encoder):
    """README.md. name: of the U-Net's file, without its ending; sizes: of VAE and U-Net in millions of parameters."""
    manifest = checkpoint.read_manifest(run_dir, "unet", name.split("unet_ckpt")[1])
    entries, machine = manifest["files"] | manifest["made_from"], manifest["machine"]
    used = (f"{name}.pth", name.removeprefix("ema_").replace("unet_", "t_ember_") + ".pth", *manifest["made_from"])
    hashes = "\n".join(f"| {file} | `{entries[file]['sha256']}` |" for file in used)
    steps, size = manifest["step"], cfg.batch_size
    losses = from_csv("\n| U-Net, training loss | {loss:.4f} |", f"{run_dir}/unet_train.csv", steps)
    losses += from_csv("\n| U-Net, held-out loss | {loss:.4f} |", f"{run_dir}/unet_held_out.csv", steps)
    text = "its text encoder, in text_encoder.py, makes a fixed random vector of each word and is not trained"
    if cfg.text_encoder == "words":
        text += ", but for words of the captions: half of theirs tells which others are said of the same pictures"
    if isinstance(encoder, ClipTextEncoder):
        which = f"{CLIP_NAME} at {CLIP_REVISION}" if cfg.text_encoder == "clip" else "a CLIP text model"
        text = f"its text encoder is {which}, frozen"
    begun = f"random\nweights{', the U-Net going on from those of another run' if cfg.init_from else ''}"
    weights = "the weights averaged over training" if name.startswith("ema_") else "the weights as trained"
    return f"""\
---
license: {"other" if cfg.dataset == "folder" else "mit"}
library_name: diffusers
pipeline_tag: text-to-image
tags: [latent-diffusion, text-to-image]
---

# Text to image, {cfg.image_size} x {cfg.image_size} pixels, trained from scratch

A latent diffusion model: a VAE of {sizes[0]:.2f}M parameters and a U-Net of {sizes[1]:.2f}M, both trained from {begun}; {text}. This is epoch {manifest["epoch"]} of {cfg.num_epochs}, {weights}.

What it is not: a fine-tuned Stable Diffusion, or fit for more than study. There is no safety checker.

```python
{snippet(cfg, encoder)}```

| training | |
|---|---|
| data | {DATA[cfg.dataset]}, at most {cfg.max_images:,} pictures |
| noise | {", ".join(f"{what} {value}" for what, value in noise_schedule(cfg).items())} |{vae_row(run_dir, manifest)}
| U-Net | {steps:,} steps of {size} pictures: {steps * size:,} seen, or less by an epoch's smaller last batch |{losses}
| seed, preset | {cfg.seed}, {manifest["preset"]} |
| PyTorch | {machine["torch"]} on {machine["device"]} |

| made from | SHA-256 |
|---|---|
{hashes}

{TERMS[cfg.dataset]}
"""


def snippet(cfg, encoder):
    """Code that makes pictures when it is run in the exported folder."""
    with_clip, uses = isinstance(encoder, ClipTextEncoder), "DPMSolverMultistepScheduler, StableDiffusionPipeline"
    values = {"prompt": errors.printable(cfg.sample_prompts[0]), "dim": cfg.text_dim, "length": cfg.text_length}
    values |= {"steps": cfg.timesteps, "few": min(20, (cfg.timesteps + 1) // 2)}
    lines = [] if with_clip else ["from text_encoder import WordHashTextEncoder  # the file in this folder"]
    learned = cfg.text_encoder == "words"
    lines += ["from safetensors.torch import load_file"] if learned else []
    version = ", version=1" if not with_clip and encoder.version == 1 else ""  # of older code, which had no vectors
    values["words"] = ', words=load_file("word_vectors.safetensors")' if learned else version
    if cfg.prediction_type == "flow":
        uses = "AutoencoderKL, FlowMatchEulerDiscreteScheduler, UNet2DConditionModel"
        lines = ["from PIL import Image", *(lines or ["from transformers import CLIPTextModel, CLIPTokenizer"])]
        body = (FLOW_WITH_CLIP if with_clip else FLOW_WITH_HASH) + FLOW
    elif with_clip:
        body = OPEN_PIPELINE + SAMPLE
    else:
        uses, body = f"AutoencoderKL, DDPMScheduler, {uses}, UNet2DConditionModel", OPEN_MODELS + SAMPLE
    return "\n".join(["import torch", f"from diffusers import {uses}", *lines]) + "\n\n" + body.format(**values)


def vae_row(run_dir, manifest):
    file = next(iter(manifest["made_from"]))
    try:
        vae = checkpoint.read_manifest(run_dir, "vae", file.removeprefix("vae_ckpt_epoch").removesuffix(".pth"))
    except errors.UserError:
        return ""
    steps, size = vae["step"], vae["cfg"].batch_size
    text = "; held-out MSE {mse:.4f} in [-1, 1] ({psnr_db:.1f} dB), latent mean {latent_mean:.3f}, std {latent_std:.3f}"
    figures = from_csv(text, f"{run_dir}/vae_held_out.csv", steps)
    return f"\n| VAE | {steps:,} steps of {size} pictures: {steps * size:,} seen{figures} |"


def from_csv(text, path, step):
    """`text` with the values of a CSV's last row up to a step; "" if the file or the row is not there."""
    try:
        table = show.read_csv(path)
        row = max(i for i, s in enumerate(table["step"]) if s <= step)
        return text.format(**{name: column[row] for name, column in table.items()})
    except (OSError, ValueError, KeyError, IndexError, TypeError):  # deleted, or edited by hand
        return ""
