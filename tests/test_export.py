"""The exported folder, asked through diffusers itself: it opens, and gives our pictures from our noise."""

import hashlib
import json
import logging
import math
import os
import re
import shutil
import stat
import subprocess
import sys
import warnings
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, assert_one_line_error, forge, sign
from diffusers import AutoencoderKL as TheirVAE
from diffusers import StableDiffusionPipeline
from diffusers import UNet2DConditionModel as TheirUNet
from PIL import Image

from config import SDConfig
from diffusion import configured_process, sample
from support import export, files
from support.models import learn_words, load_models, load_text_encoder
from support.show import append_csv, png_bytes
from text_encoder import ClipTextEncoder, make_text_encoder
from unet import TimeEmbedding, UNetLatent
from vae import AutoencoderKL

CPU = torch.device("cpu")
TOLERANCE = 1e-4
PROMPT = "a dog on the grass"


def randomized(module):
    """Fill every weight, the zero-initialised ones too, so that a wrong connection cannot hide."""
    torch.manual_seed(0)
    for name, p in module.named_parameters():
        scale = 1 / math.sqrt(p[0].numel()) if p.dim() > 1 else 0.1
        p.data = torch.randn_like(p) * scale + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return module


def make_run(folder, **settings):
    """A finished run that nobody trained: random weights, the manifests and the CSVs of six steps."""
    folder.mkdir()
    cfg = SDConfig(**(TINY | settings))
    unet, t_embedder, averaged = (
        randomized(m) for m in (UNetLatent(cfg), TimeEmbedding(cfg.time_dim), UNetLatent(cfg))
    )
    for p in averaged.parameters():
        p.data.mul_(1.1)
    sets = {
        "vae": {"vae_ckpt_epoch": randomized(AutoencoderKL(cfg))},
        "unet": {"unet_ckpt": unet, "t_ember_ckpt": t_embedder, "ema_unet_ckpt": averaged},
    }
    made_from = {}
    for kind, modules in sets.items():
        entries = {}
        for prefix, module in modules.items():
            path = folder / f"{prefix}2.pth"
            torch.save(module.state_dict(), path)
            data = path.read_bytes()
            entries[path.name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        manifest = {"format": 1, "kind": kind, "step": 6, "epoch": 2, "finished": True, "files": entries}
        manifest |= {"preset": "demo", "settings": asdict(cfg) | {"max_steps": None}} | made_from
        manifest |= {"machine": {"torch": torch.__version__, "device": "cpu"}}
        (folder / f"{kind}_set2.json").write_text(sign(json.loads(json.dumps(manifest))))
        made_from = {"made_from": entries}
        if settings.get("text_encoder") == "words":
            encoder = make_text_encoder("words", cfg.text_dim, cfg.text_length)
            run = SimpleNamespace(dir=folder, cfg=cfg, world=SimpleNamespace(rank=0))
            learn_words(encoder, [["a dog on the grass"], ["a cat in snow"]] * 5, run)
            made_from["text"] = encoder.key()
    figures = {"mse": 0.0142, "psnr_db": 24.5, "latent_mean": 0.01, "latent_std": 0.973}
    append_csv(folder / "vae_held_out.csv", {"epoch": 2, "step": 6} | figures)
    append_csv(folder / "unet_held_out.csv", {"epoch": 2, "step": 6, "loss": 0.2154})
    append_csv(folder / "unet_train.csv", {"step": 6, "lr": 0.001, "loss": 0.4321})


@pytest.fixture(scope="module")
def tiny_clip(real_data, tmp_path_factory):
    """A CLIP directory: the real tokenizer, and a small text model with random weights."""
    from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel

    path = tmp_path_factory.mktemp("tiny_clip")
    torch.manual_seed(0)
    config = CLIPTextConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                            vocab_size=49408, initializer_range=1.0)  # fmt: skip
    model = CLIPTextModel(config)
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(real_data / "clip-tokenizer").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def clip_run(tiny_clip, tmp_path_factory):
    """A run with CLIP, exported: run/ and out/ in one folder."""
    cwd = tmp_path_factory.mktemp("clip_run")
    make_run(cwd / "run", text_encoder=str(tiny_clip), text_dim=32, text_length=77, sample_prompts=(PROMPT,))
    assert export.export_run(str(cwd / "out"), str(cwd / "run")) == "StableDiffusionPipeline"
    return cwd


