"""Promises of sample.py, from outside: its files, what they say of themselves, its answers to mistakes."""

import dataclasses
import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, SAMPLE, assert_one_line_error, forge, sign
from PIL import Image
from test_faults import photo

import sample as script

HEAVY = ("torchvision", "torch._dynamo", "torch._inductor", "transformers", "safetensors", "matplotlib", "evaluate")


def pixels_of(run_here, cwd, out, *argv, prompt="a red bus"):
    """The picture that sample.py makes of a prompt with these flags, as an array, and its `parameters`."""
    command = ["--run_dir", "run", "--prompt", prompt, "--num_images", 1, "--out", out, *argv]
    result = run_here("sample.py", *command, cwd=cwd)
    assert result.returncode == 0, result.stderr
    with Image.open(out / f"{prompt.replace(' ', '-')}_seed0.png") as image:
        return np.asarray(image).astype(int), image.text["parameters"]


def settings_of(text):
    """The settings of `parameters`, read as AUTOMATIC1111's web UI reads them (its generation_parameters_copypaste.py)."""
    found = re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', text.split("\n")[-1])
    return {
        name: json.loads(value) if value.startswith('"') and value.endswith('"') else value for name, value in found
    }


# ---- Files ----


def test_sample_writes_pictures_a_grid_and_their_parameters(tiny_run, tmp_path, run_here):
    command = ["--prompt", "a red sports car", "--run_dir", "run", "--seed", 5, "--steps", 4, "--out", tmp_path / "out"]
    result = run_here("sample.py", *command, cwd=tiny_run)
    assert result.returncode == 0, result.stderr
    names = [f"a-red-sports-car_{name}.png" for name in ("grid", "seed5", "seed6", "seed7", "seed8")]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == names and names[0] in result.stdout
    with Image.open(tmp_path / "out" / names[0]) as grid, Image.open(tmp_path / "out" / names[4]) as last:
        assert grid.size == (2 * 34 + 2, 2 * 34 + 2)
        assert grid.crop((36, 36, 68, 68)).tobytes() == last.tobytes()
    with Image.open(tmp_path / "out" / names[3]) as image:
        prompt, _ = image.text["parameters"].split("\n")
        found = settings_of(image.text["parameters"])
    assert prompt == "a red sports car"
    expected = {"Steps": "4", "Sampler": "DDPM", "CFG scale": "1", "Seed": "7", "Size": "32x32", "Model": "unet_ckpt2"}
    assert found == expected

    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    assert run_here("sample.py", *command, "--num_images", 1, cwd=tiny_run).returncode == 0
    after = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    assert after | before == after and len(after) == 7
    four, alone = (np.asarray(Image.open(tmp_path / f"out/a-red-sports-car_{name}.png")).astype(int)
                   for name in ("seed5", "seed5_2"))  # fmt: skip
    assert abs(four - alone).max() <= 1  # which way a number is rounded depends on the processor and on the batch


def test_one_picture_needs_none_of_the_heavy_libraries(tiny_run, tmp_path):
    """The command as it is typed, in a process of its own; Python lists what it imports."""
    command = ["--prompt", "x", "--run_dir", "run", "--steps", "1", "--num_images", "1", "--out", str(tmp_path)]
    result = subprocess.run([sys.executable, "-X", "importtime", ROOT / "sample.py", *command], cwd=tiny_run,
                            capture_output=True, text=True, timeout=100)  # fmt: skip
    imported = {line.split("|")[-1].strip() for line in result.stderr.splitlines() if line.startswith("import time:")}
    assert result.returncode == 0 and {"torch", "PIL.PngImagePlugin"} <= imported
    assert [name for name in HEAVY if name in imported] == []
    assert (tmp_path / "x_seed0.png").exists() and "wrote 1 picture of 'x'" in result.stdout


def test_many_pictures_are_all_written_and_the_grid_shows_the_first(tiny_run, tmp_path, run_here):
    command = ["--prompt", "x", "--run_dir", "run", "--steps", 1, "--num_images", 105, "--out", tmp_path / "out"]
    result = run_here("sample.py", *command, cwd=tiny_run)
    assert result.returncode == 0 and "wrote 105 pictures" in result.stdout, result.stderr
    assert len(list((tmp_path / "out").glob("x_seed*.png"))) == 105
    with Image.open(tmp_path / "out/x_grid.png") as grid, Image.open(tmp_path / "out/x_seed99.png") as last:
        assert grid.size == (10 * 34 + 2, 10 * 34 + 2)
        assert grid.crop((9 * 34 + 2, 9 * 34 + 2, 340, 340)).tobytes() == last.tobytes()


