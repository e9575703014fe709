"""Promises of support/published.py and its two flags: FID and CLIP score, by the real libraries with random weights."""

import json
import math
import os
import shutil
import sys
import types

import numpy as np
import pytest
import torch
from conftest import TINY, assert_one_line_error, flags, rows
from PIL import Image

import evaluate
import metrics
import text_encoder
from support import judges, published
from support.errors import UserError

CPU = torch.device("cpu")
SIDE = 30  # of the pictures that the tiny CLIP looks at


def blobs(count, side=32):
    """Smooth coloured pictures, uint8 (count, 3, side, side)."""
    x = torch.nn.functional.interpolate(torch.rand(count, 3, 4, 4), side, mode="bilinear")
    return (255 * x).byte()


# ---- CLIP score ----


def letters():
    """A tokenizer of CLIP's kind that knows the printable characters of ASCII alone."""
    from transformers import CLIPTokenizer

    characters = [chr(i) for i in range(33, 127)]
    tokens = [*characters, *(f"{c}</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[])


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory):
    """A directory with a tiny CLIP of random weights; the tokenizer is the real one if SD_TEST_DATA has it."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    folder, real = tmp_path_factory.mktemp("clip"), os.path.join(os.environ.get("SD_TEST_DATA", ""), "clip-tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(real) if os.path.isdir(real) else letters()
    tokenizer.save_pretrained(folder)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text, vision = size | ids | {"vocab_size": len(tokenizer)}, size | {"image_size": SIDE, "patch_size": 10}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    for name, p in model.named_parameters():  # large, so that cosines have both signs
        torch.nn.init.normal_(p, std=3.0 if "embedding" in name else 0.3)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def clip(tiny_clip, tmp_path, monkeypatch):
    """A copy of it, whose tokenizer text_encoder.py takes for CLIP's."""
    from tokenizers import Tokenizer

    shutil.copytree(tiny_clip, tmp_path / "clip")
    ids = Tokenizer.from_file(str(tiny_clip / "tokenizer.json")).encode(text_encoder.PROBE_TEXT).ids
    monkeypatch.setattr(text_encoder, "PROBE_IDS", ids)
    return tmp_path / "clip"


def cosines(folder, pictures, prompts, mean, std, resample):
    """(N, N) of all pictures and all prompts: one by one, with Pillow, tokenizers and the model's two towers."""
    from tokenizers import Tokenizer
    from transformers import CLIPModel

    model, tokenizer = CLIPModel.from_pretrained(folder).eval(), Tokenizer.from_file(str(folder / "tokenizer.json"))
    images, texts = [], []
    for picture in pictures:
        small = Image.fromarray(picture.permute(1, 2, 0).numpy()).resize((SIDE, SIDE), resample)
        x = torch.tensor((np.asarray(small) / 255 - mean) / std).permute(2, 0, 1)[None].float()
        images.append(model.visual_projection(model.vision_model(pixel_values=x).pooler_output)[0])
    for prompt in prompts:
        ids = tokenizer.encode(prompt.replace("\ud800", "?")).ids
        ids = ids if len(ids) <= 77 else [*ids[:76], ids[-1]]
        last = model.text_model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
        texts.append(model.text_projection(last))
    a, b = (torch.stack(x).double().detach() for x in (images, texts))
    return (a / a.norm(dim=1, keepdim=True)) @ (b / b.norm(dim=1, keepdim=True)).T


OPENAI = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711], Image.Resampling.BICUBIC)
ANOTHER = ([0.5, 0.4, 0.3], [0.3, 0.2, 0.1], Image.Resampling.NEAREST)


@pytest.mark.parametrize("config", [None, "preprocessor_config.json", "processor_config.json"])
def test_clip_score_is_100_times_the_mean_of_cosines_without_the_negative_ones(clip, config):
    """Without a file that says how, pictures are prepared as for CLIP itself, at the size that the model takes."""
    if config:
        mean, std, resample = ANOTHER
        how = {"image_mean": mean, "image_std": std, "resample": int(resample), "size": SIDE, "crop_size": SIDE}
        how |= {"image_processor_type": "CLIPImageProcessor"}
        (clip / config).write_text(json.dumps(how if config.startswith("pre") else {"image_processor": how}))
    pictures = blobs(published.BATCH + 4, 20)
    prompts = [f"{i} dogs and {i * i} cats" for i in range(len(pictures) - 3)] + ["", "word " * 100, "a \ud800 cat"]
    found = published.load_clip_score(str(clip), CPU)(pictures, None, prompts)
    expected = cosines(clip, pictures, prompts, *(ANOTHER if config else OPENAI))
    own, others = expected.diag(), torch.stack([expected[i, (i + 1) % len(prompts)] for i in range(len(prompts))])
    assert min((own < 0).sum(), (own > 0).sum()) >= 5  # or the test would not see the clamp
    assert own.std() > 0.02  # pictures and prompts differ
    assert found["pictures"] == len(pictures)
    assert found["value"] == pytest.approx(100 * own.clamp(min=0).mean().item(), abs=1e-3)
    assert found["shuffled"] == pytest.approx(100 * others.clamp(min=0).mean().item(), abs=1e-3)


