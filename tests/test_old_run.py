"""A run directory of the code before it was moved into rooms opens: sample, evaluate, export, resume.

old_run.tar.xz holds a finished VAE and a U-Net that was stopped after step 6 of 8. What it is not: a promise to read runs
of the future, or of other formats.
"""

import hashlib
import json
import tarfile
from pathlib import Path

import pytest
from conftest import SAMPLE, TRAIN, assert_one_line_error, files, rows, sign

from config import SDConfig
from support.models import load_text_encoder, training_text_encoder

ARCHIVE = Path(__file__).parent / "old_run.tar.xz"
FLAGS = """--num_workers 0 --image_size 32 --max_images 16 --held_out_images 4 --block_out_channels 4 8 --norm_num_groups 1
    --unet_block_out_channels 8 --time_dim 32 --unet_norm_num_groups 4 --num_heads 2 --text_dim 16 --text_length 8
    --batch_size 4 --sample_steps 4 --save_every 1 --optimizer adam --lr_warmup_steps 60 --flow_time_mean 0"""
VAE = ("train_vae.py", *TRAIN, *FLAGS.split(), "--cache_dir", "", "--lr", 2e-3, "--beta", 1e-5)
UNET = ("train_unet.py", *TRAIN, *FLAGS.split(), "--cache_dir", "", "--num_epochs", 2, "--lr", 2.3e-3)
# the files of a run of the old code that nobody stopped, on the machine that the manifests name
UNBROKEN = {
    "unet_ckpt2.pth": "fa6158f8bb7b49105f6db9c2b0ef257f16dea53ca74a5efd71ba526f19d498f1",
    "ema_unet_ckpt2.pth": "54760f5eb3a2b209d74935acb10f43a9ea52af80872a3521eabb4d050d95f8c7",
    "t_ember_ckpt2.pth": "c6b2cdfcadab3964663a74678eae1d8dc9d6a9f805b37455df91dfd540436a13",
    "unet_train.csv": "3a4bdfa4c54d7dded0a37497c31e6e02411df7820462675dee2d5db86130c4dd",
    "unet_samples_epoch2.png": "e4451ec2b2c1757ff9b3382f26f19f9ebe02abcca7d125c1255a3850659d9fa9",
}
HELD_OUT = ["1.04822", "1.04732"]


@pytest.fixture
def old(tmp_path):
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def resign(path, **change):
    """Other settings in a manifest, as if the run had been trained with them."""
    manifest = json.loads(path.read_text())
    path.write_text(sign(manifest | {"settings": manifest["settings"] | change}))


def test_it_is_sampled(old, run_here):
    before = files(old)
    result = run_here(*SAMPLE, cwd=old)
    assert result.returncode == 0 and "wrote 1 picture" in result.stdout, result.stderr
    assert files(old).items() > before.items() and len(list(old.glob("run/samples/x_*.png"))) == 2


def test_its_words_are_split_as_they_were(old, tmp_path):
    """Of a caption in a script without spaces it has learned one vector."""
    manifest = json.loads((old / "run/unet_set1.json").read_text())
    cfg = SDConfig(**{k: manifest["settings"][k] for k in ("text_dim", "text_length")}, text_encoder="hash")
    for encoder in (
        load_text_encoder(old / "run", cfg, None, "cpu"),
        training_text_encoder(cfg, old / "run", False, "cpu"),
    ):
        assert encoder.split("\u7ea2\u8272") == ["\u7ea2\u8272"] and encoder.key() == manifest["text"]
    for run, overwrite in ((old / "run", True), (tmp_path / "new", False)):
        assert training_text_encoder(cfg, run, overwrite, "cpu").version == 2


def test_it_is_measured(old, run_here, quick_judge):
    result = run_here("evaluate.py", "--run_dir", "run", "--num_prompts", 4, "--steps", 2, cwd=old)
    assert result.returncode == 0 and "warning: --data_root" not in result.stderr, result.stderr
    assert json.loads((old / "run/evaluation.json").read_text())["model"] == "unet_ckpt1"


def test_it_is_exported(old, run_here):
    assert run_here("sample.py", "--run_dir", "run", "--export", "card", cwd=old).returncode == 0
    assert {"README.md", "unet", "vae"} <= {path.name for path in (old / "card").iterdir()}
    assert "WordHashTextEncoder(16, 8, version=1)" in (old / "card/README.md").read_text()


def test_it_is_resumed_to_its_end(old, run_here):
    finished = run_here(*VAE, cwd=old)
    assert finished.returncode == 0 and "this run is finished (epoch 1)" in finished.stdout, finished.stderr
    then = json.loads((old / "run/unet_set2_step6.json").read_text())["machine"]
    resumed = run_here(*UNET, cwd=old)
    assert resumed.returncode == 0 and "resumed after step 6" in resumed.stdout, resumed.stderr
    assert [row["step"] for row in rows(old / "run/unet_train.csv")] == ["4", "8"]
    manifest = json.loads((old / "run/unet_set2.json").read_text())
    assert manifest["finished"] and not list(old.glob("run/*_step*"))
    held_out = rows(old / "run/unet_held_out.csv")  # has more columns now, which the older row leaves empty
    assert [row["epoch"] for row in held_out] == ["1", "2"]
    assert held_out[0]["other_caption"] == "" and held_out[1]["other_caption"]
    if manifest["machine"] == then:
        assert [row["loss"] for row in held_out] == HELD_OUT
        assert {name: hashlib.sha256((old / "run" / name).read_bytes()).hexdigest() for name in UNBROKEN} == UNBROKEN
    assert "finished" in run_here(*UNET, cwd=old).stdout


@pytest.mark.parametrize(
    "change", [{"equivariance": 0.25}, {"min_snr_gamma": 5.0}, {"flow_times": "uniform"}, {"ema_sigma_rel": 0.1}]
)
def test_a_setting_that_is_no_more_bars_from_going_on_but_not_from_sampling(old, run_here, change):
    for path in old.glob("run/unet_set*.json"):
        resign(path, **change)
    ((name, value),) = change.items()
    resumed = run_here(*UNET, cwd=old)
    assert_one_line_error(resumed, 1, "--run_dir run", f"{name} was {value}, which is no more", "--overwrite")
    assert run_here(*SAMPLE, cwd=old).returncode == 0


@pytest.mark.parametrize("change", [{"beta_schedule": "cosine"}, {"rescale_betas_zero_snr": True}])
def test_a_schedule_that_is_no_more_bars_from_both(old, run_here, change):
    for path in old.glob("run/unet_set*.json"):
        resign(path, **change)
    for words in (UNET, SAMPLE):
        assert_one_line_error(run_here(*words, cwd=old), 1, "unet_set", f"--{next(iter(change))}", "is no more; use")


def test_the_settings_of_a_vae_that_are_no_more_do_not_bar_a_unet(old, run_here):
    resign(old / "run/vae_set1.json", equivariance=0.25)
    assert_one_line_error(run_here(*VAE, cwd=old), 1, "(equivariance was 0.25, which is no more)")
    assert run_here(*UNET, cwd=old).returncode == 0
