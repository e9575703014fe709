"""Captions to token embeddings (B, L, dim): CLIP's frozen text model, or a built-in encoder that needs no files.

What it is not: nothing here is trained or knows the U-Net. Guidance uses the empty caption "" with either encoder.
The file imports nothing of the project, because sample.py --export copies it, and nothing else, beside the models.

Papers:
  Radford et al. 2021, CLIP (arXiv 2103.00020), section 2.4: the text model
  Rombach et al. 2022, Latent Diffusion (arXiv 2112.10752), section 3.3: token embeddings as condition
"""

import contextlib
import hashlib
import os
import re
import sys
import threading
import unicodedata

import numpy as np
import torch
import torch.nn as nn

CLIP_NAME = "openai/clip-vit-base-patch32"
CLIP_REVISION = "3d74acf9a28c67741b2f4f2ea7635f0aaf6f0268"  # a commit, so that the weights cannot change
MOST_WARNINGS = 5  # thousands of captions may be too long
HUB_TIMEOUT = 6  # seconds to wait for Hugging Face's hub
# scripts that put no spaces between words: of Thailand, Laos, Tibet, Burma and Cambodia, then Chinese and Japanese
SPACELESS = re.compile(
    r"[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u1950-\u19ff\u1a20-\u1aaf\ua9e0-\ua9ff\uaa60-\uaadf"
    r"\u3005-\u3007\u3021-\u3029\u3031-\u312f\u31a0-\u31ff\u3400-\u9fff\ua000-\ua4cf\uf900-\ufaff\uff66-\uff9f"
    r"\U00016fe0-\U00018dff\U0001aff0-\U0001b2ff\U00020000-\U0003ffff]"
)
PROBE_TEXT, PROBE_IDS = "a photo of a cat", [49406, 320, 1125, 539, 320, 2368, 49407]


class ClipTextEncoder(nn.Module):
    """CLIP ViT-B/32, frozen: the last hidden states after the final layer norm.

    source: the model's name on the hub, or a directory with config.json, weights and tokenizer files.
    prompts: list of B strings -> (B, 77, 512) float32. Shorter prompts are padded with the end token, as Hugging Face's
    tokenizer does (CLIP's own code pads with 0). The padding is not masked: the U-Net sees it too.
    Raises OSError with a one-line message if the model or its tokenizer is missing, incomplete or not CLIP's.
    """

    max_length = 77

    def __init__(self, source=CLIP_NAME):
        super().__init__()
        self.source, self.warned = source, set()
        self.tokenizer, self.model = _load_clip(source)
        self.model.eval().requires_grad_(False)

    def key(self):
        """What embeddings depend on, for cache keys: weights, tokenizer, what the forward pass reads of the config."""
        digest, config = hashlib.sha256(), self.model.config
        for value in self.model.state_dict().values():
            digest.update(value.cpu().contiguous().numpy())
        digest.update(repr([config.hidden_act, config.layer_norm_eps, config.num_attention_heads]).encode())
        digest.update(self.tokenizer.backend_tokenizer.to_str().encode())
        return {"clip": digest.hexdigest()}

    def split(self, prompt):
        """-> the prompt's tokens, as strings."""
        return self.tokenizer.tokenize(prompt.encode("utf-8", "replace").decode("utf-8"))

    def tokenize(self, prompts):
        """-> token ids (B, 77). Special tokens spelled out in a prompt are plain text. Warns of what it cuts off."""
        end, rows = self.tokenizer.eos_token_id, []
        for prompt, ids in zip(prompts, self.tokenizer(prompts, split_special_tokens=True).input_ids):
            if len(ids) > self.max_length:
                _warn_once(self.warned, prompt, self.tokenizer.decode(ids[self.max_length - 1 : -1]), self.max_length)
                ids = ids[: self.max_length - 1] + [end]
            rows.append(ids + [end] * (self.max_length - len(ids)))
        return torch.tensor(rows)

    @torch.no_grad()
    def forward(self, prompts):
        # lone surrogates, which JSON can hold and the tokenizer refuses, become question marks
        prompts = [prompt.encode("utf-8", "replace").decode("utf-8") for prompt in prompts]
        ids, device = self.tokenize(prompts), self.model.device
        if device.type == "cuda":  # copying from pinned memory does not wait for the GPU's earlier work
            ids = ids.pin_memory().to(device, non_blocking=True)
        return self.model(input_ids=ids.to(device)).last_hidden_state.float()