def test_clip_score_with_anothers_prompt_needs_another(clip):
    """Where all prompts are alike it would be the score itself, as if prompts made no difference."""
    measure = published.load_clip_score(str(clip), CPU)
    assert measure(blobs(3), None, ["a cat"] * 3)["shuffled"] is None
    pictures = blobs(3)  # the first picture's neighbour has its own prompt, and does not count
    alone = [measure(x[None], None, [text])["value"] for x, text in zip(pictures[1:], ("3 dogs", "a cat"))]
    found = measure(pictures, None, ["a cat", "a cat", "3 dogs"])["shuffled"]
    assert found == pytest.approx(sum(alone) / 2, abs=1e-3)


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def text_tower_alone(folder):
    from transformers import CLIPConfig, CLIPTextModel

    config = (folder / "config.json").read_text()
    CLIPTextModel(CLIPConfig.from_pretrained(folder).text_config).save_pretrained(folder)
    (folder / "config.json").write_text(config)


def ask_for_code(folder):
    (folder / "evil.py").write_text(f"open({str(folder / 'pwned')!r}, 'w')\nclass Evil: pass\n")
    asked = {"image_processor_type": "Evil", "auto_map": {"AutoImageProcessor": "evil.Evil"}, "size": 8, "crop_size": 8}
    (folder / "preprocessor_config.json").write_text(json.dumps(asked))


DAMAGES = {
    "no directory": (shutil.rmtree, "no such directory"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no file named model.safetensors"),
    "half the weights": (lambda folder: truncate(folder / "model.safetensors"), "incomplete metadata"),
    "the text tower's weights": (text_tower_alone, "weights lack"),
    "no tokenizer": (lambda folder: [path.unlink() for path in folder.glob("token*")], "tokenizer"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "size"),  # transformers takes CLIP's own
    "a damaged preprocessor": (
        lambda folder: (folder / "preprocessor_config.json").write_text("{"),
        "not a valid JSON",
    ),
    "pictures of another size, and code to run": (ask_for_code, "size"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_directory_that_is_no_whole_clip_is_said_in_one_line(clip, damage):
    break_it, said = DAMAGES[damage]
    break_it(clip)
    with pytest.raises(UserError) as e:
        published.load_clip_score(str(clip), CPU)
    message = str(e.value)
    assert message.startswith(f"--clip_score: {clip}: ") and "give --clip_score DIR" in message and said in message
    assert "\n" not in message and len(message) < 600 and not (clip / "pwned").exists()


def test_clip_comes_from_the_hubs_cache_or_it_is_said_that_the_hub_cannot_be_reached(clip, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "*")
    with pytest.raises(UserError, match="--clip_score: openai.*cannot be reached.*; give --clip_score DIR"):
        published.load_clip_score(text_encoder.CLIP_NAME, CPU)
    snapshot = tmp_path / "hub/models--openai--clip-vit-base-patch32/snapshots" / text_encoder.CLIP_REVISION
    shutil.copytree(clip, snapshot)
    pictures, prompts = blobs(3), ["a", "b", "c"]
    found = published.load_clip_score(text_encoder.CLIP_NAME, CPU)(pictures, None, prompts)
    assert found == published.load_clip_score(str(clip), CPU)(pictures, None, prompts)


def test_a_transformers_without_the_class_is_said(clip, monkeypatch):
    import transformers

    old = types.ModuleType("transformers")
    old.AutoTokenizer, old.CLIPTextModel = transformers.AutoTokenizer, transformers.CLIPTextModel
    old.logging, old.CLIPModel = transformers.logging, transformers.CLIPModel
    monkeypatch.setitem(sys.modules, "transformers", old)
    with pytest.raises(UserError, match="--clip_score: .*CLIPImageProcessorPil.*; pip install 'transformers>=5.4'"):
        published.load_clip_score(str(clip), CPU)


# ---- FID ----


@pytest.fixture(scope="session")
def inception(tmp_path_factory):
    """A file of random weights for torch-fidelity's Inception-v3, large enough that features differ."""
    reason = "torch-fidelity is not installed: FID is not tested; pip install torch-fidelity"
    library = pytest.importorskip("torch_fidelity", reason=reason, exc_type=ImportError)
    kind, path = library.FeatureExtractorInceptionV3, tmp_path_factory.mktemp("inception") / "inception.pth"
    with pytest.MonkeyPatch.context() as m:
        m.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *_, **__: {})
        m.setattr(kind, "load_state_dict", lambda *_: None)
        network = kind("inception-v3-compat", ["2048"])
    torch.manual_seed(0)
    for name, p in network.named_parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=math.sqrt(2 / p[0].numel()))
        elif name.endswith("bias"):
            torch.nn.init.normal_(p, std=0.1)
    torch.save(dict(network.state_dict()), path)
    return path


def test_fid_is_the_frechet_distance_of_inceptions_features(inception):
    from torch_fidelity import FeatureExtractorInceptionV3

    pictures, real = blobs(3), blobs(5).flip(2) // 2
    found = published.load_fid(str(inception), CPU)(pictures, real, None)
    network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(inception))
    x, y = (network(pixels)[0] for pixels in (pictures, real[:3]))
    expected = metrics.frechet_distance(x, y)
    assert found == {"value": pytest.approx(expected, abs=1e-4), "pictures": [3, 3]}
    assert expected > 0.1 and x.std(dim=0).max() > 0.01


