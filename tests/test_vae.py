"""Promises of the VAE's options: equivariance, L1 and MS-SSIM terms, a decoder finetuned on latents that stay."""

import json
import math
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, Forked, assert_one_line_error, flags, sign
from PIL import Image
from test_models import randomize
from test_resume import bits

import evaluate
import train_vae
import vae as vae_module
from config import SDConfig, UserError
from data import Scenes, shrunk
from train_unet import encode_all, latents_of
from training import Progress, encode_pictures, to_float
from vae import AutoencoderKL, draw_transform, ms_ssim, reparameterize, transformed, vae_loss

# a few hundred steps in seconds
QUICK = {"image_size": 16, "block_out_channels": (8, 16), "unet_block_out_channels": (8, 16), "time_dim": 32,
         "max_images": 160, "num_epochs": 6, "lr": 5e-3, "mixed_precision": "no"}  # fmt: skip

ABOUT = {"made_from": {}, "machine": {}, "code": {"latents": ""}}  # what encode_all() reads of a run


def weights(path):
    return torch.load(path, weights_only=True)


# ---- Equivariance (EQ-VAE) ----


def test_transforms_are_drawn_as_often_as_said_and_all_of_them():
    torch.manual_seed(0)
    drawn = [draw_transform(0.5) for _ in range(4000)]
    share = sum(t is not None for t in drawn) / len(drawn)
    assert share == pytest.approx(0.5, abs=0.03)
    assert {t for t in drawn if t} == {(turns, h) for turns in range(4) for h in (False, True)} - {(0, False)}
    torch.manual_seed(0)
    assert drawn[:50] == [draw_transform(0.5) for _ in range(50)]
    assert not any(draw_transform(0.0) for _ in range(200)) and all(draw_transform(1.0) for _ in range(200))


def test_pictures_and_latents_are_turned_and_halved_alike():
    """Against flips and sums written out; and a code that is equivariant by construction passes with error 0."""
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(transformed(x, (1, False)), x.transpose(2, 3).flip(2))
    assert torch.equal(transformed(x, (2, False)), x.flip(2, 3))
    halves = sum(x[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)) / 4
    torch.testing.assert_close(transformed(x, (0, True)), halves)
    assert transformed(x, None) is x
    z, decode = F.avg_pool2d(x, 2), lambda z: F.interpolate(z, scale_factor=2)
    for transform in ((1, False), (3, False), (2, False)):
        assert torch.equal(decode(transformed(z, transform)), transformed(decode(z), transform))


@pytest.mark.parametrize("transform", [(0, True), (1, False), (3, True)])
def test_the_decoder_is_given_the_transformed_latent(tiny, transform):
    vae, x, eps = randomize(AutoencoderKL(tiny)), torch.randn(2, 3, 32, 32), torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        mu, log_var, x_hat = vae(x, eps, transform)
        z = reparameterize(mu, log_var, eps)
        assert torch.equal(x_hat, vae.decoder(transformed(z, transform)))
    assert x_hat.shape == transformed(x, transform).shape and mu.shape == z.shape


@pytest.mark.slow
def test_training_with_the_regulariser_makes_the_latents_equivariant(tmp_path, run_here):
    """Error of what the turned latents decode to, on scenes not trained on: below that of the same training without."""
    settings, errors = TINY | QUICK, {}
    x = to_float(torch.from_numpy(np.stack([Scenes(7, 64, 16)[i] for i in range(64)])), "cpu")
    for share in (0, 0.7):
        command = ["--preset", "demo", "--run_dir", f"run{share}", *flags(settings), "--equivariance", share]
        assert run_here("train_vae.py", *command, cwd=tmp_path).returncode == 0
        vae = AutoencoderKL(SDConfig(**settings))
        vae.load_state_dict(weights(tmp_path / f"run{share}/vae_ckpt_epoch6.pth"))
        with torch.no_grad():
            mu, turn = vae.encode(x)[0], (1, False)
            errors[share] = F.mse_loss(vae.decoder(transformed(mu, turn)), transformed(x, turn)).item()
    assert errors[0.7] < 0.9 * errors[0], errors


