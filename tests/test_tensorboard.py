"""Promises of --tensorboard: each step once however a run was killed, grids with their pixels, one line if it is missing."""

import signal
import sys

import numpy as np
import pytest
from conftest import SMALL, assert_one_line_error, command, rows
from PIL import Image

WANTED = SMALL | {"tensorboard": True, "save_minutes": 60}


@pytest.mark.parametrize("kind, grid", [("vae", "pictures"), ("unet", "samples")])
def test_a_killed_run_that_goes_on_has_each_step_once(tmp_path, fork, run_here, kind, grid):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    if kind == "unet":
        assert fork(*command("vae"), cwd=tmp_path).wait().returncode == 0
    killed = fork(*command(kind, WANTED), cwd=tmp_path, inject={"log_every": 1, "signal_at_step": (signal.SIGKILL, 6)})
    assert killed.wait().returncode == -signal.SIGKILL
    folder = tmp_path / f"run/tensorboard/{kind}"
    assert len(list(folder.iterdir())) == 1
    result = fork(*command(kind, WANTED), cwd=tmp_path, inject={"log_every": 1}).wait()
    assert result.returncode == 0 and "resumed after step 3" in result.stdout, result.stderr
    found = event_accumulator.EventAccumulator(str(folder)).Reload()
    for name, steps in (("train", [1, 2, 3, 4, 5, 6]), ("held_out", [3, 6])):
        table = rows(tmp_path / f"run/{kind}_{name}.csv")
        for figure in [figure for figure, value in table[0].items() if value and figure not in ("step", "epoch")]:
            events = found.Scalars(f"{name}/{figure}")
            assert [event.step for event in events] == steps, figure
            assert [event.value for event in events] == pytest.approx([float(row[figure]) for row in table], 1e-5)
    images = found.Images(grid)
    assert [image.step for image in images] == [3, 6]
    for epoch, image in enumerate(images, 1):
        (tmp_path / "x.png").write_bytes(image.encoded_image_string)
        ours, theirs = (
            np.asarray(Image.open(p)) for p in (tmp_path / f"run/{kind}_{grid}_epoch{epoch}.png", tmp_path / "x.png")
        )
        assert (ours == theirs).all()


def test_without_it_one_line_says_how_to_get_it_before_anything_is_trained(tmp_path, run_here, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    result = run_here(*command("vae", WANTED), cwd=tmp_path)
    assert_one_line_error(result, 1, "--tensorboard", "pip install tensorboard")
    assert not list(tmp_path.glob("run/*.json"))


def test_it_may_come_and_go_while_a_run_goes_on_and_changes_no_weights(tmp_path, run_here):
    pytest.importorskip("tensorboard")
    for i, wanted in enumerate((True, False, True)):
        result = run_here(*command("vae", WANTED | {"tensorboard": wanted, "num_epochs": i + 1}), cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    assert len(list(tmp_path.glob("run/tensorboard/vae/*"))) == 2


def test_a_full_disk_is_one_line(tmp_path, run_here, monkeypatch):
    tensorboard = pytest.importorskip("support.tensorboard")
    pytest.importorskip("tensorboard")
    board = tensorboard.Board(str(tmp_path))
    board.start(0)
    board.file = open("/dev/full", "wb")
    with pytest.raises(OSError, match="events.out.tfevents"):
        board.log("train", {"step": 1, "loss": 1.0})
    board.file = None