@pytest.mark.parametrize("count, of_real, used", [(3, 5, 3), (4, 2, 2)])
def test_as_many_real_pictures_as_generated_ones_or_all_there_are(inception, monkeypatch, count, of_real, used):
    def calculate_metrics(input1, input2, **how):
        assert torch.equal(torch.stack(list(input1)), pictures) and torch.equal(torch.stack(list(input2)), real[:used])
        assert how["fid"] and not how["cuda"]
        return {"frechet_inception_distance": 7.0}

    monkeypatch.setattr("torch_fidelity.calculate_metrics", calculate_metrics)
    pictures, real = blobs(count), blobs(of_real)
    assert published.load_fid(str(inception), CPU)(pictures, real, None) == {"value": 7.0, "pictures": [count, used]}


class Evil:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("damage", ["missing", "empty", "text", "half", "another network", "code"])
def test_a_file_that_is_not_inceptions_is_said_in_one_line(inception, tmp_path, damage):
    path, pwned = tmp_path / "inception.pth", tmp_path / "pwned"
    if damage == "half":
        shutil.copyfile(inception, path)
        truncate(path)
    elif damage != "missing":
        path.write_bytes(b"" if damage == "empty" else b"not weights at all")
    if damage == "another network":
        torch.save(torch.nn.Linear(2, 2).state_dict(), path)
    if damage == "code":
        torch.save({"fc.weight": Evil(pwned)}, path)
    with pytest.raises(UserError) as e:
        published.load_fid(str(path), CPU)
    message = str(e.value)
    assert message.startswith(f"--fid: {path}: ") and "give --fid WEIGHTS" in message
    assert "\n" not in message and len(message) < 600 and not pwned.exists()


def test_weights_that_cannot_be_downloaded_or_were_not_wholly_are_said_with_their_folder(
    inception, tmp_path, monkeypatch
):
    name = "weights-inception-2015-12-05-6726825d.pth"
    url = f"http://127.0.0.1:9/{name}"
    monkeypatch.setattr("torch_fidelity.feature_extractor_inceptionv3.URL_INCEPTION_V3", url)
    monkeypatch.setenv("no_proxy", "*")
    before = torch.hub.get_dir()
    torch.hub.set_dir(tmp_path)
    try:
        with pytest.raises(UserError, match=f"--fid: {tmp_path}: .*refused.*give --fid WEIGHTS"):
            published.load_fid("", CPU)
        shutil.copyfile(inception, tmp_path / "checkpoints" / name)
        published.load_fid("", CPU)
        truncate(tmp_path / "checkpoints" / name)
        with pytest.raises(UserError, match=f"--fid: {tmp_path}: .*give --fid WEIGHTS"):
            published.load_fid("", CPU)
    finally:
        torch.hub.set_dir(before)


# ---- The script ----


@pytest.fixture
def run(tiny_run, tmp_path, monkeypatch):
    """A folder with a finished run, and a classifier that knows nothing."""
    shutil.copytree(tiny_run / "run", tmp_path / "run")
    monkeypatch.setattr(judges, "CLASSIFIER_SCENES", 64)
    monkeypatch.setattr(evaluate, "REAL_SCENES", 8)
    return tmp_path


QUICK = ("evaluate.py", "--run_dir", "run", "--num_prompts", 2, "--steps", 2)


def test_both_measures_are_added_to_figures_that_stay_as_they_are(run, inception, clip, run_here):
    assert run_here(*QUICK, cwd=run).returncode == 0
    without = json.loads((run / "run/evaluation.json").read_text())
    result = run_here(*QUICK, "--fid", inception, "--clip_score", clip, cwd=run)
    assert result.returncode == 0, result.stderr
    figures = json.loads((run / "run/evaluation.json").read_text())
    fid, clip_score = figures.pop("fid"), figures.pop("clip_score")
    assert figures == without
    assert fid["pictures"] == [2, 2] and fid["value"] > 0
    assert clip_score["pictures"] == 2 and 0 <= clip_score["value"] <= 100
    assert f"{'FID, n = 2 and 2 real':34}{fid['value']:>10.4g}   lower with more pictures" in result.stdout
    assert f"{'CLIP score, n = 2':34}{clip_score['value']:>10.2f}   with another's prompt" in result.stdout


