"""Promises of evaluate.py: each figure against something independent, and the script from outside."""

import contextlib
import json
import math
import os
import shutil
import types
import warnings

import numpy as np
import pytest
import torch
from conftest import TINY, assert_one_line_error, flags
from PIL import Image
from test_metrics import random_covariance

import evaluate
import scenes
from config import SDConfig
from diffusion import baab, configured_process, sample
from support import judges
from text_encoder import WordHashTextEncoder
from training import seed_step
from unet import TimeEmbedding, UNetLatent
from vae import AutoencoderKL

CPU = torch.device("cpu")


def paint(series, count):
    return evaluate.paint_scenes(series, count, SDConfig(**TINY))


# ---- Sets of pictures ----


def test_distances_notice_what_is_wrong():
    """With the features of any network that tells colours and places apart; here one with random weights."""
    seed_step(judges.SEED, 0)
    real, good, judge = paint(7, 256), paint(8, 128), judges.SceneClassifier()
    for norm in (m for m in judge.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        norm.momentum = 1.0  # the statistics of the one batch: without them the signal drowns in the biases
    judge((real.float() / 127.5) - 1)
    judge.eval()
    wrong = {
        "colour": good.flip(1),
        "layout": good.flip(2),
        "blur": good[:, :, ::4, ::4].repeat_interleave(4, 2).repeat_interleave(4, 3),
        "noise": (good.float() + 30 * torch.randn(good.shape)).clamp(0, 255).byte(),
        "one": good[:1].expand(128, -1, -1, -1),
    }
    floor = evaluate.distances(judge, good, real, CPU)
    assert floor["pictures"] == 128 and floor["frechet"] < 1.1 * floor["frechet_floor"]
    for what, pictures in wrong.items():
        found = evaluate.distances(judge, pictures, real, CPU)
        assert found["frechet"] > 1.1 * floor["frechet_floor"], what
        assert found["kernel"] > 8 * abs(floor["kernel_floor"]), what
    # with half as many real pictures the floor is between halves, and scaled to the number that is compared
    fewer = evaluate.distances(judge, good, real[:128], CPU)
    halves = evaluate.distances(judge, real[64:128], real[:128], CPU)["frechet_floor"]
    assert fewer["pictures"] == 128 and fewer["frechet_floor"] == pytest.approx(halves / 2)
    assert 0.5 * floor["frechet_floor"] < fewer["frechet_floor"] < 2 * floor["frechet_floor"]
    assert evaluate.distances(judge, good, real[:3], CPU) == {} == evaluate.distances(None, good, real, CPU)


def test_the_spread_of_channel_means_is_compared_with_that_of_training():
    z = torch.randn(300, 3, 4, 4) * torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1) + torch.randn(300, 3, 1, 1)
    nothing = torch.full_like(z, -torch.inf)
    found = evaluate.channel_means(z / 2, (z, nothing), (z, nothing))
    assert found["ratio"] == pytest.approx(0.25) and found["by_channel"] == pytest.approx([0.25] * 3)
    assert found["held_out"] == pytest.approx(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of one picture the variance is unknown, which is no matter to the user
        assert evaluate.channel_means(z / 2, (z[:1], nothing[:1]), (z, nothing))["held_out"] is None


def test_copies_of_training_pictures_are_found_and_shown(tmp_path):
    cfg, train, held_out = SDConfig(), paint(0, 1500), paint(1, 200)
    copied = evaluate.memorisation(
        torch.cat([held_out[:60], train[1200:1204]]), held_out, train, cfg, tmp_path / "x.png"
    )
    assert copied["generated"]["least"] == 0 and copied["held_out"]["least"] > 0
    with Image.open(tmp_path / "x.png") as shown:
        first = np.asarray(shown)[2:34]
    assert np.array_equal(first[:, 2:34], first[:, 36:68])
    assert evaluate.memorisation(train[:64], held_out, train, cfg, tmp_path / "y.png")["nearer"] == 1
    usual = evaluate.memorisation(held_out, held_out, train, cfg, tmp_path / "z.png")
    assert usual["nearer"] == pytest.approx(0.05, abs=0.01) and usual["generated"] == usual["held_out"]
    mirrored = evaluate.memorisation(
        train[:64].flip(3), held_out, train, SDConfig(horizontal_flips=True), tmp_path / "m.png"
    )
    assert mirrored["generated"]["median"] == 0  # a mirrored copy is one if training saw both
    # no share of generated pictures is usual where held-out ones are one, or are training pictures
    for others in (held_out[:1], train[:40]):
        assert evaluate.memorisation(train[:64], others, train, cfg, tmp_path / "n.png")["nearer"] is None


# ---- With a model ----


class Stub:
    """A run whose U-Net is any function (z_t, t, text_emb) -> eps, and whose text encoder is any function."""

    def __init__(self, unet, text_encoder):
        self.cfg, self.device = SDConfig(**TINY | {"latent_channels": 1, "timesteps": 200}), CPU
        self.unet, self.text_encoder, self.t_embedder = unet, text_encoder, lambda t: t


def levels(t):
    alpha_bar = baab(200)[2][t].view(-1, 1, 1, 1)
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def test_the_linear_optimum_has_a_ratio_of_one_in_every_bin():
    """Gaussian latents, and a denoiser that knows their mean and covariance: solved for, not by eigenvalues."""
    covariance, mean = random_covariance(64), torch.randn(64, dtype=torch.float64)
    draw = lambda n: (torch.randn(n, 64).double() @ torch.linalg.cholesky(covariance).T + mean).float().view(n, 1, 8, 8)  # noqa: E731

    def wiener(z, t, _):
        a, b = (v.double().view(-1, 1, 1) for v in levels(t))
        x = (z.flatten(1).double() - a[:, 0] * mean)[:, :, None]
        return (b * torch.linalg.solve(a**2 * covariance + b**2 * torch.eye(64), x)).float().view(z.shape)

    def only_variance(z, t, _):
        a, b = levels(t)
        average = covariance.diagonal().mean().float()
        return b * (z - a * mean.float().view(1, 8, 8)) / (a**2 * average + b**2)

    train, held_out = draw(30_000), draw(1000)
    nothing = torch.full_like(train, -torch.inf)
    found = []
    for unet in (wiener, only_variance):
        run = Stub(unet, lambda captions: torch.zeros(len(captions), 1, 1))
        t, loss, _ = evaluate.caption_losses(run, (held_out, nothing[:1000]), ["x"] * 1000)
        found.append(evaluate.loss_over_bounds(t, loss, (train, nothing), run.cfg))
    assert found[0]["wiener"]["ratio"] == pytest.approx(1, abs=0.02)
    assert found[0]["wiener"]["by_timestep"] == pytest.approx([1] * 10, abs=0.08)
    assert found[0]["white"]["ratio"] < 0.9 and found[1]["wiener"]["ratio"] > 1.1
    assert found[1]["white"]["by_timestep"] == pytest.approx([1] * 10, abs=0.08)


def test_the_conditioning_gap_is_what_the_caption_tells():
    """A denoiser that takes the latents from the caption: exact with the right one, out by a/b (mu_i - mu_j) with another."""
    mu, captions = torch.randn(20, 1, 8, 8), [str(i) for i in range(20)]
    encode = lambda texts: torch.stack([mu[int(c)] if c else torch.zeros(1, 8, 8) for c in texts])  # noqa: E731

    def listening(z, t, text_emb):
        a, b = levels(t)
        return (z - a * text_emb) / b

    nothing = torch.full_like(mu, -torch.inf)
    t, _, gaps = evaluate.caption_losses(Stub(listening, encode), (mu, nothing), captions)
    assert t.tolist() == ((torch.arange(80) + 0.5) * 200 / 80).long().tolist()
    weight = (baab(200)[2][t] / (1 - baab(200)[2][t])).view(4, 20)
    for kind, other in (("shuffled", mu.roll(-1, 0)), ("empty", torch.zeros_like(mu))):
        each = (weight * (mu - other).square().mean(dim=(1, 2, 3))).mean(0)
        assert gaps[kind]["gap"] == pytest.approx(each.mean().item(), rel=1e-3)
        assert gaps[kind]["standard_error"] == pytest.approx(each.std().item() / math.sqrt(20), rel=1e-3)

    deaf = Stub(lambda z, t, text_emb: z, encode)
    _, _, gaps = evaluate.caption_losses(deaf, (mu, nothing), captions)
    assert gaps == {kind: {"gap": 0.0, "standard_error": 0.0} for kind in ("shuffled", "empty")}


def test_a_gap_is_measured_with_other_captions_alone():
    """None where there is no other: 0 would read as a model that does not hear its captions."""
    mu = torch.randn(4, 1, 8, 8)
    numbers = {"a": 1.0, "b": 5.0, "": 0.0}

    def gaps(captions):
        encode = lambda texts: torch.tensor([numbers[text] for text in texts]).view(-1, 1, 1, 1)  # noqa: E731
        listening = Stub(lambda z, t, text_emb: z - text_emb, encode)
        n = len(captions)
        return evaluate.caption_losses(listening, (mu[:n], torch.full_like(mu[:n], -torch.inf)), captions)[2]

    why = "no two held-out captions differ"
    for captions in (["a"], ["a", "a", "a"]):
        found = gaps(captions)
        assert found["shuffled"] is None and found["why"] == why and found["empty"]["gap"] != 0
    assert found["empty"]["standard_error"] is not None and gaps(["a"])["empty"]["standard_error"] is None
    assert gaps(["", ""]) == {"shuffled": None, "empty": None, "why": why}
    assert "why" not in gaps(["a", "b"])
    some = gaps(["a", "", ""])  # of one picture alone the empty caption is another
    assert some["shuffled"]["standard_error"] is not None and some["empty"]["standard_error"] is None
    assert evaluate.other_captions(["a", "a", "b", "a"]) == ["b", "b", "a", "b"]


def test_generated_latents_are_those_of_the_pictures(tiny):
    vae, unet, t_embedder = (m.eval() for m in (AutoencoderKL(tiny), UNetLatent(tiny), TimeEmbedding(tiny.time_dim)))
    text_encoder = WordHashTextEncoder(tiny.text_dim, tiny.text_length)
    networks = {"vae": vae, "unet": unet, "t_embedder": t_embedder, "text_encoder": text_encoder}
    run = types.SimpleNamespace(cfg=tiny, device=CPU, autocast=contextlib.nullcontext, **networks)
    prompts = ["a cat"] * evaluate.BATCH + ["a dog"]
    pictures, z = evaluate.generate(run, prompts, 5, {"num_steps": 3, "sampler": "ddpm"}, "generate")
    with torch.no_grad():
        decoded = (255 * (vae.decoder(z).clamp(-1, 1) + 1) / 2).round()
    assert pictures.shape == (33, 3, 32, 32) and (pictures - decoded).abs().max() <= 1
    process = configured_process(tiny)
    alone = sample(unet, vae, t_embedder, text_encoder, "a dog", 3, 1, process=process, seeds=[37])
    assert (pictures[32] - 255 * alone[0]).abs().max() <= 1
    assert not vae.decoder._forward_pre_hooks


def test_pictures_are_encoded_part_by_part(tiny, monkeypatch):
    """A bounded number of pixels at a time, and the latents are those of each picture alone."""
    vae, pixels, sizes = AutoencoderKL(tiny).eval(), torch.randint(256, (5, 3, 32, 32), dtype=torch.uint8), []
    vae.encoder.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    monkeypatch.setattr(evaluate, "pictures_per_pass", lambda pixels: 2)
    mu, log_var = evaluate.encode(types.SimpleNamespace(vae=vae, device=CPU), pixels)
    assert sizes == [2, 2, 1]
    with torch.no_grad():
        alone = vae.encode(pixels[4:].float() / 127.5 - 1)
    assert mu.shape == (5, 4, 8, 8) and not mu.requires_grad
    assert torch.allclose(mu[4:], alone[0], atol=1e-5) and torch.allclose(log_var[4:], alone[1], atol=1e-5)


def test_photographs_prompts_are_their_captions_in_turn():
    captions = [["a", "b"], ["c"], ["d", "e", "f"]]
    assert evaluate.caption_prompts(captions, 8) == ["a", "c", "d", "b", "c", "e", "a", "c"]


def test_accuracy_counts_what_is_right(monkeypatch):
    """A classifier that reads the labels off the picture itself."""
    labels = torch.tensor([[1, 2, 3], [4, 5, 0], [7, 0, 1], [9, 1, 5]])
    monkeypatch.setattr(evaluate, "scenes_of", lambda series, count, combinations: (None, labels[:count]))
    monkeypatch.setattr(evaluate, "pictures_per_pass", lambda pixels: 3)

    def classifier(x):
        rows = (127.5 * (x[:, :, 0, 0] + 1)).round().long()
        return None, [torch.nn.functional.one_hot(rows[:, i], 20) for i in range(3)]

    right = labels[:, :, None, None].expand(-1, -1, 2, 2).byte()
    wrong = right.clone()
    wrong[0, 0], wrong[1, 1] = 0, 0
    found = evaluate.prompt_accuracy(classifier, wrong, right, None, CPU)
    assert found["real"] == {"subject": 1, "colour": 1, "place": 1, "all": 1} and found["num_prompts"] == 4
    assert found["generated"] == {"subject": 0.75, "colour": 0.75, "place": 1, "all": 0.5}


# ---- The table ----


def test_the_table_has_every_figure_and_leaves_out_what_was_not_measured():
    shares = {name: 0.5 for name in (*evaluate.ATTRIBUTES, "all")}
    bound = {"bound": 0.5, "ratio": 1.25, "by_timestep": [None, 2.0]}
    results = {
        "run_dir": "runs/x",
        "model": "unet_ckpt1",
        "sampling": {"num_steps": 5},
        "vae": {"mse": 0.1, "psnr_db": 16.0, "latent_mean": 0.0, "latent_std": 1.0, "ssim": 0.7, "octave_1": 0.125}
        | {"octave_2": 0.5},
        "decoders": {name: {"frechet": 0.5, "patches": 0.25, "samples": 7.0} for name in ("own", "other")},
        "denoising": {"target": "flow", "mean": 0.6, "by_timestep": [0.75, None], "white": bound, "wiener": bound},
        "captions": {kind: {"gap": 0.01, "standard_error": 0.002} for kind in ("shuffled", "empty")},
        "distances": {"pictures": 7, "frechet": 3.0, "frechet_floor": 2.0, "kernel": 1.0, "kernel_floor": -1.0},
        "channel_means": {"ratio": 0.9, "held_out": 1.1},
        "memorisation": {"nearer": 0.0625} | {kind: {"median": 0.1} for kind in ("generated", "held_out")},
        "words": {"words": 3, "generated": 0.7, "real": 0.8, "reconstructed": 0.75, "share": 0.8},
        "looks": {"contrast": 0.9, "colourfulness": 1.1},
        "prompts": {"generated": shares, "real": shares},
        "composition": {"generated": shares, "real": shares},
        "fid": {"value": 12.0, "pictures": [7, 6]},
        "clip_score": {"value": 25.0, "shuffled": 20.0, "pictures": 7},
    }
    full = evaluate.table(results).splitlines()
    # a row with * is four, and two rows are for what cannot be measured
    assert len(full) == 2 + len(evaluate.ROWS.splitlines()) - 2 + 2 * 3 + 4
    assert full[0] == "runs/x, unet_ckpt1: num_steps 5"
    assert full[2] == "VAE, held-out MSE                     0.1000   PSNR 16.0 dB"
    assert full[-3:] == ["loss        0.7500      -", "over white       -   2.00", "over wiener      -   2.00"]
    assert f"{'composition, place right':34}     50.0%   real 50.0%" in full and "CLIP score, n = 7" in full[-5]
    assert f"{'energy of the finest octave':34}     12.5%   next 50%; 100%: as sharp as the pictures" in full
    for kind in ("prompts", "composition", "fid", "clip_score", "decoders"):
        del results[kind]
    results["words"] = {"words": 0, "why": "too few"}
    results |= {"distances": {}, "channel_means": {"ratio": 0.9, "held_out": None}}
    results["denoising"]["wiener"] = results["captions"]["empty"]["standard_error"] = None
    results["captions"] |= {"shuffled": None, "why": "all alike"}
    results["memorisation"]["nearer"] = None
    less = evaluate.table(results).splitlines()
    assert f"{'more loss with another caption':34}         -   all alike" in less
    assert f"{'words heard':34}         -   too few" in less
    gone = [line for line in full if line not in less]
    words = [
        "wiener bound",
        "another caption",
        "no caption",
        "words heard (3 words)",
        "words heard, of",
        "Frechet",
        "Frechet distance, reconstructions",
        "patch features",
        "Frechet distance, samples",
        "kernel",
        "variance ratio",
        "nearer than",
        *8 * ["right"],
        "FID",
        "CLIP",
        "over wiener",
    ]
    assert len(gone) == len(words) and all(word in line for word, line in zip(words, gone))
    assert (
        f"{'channel-mean variance ratio':34}     0.900" in less
        and f"{'more loss with no caption':34}   +0.0100" in less
    )


# ---- The script ----


@pytest.fixture
def quick(monkeypatch):
    """A classifier of eight steps, and few real scenes: for tests that do not look at what it says."""
    monkeypatch.setattr(judges, "CLASSIFIER_SCENES", 128)
    monkeypatch.setattr(evaluate, "REAL_SCENES", 64)


def finite_numbers(figures):
    """Every number in nested dicts and lists, None and text left out."""
    if isinstance(figures, dict | list):
        for value in figures.values() if isinstance(figures, dict) else figures:
            yield from finite_numbers(value)
    elif isinstance(figures, int | float):
        assert math.isfinite(figures)
        yield figures


def train(folder, run_here, settings):
    for script in ("train_vae.py", "train_unet.py"):
        command = [script, "--preset", "demo", "--run_dir", "run", "--max_steps", 2, *flags(TINY | settings)]
        result = run_here(*command, cwd=folder)
        assert result.returncode == 0, result.stderr


def measure(folder, run_here, *argv):
    """-> the figures of evaluation.json, and the finished process."""
    result = run_here("evaluate.py", "--run_dir", "run", *argv, cwd=folder)
    assert result.returncode == 0, result.stderr
    name = f"evaluation{'_ema' if '--ema' in argv else ''}{'_vae' if '--vae' in argv else ''}.json"
    return json.loads((folder / "run" / name).read_text()), result


def test_evaluate_measures_and_leaves_the_run_alone(tiny_run, tmp_path, run_here, monkeypatch):
    monkeypatch.setattr(judges, "CLASSIFIER_SCENES", 1024)  # an eighth of the training, for a weaker one in seconds
    monkeypatch.setattr(evaluate, "REAL_SCENES", 256)
    shutil.copytree(tiny_run / "run", tmp_path / "run")
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    figures, result = measure(tmp_path, run_here, "--num_prompts", 4, "--steps", 5)
    assert 0 < figures["vae"]["mse"] < 2 and len(figures["denoising"]["by_timestep"]) == 10
    assert figures["denoising"]["wiener"]["bound"] < figures["denoising"]["white"]["bound"]
    assert figures["sampling"] == {
        "num_steps": 5, "sampler": "ddpm", "eta": 0.0, "guidance_scale": 1.0, "negative_prompt": "",
        "guidance_interval": [0.0, 1.0], "guidance_rescale": 0.0, "pictures": 4}  # fmt: skip
    assert figures["prompts"]["real"]["all"] > 0.1 and 0 <= figures["prompts"]["generated"]["all"] <= 1
    assert "composition" not in figures and len(list(finite_numbers(figures))) > 70
    after = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    assert after | before == after
    assert set(after) - set(before) == {f"evaluation{e}" for e in (".json", "_samples.png", "_nearest.png")}
    for words in ("Frechet distance, n = 4", "wiener bound", "prompts, all right", "by timestep"):
        assert words in result.stdout


def test_two_decoders_are_compared_on_the_same_latents(tiny_run, tmp_path, run_here, quick):
    """The run's own decoder against itself is equal; against a finetuned one its own figures stay."""
    shutil.copytree(tiny_run / "run", tmp_path / "run")
    words = ["--preset", "demo", "--run_dir", "sharp", "--finetune_decoder_of", "run", "--max_steps", 3, *flags(TINY)]
    assert run_here("train_vae.py", *words, "--lr", 1e-2, cwd=tmp_path).returncode == 0
    found = {}
    for vae in ("run", "sharp"):
        figures, result = measure(tmp_path, run_here, "--num_prompts", 4, "--steps", 2, "--vae", vae)
        found[vae] = figures["decoders"]
        assert "Frechet distance, samples" in result.stdout and figures["decoder"] == vae
    own, other = found["sharp"]["own"], found["sharp"]["other"]
    assert found["run"]["own"] == found["run"]["other"] == own and own.keys() == other.keys()
    assert all(own[kind] != other[kind] for kind in own)
    assert not (tmp_path / "run/evaluation.json").exists()


def test_composition_is_measured_where_combinations_were_held_out_and_twice_the_same(tmp_path, run_here, quick):
    train(
        tmp_path,
        run_here,
        {"held_out_combinations": 48, "prediction_type": "v_prediction", "scale_betas": True, "timesteps": 100},
    )
    texts = []
    for _ in range(2):
        figures, result = measure(tmp_path, run_here, "--num_prompts", 3, "--ema", "--steps", 3)
        texts.append((tmp_path / "run/evaluation_ema.json").read_text())
    assert texts[0] == texts[1]
    for kind in ("prompts", "composition"):
        assert figures[kind]["num_prompts"] == 3
        assert list(figures[kind]["generated"]) == ["subject", "colour", "place", "all"]
    assert "composition, all right" in result.stdout and figures["model"] == "ema_unet_ckpt1"
    assert figures["denoising"]["target"] == "v_prediction" and figures["denoising"]["white"]["ratio"] > 0.5


def test_prompts_of_held_out_combinations_are_no_others():
    seen, unseen = evaluate.split_combinations(48)
    asked = [set(evaluate.scenes_of(evaluate.PROMPT_SERIES, 200, combinations)[0]) for combinations in (seen, unseen)]
    assert not asked[0] & asked[1] and asked[1] <= {scenes.full_caption(*c) for c in unseen}


def test_photographs_are_measured_where_they_are_and_warned_of_if_they_are_others_now(tmp_path, run_here):
    """Twins: the same folder, and the same folder elsewhere."""
    (tmp_path / "mine/images").mkdir(parents=True)
    for i in range(30):
        noise = np.random.RandomState(i).randint(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((40, 36), Image.Resampling.BICUBIC).save(tmp_path / f"mine/images/{i}.png")
        (tmp_path / f"mine/images/{i}.txt").write_text(f"picture {i}\nthe same again")
    process = {"prediction_type": "flow", "horizontal_flips": True, "cache_dir": "prepared", "max_images": 30}
    train(tmp_path, run_here, {"dataset": "folder", "data_root": "mine"} | process)
    command = ("--num_prompts", 5, "--steps", 2)
    figures, result = measure(tmp_path, run_here, *command)
    assert "warning" not in result.stderr and figures["denoising"]["latents"] == 2 * 27  # mirrored ones too
    assert figures["distances"] == {} and "prompts" not in figures  # 3 pictures are held out: too few for two sets
    assert figures["denoising"]["target"] == "flow" and len(list(finite_numbers(figures))) > 50
    os.replace(tmp_path / "mine", tmp_path / "moved")
    gone = run_here("evaluate.py", "--run_dir", "run", *command, cwd=tmp_path)
    assert_one_line_error(gone, 1, "--data_root mine: no such folder")
    again, result = measure(tmp_path, run_here, *command, "--data_root", "moved")
    assert again == figures and "warning" not in result.stderr
    (tmp_path / "moved/images/3.txt").write_text("another")
    _, result = measure(tmp_path, run_here, *command, "--data_root", "moved")
    assert "warning: --data_root moved" in result.stderr


def test_evaluate_measures_the_pictures_that_sample_makes(tiny_run, tmp_path, run_here, quick):
    """The first tile is sample.py's picture of that prompt and seed, up to the rounding of another batch."""
    shutil.copytree(tiny_run / "run", tmp_path / "run")
    prompts, _ = evaluate.scenes_of(evaluate.PROMPT_SERIES, 1, evaluate.split_combinations(0)[0])
    flags = ["--steps", 3, "--sampler", "dpmpp_2m"]
    measure(tmp_path, run_here, *flags, "--num_prompts", 2)
    command = ["sample.py", "--run_dir", "run", *flags, "--prompt", *prompts, "--num_images", 1, "--out", "out"]
    assert run_here(*command, cwd=tmp_path).returncode == 0
    (path,) = (tmp_path / "out").glob("*_seed0.png")
    one, grid = (np.asarray(Image.open(p)).astype(int) for p in (path, tmp_path / "run/evaluation_samples.png"))
    assert np.abs(grid[2:34, 2:34] - one).max() <= 1 and one.std() > 5


@pytest.mark.parametrize("argv, word", [(["--steps", 21], "1 to 20"), (["--num_prompts", 1], "--num_prompts"),
                                        (["--sampler", "magic"], "--sampler")])  # fmt: skip
def test_evaluate_refuses_values_out_of_range(tiny_run, argv, word, run_here):
    assert_one_line_error(run_here("evaluate.py", "--run_dir", "run", *argv, cwd=tiny_run), 2, word)


def test_the_scenes_of_a_run_lie_nowhere(tiny_run, run_here):
    result = run_here("evaluate.py", "--run_dir", "run", "--data_root", "x", cwd=tiny_run)
    assert_one_line_error(result, 1, "--data_root x")


def test_the_variance_of_one_training_picture_is_asked_for_in_vain(tmp_path, run_here):
    train(tmp_path, run_here, {"max_images": 1})
    assert_one_line_error(run_here("evaluate.py", "--run_dir", "run", cwd=tmp_path), 1, "trained on one picture")
