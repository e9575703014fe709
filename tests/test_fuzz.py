"""Two hundred mutations each of checkpoint, picture, captions file and arguments: no traceback, no hang, no stray file.

Every mutation follows from a seed. A mutation may be harmless; what is promised is a clean answer, and that a changed
checkpoint is never used.
"""

import json
import random
import shutil

import pytest
from conftest import SAMPLE, SMALL, files, flags, forge, no_hang
from test_faults import COCO, GOOD, MINE, coco, my_folder, photo

MUTATIONS = 200


def mutate(data, dice):
    """One to four edits of bytes: a flip, a cut, a repeat, a number at its limit, noise."""
    data = bytearray(data)
    for _ in range(dice.randint(1, 4)):
        i = dice.randrange(len(data)) if data else 0
        j = min(len(data), i + dice.choice((1, 4, 64, 1000)))
        how = dice.choice(("flip", "cut", "drop", "repeat", "limit", "noise"))
        if how == "flip" and data:
            data[i] ^= 1 << dice.randrange(8)
        elif how == "cut":
            del data[i:]
        elif how == "drop":
            del data[i:j]
        elif how == "repeat":
            data[i:i] = data[i:j] * dice.choice((1, 50))
        elif how == "limit":
            data[i:j] = dice.choice((b"\0", b"\xff", b"9", b"-", b'"', b"{", b"null")) * (j - i)
        else:
            data[i:j] = dice.randbytes(j - i)
    return bytes(data)


def assert_clean(result):
    """Done, or refused in one line; run_here lets every exception that is not a user's through, which fails the test."""
    assert result.returncode in (0, 1, 2)
    assert "Traceback" not in result.stdout + result.stderr
    if result.returncode:
        last = result.stderr.strip().splitlines()[-1]
        assert last.startswith("error: ") and last.isprintable() and len(last) < 2000, last


def test_checkpoints(tiny_run, tmp_path, run_here):
    """Each file that sample.py opens, damaged; half of them so that the manifest vouches for the damage."""
    dice, shown = random.Random(1), 0
    shutil.copytree(tiny_run / "run", tmp_path / "run", ignore=shutil.ignore_patterns("samples"))
    good = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    for _ in range(MUTATIONS):
        name = dice.choice(("unet_ckpt2.pth", "t_ember_ckpt2.pth", "vae_ckpt_epoch2.pth", "unet_set2.json"))
        bad = mutate(good[name], dice)
        signed = name.endswith(".pth") and dice.random() < 0.5
        if signed:
            forge(tmp_path / "run", "unet", "2", name, bad)
        else:
            (tmp_path / "run" / name).write_bytes(bad)
        with no_hang():
            result = run_here(*SAMPLE, cwd=tmp_path)
        assert_clean(result)
        assert signed or result.returncode == 1 or says_the_same(name, bad, good[name]), f"a changed {name} was used"
        shown += result.returncode
        shutil.rmtree(tmp_path / "run/samples", ignore_errors=True)
        assert {p.name for p in tmp_path.iterdir()} == {"run"}
        assert {p.name for p in (tmp_path / "run").iterdir()} == set(good)
        for file in (name, "unet_set2.json"):
            (tmp_path / "run" / file).write_bytes(good[file])
    assert shown > MUTATIONS / 2
    assert run_here(*SAMPLE, cwd=tmp_path).returncode == 0  # the twin without a mutation


def says_the_same(name, bad, good):
    """A byte less can leave a manifest the same: a blank between two values."""
    return bad == good or name.endswith(".json") and json.loads(bad) == json.loads(good)


def test_pictures(tmp_path, run_here, monkeypatch):
    dice = random.Random(2)
    kinds = [photo(format=f) for f in ("JPEG", "PNG", "WEBP")] + [photo("P"), photo("LA"), photo("CMYK", format="JPEG")]
    outcomes = set()
    my_folder(tmp_path, {f"good{i}.png": photo() for i in range(11)} | {"bad.jpg": b""})
    for _ in range(MUTATIONS):
        (tmp_path / "mine/images/bad.jpg").write_bytes(mutate(dice.choice(kinds), dice))
        before = files(tmp_path / "mine")
        with no_hang():
            result = run_here("get_data.py", "verify", "--dataset", "folder", "--data_root", "mine", cwd=tmp_path)
        assert_clean(result)
        outcomes.add(result.returncode)
        assert files(tmp_path / "mine") == before and [p.name for p in tmp_path.iterdir()] == ["mine"]
    assert outcomes == {0, 1}
    # what verify passes, training reads: the last one, and twins of both kinds
    (tmp_path / "mine/images/bad.jpg").write_bytes(photo(format="JPEG"))
    assert run_here("train_vae.py", *MINE, "--max_steps", 1, cwd=tmp_path).returncode == 0