def test_an_order_of_many_pictures_does_not_keep_them_all(tiny_run, tmp_path, run_here, monkeypatch):
    """The grid shows the first ones; of the others not even the memory may stay."""
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


def test_pictures_of_several_samplers_never_get_one_name(tmp_path):
    """Eight threads stand for as many sample.py with one prompt and one seed."""
    images = [torch.full((3, 1, 1), i / 255) for i in range(200)]
    with ThreadPoolExecutor(8) as threads:
        paths = list(threads.map(lambda image: script.save_png(tmp_path, "x", "seed0", image, ""), images))
    assert [np.asarray(Image.open(path))[0, 0, 0] for path in paths] == list(range(200))
    assert len(os.listdir(tmp_path)) == 200


def test_odd_prompts_become_tame_file_names(tiny_run, tmp_path, run_here):
    prompts = ["../../etc/passwd", "\x1b[31mred\n", ""]
    command = ["--run_dir", "run", "--steps", 1, "--num_images", 1, "--out", tmp_path / "out", "--prompt", *prompts]
    result = run_here("sample.py", *command, cwd=tiny_run)
    assert result.returncode == 0, result.stderr
    assert "\x1b" not in result.stdout
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        f"{s}_{e}.png" for s in ("etc-passwd", "31mred", "prompt") for e in ("seed0", "grid")
    }
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


# ---- What is asked for ----


def test_ema_weights_are_sampled_only_on_request(tiny_run, tmp_path, run_here):
    """With other weights in the averaged file, only --ema gives another picture."""
    shutil.copytree(tiny_run / "run", tmp_path / "run")
    weights = torch.load(tmp_path / "run/ema_unet_ckpt2.pth", weights_only=True)
    forge(tmp_path / "run", "unet", "2", "ema_unet_ckpt2.pth", {k: torch.randn_like(v) for k, v in weights.items()})
    before, _ = pixels_of(run_here, tiny_run, tmp_path / "before", "--steps", 2)
    plain, text = pixels_of(run_here, tmp_path, tmp_path / "plain", "--steps", 2)
    ema, ema_text = pixels_of(run_here, tmp_path, tmp_path / "ema", "--steps", 2, "--ema")
    assert (before == plain).all() and (plain != ema).any()
    assert "Model: unet_ckpt2" in text and "Model: ema_unet_ckpt2" in ema_text


def test_guidance_negative_prompt_and_sampler_change_the_picture_and_are_written_down(tiny_run, tmp_path, run_here):
    shutil.copytree(tiny_run / "run", tmp_path / "run")
    weights = torch.load(tmp_path / "run/unet_ckpt2.pth", weights_only=True)
    # if a U-Net predicts next to nothing, all samplers give the same picture
    weights["conv_out.weight"].normal_(std=0.1)
    forge(tmp_path / "run", "unet", "2", "unet_ckpt2.pth", weights)
    guided = ("--guidance_scale", 5)
    flag_sets = {
        "plain": (),
        "guided": guided,
        "negative": (*guided, "--negative_prompt", "a dog"),
        "never": (*guided, "--guidance_interval", 0, 0),
        "partly": (*guided, "--guidance_interval", 0, 0.5),
        "ddim": ("--sampler", "ddim"),
        "2m": ("--sampler", "dpmpp_2m"),
        "eta": ("--sampler", "ddim", "--eta", 1),
    }
    found = {k: pixels_of(run_here, tmp_path, tmp_path / k, "--steps", 5, *v) for k, v in flag_sets.items()}
    assert (found["plain"][0] == found["never"][0]).all()  # an interval without a step is no guidance
    for a, b in itertools.combinations([k for k in found if k != "never"], 2):
        assert (found[a][0] != found[b][0]).any(), (a, b)
    settings = {k: settings_of(text) for k, (_, text) in found.items()}
    assert settings["eta"]["Eta"] == "1.0" and settings["2m"]["Sampler"] == "DPMPP_2M"
    assert settings["partly"]["Guidance interval"] == "0 to 0.5" and settings["guided"]["CFG scale"] == "5"
    assert "Guidance interval" not in settings["plain"] | settings["guided"]
    assert found["negative"][1].split("\n")[:2] == ["a red bus", "Negative prompt: a dog"]


