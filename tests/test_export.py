"""The exported folder, asked through diffusers itself: it opens, and gives our pictures from our noise."""

import json
import logging
import os
import re
import stat
import subprocess
import sys
import types
import warnings

import pytest
import torch
from conftest import TINY, assert_one_line_error, forge
from diffusers import AutoencoderKL as TheirVAE
from diffusers import StableDiffusionPipeline
from diffusers import UNet2DConditionModel as TheirUNet
from PIL import Image
from test_models import randomize

import export
from checkpoint import Run, load_models
from config import SDConfig
from diffusion import configured_process, sample
from text_encoder import ClipTextEncoder, make_text_encoder
from training import World, append_csv
from unet import TimeEmbedding, UNetLatent
from vae import AutoencoderKL

CPU = torch.device("cpu")
TOLERANCE = 1e-4
PROMPT = "a dog on the grass"


def make_run(folder, **settings):
    """A finished run that nobody trained: random weights, the manifests and the CSVs of six steps."""
    cfg = SDConfig(**(TINY | settings))
    args = types.SimpleNamespace(run_dir=str(folder), overwrite=False, preset="demo", max_steps=None)
    unets = [randomize(module) for module in (UNetLatent(cfg), TimeEmbedding(cfg.time_dim), UNetLatent(cfg))]
    for p in unets[2].parameters():
        p.data.mul_(1.1)
    made_from = {}
    for kind, modules in (("vae", [randomize(AutoencoderKL(cfg))]), ("unet", unets)):
        run = Run(args, kind, cfg, World(0, 1, CPU))
        run.about |= {"made_from": made_from} if made_from else {}
        run.open()
        run.save("2", True, modules, torch.optim.Adam(modules[0].parameters()), {"step": 6, "epoch": 2})
        manifest = json.loads((folder / f"{kind}_set2.json").read_text())
        made_from = {k: v for k, v in manifest["files"].items() if k.startswith("vae_ckpt")}
        run.lock.close()
    figures = {"mse": 0.0142, "psnr_db": 24.5, "latent_mean": 0.01, "latent_std": 0.973}
    append_csv(folder / "vae_held_out.csv", {"epoch": 2, "step": 6} | figures)
    append_csv(folder / "unet_held_out.csv", {"epoch": 2, "step": 6, "loss": 0.2154})
    append_csv(folder / "unet_train.csv", {"step": 6, "lr": 0.001, "loss": 0.4321})
    return cfg


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
    (cwd / "run").mkdir()
    make_run(cwd / "run", text_encoder=str(tiny_clip), text_dim=32, text_length=77, sample_prompts=(PROMPT,))
    assert export.export_run(str(cwd / "out"), str(cwd / "run")) == "StableDiffusionPipeline"
    return cwd


@pytest.fixture
def hash_run(tmp_path):
    (tmp_path / "run").mkdir()
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
    import shutil

    from transformers import CLIPTextModel

    from checkpoint import own_hash

    other = shutil.copytree(tiny_clip, tmp_path / "other")
    model = CLIPTextModel.from_pretrained(tiny_clip)
    next(model.parameters()).data.mul_(2)
    model.save_pretrained(other)
    shutil.copytree(clip_run / "run", tmp_path / "run")
    path = tmp_path / "run/unet_set2.json"
    manifest = json.loads(path.read_text()) | {"text": ClipTextEncoder(str(tiny_clip)).key()}
    path.write_text(json.dumps(manifest | {"sha256": own_hash(manifest)}))
    result = run_here("sample.py", "--export", "out", "--run_dir", "run", "--text_encoder", other, cwd=tmp_path)
    assert_one_line_error(result, 1, "--text_encoder")
    assert not (tmp_path / "out").exists()
    assert run_here("sample.py", "--export", "out", "--run_dir", "run", cwd=tmp_path).returncode == 0


def test_normalized_latents_are_refused(tmp_path, run_here):
    (tmp_path / "run").mkdir()
    make_run(tmp_path / "run", normalize_latents=True)
    result = run_here("sample.py", "--export", "out", "--run_dir", "run", cwd=tmp_path)
    assert_one_line_error(result, 1, "--export", "normalize_latents")
    assert not (tmp_path / "out").exists()


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


def run_snippet(folder):
    """The card's code, as a reader would run it: in the exported folder, without the project."""
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)


OTHER_PROCESSES = {
    "flow": {"prediction_type": "flow"}, "cosine": {"beta_schedule": "cosine"},
    "zero SNR": {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["clip_run", "hash_run", *OTHER_PROCESSES, "flow with clip"])
def test_the_cards_snippet_gives_the_picture_of_sample(kind, request, tmp_path):
    if kind in ("clip_run", "hash_run"):
        cwd = request.getfixturevalue(kind)
    else:
        cwd = tmp_path
        (cwd / "run").mkdir()
        settings = OTHER_PROCESSES[kind.split(" with")[0]]
        if "clip" in kind:
            settings = settings | {
                "text_encoder": str(request.getfixturevalue("tiny_clip")),
                "text_dim": 32,
                "text_length": 77,
            }
        make_run(cwd / "run", sample_prompts=(PROMPT,), **settings)
    if kind != "clip_run":
        opener = export.export_run(str(cwd / "out"), str(cwd / "run"))
        assert opener == "AutoencoderKL and UNet2DConditionModel" and not (cwd / "out/model_index.json").exists()
    result = run_snippet(cwd / "out")
    assert result.returncode == 0, result.stderr
    cfg, _, vae, unet, t_embedder = load_models(str(cwd / "run"), False, CPU)
    encoder = make_text_encoder(cfg.text_encoder, cfg.text_dim, cfg.text_length)
    ours = sample(unet, vae, t_embedder, encoder, PROMPT, cfg.timesteps, 1, process=configured_process(cfg), seeds=[0])
    with Image.open(cwd / "out/picture.png") as image:
        theirs = torch.tensor(list(image.convert("RGB").tobytes())).view(cfg.image_size, cfg.image_size, 3)
    (cwd / "out/picture.png").unlink()
    assert ((ours[0] * 255).round().permute(1, 2, 0) - theirs).abs().max() <= 1


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

    real = export.write_file
    monkeypatch.setattr(export, "write_file", write_file)
    result = run_here("sample.py", "--export", "out", "--run_dir", "run", cwd=hash_run)
    assert_one_line_error(result, 1, "--export", "No space left")
    assert [p.name for p in hash_run.iterdir()] == ["run"]


def test_an_export_that_is_killed_leaves_no_folder_of_that_name(hash_run):
    code = ("import os, export\nexport.model_card = lambda *_: os.kill(os.getpid(), 9)\n"
            "export.export_run('out', 'run')")  # fmt: skip
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