class WordHashTextEncoder(nn.Module):
    """Each lower-cased word becomes a fixed Gaussian vector, seeded by its hash, plus a smaller one for its position.

    prompts: list of B strings -> (B, max_length, dim) float32; unused positions are zero, so "" is all zero.
    This tells words and their order apart; with `words`, from word_vectors.py, half of a word's vector also tells which
    others it is like. A word that is in no training caption is noise to the U-Net.
    version: 2, or 1 for runs of older code, to which a caption in a script without spaces is one word.
    """

    POSITION_WEIGHT = 0.25  # small, so that a word keeps nearly the same vector wherever it stands

    def __init__(self, dim=512, max_length=77, version=2, words=None):
        super().__init__()
        self.dim, self.max_length, self.version, self.warned = dim, max_length, version, set()
        self.register_buffer("device_marker", torch.empty(0), persistent=False)
        self.use(words)

    def use(self, words):
        self.words, self.vectors = words, {}  # vectors: a cache, (dim,) for each word and position met
        self.learned = dict(zip(words["ids"].tolist(), words["vectors"])) if words else {}

    def key(self):
        """What embeddings depend on, for cache keys. Raise the version when forward() changes."""
        key = {"hash": self.version, "dim": self.dim, "max_length": self.max_length}
        return key | ({"words": digest_of(self.words)} if self.words else {})

    def vector(self, key):
        if key not in self.vectors:
            seed = hash_of(key) & 0xFFFFFFFF
            # NumPy promises never to change RandomState's numbers, so vectors are the same on all machines and versions
            vector = torch.from_numpy(np.random.RandomState(seed).randn(self.dim)).float()
            learned = self.learned.get(hash_of(key))
            self.vectors[key] = vector if learned is None else 0.5**0.5 * (vector + learned)
        return self.vectors[key]

    def split(self, prompt):
        """-> the prompt's words."""
        return words_of(prompt, self.version)

    def forward(self, prompts):
        out = torch.zeros(len(prompts), self.max_length, self.dim)
        for row, prompt in zip(out, prompts):
            words = self.split(prompt)
            if len(words) > self.max_length:
                _warn_once(self.warned, prompt, " ".join(words[self.max_length :]), self.max_length)
            for i, word in enumerate(words[: self.max_length]):
                row[i] = self.vector(f"word {word}") + self.POSITION_WEIGHT * self.vector(f"position {i}")
        return out.to(self.device_marker.device)


def hash_of(text):
    """-> a number of 63 bits."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "replace")).digest()[:8], "little") & (2**63 - 1)


def digest_of(words):
    return hashlib.sha256(words["ids"].numpy().tobytes() + words["vectors"].numpy().tobytes()).hexdigest()


def words_of(prompt, version=2):
    """Lower-cased words of letters, digits and underscores, with the marks that many scripts put on letters.

    In scripts without spaces each character is a word (not in version 1).
    """
    text = unicodedata.normalize("NFC", prompt.lower())  # an accented letter can be written as one character or as two
    kept = "".join(c if c.isalnum() or c == "_" or is_mark(c) else " " for c in text)
    if version > 1 and SPACELESS.search(kept):  # a word begins before each character of such a script, and behind it
        alone = SPACELESS.match
        kept = "".join(f" {c}" if (alone(c) or alone(b)) and not is_mark(c) else c for b, c in zip(" " + kept, kept))
    return [word for word in kept.split() if any(c.isalnum() or c == "_" for c in word)]


def is_mark(c):
    return unicodedata.category(c)[0] == "M"


def make_text_encoder(source, dim, max_length, trained_with=None, key=None, words=None):
    """source: "clip", "hash", "words" or a directory (--text_encoder). OSError with a one-line message if it cannot be used.

    trained_with: in sampling, the source that the U-Net was trained with; only CLIP can replace CLIP.
    key: of the encoder that the run began with, if there is a run; words: its learned vectors.
    """
    if trained_with not in (None, source) and {source, trained_with} & {"hash", "words"}:
        what = f"the run was trained with {trained_with}, whose embeddings differ"
        raise OSError(f"--text_encoder: {source}: {what}; leave the flag out")
    if source in ("hash", "words"):
        return WordHashTextEncoder(dim, max_length, 1 if (key or {}).get("hash") == 1 else 2, words)
    encoder = ClipTextEncoder(CLIP_NAME if source == "clip" else source)
    found_dim, found_length = encoder.model.config.hidden_size, encoder.max_length
    if (found_dim, found_length) != (dim, max_length):
        what = f"gives {found_length} tokens of {found_dim} numbers, the settings say {max_length} of {dim}"
        remedy = f"train with --text_length {found_length} --text_dim {found_dim}"
        raise OSError(f"--text_encoder: {encoder.source}: {what}; {remedy}")
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


class _Unusable(Exception):
    """Why a CLIP text model cannot be used."""


def _load_clip(source):
    """-> tokenizer, text model: from a directory, else from the hub's cache, else from the hub. OSError if unusable."""
    try:
        if os.path.isdir(source):
            _refuse_custom_code(source)
            return _from_pretrained(source, local_files_only=True)
        if source != CLIP_NAME:
            raise OSError(f"--text_encoder: {source}: no such directory; give clip, hash, or a directory")
        try:
            return _from_pretrained(source, revision=CLIP_REVISION, local_files_only=True)
        except _Unusable as e:
            _refuse_damaged_cache(e)
        _ask_hub()
        return _from_pretrained(source, revision=CLIP_REVISION)
    except _Unusable as e:
        remedy = "give --text_encoder DIR with a downloaded copy, or --text_encoder hash for the built-in encoder"
        raise OSError(f"--text_encoder: CLIP text model {source}: {e}; {remedy}") from None