@pytest.fixture
def hash_run(tmp_path):
    make_run(tmp_path / "run")
    return tmp_path


class Complaints(logging.Handler):
    """What diffusers and transformers log while it is in place."""

    def __enter__(self):
        self.texts = []
        for name in ("diffusers", "transformers"):
            logging.getLogger(name).addHandler(self)
        return self

    def emit(self, record):
        if record.levelno >= logging.WARNING:
            self.texts.append(record.getMessage())

    def __exit__(self, *_):
        for name in ("diffusers", "transformers"):
            logging.getLogger(name).removeHandler(self)


def open_pipeline(folder):
    pipe = StableDiffusionPipeline.from_pretrained(folder, low_cpu_mem_usage=False)  # True wants another package
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generators(seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_the_pipeline_opens_without_a_complaint(clip_run):
    with Complaints() as complaints, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        open_pipeline(clip_run / "out")
    assert complaints.texts == []
    assert [str(w.message) for w in warned if "diffusers" in w.filename or "transformers" in w.filename] == []


@pytest.mark.parametrize("scale", [1, 3])
def test_the_pipeline_gives_our_pictures_from_our_noise(clip_run, scale):
    """Seed for seed, because diffusers draws from a list of generators as noise_source() does."""
    cfg, _, vae, unet, t_embedder = load_models(str(clip_run / "run"), False, CPU)
    encoder = ClipTextEncoder(cfg.text_encoder)
    prompts = [PROMPT, "a photo of a cat " * 20]  # the second is cut at 77 tokens, here and there
    ours = sample(unet, vae, t_embedder, encoder, prompts, cfg.timesteps, 2, process=configured_process(cfg),
                  guidance_scale=scale, seeds=[5, 6])  # fmt: skip
    theirs = open_pipeline(clip_run / "out")(prompts, num_inference_steps=cfg.timesteps, guidance_scale=scale,
                                            generator=generators([5, 6]), output_type="pt").images  # fmt: skip
    inside = (ours > 0.02) & (ours < 0.98)
    print(f"\nguidance {scale}: largest pixel difference {(ours - theirs).abs().max() * 255:.4f}/255, "
          f"{inside.float().mean():.0%} of the pixels unsaturated, std {ours.std():.3f}")  # fmt: skip
    assert ours.shape == theirs.shape and inside.float().mean() > 0.5 and ours.std() > 0.05
    assert (ours - theirs).abs().max() <= 1 / 255


def test_the_models_open_alone_and_strictly(clip_run):
    cfg, _, vae, unet, t_embedder = load_models(str(clip_run / "run"), False, CPU)
    x, z = torch.rand(2, 3, cfg.image_size, cfg.image_size) * 2 - 1, torch.randn(2, *unet.latent_shape)
    t, text_emb = torch.tensor([0, cfg.timesteps - 1]), torch.randn(2, 77, cfg.text_dim)
    theirs = []
    for kind, folder in ((TheirVAE, "vae"), (TheirUNet, "unet")):
        model, info = kind.from_pretrained(clip_run / "out" / folder, output_loading_info=True)
        assert not any(info.values()), info
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        theirs.append(model.eval())
    with torch.no_grad():
        mu, _ = vae.encode(x)
        assert (mu - theirs[0].encode(x).latent_dist.mean).abs().max() <= TOLERANCE
        assert (vae.decoder(z) - theirs[0].decode(z / theirs[0].config.scaling_factor).sample).abs().max() <= TOLERANCE
        assert (unet(z, t_embedder(t), text_emb) - theirs[1](z, t, text_emb).sample).abs().max() <= TOLERANCE


def test_another_text_encoder_than_the_trained_one_is_not_exported(clip_run, tiny_clip, tmp_path, run_here):
    """Same shape, other weights: the run's manifest knows which it was."""
    from transformers import CLIPTextModel

    other = shutil.copytree(tiny_clip, tmp_path / "other")
    model = CLIPTextModel.from_pretrained(tiny_clip)
    next(model.parameters()).data.mul_(2)
    model.save_pretrained(other)
    shutil.copytree(clip_run / "run", tmp_path / "run")
    path = tmp_path / "run/unet_set2.json"
    manifest = json.loads(path.read_text()) | {"text": ClipTextEncoder(str(tiny_clip)).key()}
    path.write_text(sign(manifest))
    result = run_here("sample.py", "--export", "out", "--run_dir", "run", "--text_encoder", other, cwd=tmp_path)
    assert_one_line_error(result, 1, "--text_encoder")
    assert not (tmp_path / "out").exists()
    assert run_here("sample.py", "--export", "out", "--run_dir", "run", cwd=tmp_path).returncode == 0


def test_averaged_weights_on_request(hash_run, run_here):
    result = run_here("sample.py", "--export", "out", "--run_dir", "run", "--ema", cwd=hash_run)
    assert result.returncode == 0, result.stderr
    saved = torch.load(hash_run / "run/ema_unet_ckpt2.pth", weights_only=True)
    theirs = TheirUNet.from_pretrained(hash_run / "out/unet").state_dict()
    assert all(torch.equal(theirs[name], value) for name, value in saved.items())
    assert "averaged" in (hash_run / "out/README.md").read_text()


def test_without_clip_the_models_alone(hash_run, run_here):
    result = run_here("sample.py", "--export", "out/", "--run_dir", "run", cwd=hash_run)
    assert result.returncode == 0 and "UNet2DConditionModel" in result.stdout, result.stderr
    assert sorted(p.name for p in (hash_run / "out").iterdir()) == [
        "README.md", "scheduler", "text_encoder.py", "unet", "vae"]  # fmt: skip
    assert sorted(p.name for p in hash_run.iterdir()) == ["out", "run"]


def run_snippet(folder, monkeypatch):
    """The card's code, as a reader would run it: in the exported folder, without the project."""
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]
    monkeypatch.chdir(folder)
    ours = {str(folder) for folder in (ROOT, ROOT / "support", ROOT / "tests")}
    monkeypatch.setattr(sys, "path", [str(folder), *(p for p in sys.path if p not in ours)])
    for name, module in [*sys.modules.items()]:
        if os.path.dirname(getattr(module, "__file__", None) or "") in ours:
            monkeypatch.delitem(sys.modules, name)
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})