def test_captions(tmp_path, run_here):
    dice = random.Random(3)
    good = json.dumps(GOOD).encode()
    coco(tmp_path, GOOD)
    outcomes = set()
    for i in range(MUTATIONS):
        coco(tmp_path, mutate(good, dice) if dice.random() < 0.5 else json.dumps(mangle(GOOD, dice)).encode())
        with no_hang():
            result = run_here("get_data.py", "verify", "--data_root", "coco", cwd=tmp_path)
            assert_clean(result)
            if i % 20 == 0:
                assert_clean(run_here("train_vae.py", *COCO, "--overwrite", "--max_steps", 1, cwd=tmp_path))
        outcomes.add(result.returncode)
        assert {p.name for p in tmp_path.iterdir()} <= {"coco", "run"}
    assert outcomes == {0, 1}


def mangle(value, dice):
    """The same JSON with one value somewhere replaced by an odd one."""
    strings = "", "\ud800", "../../x", "/etc/passwd", "\0", "x" * 5000, "\x1b[2J"
    odd = *strings, None, -1, 2**70, 1e308, [], {}, [[]], True
    if dice.random() < 0.15 or not isinstance(value, dict | list) or not value:
        return dice.choice(odd)
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key = dice.choice(list(keys))
    copied = dict(value) if isinstance(value, dict) else list(value)
    copied[key] = mangle(value[key], dice)
    return copied


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "images/good3.txt"])
def test_captions_of_ones_own(tmp_path, run_here, name):
    """A damaged listing or text is refused in one line or read; no name in it leads anywhere else."""
    dice, outcomes = random.Random(5), set()
    my_folder(tmp_path, {f"good{i}.png": photo() for i in range(11)})
    pairs = [(f"images/good{i}.png", f"a picture, number {i}") for i in range(11)]
    content = {
        "metadata.jsonl": "".join(json.dumps({"file_name": n, "text": t}) + "\n" for n, t in pairs),
        "metadata.csv": "file_name,text\n" + "".join(f'{n},"{t}"\n' for n, t in pairs),
        "images/good3.txt": "a picture\nthe same, again\n",
    }[name]
    for _ in range(MUTATIONS // 2):
        (tmp_path / "mine" / name).write_bytes(mutate(content.encode(), dice))
        before = files(tmp_path)
        with no_hang():
            result = run_here("get_data.py", "verify", "--dataset", "folder", "--data_root", "mine", cwd=tmp_path)
        assert_clean(result)
        outcomes.add(result.returncode)
        assert files(tmp_path) == before
    assert outcomes == {0, 1}


def test_arguments(tiny_run, tmp_path, run_here):
    """Flags with values that a slip of the hand or a script gives them."""
    dice = random.Random(4)
    odd = ["-1", "0", "1", "1e400", "nan", "inf", "-inf", "1.5", "x", "../..", "None", "--", "[]", "1,2"]
    odd += ["", " ", "9" * 400, "\udcff", "\x1b[31m", "\u0663"]
    trainer = [
        "--lr",
        "--batch_size",
        "--num_epochs",
        "--seed",
        "--image_size",
        "--block_out_channels",
        "--beta",
        "--beta_start",
        "--text_encoder",
        "--num_heads",
        "--dataset",
        "--preset",
        "--captions_json",
        "--save_minutes",
        "--lr_schedule",
        "--sample_prompts",
        "--ema_decay",
        "--nonsense",
        "--norm_num_groups",
        "--time_dim",
    ]
    sampler = [
        "--steps",
        "--seed",
        "--num_images",
        "--sampler",
        "--prompt",
        "--run_dir",
        "--text_encoder",
        "--ema",
        "--nonsense",
    ]
    shutil.copytree(tiny_run / "run", tmp_path / "run", ignore=shutil.ignore_patterns("samples"))
    codes = set()
    for i in range(MUTATIONS):
        flag_names = sampler if i % 2 else trainer
        extra = [w for _ in range(dice.randint(1, 3)) for w in (dice.choice(flag_names), dice.choice(odd))]
        script = dice.choice(("train_vae.py", "train_unet.py"))
        train = (script, "--preset", "demo", "--run_dir", "new", *flags(SMALL), "--max_steps", 1)
        with no_hang():
            result = run_here(*(SAMPLE if i % 2 else train), *extra, cwd=tmp_path)
        assert_clean(result)
        codes.add(result.returncode)
        assert {p.name for p in tmp_path.iterdir()} <= {"run", "new"}, extra
        shutil.rmtree(tmp_path / "new", ignore_errors=True)
    assert codes >= {0, 2}


@pytest.mark.parametrize("seed", range(3))
def test_the_mutations_mutate(seed):
    data = bytes(range(256)) * 40
    assert sum(mutate(data, random.Random(i + 1000 * seed)) != data for i in range(100)) > 90
