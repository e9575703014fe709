"""Promises of the scripts, from outside: the documented commands, their files, their answers to mistakes."""

import csv
import itertools
import json
import os
import re
import shlex
import shutil
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import TINY, assert_one_line_error, flags, forge, run_script
from PIL import Image
from test_data import picture

import evaluate
from checkpoint import load_models
from config import Parser, SDConfig
from diffusion import baab, sample
from sample import save_png
from text_encoder import WordHashTextEncoder
from training import add_sampling_flags, sampling_options
from unet import TimeEmbedding, UNetLatent
from vae import AutoencoderKL


def rows(path):
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def load_by_hand(run, cfg):
    """The recipe's way: build the three modules, torch.load the three plain state_dicts."""
    vae = AutoencoderKL(cfg)
    vae.load_state_dict(torch.load(run / "vae_ckpt_epoch2.pth", map_location="cpu", weights_only=True))
    unet = UNetLatent(cfg)
    unet.load_state_dict(torch.load(run / "unet_ckpt2.pth", map_location="cpu", weights_only=True))
    t_ember = TimeEmbedding(cfg.time_dim)
    t_ember.load_state_dict(torch.load(run / "t_ember_ckpt2.pth", map_location="cpu", weights_only=True))
    return vae.eval(), unet.eval(), t_ember.eval()


