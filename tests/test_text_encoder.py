"""Promises of text_encoder.py: fixed vectors for words, a whole CLIP or a clear refusal, no special tokens by text."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT

import text_encoder
from text_encoder import (
    CLIP_NAME,
    CLIP_REVISION,
    MOST_WARNINGS,
    ClipTextEncoder,
    WordHashTextEncoder,
    make_text_encoder,
)


def test_word_vectors_are_fixed():
    """Drawn from a hash: the same in every process; the first numbers are pinned."""
    a, b = WordHashTextEncoder(), WordHashTextEncoder()
    assert torch.equal(a(["a red car"]), b(["A RED car!"]))
    assert a(["red"]).shape == (1, 77, 512)
    assert [round(v, 4) for v in a.vector("word red")[:3].tolist()] == PINNED_RED


PINNED_RED = [-1.5566, 0.7961, 0.7313]


def test_empty_caption_is_the_null_caption():
    assert WordHashTextEncoder()([""]).abs().max() == 0


def test_word_order_and_words_matter():
    encoder = WordHashTextEncoder()
    x = encoder(["dog red", "red dog", "red cat"])
    assert not torch.equal(x[0], x[1]) and not torch.equal(x[1], x[2])


def test_words_of_scripts_with_marks_are_words():
    """By code points: Hindi "ka" and "ki" differ in a mark alone, and e with acute can be one code point or two."""
    encoder = WordHashTextEncoder(16, 4)
    ka, ki = encoder(["\u0915\u093e", "\u0915\u0940"])
    assert not torch.equal(ka, ki) and not ka[1:].any()
    assert torch.equal(encoder(["caf\u00e9"]), encoder(["cafe\u0301"]))
    assert torch.equal(encoder(["a red_1 car \u2764\ufe0f, too"]), encoder(["A red_1 car - too"]))  # a heart is no word


@pytest.mark.parametrize(
    "prompt, other, words",
    [
        ("\u7ea2\u8272\u6c7d\u8f66\u3002", "\u84dd\u8272\u6c7d\u8f66\u3002", 4),  # a red and a blue car, Chinese
        ("\u8d64\u3044\u30ab\u30fc", "\u9752\u3044\u30ab\u30fc", 4),  # the same, Japanese
        (
            "\u0e23\u0e16\u0e2a\u0e35\u0e41\u0e14\u0e07",
            "\u0e23\u0e16\u0e2a\u0e35\u0e14\u0e33",
            6,
        ),  # Thai, with a mark above
        ("\u1785\u17b6\u1793", "\u1785\u17b6\u1798", 2),  # Khmer: letters with marks
        ("\u96eawhite2\u96ea red_1", "\u96eawhite2\u96ea blue", 4),
    ],
)
def test_scripts_without_spaces_have_a_word_per_character(prompt, other, words):
    encoder = WordHashTextEncoder(512, 12)
    assert len(encoder.split(prompt)) == words
    a, b = encoder([prompt, other]).flatten(1)
    assert torch.cosine_similarity(a, b, 0) > 0.4  # most of the characters are the same
    old = WordHashTextEncoder(512, 12, version=1)
    assert len(old.split(prompt)) < words and old.key() != encoder.key()


def test_scripts_with_spaces_have_the_words_that_they_always_had():
    """Korean has spaces. The encoder of runs of older code and today's give the same bits."""
    prompts = [
        "A red car!",
        "\uace0\uc591\uc774\uac00 \uc18c\ud30c\uc5d0",
        "\u0915\u093e \u0915\u0940",
        "caf\u00e9 _x \u2764\ufe0f",
        "",
    ]
    old, new = (make_text_encoder("hash", 64, 12, key={"hash": n}) for n in (1, 2))
    assert torch.equal(old(prompts), new(prompts)) and (old.version, new.version) == (1, 2)