def _refuse_custom_code(folder):
    """The configs of a folder can make transformers run its Python files, or ask the user whether to run them."""
    for name in ("config.json", "tokenizer_config.json"):
        with contextlib.suppress(OSError), open(os.path.join(folder, name), "rb") as f:
            if b'"auto_map"' in f.read():
                raise _Unusable(f"its {name} asks to run custom code (auto_map), which is never done")


def _refuse_damaged_cache(reason):
    """If all files are in the hub's cache and the model still does not load, the hub will not send them again."""
    from huggingface_hub import constants

    folder = os.path.join(constants.HF_HUB_CACHE, f"models--{CLIP_NAME.replace('/', '--')}")

    def there(name):
        return os.path.isfile(os.path.join(folder, "snapshots", CLIP_REVISION, name))

    if there("config.json") and there("tokenizer.json") and (there("model.safetensors") or there("pytorch_model.bin")):
        what = f"the downloaded CLIP text model is damaged ({reason})"
        raise OSError(f"--text_encoder: {folder}: {what}; delete this folder, and the same command downloads it anew")


def _from_pretrained(source, **where):
    from transformers import AutoTokenizer, CLIPTextModel, logging  # slow to import; the built-in encoder goes without

    where["trust_remote_code"] = False
    # else transformers asks the hub, in a thread, to convert weights that are here already
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # else every tensor of the image model, which the files hold too, is reported
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **where)
        model, info = CLIPTextModel.from_pretrained(source, output_loading_info=True, dtype=torch.float32, **where)
    except MemoryError:
        raise
    except Exception as e:  # transformers raises many kinds; each means that this model cannot be used
        raise _Unusable(str(e).split("\n")[0] or type(e).__name__) from None
    finally:
        logging.set_verbosity(verbosity)
    config = model.config
    if info["missing_keys"]:
        raise _Unusable(f"its weights lack {min(info['missing_keys'])}")
    if config.max_position_embeddings < ClipTextEncoder.max_length:
        raise _Unusable(f"takes {config.max_position_embeddings} tokens, not {ClipTextEncoder.max_length}")
    if config.vocab_size < len(tokenizer):
        raise _Unusable(f"knows {config.vocab_size} tokens, its tokenizer {len(tokenizer)}")
    if tokenizer(PROBE_TEXT).input_ids != PROBE_IDS:  # transformers makes up a tokenizer whose files are missing
        raise _Unusable("its tokenizer is not CLIP's or not whole (tokenizer.json)")
    return tokenizer, model


def _ask_hub():
    """Find out within seconds whether the hub answers; transformers would try again and again for minutes."""
    import urllib.request

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

    # in a thread, because urlopen's time-out does not cover the look-up of the name, and starts anew for each address
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_TIMEOUT)
    if answer != [""]:
        raise _Unusable(f"{constants.ENDPOINT} cannot be reached{''.join(answer)}")