@pytest.mark.parametrize("scale", ["-3", "0", "1e9"])
def test_any_finite_guidance_gives_a_picture(tiny_run, tmp_path, run_here, scale):
    pixels, _ = pixels_of(run_here, tiny_run, tmp_path / "out", "--steps", 3, "--guidance_scale", scale)
    assert pixels.shape == (32, 32, 3)


def test_pictures_of_another_size(tiny_run, tmp_path, run_here):
    pixels, text = pixels_of(run_here, tiny_run, tmp_path / "out", "--steps", 2, "--size", 48, 64)
    assert pixels.shape == (48, 64, 3) and "Size: 64x48" in text


@pytest.mark.parametrize("name", ["sharp", "sharp, two", 'a "quoted" one', "back\\slash, comma", "sharp: two", "vae-ü"])
def test_the_name_of_another_runs_vae_is_whole_where_others_read_it(tiny_run, tmp_path, run_here, name):
    """A comma ends a setting there, unless the value is quoted."""
    shutil.copytree(tiny_run / "run", tmp_path / "run")
    (tmp_path / name).symlink_to("run")
    _, text = pixels_of(
        run_here, tmp_path, tmp_path / "out", "--steps", 1, "--vae", name, "--sampler", "ddim", "--eta", 1
    )
    found = settings_of(text)
    assert found["VAE"] == name and found["Model"] == "unet_ckpt2" and found["Eta"] == "1.0"
    assert text.endswith("VAE: sharp, Eta: 1.0") == (name == "sharp")  # quotes stand only where they are needed


def read_by_sd_parsers(path):
    """-> prompt, negative prompt, {setting: value}. It cuts settings at every comma, in quotes or not."""
    found = pytest.importorskip("sd_parsers").ParserManager().parse(path)
    (sampler,) = found.samplers
    texts = ["".join(p.value for p in prompts) for prompts in (sampler.prompts, sampler.negative_prompts)]
    settings = {"Sampler": sampler.name, "Model": sampler.model.name} | found.metadata
    return *texts, settings | {"Steps": sampler.parameters["steps"], "Seed": sampler.parameters["seed"]}


def read_by_sd_geninfo(path):
    """-> the same. It cuts settings at commas outside of quotes, and takes each for YAML."""
    reader = pytest.importorskip("sd_geninfo.sd_geninfo")
    with Image.open(path) as image:
        text, _ = reader.read_geninfo(image)
    prompt, negative, *settings = reader.parse_geninfo(text).split("\n")
    settings = dict(line.split(": ", 1) for line in settings)
    return prompt.removeprefix("Positive prompt: "), negative.removeprefix("Negative prompt: "), settings


@pytest.mark.parametrize("reader", [read_by_sd_parsers, read_by_sd_geninfo])
@pytest.mark.parametrize(
    "prompt", ["a red bus", 'a "red", big: bus', "x: y, Steps: 3, Seed: 9", "caf\u00e9\n\u7ea2\u8272"]
)
@pytest.mark.parametrize("name", ["sharp", "sharp, Model: two", 'a "quoted" one', "back\\slash, comma"])
def test_public_readers_read_what_was_written(tmp_path, reader, prompt, name):
    """Programs that others have made, of a pinned version: whatever a prompt or a name holds, all settings are whole."""
    options = {"num_steps": 4, "sampler": "ddpm", "guidance_scale": 3.0, "guidance_interval": (0, 1)}
    options |= {"negative_prompt": 'a dog, "x": y', "eta": 0, "guidance_rescale": 0}
    image = torch.zeros(3, 8, 16)
    text = script.parameters(prompt, options, 5, image, "unet_ckpt2", {"VAE": name})
    found = reader(script.save_png(tmp_path, "x", "seed5", image, text))
    assert found[:2] == (" ".join(prompt.split()), options["negative_prompt"])
    shown = {"Steps": "4", "Sampler": "DDPM", "Seed": "5", "Size": "16x8", "Model": "unet_ckpt2"}
    assert shown.items() <= found[2].items()
    value = found[2]["VAE"]
    assert (json.loads(value) if value.startswith('"') else value) == name