class Casts(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts what is turned into another type."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._to_copy.default
        return function(*args, **(kwargs or {}))


def test_sampling_turns_the_weights_into_bfloat16_once(tiny_run):
    """And not in every step, which on two CPU cores made each step of a U-Net of coco's size a sixth longer."""
    _, _, _, unet, t_ember = load_models(str(tiny_run / "run"), False, torch.device("cpu"))
    z, t_emb, text_emb = torch.randn(1, *unet.latent_shape), t_ember(torch.zeros(1)), torch.randn(1, 12, 512)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        first, second = Casts(), Casts()
        for casts in (first, second):
            with casts:
                unet(z, t_emb, text_emb)
    weights = [name for name, p in unet.named_parameters() if p.dim() > 1 and "norm" not in name]
    assert first.count - second.count >= len(weights) > 50


def test_a_run_leaves_what_the_contract_lists(tiny_run):
    run = tiny_run / "run"
    for name in ("vae_ckpt_epoch2.pth", "unet_ckpt2.pth", "t_ember_ckpt2.pth", "ema_unet_ckpt2.pth", "config.json",
                 "vae_curves.png", "unet_curves.png", "vae_pictures_epoch1.png", "vae_pictures_epoch2.png",
                 "unet_samples_epoch1.png", "unet_samples_epoch2.png"):  # fmt: skip
        assert (run / name).stat().st_size > 0, name
    assert not list(run.glob("*.tmp"))
    assert [r["epoch"] for r in rows(run / "vae_held_out.csv")] == ["1", "2"]
    assert {"mse", "psnr_db", "latent_mean", "latent_std", "latent_mean_3", "latent_std_3"} <= set(
        rows(run / "vae_held_out.csv")[0]
    )
    assert rows(run / "unet_train.csv")[-1]["step"] == "6"
    record = json.loads((run / "config.json").read_text())
    assert record["train_unet"]["settings"]["batch_size"] == TINY["batch_size"]
    assert json.loads((run / "unet_set2.json").read_text())["finished"]


def test_the_recipes_own_snippet_gives_the_picture_of_sample(tiny_run):
    """The loop of the recipe, as its readers will paste it, against sample() from the same random state."""
    cfg = SDConfig(**TINY)
    vae, unet, t_embedder = load_by_hand(tiny_run / "run", cfg)
    text_encoder = WordHashTextEncoder(cfg.text_dim, cfg.text_length)
    prompt, num_samples, num_steps, device = "a red sports car", 2, 200, "cpu"

    torch.manual_seed(3)
    with torch.no_grad():
        text_emb = text_encoder([prompt] * num_samples)
        z = torch.randn(num_samples, cfg.latent_channels, cfg.latent_size, cfg.latent_size, device=device)
        beta, alpha, alpha_bar = baab()
        beta, alpha, alpha_bar = beta.to(device), alpha.to(device), alpha_bar.to(device)
        for t in reversed(range(num_steps)):
            t_batch = torch.full((num_samples,), t, device=device, dtype=torch.long)
            eps_pred = unet(z, t_embedder(t_batch), text_emb)
            noise = torch.randn_like(z) if t > 0 else torch.zeros_like(z)
            mean = (z - ((1 - alpha[t]) / torch.sqrt(1 - alpha_bar[t])) * eps_pred) / torch.sqrt(alpha[t])
            z = mean + torch.sqrt(beta[t]) * noise
        theirs = (vae.decoder(z).clamp(-1, 1) + 1) / 2

    torch.manual_seed(3)
    ours = sample(unet, vae, t_embedder, text_encoder, prompt, num_steps=200, num_samples=2)
    assert (ours - theirs).abs().max() < 1e-3 and theirs.std() > 0.01


def test_training_is_a_function_of_its_seed(tiny_run, tmp_path, run_here):
    """The same commands twice give the same bits, pictures and figures included; another seed does not."""
    for run, seed in (("same", 0), ("other", 1)):
        for script in ("train_vae.py", "train_unet.py"):
            command = ["--preset", "demo", "--run_dir", run, *flags(TINY | {"seed": seed})]
            assert run_here(script, *command, cwd=tmp_path).returncode == 0
    for name in ("vae_held_out.csv", "unet_train.csv", "unet_held_out.csv", "unet_samples_epoch2.png"):
        first, same, other = (
            (p / name).read_bytes() for p in (tiny_run / "run", tmp_path / "same", tmp_path / "other")
        )
        assert first == same != other, name
    for name in ("vae_ckpt_epoch2", "unet_ckpt2", "t_ember_ckpt2", "ema_unet_ckpt2"):
        first, same = (torch.load(p / f"{name}.pth", weights_only=True) for p in (tiny_run / "run", tmp_path / "same"))
        assert all(torch.equal(first[k], same[k]) for k in first), name


def test_a_finished_run_is_left_alone(tiny_run, run_here):
    before = {p.name: p.read_bytes() for p in (tiny_run / "run").iterdir() if p.is_file()}
    for script in ("train_vae.py", "train_unet.py"):
        result = run_here(script, "--preset", "demo", "--run_dir", "run", *flags(TINY), cwd=tiny_run)
        assert result.returncode == 0 and "finished" in result.stdout
    changed = run_here(
        "train_unet.py", "--preset", "demo", "--run_dir", "run", *flags(TINY | {"lr": 0.5}), cwd=tiny_run
    )
    assert_one_line_error(changed, 1, "lr was 0.001, now 0.5", "--overwrite")
    assert before == {p.name: p.read_bytes() for p in (tiny_run / "run").iterdir() if p.is_file()}


def test_max_steps_finishes_as_a_whole_run_would_and_overwrite_starts_over(tmp_path, run_here):
    command = ["--preset", "demo", "--run_dir", "run", *flags(TINY)]
    assert run_here("train_vae.py", *command, cwd=tmp_path).returncode == 0
    assert run_here("train_vae.py", *command, "--max_steps", 2, "--overwrite", cwd=tmp_path).returncode == 0
    assert sorted(p.name for p in (tmp_path / "run").glob("*.pth")) == ["vae_ckpt_epoch1.pth"]
    assert rows(tmp_path / "run/vae_train.csv")[-1]["step"] == "2"
    assert (tmp_path / "run/vae_pictures_epoch1.png").exists()


def test_sample_writes_pictures_a_grid_and_their_parameters(tiny_run, tmp_path):
    command = ["--prompt", "a red sports car", "--run_dir", "run", "--seed", 5, "--steps", 4, "--out", tmp_path / "out"]
    result = run_script("sample.py", *command, cwd=tiny_run)
    assert result.returncode == 0, result.stderr
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "a-red-sports-car_grid.png", *(f"a-red-sports-car_seed{k}.png" for k in range(5, 9))]  # fmt: skip
    assert "a-red-sports-car_grid.png" in result.stdout
    with Image.open(tmp_path / "out/a-red-sports-car_grid.png") as grid:
        assert grid.size == (2 * 34 + 2, 2 * 34 + 2)
    with Image.open(tmp_path / "out/a-red-sports-car_seed7.png") as image:
        prompt, settings = image.text["parameters"].split("\n")
    found = dict(re.findall(r"\s*([\w ]+):\s*([^,]+)", settings))
    assert prompt == "a red sports car"
    assert found | {"Steps": "4", "Sampler": "DDPM", "Seed": "7", "Size": "32x32", "Model": "unet_ckpt2"} == found

    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    assert run_script("sample.py", *command, "--num_images", 1, cwd=tiny_run).returncode == 0
    after = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    assert after | before == after and len(after) == 7
    four, alone = (np.asarray(Image.open(tmp_path / f"out/a-red-sports-car_{name}.png")).astype(int)
                   for name in ("seed5", "seed5_2"))  # fmt: skip
    assert abs(four - alone).max() <= 1  # which way a number is rounded depends on the processor and on the batch