def test_words_are_far_apart():
    """Random vectors in 512 dimensions: the largest of half a million cosines is about 0.23."""
    encoder = WordHashTextEncoder()
    v = torch.nn.functional.normalize(torch.stack([encoder.vector(f"word w{i}") for i in range(1000)]), dim=1)
    assert ((v @ v.T) - torch.eye(1000)).abs().max() < 0.3


def test_word_vectors_are_those_of_the_run():
    """Neither built-in encoder stands in for the other, nor for CLIP."""
    for trained_with, other in (("words", "hash"), ("hash", "words"), ("words", "clip"), ("clip", "words")):
        with pytest.raises(OSError, match=f"trained with {trained_with}"):
            make_text_encoder(other, 512, 77, trained_with=trained_with)


def test_long_prompts_are_cut_and_it_says_so(capsys):
    encoder = WordHashTextEncoder(16, 4)
    assert torch.equal(encoder(["one two three four five six"]), encoder(["one two three four"]))
    assert "five six" in capsys.readouterr().err


def test_clip_gives_tokens_of_the_real_tokenizer(clip_dir):
    encoder = ClipTextEncoder(str(clip_dir)).eval()
    ids = encoder.tokenize(["a photo of a cat", ""])
    assert ids[0, :8].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407, 49407]
    assert ids[1].tolist() == [49406] + [49407] * 76
    x = encoder(["a photo of a cat", "a dog"])
    assert x.shape == (2, 77, 512) and x.dtype == torch.float32 and not x.requires_grad
    assert not any(p.requires_grad for p in encoder.parameters())
    from transformers import CLIPTextModel

    reference = CLIPTextModel.from_pretrained(clip_dir).eval()(input_ids=ids[:1]).last_hidden_state
    torch.testing.assert_close(x[:1], reference.detach())


def test_special_tokens_in_a_prompt_are_plain_text(clip_dir):
    encoder = ClipTextEncoder(str(clip_dir))
    ids = encoder.tokenize(["a <|endoftext|> cat"])[0].tolist()
    assert ids.index(49407) > 5 and 2368 in ids[: ids.index(49407)]


def test_clip_cuts_at_77_tokens_and_says_what(clip_dir, capsys):
    encoder = ClipTextEncoder(str(clip_dir))
    ids = encoder.tokenize(["cat " * 75 + "dog horse"])[0]
    assert ids.shape == (77,) and ids[-1] == 49407
    assert "dog horse" in capsys.readouterr().err
    whole = encoder.tokenizer(
        ["cat " * 75 + "dog horse", "a cat"], padding="max_length", truncation=True, max_length=77
    )
    assert encoder.tokenize(["cat " * 75 + "dog horse", "a cat"]).tolist() == whole.input_ids
    assert not capsys.readouterr().err  # said once


def test_a_lone_surrogate_is_no_crash(clip_dir):
    assert ClipTextEncoder(str(clip_dir))(["a \ud800 cat"]).isfinite().all()


@pytest.mark.parametrize("missing", ["tokenizer.json", "model.safetensors", "model.safetensors, its second half"])
def test_an_incomplete_clip_directory_is_refused(clip_dir, tmp_path, missing):
    """transformers gives an empty tokenizer, without a word, when its files are missing."""
    copy = tmp_path / "clip"
    shutil.copytree(clip_dir, copy)
    weights = copy / "model.safetensors"
    if missing.endswith("half"):
        os.truncate(weights, weights.stat().st_size // 2)
    else:
        for name in [missing] if missing.startswith("model") else [missing, "vocab.json", "merges.txt"]:
            (copy / name).unlink()
    with pytest.raises(OSError, match="--text_encoder") as e:
        ClipTextEncoder(str(copy))
    assert "\n" not in str(e.value) and str(copy) in str(e.value) and "hash" in str(e.value)


@pytest.mark.parametrize("change", [{"max_position_embeddings": 64}, {"vocab_size": 1000}])
def test_a_model_that_cannot_take_the_tokens_is_refused(clip_dir, tmp_path, change):
    from transformers import CLIPTextConfig, CLIPTextModel

    copy = tmp_path / "clip"
    shutil.copytree(clip_dir, copy)
    CLIPTextModel(CLIPTextConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
                                 **change)).save_pretrained(copy)  # fmt: skip
    with pytest.raises(OSError, match="takes 64 tokens|knows 1000 tokens"):
        ClipTextEncoder(str(copy))