def test_words_that_no_scene_has_are_warned_of(tiny_run, tmp_path, run_here):
    command = ["--run_dir", "run", "--steps", 1, "--num_images", 1, "--out", tmp_path]
    prompts = ["--prompt", "a red bus, a kitten", "--prompt", "A blue house at night"]
    result = run_here("sample.py", *command, *prompts, cwd=tiny_run)
    assert result.stderr.count("warning") == 1 and "no painted scene has 'kitten'" in result.stderr
    assert len(list(tmp_path.glob("*_seed0.png"))) == 2  # --prompt given twice
    guided = ["--prompt", "a red bus", "--guidance_scale", 2, "--negative_prompt", "blurry"]
    assert "no painted scene has 'blurry'" in run_here("sample.py", *command, *guided, cwd=tiny_run).stderr
    usual = run_here("sample.py", *command, "--prompt", "a red bus", cwd=tiny_run)
    assert "warning" not in usual.stderr and usual.returncode == 0


def test_a_prompt_that_lost_its_quotes_is_hinted_at_where_the_run_knows_phrases(copy, run_here):
    words = ("sample.py", "--run_dir", "run", "--steps", 1, "--num_images", 1, "--prompt")
    hint = (
        "warning: --prompt: 4 prompts are single words; if they are one, put it in quotes: --prompt 'a red sports car'"
    )
    lost = run_here(*words, "a", "red", "sports", "car", cwd=copy)
    assert hint in lost.stderr and lost.returncode == 0
    for prompts in (["a red car", "a dog"], ["car"], ["car", "a dog"]):
        assert "quotes" not in run_here(*words, *prompts, cwd=copy).stderr
    path = copy / "run/unet_set2.json"
    manifest = json.loads(path.read_text())
    assert " " in manifest["caption"]
    path.write_text(sign(manifest | {"caption": "car"}))  # a run whose captions are words
    assert "quotes" not in run_here(*words, "car", "dog", cwd=copy).stderr


def test_prompts_come_from_a_file_too(tiny_run, tmp_path, run_here):
    (tmp_path / "prompts.txt").write_bytes("\ufeffa red car\r\n\r\n  caf\u00e9 #1 \r\n--seed\n".encode())
    words = ("sample.py", "--run_dir", "run", "--steps", 1, "--num_images", 1, "--out", tmp_path / "out")
    result = run_here(*words, "--prompts_file", tmp_path / "prompts.txt", "--prompt", "a blue bus", cwd=tiny_run)
    assert result.returncode == 0, result.stderr
    for prompt in ("a blue bus", "a red car", "caf\u00e9 #1", "--seed"):
        assert f"wrote 1 picture of {prompt!r}" in result.stdout
    assert result.stdout.count("wrote 1") == 4


@pytest.mark.parametrize(
    "content, what",
    [(None, "missing"), (b"", "no prompt"), (b" \n\t\r\n", "no prompt"), (b"\xff\xfea\x00", "not UTF-8")],
)
def test_a_file_without_prompts_is_named_before_anything_is_loaded(tmp_path, run_here, content, what):
    (tmp_path / "run").mkdir()
    if content is not None:
        (tmp_path / "p.txt").write_bytes(content)
    result = run_here("sample.py", "--run_dir", "run", "--prompts_file", "p.txt", cwd=tmp_path)
    assert_one_line_error(result, 1, "--prompts_file p.txt", what)


# ---- Strips ----


def columns_of(path, side=32):
    """The pictures of a grid file, row by row: (rows, columns, side, side, 3)."""
    with Image.open(path) as image:
        grid = np.asarray(image.convert("RGB"))[2:, 2:]
    rows, columns = grid.shape[0] // (side + 2), grid.shape[1] // (side + 2)
    return grid.reshape(rows, side + 2, columns, side + 2, 3)[:, :side, :, :side].transpose(0, 2, 1, 3, 4)