@pytest.mark.slow
def test_a_compiled_model_trains_with_the_regulariser_as_the_plain_one(tmp_path, run_here):
    settings, losses = TINY | QUICK | {"max_images": 20, "num_epochs": 2, "equivariance": 1.0}, []
    for run, more in (("plain", []), ("compiled", ["--compile"])):
        command = ["--preset", "demo", "--run_dir", run, *more, *flags(settings)]
        assert run_here("train_vae.py", *command, cwd=tmp_path).returncode == 0
        lines = (tmp_path / run / "vae_train.csv").read_text().splitlines()[1:]
        losses.append([float(line.split(",")[2]) for line in lines])
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)


def test_equivariance_that_makes_no_sense_is_refused():
    with pytest.raises(UserError, match="--equivariance.*3 wide.*--image_size"):
        SDConfig(**TINY | {"image_size": 12, "equivariance": 0.5, "unet_block_out_channels": (16,)})
    with pytest.raises(UserError, match="--equivariance.*finetuning"):
        SDConfig(**TINY | {"equivariance": 0.5, "finetune_decoder_of": "run"})


# ---- L1 and MS-SSIM ----


def naive_ssim(a, b):
    """-> SSIM and its factor without brightness of one channel: a weighted mean per window, in plain loops."""
    offsets = np.arange(11) - 5
    g = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    g /= g.sum()
    both = []
    for i in range(a.shape[0] - 10):
        for j in range(a.shape[1] - 10):
            p, q = a[i : i + 11, j : j + 11], b[i : i + 11, j : j + 11]
            mp, mq = (g * p).sum(), (g * q).sum()
            vp, vq, cov = (g * (p - mp) ** 2).sum(), (g * (q - mq) ** 2).sum(), (g * (p - mp) * (q - mq)).sum()
            brightness = (2 * mp * mq + 0.01**2) / (mp**2 + mq**2 + 0.01**2)
            structure = (2 * cov + 0.03**2) / (vp + vq + 0.03**2)
            both.append((brightness * structure, structure))
    return np.mean(both, axis=0)


def test_ms_ssim_equals_a_naive_one():
    """32 pixels: the window fits into two scales, whose exponents 0.0448 and 0.2856 are scaled to a sum of 1."""
    a = torch.rand(2, 2, 32, 32, dtype=torch.float64)
    b = (a + 0.2 * torch.randn_like(a)).clamp(0, 1)
    values, exponents = [], np.array([0.0448, 0.2856]) / (0.0448 + 0.2856)
    for n in range(2):
        for c in range(2):
            fine = naive_ssim(a[n, c].numpy(), b[n, c].numpy())[1]
            coarse = naive_ssim(*(x[n, c].reshape(16, 2, 16, 2).mean(dim=(1, 3)).numpy() for x in (a, b)))[0]
            values.append(fine ** exponents[0] * coarse ** exponents[1])
    assert ms_ssim(a, b).item() == pytest.approx(np.mean(values), abs=1e-6)


@pytest.mark.parametrize("size", [11, 16, 32, 64, 200])
def test_ms_ssim_in_closed_form(size):
    """1 of equal pictures; of two grey ones what is left is the brightness of the coarsest scale."""
    a = torch.rand(1, 3, size, size)
    assert ms_ssim(a, a).item() == pytest.approx(1, abs=1e-5)
    scales = 1 + min(4, int(math.log2(size / 11)))
    exponents = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)[:scales]
    brightness = (2 * 0.3 * 0.6 + 0.01**2) / (0.3**2 + 0.6**2 + 0.01**2)
    found = ms_ssim(torch.full_like(a, 0.3), torch.full_like(a, 0.6)).item()
    assert found == pytest.approx(brightness ** (exponents[-1] / sum(exponents)), abs=1e-4)


def test_the_gradient_of_ms_ssim_is_finite_where_the_pictures_are_opposite():
    a = torch.rand(1, 3, 32, 32, requires_grad=True)
    ms_ssim(a, 1 - a.detach()).backward()
    assert a.grad.isfinite().all()


