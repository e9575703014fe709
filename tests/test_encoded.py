"""Promises of support/encoded.py: latents and embedded captions are those of the models, kept, and never of older code."""

import signal
import statistics
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import SMALL, flags, randomize

import data
from data import Pictures, Scenes, to_float
from support import encoded
from support.encoded import embed_captions, encode_pictures
from text_encoder import WordHashTextEncoder
from train_unet import pick_latents
from vae import AutoencoderKL

ABOUT = {"made_from": {}, "machine": {}, "text": "a test", "code": {"latents": "", "captions": ""}}


def test_the_unet_sees_every_picture_and_its_mirror_image(tiny, tmp_path):
    """Against encoding the mirrored picture; plain and mirrored ones are kept in two files."""
    vae, pixels = randomize(AutoencoderKL(tiny)), torch.from_numpy(np.stack([Scenes(0, 3, 32)[i] for i in range(3)]))
    cfg = replace(tiny, cache_dir=str(tmp_path))
    plain, mirrored = (encode_pictures(vae, pixels, ABOUT, "cpu", cfg, "encode", mirrored=m) for m in (False, True))
    index = torch.tensor([2, 0])
    mu, log_var = pick_latents([plain, mirrored], index, torch.tensor([0, 1]), "cpu")
    seen = torch.stack([pixels[2], pixels[0].flip(2)])
    with torch.no_grad():
        found = pick_latents([plain], index, None, "cpu")
        torch.testing.assert_close(found, vae.encode(to_float(pixels[index], "cpu")))
        torch.testing.assert_close((mu, log_var), vae.encode(to_float(seen, "cpu")))
    assert len(list(tmp_path.glob("latents-*.json"))) == 2


def test_latents_that_are_all_there_but_not_named_yet_are_used(tiny, tmp_path, monkeypatch):
    """A stop while they are hashed, and as many pictures as are encoded in one go."""
    vae, pixels = randomize(AutoencoderKL(tiny)), torch.randint(256, (32, 3, 32, 32), dtype=torch.uint8)
    cfg = replace(tiny, cache_dir=str(tmp_path))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("support.prepared.file_sha256", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        encode_pictures(vae, pixels, ABOUT, "cpu", cfg, "encode")
    vae.encoder.register_forward_pre_hook(lambda *_: pytest.fail("they are there"))
    assert encode_pictures(vae, pixels, ABOUT, "cpu", cfg, "encode").shape[0] == 32


@pytest.mark.parametrize("cached", [False, True])
def test_captions_are_embedded_as_they_are_numbered_and_the_last_is_empty(tiny, tmp_path, cached):
    """More of them than are encoded in one go."""
    cfg, encoder = replace(tiny, cache_dir=str(tmp_path) if cached else ""), WordHashTextEncoder(512, 12)
    captions = [[f"number {i}", f"picture {i}"] for i in range(40)]
    embed = embed_captions(encoder, captions, ABOUT, torch.device("cpu"), cfg)
    rows = torch.tensor([80, 3, 0, 79])
    expected = encoder(["", "picture 1", "number 0", "picture 39"])
    torch.testing.assert_close(embed(rows), expected.half().float(), atol=0, rtol=0)
    assert len(list(tmp_path.glob("captions-*.json"))) == cached


def test_pictures_and_latents_that_older_code_has_made_are_not_used(tiny, tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(b"")
    pictures = Pictures([(str(tmp_path / "a.png"), ["a picture"])], 16, {str(tmp_path)})
    cfg = replace(tiny, cache_dir=str(tmp_path / "prepared"))
    vae, encoder, device = AutoencoderKL(cfg), WordHashTextEncoder(cfg.text_dim, cfg.text_length), torch.device("cpu")
    pixels = torch.zeros(2, 3, cfg.image_size, cfg.image_size, dtype=torch.uint8)

    def kept():
        about = ABOUT | {"code": encoded.hash_code()}
        encode_pictures(vae, pixels, about, device, cfg, "encode")
        embed_captions(encoder, [["a picture"]], about, device, cfg)
        return [len(list((tmp_path / "prepared").glob(f"{name}-*.json"))) for name in ("latents", "captions")]

    key = pictures.key()
    assert pictures.key() == key and kept() == kept() == [1, 1]
    monkeypatch.setattr(data, "read_square", lambda path, size, *how: None)
    assert pictures.key() != key
    monkeypatch.setattr(encoded, "vae_code", statistics)  # any other module's source
    monkeypatch.setattr(statistics, "pictures_per_pass", lambda pixels: 8, raising=False)
    assert kept() == [2, 1]
    monkeypatch.setattr(encoded, "text_encoder_code", statistics)
    assert kept() == [2, 2]
    monkeypatch.setattr(encoded, "to_float", lambda x, device: -to_float(x, device))
    assert kept() == [3, 2]


def test_a_cached_run_has_the_bits_of_one_in_memory_and_a_killed_build_goes_on(tmp_path, fork):
    """Caches on and off, and a kill -9 while the pictures are prepared."""
    runs = {}
    for cache in ("", "prepared"):
        settings = flags(SMALL | {"cache_dir": cache, "save_minutes": 60, "horizontal_flips": True})
        for script in ("train_vae.py", "train_unet.py"):
            words = (script, "--preset", "demo", "--run_dir", f"run{cache}", *settings)
            if cache and script == "train_vae.py":
                killed = fork(*words, cwd=tmp_path, inject={"kill_at_picture": 8}).wait()
                assert killed.returncode == -signal.SIGKILL
            result = fork(*words, cwd=tmp_path).wait()
            assert result.returncode == 0, result.stderr
        left = (p for p in (tmp_path / f"run{cache}").iterdir() if p.suffix in (".pth", ".csv", ".png"))
        runs[cache] = {p.name: p.read_bytes() for p in left}
    assert runs[""] == runs["prepared"]
    again = fork(*words, "--overwrite", cwd=tmp_path).wait()
    assert again.returncode == 0 and "read training" not in again.stdout and "encode" not in again.stdout
    assert {p.name.split("-")[0] for p in (tmp_path / "prepared").iterdir()} == {"pictures", "latents", "captions"}
