"""Promises of support/show.py: grids, tables, curves, and progress that is readable in a file."""

import contextlib
import io
import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from support import show


@pytest.mark.parametrize("count, columns", [(1, 1), (1, 4), (4, 2), (5, 2), (3, 8), (7, 7)])
@pytest.mark.parametrize("size", [(6, 6), (4, 9)])
def test_a_grid_is_torchvisions(count, columns, size):
    """Where torchvision is installed; pixel by pixel everywhere."""
    images, border = torch.rand(count, 3, *size), 0 if count == 1 else 2
    grid, width = show.make_grid(images, columns), min(columns, count)
    expected = torch.zeros(3, *(border + n * (side + border) for n, side in zip((-(-count // width), width), size)))
    for i, c, y, x in itertools.product(range(count), range(3), *map(range, size)):
        place = (border + (i // width) * (size[0] + border) + y, border + (i % width) * (size[1] + border) + x)
        expected[c, *place] = images[i, c, y, x]
    assert torch.equal(grid, expected)
    with contextlib.suppress(ImportError):
        from torchvision.utils import make_grid

        assert torch.equal(grid, make_grid(images, columns))


def test_a_grid_has_rows_of_pictures_in_black_borders():
    images = torch.arange(1, 6).view(5, 1, 1, 1).expand(5, 3, 2, 3) / 10
    grid = show.make_grid(images, 2, border=1)
    assert grid.shape == (3, 3 * 2 + 4, 2 * 3 + 3)
    places = {(row, column): grid[0, 1 + 3 * row, 1 + 4 * column].item() for row in range(3) for column in range(2)}
    assert list(places.values()) == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.0])
    assert grid.sum().item() == pytest.approx(3 * 6 * 1.5)  # the borders add nothing
    assert torch.equal(show.make_grid(images[:1], 4), images[0])  # a single picture has no border


def test_a_png_has_the_pixels_rounded_to_the_nearest(tmp_path):
    x = torch.tensor([-1.0, 0.0, 0.4 / 255, 0.6 / 255, 1.0, 2.0]).view(1, 2, 3).expand(3, 2, 3)
    with Image.open(io.BytesIO(show.png_bytes(x))) as picture:
        assert [picture.getpixel((i % 3, i // 3)) for i in range(6)] == [(v,) * 3 for v in (0, 0, 0, 1, 255, 255)]
    show.save_grid(str(tmp_path / "grid.png"), torch.rand(3, 3, 4, 4), columns=2)
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.size == (14, 14)
    assert [p.name for p in tmp_path.iterdir()] == ["grid.png"]


def test_a_table_has_one_header_and_can_be_read(tmp_path):
    path = str(tmp_path / "x.csv")
    for row in ({"step": 1, "loss": 1 / 3}, {"step": 20, "loss": 2.5e-9}):
        show.append_csv(path, row)
    assert open(path, newline="").read() == "step,loss\r\n1,0.333333\r\n20,2.5e-09\r\n"
    assert show.read_csv(path) == {"step": [1.0, 20.0], "loss": [0.333333, 2.5e-9]}
    with pytest.raises(OSError, match=r"nowhere/x\.csv"):
        show.append_csv(str(tmp_path / "nowhere/x.csv"), {"step": 1})


def test_curves_are_drawn_side_by_side_and_the_same_twice(tmp_path):
    panels = {"a": {"x": ([1, 2], [3.0, 4.0]), "y": (range(50), range(50))}, "b": {"z": ([1], [1.0])}}
    for name in ("one", "two"):
        show.plot_curves(str(tmp_path / f"{name}.png"), panels)
    one, two = ((tmp_path / f"{name}.png").read_bytes() for name in ("one", "two"))
    with Image.open(io.BytesIO(one)) as picture:
        assert picture.size == (1000, 350)
    assert one == two and len(list(tmp_path.iterdir())) == 2


def test_progress_is_plain_lines_where_there_is_no_terminal(capsys, monkeypatch):
    clock = iter([0.0, 1.0, 12.0, 13.0])
    monkeypatch.setattr(show.time, "monotonic", lambda: next(clock))
    progress = show.Progress(6, "read", done=3)
    for _ in range(3):
        progress.update()
    progress.say("hello")
    progress.close()
    lines = ["read: 5/6, 0.2/s, 6 s left", "read: 6/6, 0.2/s, 0 s left", "hello"]
    assert capsys.readouterr().out.splitlines() == lines


def test_progress_of_unknown_length_and_of_nothing(capsys):
    progress = show.Progress(None, "search", seconds_between_lines=-1)
    progress.update(2)
    assert capsys.readouterr().out.startswith("search: 2/?, ")
    show.progress_bar("read")(0, 0).close()
    assert not capsys.readouterr().out


def test_an_animation_keeps_pixels_and_shows_its_last_frame_longest():
    frames = torch.rand(3, 3, 10, 14)
    with Image.open(io.BytesIO(show.webp_bytes(frames))) as movie:
        assert (movie.n_frames, movie.info["loop"]) == (3, 0)
        times = []
        for i, frame in enumerate(frames):
            movie.seek(i)
            movie.load()
            times.append(movie.info["duration"])
            assert np.array_equal(np.asarray(movie.convert("RGB")), np.asarray(show.to_pil(frame)))
    assert times[0] == times[1] < times[2]
    with Image.open(io.BytesIO(show.webp_bytes(frames[:1]))) as still:  # of a single step
        assert np.array_equal(np.asarray(still.convert("RGB")), np.asarray(show.to_pil(frames[0])))
