"""Captions to token embeddings (B, L, 512): the frozen CLIP text tower, or an embedded stand-in without files.

What it is not: nothing here is trained, and nothing knows the U-Net. Both encoders have one interface:
encoder(prompts) -> (B, L, dim), and the empty caption "" is the null caption.

Papers:
  Radford et al. 2021, CLIP (arXiv 2103.00020), section 2.4: the text tower
  Rombach et al. 2022, Latent Diffusion (arXiv 2112.10752), section 3.3: token embeddings as condition
"""

import hashlib
import json
import os
import re
import sys
import threading
import unicodedata
import urllib.request

import numpy as np
import torch
import torch.nn as nn

CLIP_NAME = "openai/clip-vit-base-patch32"
CLIP_REVISION = "3d74acf9a28c67741b2f4f2ea7635f0aaf6f0268"  # a commit, so the weights cannot change under us
MOST_WARNINGS = 5  # a set of captions can hold thousands that are too long
HUB_TIMEOUT = 6  # seconds to wait for the hub before saying that it cannot be reached
PROBE_TEXT, PROBE_IDS = "a photo of a cat", [49406, 320, 1125, 539, 320, 2368, 49407]


class ClipTextEncoder(nn.Module):
    """The text tower of CLIP ViT-B/32, frozen; last hidden states after the final layer norm.

    source: the model's name on the hub, or a directory with config.json, weights and tokenizer files.
    prompts: list of B strings -> (B, 77, 512) float32, padded with the end token, as Hugging Face's tokenizer does (CLIP's
    own code pads with 0). There is no attention mask: the U-Net sees the padding too.
    Raises OSError, in one line, if the model or a whole tokenizer cannot be had.
    """

    max_length = 77

    def __init__(self, source=CLIP_NAME):
        super().__init__()
        self.source, self.warned = source, set()
        self.tokenizer, self.model = _load_clip(source)
        self.model.eval().requires_grad_(False)

    def key(self):
        """What the embeddings depend on, for caches: the weights, what the config says of their use, the tokenizer."""
        digest = hashlib.sha256()
        for value in self.model.state_dict().values():
            digest.update(value.cpu().contiguous().numpy())
        config = self.model.config
        digest.update(repr([config.hidden_act, config.layer_norm_eps, config.num_attention_heads]).encode())
        digest.update(self.tokenizer.backend_tokenizer.to_str().encode())
        return {"clip": digest.hexdigest()}

    def tokenize(self, prompts):
        """Token ids (B, 77); says once on stderr what did not fit. Special tokens written in a prompt are plain text."""
        end, rows = self.tokenizer.eos_token_id, []
        for prompt, ids in zip(prompts, self.tokenizer(prompts, split_special_tokens=True).input_ids):
            if len(ids) > self.max_length:
                _warn_once(self.warned, prompt, self.tokenizer.decode(ids[self.max_length - 1 : -1]), self.max_length)
            ids = ids[: self.max_length - 1] + [end] if len(ids) > self.max_length else ids
            rows.append(ids + [end] * (self.max_length - len(ids)))
        return torch.tensor(rows)

    @torch.no_grad()
    def forward(self, prompts):
        ids, device = self.tokenize([_printable(p) for p in prompts]), self.model.device
        if device.type == "cuda":  # from other memory it would wait for all that the GPU has to do before
            ids = ids.pin_memory().to(device, non_blocking=True)
        return self.model(input_ids=ids.to(device)).last_hidden_state.float()


