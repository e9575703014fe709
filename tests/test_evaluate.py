"""Promises of metrics.py and evaluate.py: each measure against something independent, and the script from outside."""

import contextlib
import json
import math
import shutil
import sys
import types
import warnings

import numpy as np
import pytest
import torch
from conftest import TINY, assert_one_line_error, flags
from PIL import Image

import evaluate
import metrics
from config import SDConfig
from diffusion import baab, configured_process, sample
from text_encoder import WordHashTextEncoder
from unet import TimeEmbedding, UNetLatent
from vae import AutoencoderKL

# ---- The bounds ----

TARGETS = {"epsilon": lambda x0, eps, a, b: eps, "v_prediction": lambda x0, eps, a, b: a * eps - b * x0,
           "flow": lambda x0, eps, a, b: eps - x0}  # fmt: skip


def random_covariance(size):
    root = torch.randn(size, size, dtype=torch.float64)
    return root @ torch.diag(torch.logspace(-1, 1, size, dtype=torch.float64)) @ root.T / size


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("a, b", [(0.99, 0.14), (0.6, 0.8), (0.3, 0.7)])
def test_the_bound_is_what_the_best_linear_predictor_reaches(target, a, b):
    """Gaussian data; the predictor is fitted by least squares, knowing neither covariance nor formula."""
    covariance = random_covariance(5)
    x0 = torch.randn(200_000, 5, dtype=torch.float64) @ torch.linalg.cholesky(covariance).T
    eps = torch.randn_like(x0)
    z, wanted = a * x0 + b * eps, TARGETS[target](x0, eps, a, b)
    reached = (z @ torch.linalg.lstsq(z, wanted).solution - wanted).square().mean()
    levels = (torch.tensor([v], dtype=torch.float64) for v in (a, b))
    bound = metrics.wiener_bound(*levels, torch.linalg.eigvalsh(covariance), target)
    assert bound.item() == pytest.approx(reached.item(), rel=0.01)


def test_the_bounds_of_white_latents_are_those_known_of_the_recipe():
    """Computed elsewhere, for latents of std 0.908: the recipe's schedule, and a uniform straight flow."""
    alpha_bar, white = baab()[2].double(), torch.tensor([0.908**2], dtype=torch.float64)
    levels = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    assert metrics.wiener_bound(*levels, white, "epsilon").mean().item() == pytest.approx(0.5624, abs=1e-4)
    assert metrics.wiener_bound(*levels, white, "v_prediction").mean().item() == pytest.approx(0.9232, abs=1e-4)
    s = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    assert metrics.wiener_bound(1 - s, s, white, "flow").mean().item() == pytest.approx(1.426, abs=1e-3)


def test_the_covariance_is_that_of_drawn_latents():
    mu, log_var = torch.randn(50, 2, 2, 2) * torch.rand(2, 2, 2) + 3, torch.randn(50, 2, 2, 2) - 1
    draws = torch.cat([mu + (log_var / 2).exp() * torch.randn_like(mu) for _ in range(4000)]).flatten(1).double()
    mean = mu.flatten(1).double().mean(0)
    drawn = (draws - mean).T @ (draws - mean) / len(draws) * 50 / 49 - torch.diag(log_var.flatten(1).exp().mean(0)) / 49
    assert torch.allclose(metrics.latent_covariance(mu, log_var), drawn, atol=0.02)
    without_noise = metrics.latent_covariance(mu, torch.full_like(mu, -torch.inf))
    assert torch.allclose(without_noise, mu.flatten(1).double().T.cov(), atol=1e-12)
    assert metrics.CHUNK < 3000
    many = torch.randn(3000, 3)
    assert torch.allclose(metrics.latent_covariance(many, many - torch.inf), many.double().T.cov(), atol=1e-12)


def test_bins_and_standard_errors():
    assert metrics.mean_by_bin(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 0, 2]), 4) == [2.0, None, 5.0, None]
    means, errors = zip(*(metrics.mean_and_error(torch.randn(40)) for _ in range(2000)))
    assert np.std(means) == pytest.approx(np.mean(errors), rel=0.06)
    assert metrics.mean_and_error(torch.ones(1)) == (1.0, None)


# ---- Distances ----


def exactly(n, d):
    """Random features (n, d) whose own mean is 0 and whose own covariance is I, to rounding."""
    x = torch.randn(n, d, dtype=torch.float64)
    x = x - x.mean(0)
    return x @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov())).T


