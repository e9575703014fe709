"""Promises of support/judges.py: the judge of words reads what pictures show and says what it cannot read; judges are trained once."""

import json
import os
from dataclasses import replace

import pytest
import torch
from conftest import TINY, flags
from PIL import Image

import evaluate
from support import judges
from text_encoder import WordHashTextEncoder, words_of

COLOURS = ("red", "green", "blue")


def painted(count):
    """Pictures of three colours; captions say the colour, and a day that no picture shows."""
    generator = torch.Generator().manual_seed(0)
    colour, day = torch.randint(3, (2, count), generator=generator)
    pixels = 60 * torch.rand(count, 3, 16, 16, generator=generator)
    pixels[torch.arange(count), colour] += 150
    days = ("monday", "tuesday", "sunday")
    captions = [
        [f"a {COLOURS[c]} thing", f"{days[d]}, all {COLOURS[c]}"] for c, d in zip(colour.tolist(), day.tolist())
    ]
    return pixels.byte(), captions


@pytest.fixture(scope="module")
def judge():
    """pixels, captions, and what word_judge() makes of them, learned in a few steps."""
    pixels, captions = painted(200)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("STEPS", 60), ("BATCH", 16), ("LEAST_PICTURES", 4)):
            patch.setattr(judges, name, value)
        made = judges.word_judge(pixels, captions, words_of, lambda x: x, {}, "", torch.device("cpu"))
    return pixels, captions, *made


def test_frequent_words_are_neither_rare_nor_in_most_captions():
    captions = [["a dog", "the Dog runs"]] * 60 + [["a cat"]] * 60 + [["a cow"]] * 30
    assert judges.frequent_words(captions, words_of) == ["cat", "dog", "runs", "the"]  # "a" is in all, "cow" in few


def test_labels_are_shares_of_a_pictures_captions():
    labels = judges.label([["a dog", "dog dog"], ["a cat", "nothing"]], ["dog", "cat"], words_of)
    assert labels.tolist() == [[1.0, 0.0], [0.0, 0.5]]


def test_the_judge_keeps_the_words_that_it_reads_and_no_others(judge):
    pixels, captions, judge, words, why = judge
    assert {*words} >= {*COLOURS} and not why
    assert not {*words} & {"monday", "tuesday", "sunday"}
    scores = judges.read_words(judge, [judges.to_float(pixels, "cpu")])[:, words["red"]]
    red = torch.tensor(["red" in several[0] for several in captions])
    assert scores[red].mean() > scores[~red].mean()


def test_a_judge_is_trained_once_and_a_damaged_file_is_made_again(tmp_path):
    made, folder, device = [], str(tmp_path), torch.device("cpu")

    def train():
        made.append(judges.WordJudge(3))
        made[-1](torch.randn(4, 3, 64, 64))  # its statistics, and a count of batches
        made[-1].readable[1] = True
        return made[-1]

    def kept(key):
        return judges.kept(judges.WordJudge(3).to(device), folder, "judge", {"run": key}, train)

    for judge in (kept(1), kept(1)):
        theirs = judge.state_dict()
        assert len(made) == 1 and not judge.training
        for name, value in made[0].state_dict().items():
            assert torch.equal(value, theirs[name]) and value.dtype == theirs[name].dtype, name
    (file,) = [path for path in tmp_path.glob("judge-*") if not path.suffix]
    content = bytearray(file.read_bytes())
    content[-40] ^= 1
    file.write_bytes(content)
    kept(1)
    assert len(made) == 2
    kept(2)  # of another run
    assert len(made) == 3
    judges.kept(judges.WordJudge(3), "", "judge", {"run": 2}, train)  # not kept
    assert len(made) == 4


def test_text_encoders_split_captions():
    assert WordHashTextEncoder(8, 4).split("A red, red dog") == ["a", "red", "red", "dog"]


@pytest.fixture
def photographs(tmp_path):
    def make(captions):
        images = tmp_path / "mine" / "images"
        images.mkdir(parents=True)
        for i, caption in enumerate(captions):
            Image.new("RGB", (32, 32), (5 * i % 256, 40, 90)).save(images / f"p{i}.png")
            (images / f"p{i}.txt").write_text(caption, encoding="utf-8")

    return make


@pytest.mark.parametrize(
    "captions, why",
    [
        (["a dog"] * 14, "no word is said of"),
        ([f"word{i}" for i in range(14)], "no word is said of"),
        ([f"一只狗在草地上{i}" for i in range(14)], "no word is said of"),
    ],
    ids=["all alike", "all others", "Chinese"],
)
def test_what_cannot_be_heard_is_said(captions, why, photographs, run_here, tmp_path):
    photographs(captions)
    settings = TINY | {
        "dataset": "folder",
        "data_root": "mine",
        "max_images": 12,
        "held_out_images": 2,
        "num_epochs": 1,
    }
    words = ["--preset", "demo", "--run_dir", "run", *flags(settings)]
    for script in ("train_vae.py", "train_unet.py"):
        assert run_here(script, *words, cwd=tmp_path).returncode == 0
    result = run_here("evaluate.py", "--run_dir", "run", "--num_prompts", 4, "--steps", 2, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert found["words"]["words"] == 0 and why in found["words"]["why"]
    assert found["distances"] == {}  # there is no judge to take features from
    assert "words heard" in result.stdout and why in result.stdout
    assert (
        found["captions"]["shuffled"] is None and "no two held-out captions differ" in result.stdout
    )  # one is held out
    assert found["memorisation"]["nearer"] is None and "nearer than" not in result.stdout


def test_words_heard_are_of_words_that_enough_prompts_say(judge):
    pixels, captions, judge, words, why = judge
    prompts = [several[0] for several in captions[:40]]
    sets = {"generated": pixels[40:80], "reconstructed": pixels[:40], "real": pixels[:40]}
    figures = evaluate.words_heard(judge, words, why, prompts, sets, words_of, torch.device("cpu"))
    assert figures["words"] == 3 and figures["real"] > 0.9  # the colours
    assert abs(figures["generated"] - 0.5) < 0.35  # pictures of other captions: nothing is heard but by chance
    few = evaluate.words_heard(judge, words, why, prompts[:4], sets, words_of, torch.device("cpu"))
    assert few["words"] == 0 and "prompts" in few["why"]
    sets["real"] = pixels[:1].expand(40, -1, -1, -1)  # one held-out picture with several captions
    one = evaluate.words_heard(judge, words, why, prompts, sets, words_of, torch.device("cpu"))
    assert one["words"] == 0 and "alike" in one["why"]


def test_scenes_have_a_classifier_that_is_kept(monkeypatch, tmp_path, tiny):
    monkeypatch.setattr(judges, "CLASSIFIER_SCENES", 64)
    cfg = replace(tiny, cache_dir=str(tmp_path))
    first = judges.scene_classifier(cfg, torch.device("cpu"))
    monkeypatch.setattr(judges, "paint_scenes", None)  # training would fail now
    second = judges.scene_classifier(cfg, torch.device("cpu"))
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(first(x)[0], second(x)[0])
    assert any(name.startswith("classifier-") for name in os.listdir(tmp_path))