class WordHashTextEncoder(nn.Module):
    """Each lower-cased word becomes a fixed Gaussian vector drawn from its hash, plus one for its position.

    prompts: list of B strings -> (B, max_length, dim) float32; unused positions are zero, so "" is all zero.

    It needs no files and no training, and tells words apart: two of a thousand random vectors of 512 numbers
    have a cosine of at most about 0.2. That is all it does. It knows no synonyms ("automobile" is as far from
    "car" as from "banana"), no plurals, no grammar beyond word positions, and a word that was in no training
    caption is noise to the U-Net.
    """

    POSITION_WEIGHT = 0.25  # small, so that a word is mostly itself wherever it stands

    def __init__(self, dim=512, max_length=77):
        super().__init__()
        self.dim, self.max_length = dim, max_length
        self.vectors, self.warned = {}, set()  # word or position -> (dim,), filled as they come up
        self.register_buffer("device_marker", torch.empty(0), persistent=False)

    def key(self):
        """What the embeddings depend on, for caches; a change of encode() raises the number."""
        return {"hash": 1, "dim": self.dim, "max_length": self.max_length}

    def vector(self, key):
        if key not in self.vectors:
            seed = int.from_bytes(hashlib.sha256(key.encode("utf-8", "replace")).digest()[:4], "little")
            # RandomState's stream is frozen by NumPy's promise: the same vector on every machine and version
            self.vectors[key] = torch.from_numpy(np.random.RandomState(seed).randn(self.dim)).float()
        return self.vectors[key]

    def encode(self, prompt):
        words = words_of(prompt)
        if len(words) > self.max_length:
            _warn_once(self.warned, prompt, " ".join(words[self.max_length :]), self.max_length)
        out = torch.zeros(self.max_length, self.dim)
        for i, word in enumerate(words[: self.max_length]):
            out[i] = self.vector(f"word {word}") + self.POSITION_WEIGHT * self.vector(f"position {i}")
        return out

    def forward(self, prompts):
        return torch.stack([self.encode(p) for p in prompts]).to(self.device_marker.device)


def words_of(prompt):
    """Lower-cased words: letters and digits, and the marks that tell words apart in many scripts."""
    text = unicodedata.normalize("NFC", prompt.lower())  # one form of what can be written as letter and mark, or as one
    kept = (c if c.isalnum() or c == "_" or unicodedata.category(c)[0] == "M" else " " for c in text)
    return [word for word in "".join(kept).split() if re.search(r"\w", word)]


def make_text_encoder(source, dim, max_length, trained_with=None):
    """source: "clip", "hash" or a directory (--text_encoder); raises OSError if it cannot be had as asked.

    trained_with: what the U-Net was trained with, if that is not `source`; the two kinds cannot stand in for each other.
    """
    if trained_with is not None and (source == "hash") != (trained_with == "hash"):
        raise OSError(f"--text_encoder: {source}: the run was trained with {trained_with}, whose embeddings are others; "
                      "leave the flag out")  # fmt: skip
    if source == "hash":
        return WordHashTextEncoder(dim, max_length)
    encoder = ClipTextEncoder(CLIP_NAME if source == "clip" else source)
    found = (encoder.model.config.hidden_size, encoder.max_length)
    if found != (dim, max_length):
        raise OSError(f"--text_encoder: {encoder.source}: gives {found[1]} tokens of {found[0]} numbers, the settings "
                      f"say {max_length} of {dim}; train with --text_length {found[1]} --text_dim {found[0]}")  # fmt: skip
    return encoder


def _warn_once(warned, prompt, left_out, max_length):
    if prompt in warned or len(warned) > MOST_WARNINGS:
        return
    warned.add(prompt)
    shown = left_out if len(left_out) < 60 else f"{left_out[:50]} ..."
    what = f"prompt cut to {max_length} tokens; left out: {shown!r}"
    if len(warned) > MOST_WARNINGS:
        what = f"more prompts are cut to {max_length} tokens; they are not listed"
    print(f"warning: {what}", file=sys.stderr)


def _printable(prompt):
    """Lone surrogates, which JSON can smuggle in and the tokenizer refuses, become question marks."""
    return prompt.encode("utf-8", "replace").decode("utf-8")


class _Unusable(Exception):
    """Why a CLIP text model cannot be had."""


def _load_clip(source):
    """-> (tokenizer, text model). OSError, in one line, if they cannot be had."""
    try:
        return _find_clip(source)
    except _Unusable as e:
        raise OSError(f"--text_encoder: CLIP text model {source}: {e}; give --text_encoder DIR with a downloaded copy, or "
                      "--text_encoder hash for the embedded encoder") from None  # fmt: skip