def test_the_pages_code_opens_a_run_of_any_preset(tmp_path, monkeypatch):
    """With learned word vectors, and all that guides."""
    (tmp_path / "runs").mkdir()
    guidance = {"guidance_scale": 3.0, "guidance_interval": (0.3, 1.0), "guidance_rescale": 0.9}
    make_run(tmp_path / "runs/demo", text_encoder="words", prediction_type="flow", caption_dropout=0.1, **guidance)
    code = re.search(r"## Opening a run.*?```python\n(.*?)```", (ROOT / "docs/diffusers.md").read_text(), re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    exec(code.replace("images = ", "torch.manual_seed(0)\nimages = "), found := {})
    cfg, _, vae, unet, t_embedder = load_models("runs/demo", False, CPU)
    encoder, process = load_text_encoder("runs/demo", cfg, None, CPU), configured_process(cfg)
    torch.manual_seed(0)
    networks = (unet, vae, t_embedder, encoder)
    expected = sample(*networks, "a red sports car", cfg.timesteps, process=process, **guidance)
    assert torch.equal(found["images"], expected)


CLIP = {"text_dim": 32, "text_length": 77}
RUNS = {
    "pipeline": {},
    "models": {},
    "v-prediction": {"prediction_type": "v_prediction", "scale_betas": True, "timesteps": 100},
    "flow": {"prediction_type": "flow"},
    "flow with words": {"prediction_type": "flow", "text_encoder": "words"},
    "flow with clip": {"prediction_type": "flow"},
}


@pytest.mark.parametrize("kind", RUNS)
def test_the_cards_snippet_gives_the_picture_of_sample(kind, request, tmp_path, monkeypatch):
    settings = RUNS[kind] | {"sample_prompts": (PROMPT,)}
    if kind in ("pipeline", "flow with clip"):
        settings |= {"text_encoder": str(request.getfixturevalue("tiny_clip"))} | CLIP
    make_run(tmp_path / "run", **settings)
    opener = export.export_run(str(tmp_path / "out"), str(tmp_path / "run"))
    assert (opener == "StableDiffusionPipeline") == (tmp_path / "out/model_index.json").exists() == (kind == "pipeline")
    cfg, _, vae, unet, t_embedder = load_models(str(tmp_path / "run"), False, CPU)
    encoder = load_text_encoder(str(tmp_path / "run"), cfg, None, CPU)
    ours = sample(unet, vae, t_embedder, encoder, PROMPT, cfg.timesteps, 1, process=configured_process(cfg), seeds=[0])
    (tmp_path / "ours.png").write_bytes(png_bytes(ours[0]))
    run_snippet(tmp_path / "out", monkeypatch)
    ours, theirs = (np.asarray(Image.open(tmp_path / p)).astype(int) for p in ("ours.png", "out/picture.png"))
    assert ours.shape == theirs.shape == (cfg.image_size, cfg.image_size, 3) and ours.std() > 10
    difference = np.abs(ours - theirs)
    assert difference.max() <= 1 and difference.mean() < 0.05  # whoever cuts off instead of rounding is 0.5 too dark


def test_the_card_says_what_the_run_says(clip_run):
    card = (clip_run / "out/README.md").read_text()
    manifest = json.loads((clip_run / "run/unet_set2.json").read_text())
    for file in ("unet_ckpt2.pth", "t_ember_ckpt2.pth"):
        assert f"| {file} | `{manifest['files'][file]['sha256']}` |" in card
    assert f"| vae_ckpt_epoch2.pth | `{manifest['made_from']['vae_ckpt_epoch2.pth']['sha256']}` |" in card
    for words in (
        "license: mit",
        "6 steps of 8 pictures: 48 seen",
        "0.4321",
        "0.2154",
        "MSE 0.0142",
        "24.5 dB",
        "epoch 2",
    ):
        assert words in card, words
    assert str(clip_run) not in card  # nothing of this machine


def test_the_licence_of_weights_of_ones_own_pictures_is_left_open(tmp_path):
    for dataset, licence in (("folder", "other"), ("coco", "mit")):
        make_run(tmp_path / dataset, dataset=dataset)
        export.export_run(str(tmp_path / f"{dataset}-out"), str(tmp_path / dataset))
        card = (tmp_path / f"{dataset}-out/README.md").read_text()
        assert f"license: {licence}\n" in card and ("Licence of the weights: MIT" in card) == (licence == "mit")


def test_a_card_tells_of_another_runs_weights(hash_run):
    path = hash_run / "run/unet_set2.json"
    for source in ("", "runs/a"):
        manifest = json.loads(path.read_text())
        path.write_text(sign(manifest | {"settings": manifest["settings"] | {"init_from": source}}))
        export.export_run(str(hash_run / f"out{source[5:]}"), str(hash_run / "run"))
        card = (hash_run / f"out{source[5:]}/README.md").read_text()
        assert "both trained from random\nweights" in card and "runs/a" not in card
        assert ("weights, the U-Net going on from those of another run; its" in card) == bool(source)


def test_a_card_without_what_was_deleted(hash_run):
    for name in ("unet_held_out.csv", "vae_set2.json"):
        (hash_run / "run" / name).unlink()
    (hash_run / "run/unet_train.csv").write_text("step,loss\nx,")
    export.export_run(str(hash_run / "out"), str(hash_run / "run"))
    card = (hash_run / "out/README.md").read_text()
    assert "48 seen" in card and "loss" not in card and "MSE" not in card


def test_files_are_as_readable_as_the_umask_says(clip_run, tmp_path):
    before = os.umask(0o027)
    try:
        export.export_run(str(tmp_path / "out"), str(clip_run / "run"))
    finally:
        os.umask(before)
    for path in [tmp_path / "out", *(tmp_path / "out").rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o750 if path.is_dir() else 0o640), path


def test_a_folder_that_is_there_is_left_alone(hash_run, run_here):
    command = ["--export", "out", "--run_dir", "run"]
    (hash_run / "out").mkdir()
    (hash_run / "out/mine").write_text("mine")
    assert_one_line_error(run_here("sample.py", *command, cwd=hash_run), 1, "--export out", "another name")
    assert [p.name for p in (hash_run / "out").iterdir()] == ["mine"]
    (hash_run / "out/mine").unlink()
    assert run_here("sample.py", *command, cwd=hash_run).returncode == 0  # an empty one is filled
    (hash_run / "file").write_text("mine")
    assert_one_line_error(run_here("sample.py", "--export", "file", "--run_dir", "run", cwd=hash_run), 1, "file")
    assert (hash_run / "file").read_text() == "mine"


@pytest.mark.parametrize("writes", range(6))
def test_an_export_that_fails_leaves_nothing(hash_run, run_here, monkeypatch, writes):
    """The disk is full at each of the writes in turn."""
    calls = []

    def write_file(path, data):
        calls.append(path)
        if len(calls) > writes:
            raise OSError(28, "No space left on device")
        real(path, data)

    real = files.write_file
    monkeypatch.setattr(files, "write_file", write_file)
    result = run_here("sample.py", "--export", "out", "--run_dir", "run", cwd=hash_run)
    assert_one_line_error(result, 1, "--export", "No space left")
    assert [p.name for p in hash_run.iterdir()] == ["run"]


def test_an_export_that_is_killed_leaves_no_folder_of_that_name(hash_run):
    code = (
        "import os\nfrom support import export\nexport.model_card = lambda *_: os.kill(os.getpid(), 9)\n"
        "export.export_run('out', 'run')"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=hash_run).returncode == -9
    assert not (hash_run / "out").exists()
    export.export_run(str(hash_run / "out"), str(hash_run / "run"))  # and is in nobody's way


def test_damaged_weights_and_absent_clip_are_refused(clip_run, hash_run, run_here):
    forge(hash_run / "run", "unet", "2", "unet_ckpt2.pth", b"not a checkpoint")
    result = run_here("sample.py", "--export", "new", "--run_dir", "run", cwd=hash_run)
    assert_one_line_error(result, 1, "unet_ckpt2.pth")
    command = ["--export", "new", "--run_dir", clip_run / "run", "--text_encoder", "nowhere"]
    assert_one_line_error(run_here("sample.py", *command, cwd=hash_run), 1, "--text_encoder: nowhere")
    assert not (hash_run / "new").exists()


@pytest.mark.parametrize(
    "argv, word", [([], "--export"), (["--steps", "5"], "--steps"), (["--prompt", "x"], "--prompt")]
)
def test_flags_that_export_does_not_read_are_refused(tmp_path, run_here, argv, word):
    export_flags = ["--export", "out"] if argv else []
    assert_one_line_error(run_here("sample.py", *export_flags, *argv, cwd=tmp_path), 2, word)
