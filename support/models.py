"""A run's trained models, checked and ready for use.

What it is not: it trains nothing but word vectors, and it does not choose a text encoder.
"""

import os
import re

import torch

import scenes
from config import PRESETS
from support import checkpoint
from support.devices import memory_format
from support.errors import UserError, warn
from support.files import Damaged, read_file, write_file
from text_encoder import digest_of, hash_of, make_text_encoder
from training import random_share
from unet import TimeEmbedding, UNetLatent
from vae import AutoencoderKL
from word_vectors import LEAST_PICTURES, MOST_WORDS, learn_word_vectors

VAE_SETTINGS = ("image_size", "latent_channels", "block_out_channels", "layers_per_block", "norm_num_groups")


def newest_run():
    """The default run directory, runs/<preset>, in which train_unet.py saved an epoch last."""
    saved = {}
    for run_dir in (os.path.join("runs", preset) for preset in PRESETS):
        for tag in checkpoint.epochs_of(run_dir, "unet")[:1]:
            saved[os.path.getmtime(checkpoint.manifest_path(run_dir, "unet", tag))] = run_dir
    if not saved:
        raise UserError("--run_dir: no trained U-Net in runs/; run python train_vae.py and python train_unet.py")
    return saved[max(saved)]


def load_models(run_dir, ema, device, vae_dir=None, epoch=None):
    """An epoch's models, the newest's if none is named -> cfg, name of the U-Net's file, vae, unet, t_embedder.

    All are ready for use. The VAE is the one that the U-Net was trained on, or that of vae_dir if only its decoder is
    another. UserError, naming the file, if any is not as it was saved.
    """
    tag, manifest = checkpoint.newest_epoch_set(run_dir, "unet", epoch=epoch)
    cfg, name = manifest["cfg"], f"{'ema_' if ema else ''}unet_ckpt{tag}"
    made_from = manifest.get("made_from", {})
    files, vae_file = manifest["files"] | made_from, os.path.basename(next(iter(made_from), "the VAE"))
    models = []
    for file, kind, size in (
        (vae_file, AutoencoderKL, cfg),
        (f"{name}.pth", UNetLatent, cfg),
        (f"t_ember_ckpt{tag}.pth", TimeEmbedding, cfg.time_dim),
    ):
        if file not in files:
            raise UserError(f"{checkpoint.manifest_path(run_dir, 'unet', tag)}: does not list {file}; train again")
        try:
            module = load_model(os.path.join(run_dir, file), files[file], kind, size)
        except Damaged as e:
            again = f"python train_unet.py --run_dir {run_dir} --overwrite"
            retrained = f"; if train_vae.py has run again since, run {again}" if file == vae_file else ""
            raise UserError(f"{e}{retrained}") from None
        # leave requires_grad on: autocast then casts each weight once, not at each call
        models.append(module.to(device).eval())
    models[1].to(memory_format=memory_format(device))
    if vae_dir:
        models[0] = load_other_decoder(vae_dir, cfg, models[0], device, run_dir)
    share = random_share(manifest["step"], cfg) if ema and not cfg.init_from else 0
    if share > 0.01:
        what = f"{share:.1%} of these weights are the random ones that the average began with, {manifest['step']} steps ago"
        remedy = "leave --ema out, or train for longer, with --ema_warmup or a lower --ema_decay"
        warn(f"--ema: {what}, at --ema_decay {cfg.ema_decay}; {remedy}")
    return cfg, name, *models


def load_model(path, entry, kind, size):
    """A module of class `kind` with the weights of a file; Damaged if they are others."""
    with torch.device("meta"):  # takes no memory, however large the manifest says it is
        expected = checkpoint.num_bytes(kind(size))
    if not expected <= entry["bytes"] <= checkpoint.most_bytes(expected):
        raise Damaged(f"{path}: {entry['bytes']} bytes are not a {kind.__name__} of these settings; restore it")
    module = kind(size)
    checkpoint.load_weights(path, entry, module)
    return module


def load_other_decoder(vae_dir, cfg, own, device, run_dir):
    """The VAE of vae_dir; UserError unless all of it but the decoder's weights is equal to `own`."""
    vae, _ = load_vae(cfg, vae_dir, device, "--vae")
    theirs, free = own.state_dict(), {f"decoder.{name}" for name, _ in vae.decoder.named_parameters()}
    if not all(torch.equal(v, theirs[name]) for name, v in vae.state_dict().items() if name not in free):
        raise UserError(
            f"--vae {vae_dir}: its latents are not those that the U-Net in {run_dir} was trained on; give a run of "
            f"train_vae.py --finetune_decoder_of {run_dir}"
        )
    return vae


def load_text_encoder(run_dir, cfg, source, device, epoch=None):
    """The text encoder that the run was trained with; OSError or UserError if it cannot be had or is another.

    source: "clip" or a directory, if it is no longer where training found it, else None.
    """
    tag, manifest = checkpoint.newest_epoch_set(run_dir, "unet", epoch=epoch)
    key, sizes = manifest.get("text"), (cfg.text_dim, cfg.text_length)
    words = load_words(run_dir, key, cfg.text_dim)
    encoder = make_text_encoder(source or cfg.text_encoder, *sizes, cfg.text_encoder, key, words)
    if key not in (None, encoder.key()):
        path = checkpoint.manifest_path(run_dir, "unet", tag)
        raise UserError(f"--text_encoder: not the weights that {path} was trained with; give the same ones")
    return encoder.to(device).eval()