def test_of_many_prompts_that_are_cut_a_few_are_listed(capsys):
    encoder = WordHashTextEncoder(8, 2)
    encoder([f"one two three {i}" for i in range(1000)])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == MOST_WARNINGS + 1 and "three 0" in lines[0] and "not listed" in lines[-1]


def test_weights_of_another_model_are_refused(clip_dir, tmp_path):
    """transformers would fill what is missing with random numbers."""
    from safetensors.torch import load_file, save_file

    copy = tmp_path / "clip"
    shutil.copytree(clip_dir, copy)
    weights = load_file(copy / "model.safetensors")
    dropped = next(k for k in weights if "layers.3.mlp.fc1.weight" in k)
    del weights[dropped]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(OSError, match="lack"):
        ClipTextEncoder(str(copy))


def ask_for_code(clip_dir, tmp_path, name, monkeypatch):
    """A copy of a CLIP directory with Python files that its `name` asks for, and a user who says yes to everything."""
    copy = tmp_path / "clip"
    shutil.copytree(clip_dir, copy)
    (copy / "evil.py").write_text(f"open({str(tmp_path / 'pwned')!r}, 'w')\nclass Evil: pass\n")
    asked = {"config.json": {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}},
             "tokenizer_config.json": {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}}  # fmt: skip
    if name:
        (copy / name).write_text(json.dumps(json.loads((copy / name).read_text()) | asked[name]))
    monkeypatch.setattr("builtins.input", lambda _: "y")
    return copy


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_a_directory_that_asks_for_custom_code_is_refused(clip_dir, tmp_path, name, monkeypatch):
    copy = ask_for_code(clip_dir, tmp_path, name, monkeypatch)
    with pytest.raises(OSError, match=f"--text_encoder.*{name} asks to run custom code") as e:
        ClipTextEncoder(str(copy))
    assert "\n" not in str(e.value) and not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_custom_code_does_not_run_even_where_nobody_looked(clip_dir, tmp_path, name, monkeypatch):
    """As from the hub, whose files are not looked at first."""
    copy = ask_for_code(clip_dir, tmp_path, name, monkeypatch)
    monkeypatch.setattr(text_encoder, "_refuse_custom_code", lambda folder: None)
    with contextlib.suppress(OSError):
        ClipTextEncoder(str(copy))
    assert not (tmp_path / "pwned").exists()


def test_code_that_nothing_asks_for_is_just_a_file(clip_dir, tmp_path, monkeypatch):
    assert ClipTextEncoder(str(ask_for_code(clip_dir, tmp_path, None, monkeypatch)))(["a cat"]).isfinite().all()
    assert not (tmp_path / "pwned").exists()


@pytest.fixture
def no_hub(tmp_path, monkeypatch):
    """The hub refuses connections, and its cache is empty."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def cache(clip_dir, no_hub, tmp_path):
    """The hub's cache, as a download leaves it; the hub itself refuses connections."""
    folder = tmp_path / "hub/models--openai--clip-vit-base-patch32"
    snapshot = folder / "snapshots" / CLIP_REVISION
    snapshot.mkdir(parents=True)
    shutil.copytree(clip_dir, folder / "blobs")
    for file in clip_dir.iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    return snapshot


