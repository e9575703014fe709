"""What the U-Net learns from, computed once and kept: latents of all pictures, embeddings of all captions.

What it is not: it trains nothing; VAE and text encoder are taken as they are.
"""

import numpy as np
import torch

import text_encoder as text_encoder_code
import vae as vae_code
from data import fingerprint, to_float
from support import devices
from support.prepared import prepare, source_hash
from support.show import Progress

# captions encoded at once; fixed, because another grouping could give other last bits
CAPTIONS_TOGETHER = {"cuda": 128, "other": 32}


def hash_code():
    """What latents and embeddings are made by, for their keys."""
    return {
        "latents": source_hash(vae_code, encode_pictures, to_float),
        "captions": source_hash(text_encoder_code, embed_captions),
    }


def encode_pictures(vae, pixels, about, device, cfg, what, mirrored=False):
    """uint8 pictures (N, 3, S, S) -> (N, 2, latent_channels, s, s): mu and log_var of each, computed once.

    about: of the run: its VAE, machine and code are part of the file's key.
    """
    together = vae_code.pictures_per_pass(cfg.image_size**2)

    @torch.no_grad()
    def rows(first):
        progress = Progress(len(pixels), what, first)
        parts = pixels[first:].split(together) if first < len(pixels) else ()
        encoded = (vae.encode(to_float(x.flip(3) if mirrored else x, device)) for x in parts)
        for part in devices.copied_back_ahead(torch.stack(pair, dim=1) for pair in encoded):
            yield from part.numpy()  # (B, 2, C, s, s)
            progress.update(len(part))
        progress.close()

    key = {"pixels": fingerprint(pixels), "vae": about["made_from"], "code": about["code"]["latents"]}
    key |= {"machine": machine_key(about, device)} | ({"mirrored": True} if mirrored else {})
    shape = (2, cfg.latent_channels, cfg.latent_size, cfg.latent_size)
    latents, _ = prepare(cfg.cache_dir, "latents", key, shape, np.float32, len(pixels), rows, together)
    return devices.move_if_it_fits(latents, device)


def embed_captions(text_encoder, captions, about, device, cfg):
    """-> embed(rows): captions by their number (k,), counted through all pictures -> (k, L, text_dim) float32.

    captions: N lists of strings. The number after the last is the empty caption's. Read from a prepared file, or
    without --cache_dir computed at each use; rounded to float16 either way.
    """
    texts = [*(text for several in captions for text in several), ""]
    together = CAPTIONS_TOGETHER["cuda" if device.type == "cuda" else "other"]
    if not cfg.cache_dir:
        return lambda rows: text_encoder([texts[i] for i in rows]).half().float()

    def encode(first):
        progress = Progress(len(texts), "encode captions", first)
        parts = (texts[i : i + together] for i in range(first, len(texts), together))
        for part in devices.copied_back_ahead(text_encoder(part).half() for part in parts):
            yield from part.numpy()  # (B, L, text_dim)
            progress.update(len(part))
        progress.close()

    key = {"captions": fingerprint(texts), "text_encoder": about["text"], "machine": machine_key(about, device)}
    key |= {"together": together, "code": about["code"]["captions"]}
    shape = (cfg.text_length, cfg.text_dim)
    embedded, _ = prepare(cfg.cache_dir, "captions", key, shape, np.float16, len(texts), encode, together)
    embedded = devices.move_if_it_fits(embedded, device)
    return lambda rows: devices.gather_rows(embedded, rows, device).float()


def machine_key(about, device):
    """What of the machine the last bits of a forward pass depend on."""
    without = {"processes"} | ({"threads"} if torch.device(device).type == "cuda" else set())
    return {name: value for name, value in about["machine"].items() if name not in without}
