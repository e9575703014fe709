"""Promises of tests/gpu: flags that exist, and one run that fails costs no other. Nothing is trained here."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT

import evaluate
import sample
from support import flags


@pytest.fixture
def started(monkeypatch):
    """The command lines that a script starts, each parsed by the script that it names; `bad` of them fail."""
    monkeypatch.syspath_prepend(str(ROOT / "tests/gpu"))
    commands, bad = [], []

    def start(command, stdout=None, **_):
        script, *words = command[command.index("-u") + 1 :] if "-u" in command else command[1:]
        run, stage = Path(words[words.index("--run_dir") + 1]), Path(script).stem.removeprefix("train_")
        with monkeypatch.context() as patched:
            patched.setattr(sys, "argv", [script, *words])
            if stage in ("vae", "unet"):
                flags.parse_training_args("", stage, words)
            else:
                {"evaluate": evaluate, "sample": sample}[stage].parse_args()
        stdout.write(f"{stage} was here")
        stdout.flush()
        (run / "evaluation.json").write_text("{}")
        (run / f"{stage}_set1_step1.json").write_text("{}")
        commands.append((run.name, stage))
        return SimpleNamespace(wait=lambda: (run.name, stage) in bad, poll=lambda: None, kill=lambda: None)

    def run(command, **_):
        start([sys.executable, ROOT / "train_vae.py", *command[3:]], stdout=sys.stdout)
        return SimpleNamespace(stdout="1\n")

    def call(module, *words):
        module = importlib.import_module(module)
        monkeypatch.setattr(subprocess, "Popen", start)
        monkeypatch.setattr(subprocess, "run", run)
        monkeypatch.setattr(sys, "argv", ["script", *map(str, words)])
        return module

    return SimpleNamespace(call=call, commands=commands, bad=bad)


@pytest.mark.parametrize("small", [(), ("--small",)])
def test_photographs_goes_on_without_a_run_that_fails(small, started, tmp_path, monkeypatch, capsys):
    shown = []
    photographs = started.call("photographs", tmp_path, tmp_path / "out", *small)
    monkeypatch.setattr(photographs, "show_prompts", lambda args, runs: shown.append(runs))
    started.bad += [("lr 2e-3", "unet"), ("best, guidance 2", "evaluate")]
    photographs.main()
    table = json.loads((tmp_path / "out/table.json").read_text())
    assert [*table] == ["best", "best, guidance 1", "best, guidance 3.2", "recipe"] and shown == [["best", "recipe"]]
    assert capsys.readouterr().out.count("FAILED") == 2 and ("lr 2e-3", "sample") not in started.commands


def test_photographs_ends_where_nothing_has_been_trained(started, tmp_path):
    started.bad.append(("vae", "vae"))
    with pytest.raises(SystemExit, match="nothing is left"):
        started.call("photographs", tmp_path, tmp_path / "out").main()


@pytest.mark.parametrize("small", [(), ("--small",)])
def test_sharp_asks_for_what_there_is(small, started, tmp_path):
    started.call("sharp", tmp_path, tmp_path / "out", *small).main()
    assert [stage for _, stage in started.commands] == ["vae", "vae", "unet", "evaluate", "evaluate"]


@pytest.mark.parametrize("small", [(), ("--small",)])
def test_first_minutes_asks_for_what_there_is(small, started, tmp_path, monkeypatch):
    first_minutes, timed = started.call("first_minutes", tmp_path, tmp_path / "out", *small), []
    for name in ("nothing prepared", "prepared pictures", "compiled, cold cache", "compiled, warm cache", "whole"):
        (tmp_path / "out" / name).mkdir(parents=True)
    monkeypatch.setattr(first_minutes, "time_steps", lambda kind, args, words, *_: timed.append((kind, words)))
    first_minutes.main()
    assert len(started.commands) == 5 and [kind for kind, _ in timed] == ["vae", "unet"]
    for kind, words in timed:
        flags.parse_training_args("", kind, list(map(str, [*words, "--compile"])))