def _find_clip(source):
    """-> (tokenizer, text model): a directory as it is, else the cache of the hub, else the hub."""
    if os.path.isdir(source):
        _refuse_code(source)
        return _from_pretrained(source, local_files_only=True)
    if source != CLIP_NAME:
        raise OSError(f"--text_encoder: {source}: no such directory; give clip, hash, or a directory")
    try:
        return _from_pretrained(source, revision=CLIP_REVISION, local_files_only=True)
    except _Unusable as e:
        _refuse_broken_cache(e)
    _ask_hub()
    return _from_pretrained(source, revision=CLIP_REVISION)


def _refuse_code(folder):
    """A directory may name Python files of its own to be run (auto_map): never, and nobody is asked about it either."""
    for name in ("config.json", "tokenizer_config.json"):
        try:
            with open(os.path.join(folder, name), encoding="utf-8") as f:
                asks = "auto_map" in json.load(f)
        except (OSError, ValueError, TypeError, RecursionError):  # missing or broken, which the loading will say
            continue
        if asks:
            raise _Unusable(f"its {name} asks to run custom code (auto_map), which is never done")


def _refuse_broken_cache(reason):
    """Where every file is in the hub's cache and still they do not load, the hub cannot help: it sends no file twice."""
    from huggingface_hub import try_to_load_from_cache

    def there(name):
        return isinstance(try_to_load_from_cache(CLIP_NAME, name, revision=CLIP_REVISION), str)

    if there("config.json") and there("tokenizer.json") and (there("model.safetensors") or there("pytorch_model.bin")):
        path = try_to_load_from_cache(CLIP_NAME, "config.json", revision=CLIP_REVISION)
        folder = os.path.dirname(path[: path.rindex("snapshots")])  # the files themselves lie beside the snapshots
        raise OSError(f"--text_encoder: {folder}: the downloaded CLIP text model is damaged ({reason}); delete this "
                      "folder, and the same command downloads it anew")  # fmt: skip


def _from_pretrained(source, **where):
    # imported here: seconds that users of the embedded encoder need not wait
    from transformers import AutoTokenizer, CLIPTextModel, logging

    where["trust_remote_code"] = False
    # else transformers asks the hub, in a thread of its own, for a conversion of weights that are here already
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # the file also holds the image tower, and transformers would list what we leave out
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **where)
        model, info = CLIPTextModel.from_pretrained(source, output_loading_info=True, dtype=torch.float32, **where)
    except MemoryError:
        raise
    except Exception as e:  # the library raises many kinds, and each means that this model cannot be had
        raise _Unusable(str(e).split("\n")[0] or type(e).__name__) from None
    finally:
        logging.set_verbosity(verbosity)
    if info["missing_keys"]:
        raise _Unusable(f"its weights lack {min(info['missing_keys'])}")
    if model.config.max_position_embeddings < ClipTextEncoder.max_length:
        raise _Unusable(f"takes {model.config.max_position_embeddings} tokens, not {ClipTextEncoder.max_length}")
    if model.config.vocab_size < len(tokenizer):
        raise _Unusable(f"knows {model.config.vocab_size} tokens, its tokenizer {len(tokenizer)}")
    if tokenizer(PROBE_TEXT).input_ids != PROBE_IDS:
        raise _Unusable("its tokenizer is not CLIP's or not whole (tokenizer.json)")
    return tokenizer, model


def _ask_hub():
    """One quick question to the hub: the library itself would try again and again for minutes."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise _Unusable("not downloaded yet, and HF_HUB_OFFLINE is set")
    url = f"{constants.ENDPOINT}/{CLIP_NAME}/resolve/{CLIP_REVISION}/config.json"
    answer = []

    def ask():
        try:
            urllib.request.urlopen(url, timeout=HUB_TIMEOUT).close()
            answer.append("")
        except Exception as e:  # name look-up, proxies and captive portals fail in many ways
            answer.append(f" ({type(e).__name__}: {e})")

    # a thread, because the time-out of urlopen bounds neither the look-up of the name nor a list of addresses
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_TIMEOUT)
    if answer != [""]:
        raise _Unusable(f"{constants.ENDPOINT} cannot be reached{''.join(answer)}")