@pytest.mark.parametrize("offline", [True, False])
@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_damaged_file_in_the_cache_is_said_and_the_folder_to_delete(cache, name, offline, monkeypatch):
    """Not that the hub cannot be reached: the hub would not send a file again that is there."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    os.truncate(cache / name, (cache / name).stat().st_size // 2)
    with pytest.raises(OSError, match="damaged.*delete this folder") as e:
        ClipTextEncoder()
    said = str(e.value)
    assert f"{cache.parent.parent}: " in said and "reached" not in said and "\n" not in said


@pytest.mark.parametrize("offline, said", [(True, "not downloaded yet"), (False, "cannot be reached")])
def test_a_whole_cache_loads_and_an_unfinished_one_wants_the_hub(cache, offline, said, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    assert ClipTextEncoder()(["a cat"]).isfinite().all()
    (cache / "model.safetensors").unlink()
    with pytest.raises(OSError, match=said):
        ClipTextEncoder()


@pytest.mark.parametrize("hub", ["refuses", "is silent", "is switched off", "has a name that is long looked up"])
def test_an_unreachable_hub_is_said_soon(hub, no_hub, monkeypatch):
    """Not after minutes of new tries, as transformers would do."""
    from huggingface_hub import constants

    assert text_encoder.HUB_TIMEOUT < 10
    monkeypatch.setattr(text_encoder, "HUB_TIMEOUT", 1)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", hub == "is switched off")
    if hub.startswith("has"):  # which urlopen's time-out does not cover
        monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: time.sleep(100))
    with socket.create_server(("127.0.0.1", 0)) as server:  # takes connections, answers nothing
        if hub == "is silent":
            monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        start = time.monotonic()
        with pytest.raises(OSError) as e:
            ClipTextEncoder()
    assert time.monotonic() - start < 60  # transformers may be slow to load
    message = str(e.value)
    assert CLIP_NAME in message and "--text_encoder DIR" in message and "--text_encoder hash" in message
    assert ("HF_HUB_OFFLINE" if hub == "is switched off" else "cannot be reached") in message and "\n" not in message


def test_the_method_loads_no_heavy_library():
    """Each would add seconds to every start of sample.py, with the hash encoder too."""
    code = """import sys, config, text_encoder, vae, unet, samplers, diffusion
print(sorted({"transformers", "huggingface_hub", "torch._dynamo", "torchvision", "matplotlib"} & set(sys.modules)))"""
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert out.stdout.strip() == "[]", out.stdout + out.stderr


def test_make_text_encoder_checks_the_sizes(clip_dir):
    assert isinstance(make_text_encoder("hash", 512, 12), WordHashTextEncoder)
    with pytest.raises(OSError, match="--text_length 77"):
        make_text_encoder(str(clip_dir), 512, 12)
    with pytest.raises(OSError, match="trained with hash"):
        make_text_encoder("clip", 512, 77, trained_with="hash")
    with pytest.raises(OSError, match="no such directory"):
        make_text_encoder("no/such/place", 512, 77)


def test_time_is_not_wasted_on_words_seen_before():
    encoder = WordHashTextEncoder()
    encoder(["a red car"] * 8)
    assert len(encoder.vectors) == 6  # three words, three positions


def test_a_model_saved_in_half_precision_is_used_in_full(clip_dir, tmp_path):
    """Else a cache could not hash its weights, and a CPU would compute in 8 bits."""
    from transformers import CLIPTextModel

    path = shutil.copytree(clip_dir, tmp_path / "clip")
    CLIPTextModel.from_pretrained(clip_dir).to(torch.bfloat16).save_pretrained(path)
    encoder = ClipTextEncoder(str(path))
    assert {p.dtype for p in encoder.model.parameters()} == {torch.float32} and len(encoder.key()["clip"]) == 64


def test_the_key_tells_models_apart_by_what_changes_their_embeddings(clip_dir, tmp_path):
    path = shutil.copytree(clip_dir, tmp_path / "clip")
    same, config = ClipTextEncoder(str(path)).key(), json.loads((path / "config.json").read_text())
    assert same == ClipTextEncoder(str(clip_dir)).key()
    (path / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu"}))
    assert ClipTextEncoder(str(path)).key() != same