def test_the_weighted_terms_are_added_to_the_loss():
    mu, log_var, x, x_hat = (*torch.randn(2, 1, 4, 2, 2), *torch.rand(2, 1, 3, 16, 16))
    plain = vae_loss(x, mu, log_var, x_hat, 0.1)[0]
    both = vae_loss(x, mu, log_var, x_hat, 0.1, l1_weight=0.5, ms_ssim_weight=0.25)[0]
    expected = 0.5 * (x - x_hat).abs().mean() + 0.25 * (1 - ms_ssim((x + 1) / 2, (x_hat + 1) / 2))
    assert (both - plain).item() == pytest.approx(expected.item(), abs=1e-6)


def test_pictures_smaller_than_the_window_are_refused():
    with pytest.raises(UserError, match="--ms_ssim_weight.*11 pixels.*8"):
        SDConfig(**TINY | {"image_size": 8, "ms_ssim_weight": 0.1})
    with pytest.raises(UserError, match="--ms_ssim_weight"):
        SDConfig(**TINY | {"image_size": 16, "ms_ssim_weight": 0.1, "equivariance": 0.5})
    SDConfig(**TINY | {"image_size": 16, "ms_ssim_weight": 0.1})


# ---- Normalised latents ----


@pytest.fixture
def normalized(tmp_path, run_here):
    """A finished VAE, in `run`, with its latents normalised."""
    command = ["--preset", "demo", "--run_dir", "run", *flags(TINY), "--mixed_precision", "no", "--normalize_latents"]
    result = run_here("train_vae.py", *command, cwd=tmp_path)
    assert result.returncode == 0 and "latent_std by channel" in result.stdout, result.stderr
    return tmp_path, command


def open_vae(path, **more):
    vae = AutoencoderKL(SDConfig(**TINY | more))
    vae.load_state_dict(weights(path))
    return vae.requires_grad_(False)