def test_frechet_distance_of_gaussians_in_closed_form():
    """Covariances with common axes: |difference of means|^2 + sum of (s - t)^2."""
    turn = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    s, t, m = torch.rand(6).double() + 0.1, torch.rand(6).double() * 3, torch.randn(6).double()
    x, y = exactly(100, 6) * s @ turn, exactly(80, 6) * t @ turn + m
    expected = m.square().sum() + (s - t).square().sum()
    assert metrics.frechet_distance(x, y) == pytest.approx(expected.item(), rel=1e-9)
    assert metrics.frechet_distance(y, x) == pytest.approx(expected.item(), rel=1e-9)
    assert metrics.frechet_distance(x, x) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("n, m", [(300, 200), (40, 25)])  # more, and fewer rows than features: a singular covariance
def test_frechet_distance_against_singular_values(n, m):
    """Another way to the same root: the trace is the nuclear norm of X Y^T, and no covariance is formed."""
    x, y = torch.randn(n, 64) @ torch.randn(64, 64) + 1, torch.randn(m, 64) @ torch.randn(64, 64)
    cx, cy = (v.double() - v.double().mean(0) for v in (x, y))
    cross = torch.linalg.svdvals(cx @ cy.T).sum() / math.sqrt((n - 1) * (m - 1))
    spread = cx.square().sum() / (n - 1) + cy.square().sum() / (m - 1)
    expected = (x.double().mean(0) - y.double().mean(0)).square().sum() + spread - 2 * cross
    assert metrics.frechet_distance(x, y) == pytest.approx(expected.item(), rel=1e-6)


def test_kernel_distance_against_a_naive_sum(monkeypatch):
    monkeypatch.setattr(metrics, "CHUNK", 4)
    x, y = torch.randn(9, 5), torch.randn(7, 5) + 0.5
    k = lambda u, v: (float(np.dot(u, v)) / 5 + 1) ** 3  # noqa: E731
    xs, ys = x.double().numpy(), y.double().numpy()
    same = [sum(k(s[i], s[j]) for i in range(len(s)) for j in range(len(s)) if i != j) / len(s) / (len(s) - 1)
            for s in (xs, ys)]  # fmt: skip
    cross = sum(k(u, v) for u in xs for v in ys) / 63
    assert metrics.kernel_distance(x, y) == pytest.approx(sum(same) - 2 * cross, rel=1e-9)


def test_kernel_distance_is_unbiased_where_the_frechet_distance_is_not():
    pairs = [(torch.randn(20, 8), torch.randn(20, 8)) for _ in range(600)]
    values = np.array([metrics.kernel_distance(x, y) for x, y in pairs])
    assert abs(values.mean()) < 4 * values.std() / math.sqrt(len(values))
    assert np.mean([metrics.frechet_distance(x, y) for x, y in pairs[:50]]) > 1


def paint(series, count):
    return evaluate.paint_scenes(series, count, SDConfig(**TINY))


def test_random_features_notice_what_is_wrong_and_are_the_same_for_every_run():
    real, cpu = paint(7, 256), torch.device("cpu")
    judge = evaluate.random_classifier(real, cpu)
    torch.manual_seed(5)
    again = evaluate.features_of(evaluate.random_classifier(real, cpu), real[:4], cpu)
    assert torch.equal(again, evaluate.features_of(judge, real[:4], cpu))
    good = paint(8, 128)
    wrong = {"colour": good.flip(1), "layout": good.flip(2), "blur": good[:, :, ::4, ::4].repeat_interleave(4, 2).repeat_interleave(4, 3),
             "noise": (good.float() + 30 * torch.randn(good.shape)).clamp(0, 255).byte(), "one": good[:1].expand(128, -1, -1, -1)}  # fmt: skip
    floor = evaluate.distances(judge, good, real, cpu)
    assert floor["pictures"] == 128 and floor["frechet"] < 1.1 * floor["frechet_floor"]
    for what, pictures in wrong.items():
        found = evaluate.distances(judge, pictures, real, cpu)
        assert found["frechet"] > 1.1 * floor["frechet_floor"], what
        assert found["kernel"] > 8 * abs(floor["kernel_floor"]), what
    assert evaluate.distances(judge, good, real[:3], cpu) == {}


# ---- Single sets ----