def test_a_strip_and_an_animation_show_how_the_pictures_emerge(tiny_run, tmp_path, run_here):
    """Its last column and frame are the pictures themselves, which are what they are without the flag."""
    command = ["--run_dir", "run", "--prompt", "a red bus", "--steps", 20, "--num_images", 3]
    assert run_here("sample.py", *command, "--out", tmp_path / "plain", cwd=tiny_run).returncode == 0
    for _ in range(2):
        result = run_here("sample.py", *command, "--steps_strip", "--out", tmp_path / "out", cwd=tiny_run)
        assert result.returncode == 0, result.stderr
    names = {f"a-red-bus_steps{n}.{kind}" for n in ("", "_2") for kind in ("png", "webp")}
    assert {p.name for p in (tmp_path / "out").glob("*steps*")} == names
    for name in ("seed0", "seed1", "seed2", "grid"):
        assert (tmp_path / f"out/a-red-bus_{name}.png").read_bytes() == (
            tmp_path / f"plain/a-red-bus_{name}.png"
        ).read_bytes()
    strip = columns_of(tmp_path / "out/a-red-bus_steps.png")
    assert strip.shape[:2] == (3, 9)
    with (
        Image.open(tmp_path / "out/a-red-bus_steps.webp") as movie,
        Image.open(tmp_path / "out/a-red-bus_grid.png") as grid,
    ):
        frames = []
        for i in range(movie.n_frames):
            movie.seek(i)
            frames.append(np.asarray(movie.convert("RGB")))
        assert len(frames) == 9 and (frames[-1] == np.asarray(grid)).all() and (frames[0] != frames[-1]).any()
        assert (frames[4][2:34, 2:34] == strip[0, 4]).all() and (frames[4][2:34, 36:68] == strip[1, 4]).all()
    for i in range(3):
        with Image.open(tmp_path / f"out/a-red-bus_seed{i}.png") as image:
            assert (np.asarray(image) == strip[i, -1]).all()
    with Image.open(tmp_path / "out/a-red-bus_steps.png") as image:
        assert image.text["parameters"].startswith("a red bus\nSteps: 20")


@pytest.mark.parametrize("steps, columns", [(1, 1), (2, 2), (3, 3), (9, 9), (12, 9)])
def test_a_strip_of_few_steps_shows_each_once(tiny_run, tmp_path, run_here, steps, columns):
    """The x0 of the last step is the picture."""
    command = ["--run_dir", "run", "--prompt", "x", "--steps", steps, "--num_images", 2, "--steps_strip"]
    assert run_here("sample.py", *command, "--out", tmp_path, cwd=tiny_run).returncode == 0
    assert columns_of(tmp_path / "x_steps.png").shape[:2] == (2, columns)


# ---- Typed prompts ----


class Terminal(io.TextIOWrapper):
    """A terminal on which somebody has typed some bytes."""

    def __init__(self, typed):
        super().__init__(io.BytesIO(typed), encoding="utf-8")

    def isatty(self):
        return True


@pytest.mark.parametrize("end", [b"\n", b"", b"a dog\xff\n"], ids=["empty line", "Ctrl-D", "bytes that are no text"])
def test_prompts_are_typed_one_by_one_with_the_models_loaded_once(tiny_run, tmp_path, run_here, monkeypatch, end):
    loads, real = [], script.models.load_models
    monkeypatch.setattr(script.models, "load_models", lambda *a: loads.append(a) or real(*a))
    monkeypatch.setattr(sys, "stdin", Terminal("a red bus\n caf\u00e9, \x1b[31m kitten \n".encode() + end))
    command = ["--run_dir", "run", "--steps", 1, "--num_images", 1, "--out", tmp_path]
    result = run_here("sample.py", *command, cwd=tiny_run)
    assert result.returncode == 0, result.stderr
    expected = ["a-red-bus_seed0.png", "caf\u00e9-31m-kitten_seed0.png"] + ["a-dog_seed0.png"] * end.startswith(b"a")
    assert sorted(p.name for p in tmp_path.glob("*_seed0.png")) == sorted(expected)
    assert len(loads) == 1 and "\x1b" not in result.stdout + result.stderr
    assert result.stderr.count("no painted scene has") == len(expected) - 1 - end.startswith(b"a")
    assert (
        run_here("sample.py", *command, "--prompt", "a red bus", "--out", tmp_path / "a", cwd=tiny_run).returncode == 0
    )
    assert (tmp_path / "a/a-red-bus_seed0.png").read_bytes() == (tmp_path / "a-red-bus_seed0.png").read_bytes()