def test_normalised_latents_are_the_same_vae_with_mean_0_and_variance_1_per_channel(normalized, run_here):
    cwd, command = normalized
    assert run_here("train_vae.py", *command[:-1], "--run_dir", "plain", cwd=cwd).returncode == 0
    plain = open_vae(cwd / "plain/vae_ckpt_epoch2.pth")
    ours = open_vae(cwd / "run/vae_ckpt_epoch2.pth", normalize_latents=True)
    assert set(ours.state_dict()) - set(plain.state_dict()) == {"decoder.latent_mean", "decoder.latent_std"}
    assert all(torch.equal(v, ours.state_dict()[k]) for k, v in plain.state_dict().items())
    x = to_float(torch.from_numpy(np.stack([Scenes(0, 24, 32)[i] for i in range(24)])), "cpu")  # the training pictures
    mu, log_var = ours.encode(x)
    mean, square = mu.mean(dim=(0, 2, 3)), (mu.square() + log_var.exp()).mean(dim=(0, 2, 3))
    torch.testing.assert_close(mean, torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(square, torch.ones(4), atol=1e-3, rtol=0)
    their_mu, their_log_var = plain.encode(x)
    assert their_mu.mean(dim=(0, 2, 3)).abs().max() > 0.01  # there was something to normalise
    eps = torch.randn_like(mu)
    z, their_z = reparameterize(mu, log_var, eps), reparameterize(their_mu, their_log_var, eps)
    torch.testing.assert_close(ours.decoder(z), plain.decoder(their_z), atol=1e-4, rtol=0)


def test_the_unet_must_know_that_latents_are_normalised(normalized, run_here):
    cwd, command = normalized
    assert_one_line_error(
        run_here("train_unet.py", *command[:-1], cwd=cwd), 1, "--normalize_latents: False here", "True"
    )
    assert run_here("train_unet.py", *command, cwd=cwd).returncode == 0
    made = run_here("sample.py", "--run_dir", "run", "--prompt", "x", "--steps", 2, "--num_images", 1, cwd=cwd)
    assert made.returncode == 0, made.stderr


def test_finetuning_the_decoder_keeps_the_statistics(normalized, run_here):
    cwd, command = normalized
    more = ["--run_dir", "sharp", "--finetune_decoder_of", "run", "--max_images", 16]  # other pictures have others
    assert run_here("train_vae.py", *command, *more, cwd=cwd).returncode == 0
    before, after = (weights(cwd / run / "vae_ckpt_epoch2.pth") for run in ("run", "sharp"))
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    assert moved == {k for k in before if k.startswith("decoder.") and "latent_" not in k}


# ---- Resuming ----

ALL = {"equivariance": 0.5, "l1_weight": 0.1, "ms_ssim_weight": 0.1, "normalize_latents": True,
       "random_crop": 4, "random_scale": True, "horizontal_flips": True, "captions_per_image": 1}  # fmt: skip


def command_with_all(kind):
    return (
        f"train_{kind}.py",
        "--preset",
        "demo",
        "--run_dir",
        "run",
        *flags(TINY | QUICK | {"image_size": 32} | ALL | SHORT),
    )


SHORT = {"max_images": 12, "held_out_images": 4, "batch_size": 4, "num_epochs": 2, "timesteps": 4, "save_minutes": 0}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    cwd = tmp_path_factory.mktemp("unbroken")
    for kind in ("vae", "unet"):
        result = Forked(cwd / "process", *command_with_all(kind), cwd=cwd).wait()
        assert result.returncode == 0, result.stderr
    return bits(cwd / "run")


@pytest.mark.parametrize("step", [2, 3, 6])
def test_a_run_with_every_option_stopped_at_any_step_goes_on_to_the_same_bits(unbroken, fork, tmp_path, step):
    """Step 3 ends an epoch of three; after step 6 the latents are yet to be measured."""
    for kind in ("vae", "unet"):
        stopped = fork(*command_with_all(kind), cwd=tmp_path, inject={"signal_at_step": (signal.SIGTERM, step)}).wait()
        assert stopped.returncode == 143, stopped.stderr
        assert fork(*command_with_all(kind), cwd=tmp_path).wait().returncode == 0
    assert bits(tmp_path / "run") == unbroken


def test_a_run_from_before_an_option_existed_is_the_run_without_it(tiny_run, tmp_path, run_here):
    shutil.copytree(tiny_run / "run", tmp_path / "run")
    path = tmp_path / "run/vae_set2.json"
    manifest = json.loads(path.read_text())
    del manifest["settings"]["equivariance"]
    path.write_text(sign(manifest))
    command = ["--preset", "demo", "--run_dir", "run", *flags(TINY)]
    assert "finished" in run_here("train_vae.py", *command, cwd=tmp_path).stdout
    changed = run_here("train_vae.py", *command, "--equivariance", 0.5, cwd=tmp_path)
    assert_one_line_error(changed, 1, "equivariance was 0.0, now 0.5")


def test_the_unet_sees_every_picture_and_its_mirror_image(tiny, tmp_path):
    """Against encoding the mirrored picture; and the cached latents of the plain ones are used again."""
    vae, pixels = randomize(AutoencoderKL(tiny)), torch.from_numpy(np.stack([Scenes(0, 3, 32)[i] for i in range(3)]))
    cfg, about = replace(tiny, cache_dir=str(tmp_path)), ABOUT
    plain, mirrored = (encode_all(vae, pixels, about, "cpu", cfg, "encode", mirrored=m) for m in (False, True))
    index = torch.tensor([2, 0])
    mu, log_var = latents_of([plain, mirrored], index, torch.tensor([0, 1]), "cpu")
    seen = torch.stack([pixels[2], pixels[0].flip(2)])
    with torch.no_grad():
        torch.testing.assert_close(latents_of([plain], index, None, "cpu"), vae.encode(to_float(pixels[index], "cpu")))
        torch.testing.assert_close((mu, log_var), vae.encode(to_float(seen, "cpu")))
    assert len(list(tmp_path.glob("latents-*.json"))) == 2


def test_latents_that_are_all_there_but_not_named_yet_are_used(tiny, tmp_path, monkeypatch):
    """A stop while they are hashed, and as many pictures as are encoded in one go."""
    vae, pixels = randomize(AutoencoderKL(tiny)), torch.randint(256, (32, 3, 32, 32), dtype=torch.uint8)
    cfg, about = replace(tiny, cache_dir=str(tmp_path)), ABOUT
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("prepared.file_sha256", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
        encode_all(vae, pixels, about, "cpu", cfg, "encode")
    vae.encoder.register_forward_pre_hook(lambda *_: pytest.fail("they are there"))
    assert encode_all(vae, pixels, about, "cpu", cfg, "encode").shape[0] == 32


def test_pictures_are_encoded_a_bounded_number_of_pixels_at_a_time(tiny, tmp_path, monkeypatch):
    """Wherever it is done: 512-pixel pictures must fit where those of 128 do."""
    cfg = replace(tiny, normalize_latents=True, cache_dir=str(tmp_path), batch_size=4)
    vae, pixels, sizes = randomize(AutoencoderKL(cfg)), torch.randint(256, (5, 3, 32, 32), dtype=torch.uint8), []
    vae.encoder.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    ways = {
        "encode_pictures": lambda: encode_pictures(vae, pixels, "cpu", Progress(5, "encode")),
        "encode_all": lambda: encode_all(vae, pixels, ABOUT, "cpu", cfg, "encode"),
        "held-out figures": lambda: train_vae.evaluate(vae, pixels, "cpu", cfg),
        "pictures": lambda: train_vae.show_reconstructions(vae, pixels, "cpu", cfg, tmp_path / "x.png"),
        "normalize": lambda: train_vae.normalize(vae, pixels, torch.device("cpu"), cfg),
        "evaluate.py": lambda: sizes.extend(len(x) for x in evaluate.batches(pixels, "cpu")),
    }
    monkeypatch.setattr(vae_module, "PIXELS_TOGETHER", 2 * 32 * 32)
    for name, way in ways.items():
        sizes.clear()
        with torch.no_grad():
            way()
        assert sizes == [2, 2, 1], name


@pytest.mark.parametrize("random_scale", [False, True])
def test_latents_are_measured_on_the_middle_or_with_random_scale_on_the_whole(tiny, random_scale):
    cfg = replace(tiny, normalize_latents=True, random_crop=16, random_scale=random_scale)
    vae, pixels = randomize(AutoencoderKL(cfg)), torch.randint(256, (5, 3, 48, 48), dtype=torch.uint8)
    seen = shrunk(pixels, 32) if random_scale else pixels[:, :, 8:40, 8:40]
    with torch.no_grad():
        mu, log_var = vae.encode(to_float(seen, "cpu"))
        train_vae.normalize(vae, pixels, torch.device("cpu"), cfg)
    torch.testing.assert_close(vae.decoder.latent_mean[:, 0, 0], mu.mean(dim=(0, 2, 3)))
    variance = mu.var(dim=(0, 2, 3), correction=0) + log_var.exp().mean(dim=(0, 2, 3))
    torch.testing.assert_close(vae.decoder.latent_std[:, 0, 0], variance.sqrt())


def test_training_with_flips_and_crops_is_another_training(tmp_path, run_here):
    """That each option reaches each loop it is for, and no other: by the losses that follow."""
    settings = TINY | QUICK | {"max_images": 16, "num_epochs": 1}
    losses = {"vae": {}, "unet": {}}
    for option in (
        "",
        "--random_crop 4",
        "--random_crop 4 --random_scale",
        "--horizontal_flips",
        "--captions_per_image 1",
    ):
        for kind in losses:
            run = f"{kind} {option}"
            if kind == "unet":  # on the VAE trained without any
                shutil.copytree(tmp_path / "vae ", tmp_path / run)
            command = ["--preset", "demo", "--run_dir", run, *flags(settings), *option.split()]
            assert run_here(f"train_{kind}.py", *command, cwd=tmp_path).returncode == 0
            losses[kind][option] = (tmp_path / run / f"{kind}_train.csv").read_text()
    vae, unet = losses["vae"], losses["unet"]
    assert vae[""] == vae["--captions_per_image 1"] and len({*vae.values()}) == 4
    assert unet[""] == unet["--random_crop 4"] == unet["--random_crop 4 --random_scale"] != unet["--horizontal_flips"]


# ---- The decoder alone ----


@pytest.fixture
def finetuned(tiny_run, tmp_path, run_here):
    """A copy of the tiny run, and beside it `sharp`: its VAE with the decoder finetuned."""
    shutil.copytree(tiny_run / "run", tmp_path / "run")
    command = [
        "--preset",
        "demo",
        "--run_dir",
        "sharp",
        "--finetune_decoder_of",
        "run",
        *flags(TINY),
        "--l1_weight",
        0.1,
    ]
    result = run_here("train_vae.py", *command, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    return tmp_path, command


def test_finetuning_the_decoder_leaves_every_bit_of_the_encoder(finetuned, tiny_run):
    cwd, _ = finetuned
    before, after = (weights(cwd / run / "vae_ckpt_epoch2.pth") for run in ("run", "sharp"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) != k.startswith("decoder.") for k in before)
    old = {p.name: p.read_bytes() for p in (tiny_run / "run").iterdir() if p.is_file()}
    assert old == {p.name: p.read_bytes() for p in (cwd / "run").iterdir() if p.is_file()}


def test_a_unet_is_sampled_with_the_decoder_finetuned_on_its_latents_and_no_other(finetuned, run_here):
    cwd, _ = finetuned
    assert (
        run_here(
            "train_vae.py", "--preset", "demo", "--run_dir", "other", *flags(TINY | {"seed": 5}), cwd=cwd
        ).returncode
        == 0
    )
    sample = ["--run_dir", "run", "--prompt", "x", "--steps", 2, "--num_images", 1]
    pictures = {}
    for out, more in (("own", []), ("same", ["--vae", "run"]), ("sharp", ["--vae", "sharp"])):
        result = run_here("sample.py", *sample, *more, "--out", out, cwd=cwd)
        assert result.returncode == 0, result.stderr
        with Image.open(cwd / out / "x_seed0.png") as image:
            pictures[out] = image.tobytes()
            assert (f"VAE: {out}" in image.text["parameters"]) == (out == "sharp")
    assert pictures["own"] == pictures["same"] != pictures["sharp"]
    assert_one_line_error(
        run_here("sample.py", *sample, "--vae", "other", cwd=cwd), 1, "--vae other", "--finetune_decoder_of run"
    )
    assert_one_line_error(
        run_here("sample.py", *sample, "--vae", "nowhere", cwd=cwd), 1, "--vae nowhere", "train_vae.py"
    )


def test_a_finetuned_run_is_finished_until_the_vae_it_came_from_is_another(finetuned, run_here):
    cwd, command = finetuned
    again = run_here("train_vae.py", *command, cwd=cwd)
    assert again.returncode == 0 and "finished" in again.stdout
    assert (
        run_here(
            "train_vae.py", "--preset", "demo", "--run_dir", "run", "--overwrite", *flags(TINY | {"seed": 5}), cwd=cwd
        ).returncode
        == 0
    )
    assert_one_line_error(run_here("train_vae.py", *command, cwd=cwd), 1, "the VAE is another", "--overwrite")


def test_a_vae_is_not_finetuned_onto_itself_nor_by_the_wrong_script(tiny_run, run_here):
    command = ["--preset", "demo", *flags(TINY), "--finetune_decoder_of", "run"]
    for script, run in (("train_vae.py", "run/../run"), ("train_unet.py", "new")):
        result = run_here(script, *command, "--run_dir", run, cwd=tiny_run)
        assert_one_line_error(result, 2, "--run_dir" if run != "new" else "--finetune_decoder_of")
    nothing = run_here("train_vae.py", *command[:-1], "nowhere", "--run_dir", "new", cwd=tiny_run)
    assert_one_line_error(nothing, 1, "--finetune_decoder_of nowhere", "train_vae.py")