def warn_of_unknown_words(prompt, cfg, encoder, warn):
    """warn(line) if a prompt has words that the run's U-Net has not learned, where the vectors are of its own captions."""
    words = dict.fromkeys(encoder.split(prompt)) if cfg.text_encoder == "words" and not cfg.init_from else ()
    if rare := ", ".join(word for word in words if hash_of(f"word {word}") not in encoder.learned)[:100]:
        few = f"fewer than {LEAST_PICTURES}" if len(encoder.learned) < MOST_WORDS else "few"
        warn(f"{rare}: in the captions of {few} training pictures; the U-Net hardly knows it")
    if prompt.strip() and not encoder.split(prompt):
        warn(f"{prompt.strip()[:100]!r}: has no word in it; to the U-Net it is the empty caption")
    scenes.warn_of_unknown_words(prompt, cfg, warn)


def begun(run_dir, overwrite):
    """The newest manifest of the run's U-Net, if it goes on: it keeps the text encoder and the VAE that it began with."""
    return {} if overwrite else next(iter(checkpoint.readable(run_dir, "unet").values()), {})


def training_text_encoder(cfg, run_dir, overwrite, device):
    """The text encoder to train a U-Net with. Learned word vectors are those that the U-Net knows already, if any."""
    unet = begun(run_dir, overwrite)
    key, words, sizes = unet.get("text"), None, (cfg.text_dim, cfg.text_length)
    if cfg.text_encoder == "words" and unet.get("step"):
        words = load_words(run_dir, key, cfg.text_dim)
    elif cfg.text_encoder == "words" and cfg.init_from:
        source = checkpoint.newest_epoch_set(cfg.init_from, "unet", "--init_from")[1]
        words = load_words(cfg.init_from, source.get("text"), cfg.text_dim)
    return make_text_encoder(cfg.text_encoder, *sizes, key=key, words=words).to(device).eval()


def learn_words(encoder, captions, run):
    """With --text_encoder words learn those of a new run from its captions, and keep them beside its weights -> key()."""
    if run.cfg.text_encoder != "words":
        return encoder.key()
    from safetensors.torch import save  # here: sampling with CLIP needs none

    encoder.use(encoder.words or learn_word_vectors(captions, encoder.dim))
    path = words_path(run.dir, encoder.key())
    if not run.world.rank:
        write_file(path, save(encoder.words))
    elif not os.path.exists(path):
        raise UserError(f"{path}: not there, or the processes learned different words; use machines of one kind")
    return encoder.key()


def words_path(run_dir, key):
    return os.path.join(run_dir, f"words_{key['words'][:8]}.safetensors")


def load_words(run_dir, key, dim):
    """The learned word vectors that a manifest's `text` tells of, None if it has none; Damaged if they are others."""
    if not re.fullmatch("[0-9a-f]{64}", str((key or {}).get("words"))):
        return None
    from safetensors.torch import load as load_safetensors  # of a format that holds numbers alone

    path = words_path(run_dir, key)
    data = read_file(path, MOST_WORDS * (8 + 2 * dim) + (1 << 20))
    try:
        words = load_safetensors(data)
        if digest_of(words) == key["words"] and words["vectors"].shape == (len(words["ids"]), dim):
            return words
    except Exception:  # of a file that is none of these, the library raises many kinds
        pass
    raise Damaged(f"{path}: not the word vectors that were saved; restore it")


def training_vae(cfg, args, device):
    """As load_vae(), for a U-Net to train on. Once that has taken a step, the VAE that it began with, if it is there."""
    unet, epochs = begun(args.run_dir, args.overwrite), checkpoint.epochs_of(args.run_dir, "vae")
    made_from = unet.get("made_from", ()) if unet.get("step") else ()
    own = next((epoch for epoch in epochs if f"vae_ckpt_epoch{epoch}.pth" in made_from), None)
    if own and own != epochs[0]:
        print(f"the U-Net goes on with its own VAE, of epoch {own}; --overwrite starts over with that of {epochs[0]}")
    return load_vae(cfg, args.run_dir, device, given=args.given, epoch=own)


def load_vae(cfg, run_dir, device, flag="--run_dir", given=("dataset",), epoch=None):
    """-> the VAE of an epoch, the newest if none is named, and {its file: size and SHA-256}; UserError if it was made
    otherwise.

    given: settings that the user has named; a data set other than the VAE's must be among them.
    """
    if flag == "--finetune_decoder_of":
        checkpoint.check_idle(run_dir, flag)
    tag, manifest = checkpoint.newest_epoch_set(run_dir, "vae", flag, epoch)
    theirs = manifest["cfg"]
    for name in VAE_SETTINGS:
        if getattr(theirs, name) != getattr(cfg, name):
            lead = f"--{name}" if flag == "--run_dir" else f"{flag} {run_dir}: {name}"
            raise UserError(
                f"{lead}: {getattr(cfg, name)} here, but the VAE in {run_dir} was trained with {getattr(theirs, name)} "
                f"(--preset {manifest.get('preset')}); give the same, or another {flag}"
            )
    if theirs.dataset != cfg.dataset:
        if "dataset" not in given:
            raise UserError(
                f"--dataset: {cfg.dataset} here, but the VAE in {run_dir} was trained on {theirs.dataset}; give --dataset "
                f"and its flags as for the VAE, or --dataset {cfg.dataset} if that is meant"
            )
        warn(f"the VAE was trained on --dataset {theirs.dataset}, this is for {cfg.dataset}")
    if theirs.held_out_combinations != cfg.held_out_combinations:
        warn("the VAE was trained with other --held_out_combinations: what is new to the U-Net is not to it")
    file = f"vae_ckpt_epoch{tag}.pth"
    vae = load_model(os.path.join(run_dir, file), manifest["files"][file], AutoencoderKL, cfg)
    early = "" if manifest["finished"] else f": epoch {tag} of {theirs.num_epochs}, where its training was stopped"
    print(f"VAE: {os.path.join(run_dir, file)}{early}")
    return vae.to(device).eval().requires_grad_(False), {file: manifest["files"][file]}