def test_a_typed_prompt_that_fails_is_one_line_and_the_next_is_asked_for(tiny_run, tmp_path, run_here, monkeypatch):
    real = script.save_png

    def full_disk(folder, prompt, *rest):
        if prompt == "x":
            raise script.errors.UserError("x_seed0.png: could not be written; make room")
        return real(folder, prompt, *rest)

    monkeypatch.setattr(script, "save_png", full_disk)
    monkeypatch.setattr(sys, "stdin", Terminal(b"x\ny\n"))
    result = run_here(*SAMPLE[:1], *SAMPLE[3:], "--out", tmp_path, cwd=tiny_run)
    assert result.returncode == 0 and "error: x_seed0.png: could not be written; make room\n" in result.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["y_grid.png", "y_seed0.png"]


# ---- Pictures from pictures ----


@pytest.fixture
def car(tmp_path):
    """A picture and a mask of its left half, both wider than high."""
    pixels = np.random.RandomState(0).randint(0, 256, (6, 9, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((90, 60), Image.Resampling.BICUBIC).save(tmp_path / "my, car.png")
    mask = Image.new("L", (180, 120))
    mask.paste(255, (0, 0, 90, 120))
    mask.save(tmp_path / "mask.png")
    return tmp_path


@pytest.mark.parametrize("size", [(), ("--size", 32, 64)])
def test_strength_and_mask_lead_from_the_reconstruction_to_plain_sampling(tiny_run, car, run_here, size):
    cfg, _, vae, *_ = script.models.load_models(str(tiny_run / "run"), False, torch.device("cpu"))
    with Image.open(car / "my, car.png") as image:  # 90 x 60: the middle 60 x 60, or 90 x 45
        box = (0, 7.5, 90, 52.5) if size else (15, 0, 75, 60)
        image = image.resize((64, 32) if size else (32, 32), Image.Resampling.BICUBIC, box=box)
    with torch.no_grad():
        mu, _ = vae.encode(torch.from_numpy(np.asarray(image) / 127.5 - 1).float().permute(2, 0, 1)[None])
        expected = vae.decoder(mu)[0].permute(1, 2, 0).numpy()
    expected = np.round((expected.clip(-1, 1) + 1) * 127.5)

    def pixels(name, *words):
        return pixels_of(run_here, tiny_run, car / name, "--steps", 5, "--sampler", "ddim", *size, *words)

    begin = ("--init_image", car / "my, car.png")
    Image.new("RGB", (90, 60)).save(car / "black.png")
    Image.new("RGBA", (90, 60)).save(car / "clear.png")
    found, text = pixels("zero", *begin, "--strength", 0)
    assert np.abs(found - expected).max() <= 1 and expected.std() > 1
    assert np.abs(pixels("black", *begin, "--mask", car / "black.png")[0] - expected).max() <= 1
    assert settings_of(text)["Denoising strength"] == "0" and settings_of(text)["Init image"] == "my, car.png"
    plain = pixels("plain")[0]
    some, text = pixels("some", *begin)
    assert settings_of(text)["Denoising strength"] == "0.75" and (some != plain).any() and (some != found).any()
    assert (pixels("one", *begin, "--strength", 1)[0] == plain).all()
    assert (pixels("clear", *begin, "--mask", car / "clear.png")[0] == plain).all()
    assert (pixels("clear some", *begin, "--mask", car / "clear.png", "--strength", 0.75)[0] == some).all()
    left, text = pixels("left", *begin, "--mask", car / "mask.png")
    assert settings_of(text)["Denoising strength"] == "1" and settings_of(text)["Mask"] == "mask.png"
    width = left.shape[1]
    nearer = np.abs(left - plain).mean(axis=(0, 2)) < np.abs(left - found).mean(axis=(0, 2))
    assert nearer[: width // 4].mean() > 0.9 and nearer[-width // 4 :].mean() < 0.1


def test_the_bars_of_a_padded_picture_are_not_repainted(tiny_run, car):
    cfg, _, vae, *_ = script.models.load_models(str(tiny_run / "run"), False, torch.device("cpu"))
    args = SimpleNamespace(init_image=car / "my, car.png", mask=car / "mask.png", size=None, strength=1.0)
    edit = script.picture_edit(args, dataclasses.replace(cfg, resize="pad"), vae, torch.device("cpu"))
    repaint = edit.keywords["repaint"]  # (8, 8), of 32 x 32 pixels; the picture has 32 x 21
    assert not repaint[[0, -1]].any() and repaint[2:-2, :4].all() and not repaint[:, 4:].any()


@pytest.mark.parametrize(
    "flag, content, words",
    [
        ("--init_image", None, ("No such file",)),
        ("--init_image", "", ("No such file",)),
        ("--init_image", b"", ("cannot identify",)),
        ("--init_image", b"\x89PNG\r\n\x1a\n", ("give a JPEG, PNG, WebP or AVIF",)),
        ("--mask", None, ("No such file",)),
        ("--mask", b"<html>", ("cannot identify",)),
        ("--mask", photo(size=(60, 60)), ("60 x 60", "90 x 60")),
    ],
)
def test_pictures_that_cannot_be_used_are_named(tiny_run, car, run_here, flag, content, words):
    path = car / "odd.png" if content != "" else ""
    if isinstance(content, bytes):
        path.write_bytes(content)
    begin = ("--init_image", car / "my, car.png") if flag == "--mask" else ()
    result = run_here(*SAMPLE, *begin, flag, path, "--out", car / "out", cwd=tiny_run)
    assert_one_line_error(result, 1, f"{flag} {path}", *words)
    assert not (car / "out").exists()


# ---- Interpolation ----


def test_ways_between_prompts_and_seeds_end_in_the_pictures_of_plain_sampling(tiny_run, tmp_path, run_here):
    command = ["--run_dir", "run", "--steps", 3, "--num_images", 4]

    def pictures(name, *words):
        result = run_here("sample.py", *command, *words, "--out", tmp_path / name, cwd=tiny_run)
        assert result.returncode == 0, result.stderr
        found = sorted(p for p in (tmp_path / name).iterdir() if "grid" not in p.name)
        return [np.asarray(Image.open(p)).astype(int) for p in found], [Image.open(p).text["parameters"] for p in found]

    ends, _ = pictures("plain", "--prompt", "a red bus", "--seed", 5)
    others, _ = pictures("others", "--prompt", "a dog, asleep", "--seed", 5)
    prompts, texts = pictures("prompts", "--prompt", "a red bus", "a dog, asleep", "--interpolate", "--seed", 5)
    seeds, seed_texts = pictures("seeds", "--prompt", "a red bus", "--seed", 5, "--interpolate", 8)
    both, both_texts = pictures("both", "--prompt", "a red bus", "a dog, asleep", "--seed", 5, "--interpolate", 8)
    for found, first, last in ((prompts, ends[0], others[0]), (seeds, ends[0], ends[3]), (both, ends[0], others[3])):
        assert len(found) == 4 and np.abs(found[0] - first).max() <= 1 and np.abs(found[3] - last).max() <= 1
        assert (found[1] != first).any() and (found[2] != last).any()
    assert sorted(p.name for p in (tmp_path / "both").iterdir())[1:] == [
        f"a-red-bus_interpolated{k}.png" for k in range(4)
    ]
    assert [settings_of(text)["Interpolation"] for text in texts] == ["0", "0.333", "0.667", "1"]
    assert {settings_of(t)["To prompt"] for t in texts + both_texts} == {"a dog, asleep"}
    assert {settings_of(t)["To seed"] for t in seed_texts + both_texts} == {"8"} and "To seed" not in texts[0]


@pytest.mark.parametrize("prompts", [["x"], ["x", "y", "z"]])
def test_a_way_needs_two_ends(tiny_run, run_here, prompts):
    result = run_here(*SAMPLE[:1], *SAMPLE[3:5], "--interpolate", "--prompt", *prompts, cwd=tiny_run)
    assert_one_line_error(result, 2, "--interpolate", "two prompts", "another seed")


# ---- Mistakes ----


@pytest.mark.parametrize(
    "argv, word",
    [
        (["--steps", "0"], "--steps"),
        (["--steps", "21"], "1 to 20"),
        (["--seed", "-1"], "--seed"),
        (["--seed", str(2**64)], "--seed"),
        (["--num_images", "0"], "--num_images"),
        (["--num_images", "9" * 20], "--num_images"),
        (["--sampler", "magic"], "--sampler"),
        (["--sampler", "heun"], "choose from ddpm"),
        (["--guidance_scale", "nan"], "--guidance_scale"),
        (["--guidance_scale", "inf"], "--guidance_scale"),
        (["--guidance_interval", "0.5", "0.2"], "--guidance_interval"),
        (["--guidance_interval", "0", "nan"], "--guidance_interval"),
        (["--negative_prompt", "x"], "--negative_prompt"),
        (["--eta", "1"], "--eta"),
        (["--sampler", "ddim", "--eta", "nan"], "--eta"),
        (["--size", "33", "32"], "--size"),
        (["--size", "0", "32"], "--size"),
        (["--start", "fitted"], "--start"),
        (["--strength", "0.5"], "--init_image"),
        (["--mask", "x.png"], "--init_image"),
        (["--init_image", "x.png", "--strength", "1.5"], "--strength"),
        (["--init_image", "x.png", "--strength", "nan"], "--strength"),
        (["--interpolate", "-2"], "--interpolate"),
        (["--interpolate", "7", "--num_images", "1"], "--num_images"),
    ],
)
def test_flags_out_of_range_or_that_do_not_fit_are_refused(tiny_run, argv, word, run_here):
    assert_one_line_error(run_here("sample.py", "--prompt", "x", "--run_dir", "run", *argv, cwd=tiny_run), 2, word)


def test_a_missing_or_mistyped_prompt_is_named(run_here, tmp_path):
    assert_one_line_error(run_here("sample.py", "--promt", "a cat", cwd=tmp_path), 2, "--promt")
    assert_one_line_error(run_here("sample.py", cwd=tmp_path), 2, "--prompt")
    assert_one_line_error(run_here("sample.py", "--prompt", cwd=tmp_path), 2, "--prompt")
    assert_one_line_error(run_here("sample.py", "--export", "", cwd=tmp_path), 2, "--export")


def test_a_run_that_is_not_there_is_answered_by_the_command_that_makes_it(tmp_path, tiny_run, run_here):
    assert_one_line_error(run_here("sample.py", "--prompt", "x", cwd=tmp_path), 1, "train_vae.py", "train_unet.py")
    (tmp_path / "run").mkdir()
    for name in ("config.json", "vae_ckpt_epoch2.pth"):
        shutil.copy(tiny_run / "run" / name, tmp_path / "run")
    assert_one_line_error(run_here("sample.py", "--prompt", "x", "--run_dir", "run", cwd=tmp_path), 1, "train_unet.py")


def test_a_model_that_gives_no_numbers_is_one_line_and_no_picture(tiny_run, tmp_path, run_here, monkeypatch):
    monkeypatch.setattr(script, "sample", lambda *_, seeds, **__: torch.full((len(seeds), 3, 8, 8), torch.nan))
    result = run_here("sample.py", "--prompt", "x", "--run_dir", "run", "--out", tmp_path, cwd=tiny_run)
    assert_one_line_error(result, 1, "unet_ckpt2: ", "not numbers", "--lr")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "prompt, name",
    [
        ("A red_1 car, to/day", "a-red-1-car-to-day"),
        ("\u7ea2\u8272 \u6c7d\u8f66\u3002", "\u7ea2\u8272-\u6c7d\u8f66"),
        ("Caf\u00e9", "caf\u00e9"),
        ("\u0e19\u0e31\u0e48\u0e07", "\u0e19\u0e31\u0e48\u0e07"),  # a Thai letter with its marks
        ("\u2764\ufe0f", "prompt"),
        ("\u7ea2" * 300, "\u7ea2" * 50),
    ],
)
def test_a_file_has_the_letters_of_its_prompt(tmp_path, prompt, name):
    path = script.save_png(str(tmp_path), prompt, "seed0", torch.zeros(3, 8, 8), "")
    assert path == str(tmp_path / f"{name}_seed0.png") and len(path.rsplit("/", 1)[1].encode()) < 200