def test_ema_weights_are_sampled_only_on_request(tiny_run, tmp_path, run_here):
    """With other weights in the averaged file, only --ema gives another picture."""
    shutil.copytree(tiny_run / "run", tmp_path / "run")
    weights = torch.load(tmp_path / "run/ema_unet_ckpt2.pth", weights_only=True)
    forge(tmp_path / "run", "unet", "2", "ema_unet_ckpt2.pth", {k: torch.randn_like(v) for k, v in weights.items()})
    pixels = {}
    for name, run, extra in (("before", tiny_run / "run", []), ("plain", "run", []), ("ema", "run", ["--ema"])):
        command = ["--prompt", "x", "--run_dir", run, "--steps", 2, "--num_images", 1, "--out", tmp_path / name, *extra]
        assert run_here("sample.py", *command, cwd=tmp_path).returncode == 0
        with Image.open(tmp_path / name / "x_seed0.png") as image:
            pixels[name] = image.tobytes()
            assert f"Model: {'ema_' if name == 'ema' else ''}unet_ckpt2" in image.text["parameters"]
    assert pixels["before"] == pixels["plain"] != pixels["ema"]


def test_many_pictures_are_all_written_and_the_grid_shows_the_first(tiny_run, tmp_path, run_here):
    command = ["--prompt", "x", "--run_dir", "run", "--steps", 1, "--num_images", 105, "--out", tmp_path / "out"]
    result = run_here("sample.py", *command, cwd=tiny_run)
    assert result.returncode == 0 and "wrote 105 pictures" in result.stdout, result.stderr
    assert len(list((tmp_path / "out").glob("x_seed*.png"))) == 105
    with Image.open(tmp_path / "out/x_grid.png") as grid, Image.open(tmp_path / "out/x_seed99.png") as last:
        assert grid.size == (10 * 34 + 2, 10 * 34 + 2)
        assert grid.crop((9 * 34 + 2, 9 * 34 + 2, 340, 340)).tobytes() == last.tobytes()


def pixels_of(run_here, cwd, out, *argv):
    """The picture that sample.py makes of a prompt with these flags, as an array, and its `parameters`."""
    command = ["--run_dir", "run", "--prompt", "a red bus", "--num_images", 1, "--out", out, *argv]
    result = run_here("sample.py", *command, cwd=cwd)
    assert result.returncode == 0, result.stderr
    with Image.open(out / "a-red-bus_seed0.png") as image:
        return np.asarray(image).astype(int), image.text["parameters"]


def test_guidance_negative_prompt_sampler_and_start_change_the_picture_and_are_written_down(
    tiny_run, tmp_path, run_here
):
    shutil.copytree(tiny_run / "run", tmp_path / "run")
    weights = torch.load(tmp_path / "run/unet_ckpt2.pth", weights_only=True)
    weights["conv_out.weight"].normal_(
        std=0.1
    )  # of a U-Net that predicts next to nothing samplers give the same picture
    forge(tmp_path / "run", "unet", "2", "unet_ckpt2.pth", weights)
    flag_sets = {
        "plain": [], "guided": ["--guidance_scale", 5], "negative": ["--guidance_scale", 5, "--negative_prompt", "a dog"],
        "never": ["--guidance_scale", 5, "--guidance_interval", 0, 0],
        "partly": ["--guidance_scale", 5, "--guidance_interval", 0, 0.5], "ddim": ["--sampler", "ddim"],
        "2m": ["--sampler", "dpmpp_2m"], "eta": ["--sampler", "ddim", "--eta", 1], "fitted": ["--start", "fitted"],
    }  # fmt: skip
    found = {k: pixels_of(run_here, tmp_path, tmp_path / k, "--steps", 5, *v) for k, v in flag_sets.items()}
    pixels = {k: v[0] for k, v in found.items()}
    assert (pixels["plain"] == pixels["never"]).all()  # an interval without a step is no guidance
    different = [k for k in pixels if k != "never"]
    for a, b in itertools.combinations(different, 2):
        assert (pixels[a] != pixels[b]).any(), (a, b)
    assert "Eta: 1" in found["eta"][1] and "Start: fitted" in found["fitted"][1]
    assert "Guidance interval: 0 to 0.5" in found["partly"][1]
    assert "interval" not in found["plain"][1] + found["guided"][1]
    assert "CFG scale: 5" in found["guided"][1] and "Sampler: DPMPP_2M" in found["2m"][1]
    assert found["negative"][1].splitlines()[1] == "Negative prompt: a dog"