@pytest.mark.parametrize("failure", ["an error", "no number"])
def test_what_fails_after_all_loses_nothing_else(run, inception, clip, run_here, monkeypatch, failure):
    def calculate_metrics(**_):
        if failure == "an error":
            raise ValueError("nothing to be done")
        return {"frechet_inception_distance": math.nan}

    monkeypatch.setattr("torch_fidelity.calculate_metrics", calculate_metrics)
    result = run_here(*QUICK, "--fid", inception, "--clip_score", clip, cwd=run)
    said = "nothing to be done" if failure == "an error" else "not numbers"
    assert_one_line_error(result, 1, "--fid", said, "run/evaluation.json")
    figures = json.loads((run / "run/evaluation.json").read_text())
    assert "fid" not in figures and figures["clip_score"]["pictures"] == 2
    assert "CLIP score, n = 2" in result.stdout and "FID" not in result.stdout


MISSING = {
    "package": (["--fid"], ["--fid", "pip install 'torch-fidelity'"]),
    "weights": (["--fid", "nowhere.pth"], ["--fid: nowhere.pth", "give --fid WEIGHTS"]),
    "directory": (["--clip_score", "nowhere"], ["--clip_score: nowhere", "no such directory"]),
}


@pytest.mark.parametrize("missing", MISSING)
def test_what_is_missing_is_said_before_anything_is_measured(run, missing, run_here, monkeypatch):
    argv, words = MISSING[missing]
    if missing == "package":
        monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    elif missing == "weights":
        pytest.importorskip("torch_fidelity", reason="torch-fidelity is not installed", exc_type=ImportError)
    before = sorted(p.name for p in (run / "run").iterdir())
    for module, name in ((evaluate, "generate"), (evaluate, "encode"), (judges, "scene_classifier")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("measured already"))
    assert_one_line_error(run_here(*QUICK, *argv, cwd=run), 1, *words)
    assert before == sorted(p.name for p in (run / "run").iterdir())


def test_one_real_picture_is_too_few_for_fid(run, inception, run_here, monkeypatch):
    monkeypatch.setattr(judges, "scene_classifier", lambda *_: None)
    monkeypatch.setattr(evaluate, "paint_scenes", lambda *_: torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    monkeypatch.setattr(evaluate, "generate", lambda *_: pytest.fail("generated already"))
    assert_one_line_error(run_here(*QUICK, "--fid", inception, cwd=run), 1, "--fid", "one held-out picture")


# ---- LPIPS ----


class StandIn(torch.nn.Module):
    """In place of lpips.LPIPS, whose weights cannot be had here: a distance (B, 1, 1, 1) with a parameter, as there."""

    def __init__(self, net, verbose):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((), 3.0))

    def forward(self, x_hat, x):
        if x.shape[-1] < 32:
            raise RuntimeError("Output size is too small. Sides")
        return self.weight * (x_hat - x).abs().mean(dim=(1, 2, 3), keepdim=True)


@pytest.fixture
def lpips(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=StandIn))


def test_lpips_is_added_to_the_loss(lpips, tmp_path, run_here):
    """A distance of 3 x mean |x_hat - x| is l1_weight times 3, to rounding; and a refusal comes before training."""
    losses = []
    for run, words in {"l1": ["--l1_weight", 0.6], "lpips": ["--lpips_weight", 0.2]}.items():
        command = ["--preset", "demo", "--run_dir", run, *flags(TINY), *words]
        assert run_here("train_vae.py", *command, cwd=tmp_path).returncode == 0
        losses.append([float(row["loss"]) for row in rows(tmp_path / run / "vae_train.csv")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    small = ["--preset", "demo", "--run_dir", "small", *flags(TINY | {"image_size": 16}), "--lpips_weight", 0.2]
    assert_one_line_error(run_here("train_vae.py", *small, cwd=tmp_path), 1, "--lpips_weight", "too small")


def test_lpips_that_is_not_there_is_one_line(monkeypatch, tmp_path, run_here):
    monkeypatch.setitem(sys.modules, "lpips", None)
    command = ["--preset", "demo", "--run_dir", "run", *flags(TINY), "--lpips_weight", 0.2]
    assert_one_line_error(run_here("train_vae.py", *command, cwd=tmp_path), 1, "--lpips_weight", "pip install 'lpips'")
    assert not list(tmp_path.glob("run/vae_*"))