def test_channel_mean_variances_are_those_of_the_covariance():
    z = torch.randn(300, 3, 4, 4) * torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1) + torch.randn(300, 3, 1, 1)
    blocks = z.flatten(1).double().T.cov().view(3, 16, 3, 16)
    expected = torch.stack([blocks[c, :, c].sum() for c in range(3)]) / 16**2
    assert torch.allclose(metrics.channel_mean_variances(z), expected)
    nothing = torch.full_like(z, -torch.inf)
    found = evaluate.channel_means(z / 2, (z, nothing), (z, nothing))
    assert found["ratio"] == pytest.approx(0.25) and found["by_channel"] == pytest.approx([0.25] * 3)
    assert found["held_out"] == pytest.approx(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of one picture the variance is unknown, which is no matter to the user
        assert evaluate.channel_means(z / 2, (z[:1], nothing[:1]), (z, nothing))["held_out"] is None


def test_nearest_is_that_of_all_pairs():
    x, y = torch.rand(6, 10), torch.rand(50, 10)
    y[33] = x[2]
    distance, number = metrics.nearest(x, y.split(7))
    every = np.sqrt(((x.numpy()[:, None] - y.numpy()[None]) ** 2).mean(-1))
    assert np.allclose(distance, every.min(1)) and number.tolist() == every.argmin(1).tolist()
    assert distance[2] == 0 and number[2] == 33


def test_pictures_are_reduced_by_averaging():
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    theirs = Image.fromarray(pixels[1].permute(1, 2, 0).numpy()).resize((16, 16), Image.Resampling.BOX)
    ours = metrics.reduced(pixels, 16)[1].view(3, 16, 16).permute(1, 2, 0) * 255
    assert np.abs(ours.numpy() - np.asarray(theirs, dtype=float)).max() < 1.1  # of 255; Pillow rounds twice


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


# ---- With a model ----


class Stub:
    """A run whose U-Net is any function (z_t, t, text_emb) -> eps, and whose text encoder is any function."""

    def __init__(self, unet, text_encoder):
        self.cfg, self.device = SDConfig(**TINY | {"latent_channels": 1, "timesteps": 200}), torch.device("cpu")
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
        model = Stub(unet, lambda captions: torch.zeros(len(captions), 1, 1))
        losses = evaluate.caption_losses(model, (held_out, nothing[:1000]), ["x"] * 1000)
        found.append(evaluate.loss_over_bounds(*losses["matched"], (train, nothing), model.cfg))
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
    gaps = evaluate.conditioning_gaps(evaluate.caption_losses(Stub(listening, encode), (mu, nothing), captions))
    t = ((torch.arange(80) + 0.5) * 200 / 80).long()
    weight = (baab(200)[2][t] / (1 - baab(200)[2][t])).view(4, 20)
    for kind, other in (("shuffled", mu.roll(-1, 0)), ("empty", torch.zeros_like(mu))):
        each = (weight * (mu - other).square().mean(dim=(1, 2, 3))).mean(0)
        assert gaps[kind]["gap"] == pytest.approx(each.mean().item(), rel=1e-3)
        assert gaps[kind]["standard_error"] == pytest.approx(each.std().item() / math.sqrt(20), rel=1e-3)

    deaf = Stub(lambda z, t, text_emb: z, encode)
    gaps = evaluate.conditioning_gaps(evaluate.caption_losses(deaf, (mu, nothing), captions))
    assert gaps == {kind: {"gap": 0.0, "standard_error": 0.0} for kind in ("shuffled", "empty")}


def test_generated_latents_are_those_of_the_pictures(tiny):
    parts = [m.eval() for m in (AutoencoderKL(tiny), UNetLatent(tiny), TimeEmbedding(tiny.time_dim))]
    text_encoder = WordHashTextEncoder(tiny.text_dim, tiny.text_length)
    model = evaluate.Model(tiny, *parts, text_encoder, torch.device("cpu"), contextlib.nullcontext)
    options = {"num_steps": 3, "sampler": "ddpm"}
    prompts = ["a cat"] * evaluate.BATCH + ["a dog"]
    pictures, z = evaluate.generate(model, prompts, 5, options, "generate")
    decoded = (255 * (parts[0].decoder(z).clamp(-1, 1) + 1) / 2).round()
    assert pictures.shape == (33, 3, 32, 32) and (pictures - decoded).abs().max() <= 1
    process = configured_process(tiny)
    alone = sample(*(parts[1], parts[0], parts[2]), text_encoder, "a dog", 3, 1, process=process, seeds=[37])
    assert (pictures[32] - 255 * alone[0]).abs().max() <= 1
    assert not parts[0].decoder._forward_pre_hooks


def test_photographs_prompts_are_their_captions_in_turn():
    captions = [["a", "b"], ["c"], ["d", "e", "f"]]
    assert evaluate.caption_prompts(captions, 8) == ["a", "c", "d", "b", "c", "e", "a", "c"]


def test_accuracy_counts_what_is_right():
    """A judge that reads the labels off the picture itself: all right for its own labels, by attribute for others."""

    class Judge:
        def __call__(self, x):
            return [torch.nn.functional.one_hot(x[:, i, 0, 0].long(), 20).float() for i in range(3)]

    labels = torch.tensor([[1, 2, 3], [4, 5, 0], [7, 0, 1], [9, 1, 5]])
    x = labels[:, :, None, None].float()
    assert evaluate.accuracy(Judge(), [x[:2], x[2:]], labels) == {"subject": 1, "colour": 1, "place": 1, "all": 1}
    wrong = labels.clone()
    wrong[0, 0], wrong[1, 1] = 0, 0
    assert evaluate.accuracy(Judge(), [x], wrong) == {"subject": 0.75, "colour": 0.75, "place": 1, "all": 0.5}


# ---- The script ----


@pytest.fixture
def quick(monkeypatch):
    """A sixteenth of the judge's training, for a judge in seconds."""
    monkeypatch.setattr(evaluate, "CLASSIFIER_SCENES", 512)
    monkeypatch.setattr(evaluate, "REAL_SCENES", 64)


def finite_numbers(figures):
    """Every number in nested dicts and lists, None and text left out."""
    if isinstance(figures, dict | list):
        for value in figures.values() if isinstance(figures, dict) else figures:
            yield from finite_numbers(value)
    elif isinstance(figures, int | float):
        assert math.isfinite(figures)
        yield figures


def test_evaluate_measures_and_leaves_the_run_alone(tiny_run, tmp_path, run_here, monkeypatch):
    monkeypatch.setattr(evaluate, "CLASSIFIER_SCENES", 2048)  # a quarter of the training, for a weaker judge in seconds
    shutil.copytree(tiny_run / "run", tmp_path / "run")
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    result = run_here("evaluate.py", "--run_dir", "run", "--num_prompts", 4, "--steps", 5, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    figures = json.loads((tmp_path / "run/evaluation.json").read_text())
    assert 0 < figures["vae"]["mse"] < 2 and len(figures["denoising"]["by_timestep"]) == 10
    assert figures["denoising"]["wiener"]["bound"] < figures["denoising"]["white"]["bound"]
    asked = {"num_steps": 5, "sampler": "ddpm", "guidance_scale": 1.0, "pictures": 4}
    assert figures["sampling"] | asked == figures["sampling"]
    assert figures["prompts"]["real"]["all"] > 0.3 and 0 <= figures["prompts"]["generated"]["all"] <= 1
    assert "composition" not in figures and len(list(finite_numbers(figures))) > 70
    after = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    assert after | before == after
    assert set(after) - set(before) == {f"evaluation{e}" for e in (".json", "_samples.png", "_nearest.png")}
    for words in ("Frechet distance, n = 4", "wiener bound", "prompts, all right", "by timestep"):
        assert words in result.stdout


def train(folder, run_here, settings):
    for script in ("train_vae.py", "train_unet.py"):
        command = [script, "--run_dir", "run", "--max_steps", 2, *flags(settings)]
        assert run_here(*command, cwd=folder).returncode == 0


@pytest.mark.slow
def test_composition_is_measured_where_combinations_were_held_out_and_twice_the_same(tmp_path, run_here, quick):
    train(tmp_path, run_here, TINY | {"held_out_combinations": 48})
    texts = []
    for _ in range(2):
        result = run_here("evaluate.py", "--run_dir", "run", "--num_prompts", 3, "--ema", cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        texts.append((tmp_path / "run/evaluation_ema.json").read_text())
    assert texts[0] == texts[1]
    figures = json.loads(texts[0])
    for kind in ("prompts", "composition"):
        assert figures[kind]["num_prompts"] == 3 and set(figures[kind]["generated"]) == {
            "subject",
            "colour",
            "place",
            "all",
        }
    assert "composition, all right" in result.stdout and "unet_ckpt1" in figures["model"]
    seen, unseen = evaluate.split_combinations(48)
    asked = [evaluate.scene_prompts(200, combinations) for combinations in (seen, unseen)]
    assert not set(asked[0]) & set(asked[1])
    assert set(asked[1]) <= {evaluate.full_caption(*c) for c in unseen}


def test_photographs_are_measured_too(tmp_path, run_here):
    (tmp_path / "data/images").mkdir(parents=True)
    for i in range(30):
        noise = np.random.RandomState(i).randint(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((40, 36), Image.Resampling.BICUBIC).save(tmp_path / f"data/images/{i}.png")
        (tmp_path / f"data/images/{i}.txt").write_text(f"picture {i}\nthe same again")
    settings = {k: v for k, v in TINY.items() if k not in ("cache_dir", "held_out_images")}
    train(tmp_path, run_here, settings | {"dataset": "folder", "data_root": "data"})
    result = run_here("evaluate.py", "--run_dir", "run", "--num_prompts", 5, "--steps", 2, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    figures = json.loads((tmp_path / "run/evaluation.json").read_text())
    assert figures["distances"] == {} and "prompts" not in figures  # 3 pictures are held out: too few for two sets
    assert len(list(finite_numbers(figures))) > 50


@pytest.mark.slow
def test_evaluate_measures_the_pictures_that_sample_makes(tiny_run, tmp_path, run_here, quick):
    """From pure noise and from the fitted start: the first tile is sample.py's picture of that prompt and seed, up to the
    rounding of another batch."""
    shutil.copytree(tiny_run / "run", tmp_path / "run")
    prompt, tiles = evaluate.scene_prompts(1, evaluate.split_combinations(0)[0])[0], []
    for start in ("noise", "fitted"):
        flags = ["--run_dir", "run", "--steps", 3, "--sampler", "dpmpp_2m", "--start", start]
        assert run_here("evaluate.py", *flags, "--num_prompts", 2, cwd=tmp_path).returncode == 0
        assert json.loads((tmp_path / "run/evaluation.json").read_text())["sampling"]["start"] == start
        command = ["sample.py", *flags, "--prompt", prompt, "--num_images", 1, "--out", start]
        assert run_here(*command, cwd=tmp_path).returncode == 0
        (path,) = (tmp_path / start).glob("*_seed0.png")
        one = np.asarray(Image.open(path)).astype(int)
        grid = np.asarray(Image.open(tmp_path / "run/evaluation_samples.png")).astype(int)
        tiles.append(grid[2:, 2:][: one.shape[0], : one.shape[1]])
        assert np.abs(tiles[-1] - one).max() <= 1
    assert np.abs(tiles[0] - tiles[1]).max() > 1


@pytest.mark.parametrize("argv, word", [(["--steps", 21], "1 to 20"), (["--num_prompts", 1], "--num_prompts"),
                                        (["--sampler", "magic"], "--sampler")])  # fmt: skip
def test_evaluate_refuses_values_out_of_range(tiny_run, argv, word, run_here):
    assert_one_line_error(run_here("evaluate.py", "--run_dir", "run", *argv, cwd=tiny_run), 2, word)


def test_fid_without_its_library_is_a_one_line_error(tiny_run, run_here, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    before = sorted(p.name for p in (tiny_run / "run").iterdir())
    result = run_here("evaluate.py", "--run_dir", "run", "--fid_and_clip", cwd=tiny_run)
    assert_one_line_error(result, 1, "--fid_and_clip", "pip install torchmetrics")
    assert before == sorted(p.name for p in (tiny_run / "run").iterdir())


def test_fid_and_clip_get_whole_sets_of_bytes():
    """Stand-ins that note what they are given: the real ones need weights."""
    seen = types.SimpleNamespace(real=[], fake=[], texts=[])
    fid = types.SimpleNamespace(
        update=lambda x, real: (seen.real if real else seen.fake).append(x), compute=lambda: torch.tensor(1.0)
    )
    clip = types.SimpleNamespace(
        update=lambda x, texts: seen.texts.extend(zip(x, texts)), compute=lambda: torch.tensor(2.0)
    )
    pictures, real = (torch.randint(0, 256, (n, 3, 8, 8), dtype=torch.uint8) for n in (40, 90))
    prompts = [str(i) for i in range(40)]
    found = evaluate.library_metrics(fid, clip, pictures, real, prompts, torch.device("cpu"))
    assert found == {"fid": 1.0, "clip_score": 2.0, "pictures": [40, 40]}
    assert torch.equal(torch.cat(seen.real), real[:40]) and torch.equal(torch.cat(seen.fake), pictures)
    assert [t for _, t in seen.texts] == prompts and torch.equal(seen.texts[39][0], pictures[39])