def test_pictures_of_another_size(tiny_run, tmp_path, run_here):
    pixels, text = pixels_of(run_here, tiny_run, tmp_path / "out", "--steps", 2, "--size", 48, 64)
    assert pixels.shape == (48, 64, 3) and "Size: 64x48" in text


@pytest.mark.parametrize("argv, word", [
    (["--guidance_scale", "nan"], "--guidance_scale"), (["--guidance_scale", "inf"], "--guidance_scale"),
    (["--guidance_interval", "0.5", "0.2"], "--guidance_interval"), (["--guidance_interval", "0", "nan"], "--guidance_interval"),
    (["--negative_prompt", "x"], "--negative_prompt"), (["--eta", "1"], "--eta"), (["--sampler", "ddim", "--eta", "nan"], "--eta"),
    (["--sampler", "heun"], "choose from ddpm"), (["--size", "33", "32"], "--size"), (["--size", "0", "32"], "--size"),
    (["--start", "fitted", "--size", "64", "32"], "--start"), (["--data_root", "x"], "--data_root"),
])  # fmt: skip
def test_sampling_flags_that_do_not_fit_are_refused(tiny_run, argv, word, run_here):
    assert_one_line_error(run_here("sample.py", "--prompt", "x", "--run_dir", "run", *argv, cwd=tiny_run), 2, word)


def test_the_fitted_start_is_refused_where_it_is_too_large_or_no_other(capsys):
    parser = Parser()
    add_sampling_flags(parser)
    args = parser.parse_args(["--start", "fitted"])
    assert sampling_options(args, SDConfig(image_size=256))
    for settings in ({"image_size": 512}, {"prediction_type": "flow"}):
        with pytest.raises(SystemExit, match="2"):
            sampling_options(args, SDConfig(**settings))
        assert "--start" in capsys.readouterr().err


def test_the_interval_of_guidance_is_the_runs_unless_a_flag_says_otherwise():
    parser, cfg = Parser(), SDConfig(caption_dropout=0.1, guidance_scale=2.0, guidance_interval=(0.1, 0.6))
    add_sampling_flags(parser)
    assert sampling_options(parser.parse_args([]), cfg)["guidance_interval"] == (0.1, 0.6)
    assert sampling_options(parser.parse_args(["--guidance_interval", "0", "0"]), cfg)["guidance_interval"] == (0, 0)


def test_words_that_no_scene_has_are_warned_of(tiny_run, tmp_path, run_here):
    command = ["--run_dir", "run", "--steps", 1, "--num_images", 1, "--out", tmp_path]
    result = run_here("sample.py", *command, "--prompt", "a red bus, a kitten", "--prompt", "A blue house at night",
                      cwd=tiny_run)  # fmt: skip
    assert result.stderr.count("warning") == 1 and "no painted scene has 'kitten'" in result.stderr
    assert len(list(tmp_path.glob("*_seed0.png"))) == 2  # --prompt given twice
    flags_of_guidance = ["--prompt", "a red bus", "--guidance_scale", 2, "--negative_prompt", "blurry"]
    assert "no painted scene has 'blurry'" in run_here("sample.py", *command, *flags_of_guidance, cwd=tiny_run).stderr


def test_an_order_of_many_pictures_does_not_keep_them_all(tiny_run, tmp_path, run_here, monkeypatch):
    """The grid shows the first ones; of the others not even the memory may stay."""
    import sample as script

    batches, alive = [], []

    def one_batch(*_, seeds, **__):
        alive.append(sum(batch() is not None for batch in batches))
        pixels = np.zeros((len(seeds), 3, 8, 8), np.float32)
        batches.append(weakref.ref(pixels))
        return torch.from_numpy(pixels)

    monkeypatch.setattr(script, "sample", one_batch)
    monkeypatch.setattr(script, "IMAGES_PER_BATCH", 2)
    monkeypatch.setattr(script, "GRID_PICTURES", 4)
    command = ["--run_dir", "run", "--prompt", "a red bus", "--num_images", 12, "--out", tmp_path]
    assert run_here("sample.py", *command, cwd=tiny_run).returncode == 0
    assert len(alive) == 6 and max(alive) <= 1


def test_the_scenes_of_a_run_lie_nowhere(tiny_run, run_here):
    result = run_here("evaluate.py", "--run_dir", "run", "--data_root", "x", cwd=tiny_run)
    assert_one_line_error(result, 1, "--data_root x")


def test_the_next_command_trains_on_the_same_data(tmp_path, run_here):
    """What train_vae.py prints at its end, pasted as it is: your own pictures, other sizes, a folder with a blank."""
    for i in range(24):
        picture(tmp_path / f"my pictures/images/{i}.png", (9 * i, 0, 0))
        (tmp_path / f"my pictures/images/{i}.txt").write_text("a thing")
    settings = TINY | {"dataset": "folder", "data_root": "my pictures", "normalize_latents": True}
    command = ["--preset", "demo", "--run_dir", "my run", "--max_steps", 2, *flags(settings)]
    trained = run_here("train_vae.py", *command, cwd=tmp_path)
    python, *words = shlex.split(trained.stdout.split("next: ")[1])
    assert python == "python" and "--lr" not in words and "--max_steps" not in words
    result = run_here(*words, "--max_steps", 1, cwd=tmp_path)
    assert result.returncode == 0 and "warning" not in result.stderr, result.stderr
    records = json.loads((tmp_path / "my run/config.json").read_text())
    vae, unet = (records[name]["settings"] for name in ("train_vae", "train_unet"))
    assert (vae["dataset"], vae["data_root"]) == (unet["dataset"], unet["data_root"]) == ("folder", "my pictures")
    settings |= {"normalize_latents": False}  # which cannot be exported
    for script in ("train_vae.py", "train_unet.py"):
        again = ["--preset", "demo", "--run_dir", "my run", "--overwrite", "--max_steps", 1, *flags(settings)]
        assert run_here(script, *again, cwd=tmp_path).returncode == 0
    assert run_here("sample.py", "--run_dir", "my run", "--export", "card", cwd=tmp_path).returncode == 0
    assert "license: other" in (tmp_path / "card/README.md").read_text()  # the weights of these pictures are not ours
    other = run_here("train_unet.py", "--preset", "demo", "--run_dir", "my run", "--overwrite", "--max_steps", 1,
                     *flags(settings | {"dataset": "scenes", "data_root": "x"}), cwd=tmp_path)  # fmt: skip
    assert "the VAE was trained on --dataset folder" in other.stderr


@pytest.mark.parametrize("scale", ["-3", "0", "1e9"])
def test_any_finite_guidance_gives_a_picture(tiny_run, tmp_path, run_here, scale):
    pixels, _ = pixels_of(run_here, tiny_run, tmp_path / "out", "--steps", 3, "--guidance_scale", scale)
    assert pixels.shape == (32, 32, 3)


@pytest.mark.slow
@pytest.mark.parametrize("settings, sampler", [
    ({"prediction_type": "flow", "caption_dropout": 0.1, "ema_warmup": True}, "EULER"),
    ({"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, "DDPM"),
    ({"beta_schedule": "cosine", "min_snr_gamma": 5.0, "ema_sigma_rel": 0.1}, "DDPM")])  # fmt: skip
def test_other_processes_train_sample_and_are_measured(tmp_path, run_here, monkeypatch, settings, sampler):
    monkeypatch.setattr(evaluate, "CLASSIFIER_SCENES", 512)
    command = ["--preset", "demo", "--run_dir", "run", *flags(TINY | {"num_epochs": 1})]
    assert run_here("train_vae.py", *command, cwd=tmp_path).returncode == 0
    trained = run_here("train_unet.py", *command, *flags(settings), cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    _, text = pixels_of(run_here, tmp_path, tmp_path / "out", "--steps", 4)
    assert f"Sampler: {sampler}" in text
    measured = run_here("evaluate.py", "--run_dir", "run", "--num_prompts", 4, "--steps", 4, cwd=tmp_path)
    assert measured.returncode == 0, measured.stderr
    figures = json.loads((tmp_path / "run/evaluation.json").read_text())
    assert figures["denoising"]["target"] == settings.get("prediction_type", "epsilon")
    assert figures["denoising"]["white"]["ratio"] > 0.5


def test_pictures_of_several_samplers_never_get_one_name(tmp_path):
    """Eight threads stand for as many sample.py with one prompt and one seed."""
    with ThreadPoolExecutor(8) as threads:
        paths = list(
            threads.map(lambda i: save_png(tmp_path, "x", "seed0", torch.full((3, 1, 1), i / 255), ""), range(200))
        )
    assert [np.asarray(Image.open(path))[0, 0, 0] for path in paths] == list(range(200))
    assert len(os.listdir(tmp_path)) == 200


def test_odd_prompts_become_tame_file_names(tiny_run, tmp_path, run_here):
    prompts = ["../../etc/passwd", "\x1b[31mred\n", ""]
    result = run_here("sample.py", "--run_dir", "run", "--steps", 1, "--num_images", 1, "--out", tmp_path / "out",
                        "--prompt", *prompts, cwd=tiny_run)  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "\x1b" not in result.stdout
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        f"{s}_{e}.png" for s in ("etc-passwd", "31mred", "prompt") for e in ("seed0", "grid")
    }
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("argv, word", [
    (["--steps", "0"], "--steps"), (["--steps", "21"], "1 to 20"), (["--seed", "-1"], "--seed"),
    (["--seed", str(2**64)], "--seed"), (["--num_images", "0"], "--num_images"), (["--sampler", "magic"], "--sampler"),
])  # fmt: skip
def test_sample_refuses_values_out_of_range(tiny_run, argv, word, run_here):
    assert_one_line_error(run_here("sample.py", "--prompt", "x", "--run_dir", "run", *argv, cwd=tiny_run), 2, word)


def test_the_variance_of_one_training_picture_is_asked_for_in_vain(tmp_path, run_here):
    for script in ("train_vae.py", "train_unet.py"):
        command = ["--preset", "demo", "--run_dir", "run", *flags(TINY | {"max_images": 1})]
        assert run_here(script, *command, "--max_steps", 1, cwd=tmp_path).returncode == 0
    fitted = run_here("sample.py", "--run_dir", "run", "--prompt", "x", "--start", "fitted", cwd=tmp_path)
    assert_one_line_error(fitted, 1, "--start", "two training pictures")
    assert_one_line_error(run_here("evaluate.py", "--run_dir", "run", cwd=tmp_path), 1, "trained on one picture")


def test_what_is_missing_names_the_command_that_makes_it(tmp_path, tiny_run, run_here):
    assert_one_line_error(run_here("sample.py", "--prompt", "x", cwd=tmp_path), 1, "train_vae.py", "train_unet.py")
    assert_one_line_error(run_here("train_unet.py", "--preset", "demo", cwd=tmp_path), 1, "train_vae.py")
    assert_one_line_error(
        run_here("train_vae.py", "--preset", "coco", cwd=tmp_path), 1, "captions_train2017.json", "demo"
    )
    (tmp_path / "run").mkdir()
    for name in ("config.json", "vae_ckpt_epoch2.pth"):
        shutil.copy(tiny_run / "run" / name, tmp_path / "run")
    assert_one_line_error(run_here("sample.py", "--prompt", "x", "--run_dir", "run", cwd=tmp_path), 1, "train_unet.py")


def test_a_vae_of_another_shape_or_age_is_refused(tiny_run, tmp_path, run_here):
    shutil.copytree(tiny_run / "run", tmp_path / "run")
    wider = [*flags(TINY | {"image_size": 64}), "--overwrite"]
    assert_one_line_error(
        run_here("train_unet.py", "--preset", "demo", "--run_dir", "run", *wider, cwd=tmp_path), 1, "--image_size"
    )
    retrained = flags(TINY | {"seed": 9})
    assert (
        run_here(
            "train_vae.py", "--preset", "demo", "--run_dir", "run", "--overwrite", *retrained, cwd=tmp_path
        ).returncode
        == 0
    )
    assert_one_line_error(
        run_here("sample.py", "--prompt", "x", "--run_dir", "run", cwd=tmp_path),
        1,
        "vae_ckpt_epoch2.pth",
        "train_unet.py --run_dir run --overwrite",
    )


def test_a_vae_of_another_data_set_is_used_only_if_that_is_said(tiny_run, tmp_path, run_here):
    shutil.copytree(tiny_run / "run", tmp_path / "run", ignore=shutil.ignore_patterns("unet_*", "ema_*", "t_ember_*"))
    for i in range(3):
        picture(tmp_path / f"images/{i}.png")
        (tmp_path / f"images/{i}.txt").write_text("a picture")
    settings = {k: v for k, v in TINY.items() if k != "dataset"}
    command = ["train_unet.py", "--run_dir", "run", "--data_root", ".", "--max_steps", 1, *flags(settings)]
    assert_one_line_error(run_here(*command, "--preset", "coco", cwd=tmp_path), 1, "--dataset", "coco", "scenes")
    said = run_here(*command, "--preset", "coco", "--dataset", "folder", cwd=tmp_path)
    assert said.returncode == 0 and "warning: the VAE was trained on --dataset scenes" in said.stderr


def test_a_mistyped_prompt_flag_is_named(run_here, tmp_path):
    assert_one_line_error(run_here("sample.py", "--promt", "a cat", cwd=tmp_path), 2, "--promt")
    assert_one_line_error(run_here("sample.py", cwd=tmp_path), 2, "--prompt")
    assert_one_line_error(run_here("sample.py", "--export", "", cwd=tmp_path), 2, "--export")


def test_files_of_an_unknown_run_are_not_deleted(tiny_run, tmp_path, run_here):
    (tmp_path / "run").mkdir()
    shutil.copy(tiny_run / "run/vae_ckpt_epoch2.pth", tmp_path / "run")
    result = run_here("train_vae.py", "--preset", "demo", "--run_dir", "run", *flags(TINY), cwd=tmp_path)
    assert_one_line_error(result, 1, "vae_ckpt_epoch2.pth", "--overwrite")
    assert (tmp_path / "run/vae_ckpt_epoch2.pth").exists()


def test_a_loss_that_is_no_number_stops_the_run(tmp_path, run_here):
    result = run_here("train_vae.py", "--preset", "demo", "--run_dir", "run", *flags(TINY | {"lr": 1e9}), cwd=tmp_path)
    assert_one_line_error(result, 1, "--lr", "step")
    assert not list((tmp_path / "run").glob("vae_ckpt_epoch?.pth"))


@pytest.mark.slow
def test_real_coco_pictures_real_tokens_whole_pipeline(real_data, clip_dir, tmp_path):
    """coco-mini in the coco preset's architecture: both trainers, then sample.py; both losses fall."""
    data = ["--preset", "coco", "--run_dir", "run", "--data_root", real_data / "coco-mini", "--held_out_images", 8,
            "--lr", "1e-3", "--mixed_precision", "auto", "--text_encoder", clip_dir, "--sample_prompts", "a dog"]  # fmt: skip
    vae = run_script("train_vae.py", *data, "--batch_size", 2, "--max_steps", 30, cwd=tmp_path)
    assert vae.returncode == 0, vae.stderr
    unet = run_script("train_unet.py", *data, "--batch_size", 4, "--max_steps", 30, cwd=tmp_path)
    assert unet.returncode == 0, unet.stderr
    for name, column in (("vae_train.csv", "mse"), ("unet_train.csv", "loss")):
        values = [float(r[column]) for r in rows(tmp_path / "run" / name)]
        assert values[-1] < 0.9 * values[0], (name, values)
    made = run_script("sample.py", "--prompt", "a dog on the grass", "--run_dir", "run", "--steps", 4, cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    with Image.open(tmp_path / "run/samples/a-dog-on-the-grass_grid.png") as grid:
        assert grid.size == (262, 262)
