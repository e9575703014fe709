"""Promises of app.py: the bits of sample.py in a real browser, visitors apart, one line for each mistake, no traceback.

Skipped where gradio, selenium or Chromium is missing: pip install -r tests/requirements-optional.txt.
"""

import io
import json
import re
import shutil
import socket
import sys
import time
import urllib.request

import numpy as np
import pytest
from conftest import Forked, assert_one_line_error, sign
from PIL import Image

STEPS, SLOW = 20, {"slowly": 0.25, "for ever": 2}  # of the tiny run; seconds more for each step of such prompts


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as s:
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def app(tiny_run, tmp_path_factory):
    """app.py in a process of its own -> it, its address."""
    pytest.importorskip("gradio")
    port = free_port()
    command = ("app.py", "--run_dir", "run", "--port", port)
    app = Forked(tmp_path_factory.mktemp("app"), *command, cwd=tiny_run, inject={"slow_steps": SLOW})
    app.address = f"http://127.0.0.1:{port}"
    until(lambda: app.out.exists() and "open http" in app.out.read_text() or not app.process.is_alive(), 250)
    yield app
    app.process.kill()


@pytest.fixture
def page(app, browser):
    browser.get(app.address)
    yield Page(browser)
    assert "Traceback" not in app.err.read_text() + app.out.read_text()


def until(what, seconds=200):
    """Wait for it to be true -> it."""
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, "too late"
        time.sleep(0.05)
    return found


class Page:
    """What a person does in one tab."""

    def __init__(self, browser):
        self.browser, self.tab = browser, browser.current_window_handle
        until(lambda: self.find("#go"))

    def find(self, selector):
        return self.browser.find_elements("css selector", selector)

    def type(self, field, text):
        (box,) = self.find(f"#{field} :is(input, textarea)")
        box.send_keys("\ue009a\ue000\ue017")  # control-a, delete
        box.send_keys(text)

    def generate(self, **fields):
        self.browser.switch_to.window(self.tab)
        for field, text in fields.items():
            self.type(field, text)
        self.find("#go")[0].click()

    def text(self):
        return self.browser.find_element("tag name", "body").text

    def made(self, count):
        """The pictures of the gallery, as soon as there are so many."""
        self.browser.switch_to.window(self.tab)
        images = until(lambda: len(found := self.find("#gallery .thumbnail-item img")) == count and found)
        return [fetch(image.get_attribute("src")) for image in images]


def fetch(url):
    with urllib.request.urlopen(url) as answer:
        return read(answer.read())


def read(data):
    with Image.open(io.BytesIO(data)) as picture:
        return np.asarray(picture), picture.info["parameters"]


@pytest.fixture
def sampled(tiny_run, tmp_path, run_here):
    """sampled(prompt, flag, ...) -> what sample.py makes: [(pixels, parameters)]."""

    def run(*words):
        out = tmp_path / f"{time.time_ns()}"
        result = run_here("sample.py", "--run_dir", "run", "--out", out, "--prompt", *words, cwd=tiny_run)
        assert result.returncode == 0, result.stderr
        return [read(path.read_bytes()) for path in sorted(out.glob("*_seed*.png"))]

    return run


def assert_same(ours, theirs):
    assert [text for _, text in ours] == [text for _, text in theirs]
    assert all((a == b).all() for (a, _), (b, _) in zip(ours, theirs, strict=True))


# ---- In the browser ----


def test_pictures_have_the_bits_and_the_parameters_of_sample_py(page, sampled):
    page.generate(prompt="a red bus", pictures="3", seed="5")
    expected = sampled("a red bus", "--num_images", 3, "--seed", 5)
    assert_same(page.made(3), expected)
    page.generate(guidance="4.5", negative_prompt="a dog", steps="7", pictures="1")
    until(lambda: "guidance has nothing to compare with" in page.text())  # as the run has no caption_dropout
    guided = sampled("a red bus", "--num_images", 1, "--seed", 5, "--guidance_scale", 4.5, "--steps", 7,
                     "--negative_prompt", "a dog")  # fmt: skip
    assert_same(page.made(4), [*guided, *expected])  # the newest first
    assert (guided[0][0] != expected[0][0]).any()


def test_the_picture_is_seen_on_the_way_beside_the_curves(page):
    page.generate(prompt="a red bus, slowly", pictures="1")
    until(lambda: "no painted scene has 'slowly'" in page.text())
    seen = set()
    until(lambda: seen.update(re.findall(r"step (\d+) of 20", page.text())) or len(seen) > 2)
    assert page.find('img[alt="unet_curves.png"]')
    page.made(1)


def test_the_curves_stand_beside_the_form_and_below_it_on_a_narrow_screen(page, browser):
    def place(selector):
        return page.find(selector)[0].rect

    until(lambda: page.find("#facts img"))
    assert place("#facts")["x"] > place("#picture")["x"] + place("#picture")["width"]
    browser.set_window_size(800, 1500)
    until(lambda: place("#facts")["y"] > place("#gallery")["y"])
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    browser.set_window_size(1400, 1500)


def test_a_mistake_is_one_line_on_the_page(page):
    for field, text, line, right in (
        ("prompt", " ", "prompt: is empty; type what the picture is to show", "a red bus"),
        ("steps", "0", "steps: 0 is out of range; give a whole number from 1 to 1000", "20"),
        ("steps", "21", "steps: 21 is out of range; give 1 to 20", "20"),
        ("steps", "2.5", "steps: 2.5 is out of range", "20"),
        ("pictures", "17", "pictures: 17 is out of range; give a whole number from 1 to 16", "1"),
        ("seed", "-1", "seed: -1 is out of range", "0"),
        ("guidance", "", "guidance_scale: None is of the wrong type; give a float", "1"),
        ("from", "", "guidance_interval: (None, 1", "0"),
        ("negative_prompt", "a dog", "negative_prompt: acts by guidance alone", ""),
    ):
        page.generate(**{field: text})
        until(lambda: line in page.text())  # noqa: B023
        page.type(field, right)
    assert not page.find("#gallery .thumbnail-item img")


def test_two_visitors_do_not_mix(page, browser, sampled, app):
    browser.switch_to.new_window("tab")
    browser.get(app.address)
    other = Page(browser)
    page.generate(prompt="a red bus, slowly", pictures="2")
    other.generate(prompt="a blue house", pictures="2", seed="5")
    assert_same(page.made(2), sampled("a red bus, slowly", "--num_images", 2))
    assert_same(other.made(2), sampled("a blue house", "--num_images", 2, "--seed", 5))
    browser.close()
    browser.switch_to.window(page.tab)


def test_a_page_that_is_closed_ends_its_sampling(page, browser, sampled, app):
    """40 seconds of it were left."""
    browser.switch_to.new_window("tab")
    browser.get(app.address)
    Page(browser).generate(prompt="a red bus, for ever")
    until(lambda: "for ever, step 1" in app.out.read_text())
    browser.close()
    browser.switch_to.window(page.tab)
    page.generate(prompt="a blue house", pictures="1")
    assert_same(page.made(1), sampled("a blue house", "--num_images", 1))
    assert f"for ever, step {STEPS - 1}" not in app.out.read_text()


def test_nothing_is_loaded_from_elsewhere_and_nobody_else_can_reach_it(page, browser, app):
    browser.get("about:blank")  # what the page before has aborted
    browser.get_log("browser")
    browser.get(app.address)
    Page(browser)
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert asked and all(url.startswith((app.address, "data:", "blob:", "file:")) for url in asked)
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    with pytest.raises(OSError):  # another address of this machine
        socket.create_connection(("127.0.0.2", int(app.address.rpartition(":")[2])), 1)


# ---- From the command line ----


@pytest.mark.parametrize("words", [["--port", "70000"], ["--port", "0"], ["--host", "no.such.host.invalid"]])
def test_an_address_that_cannot_be_had_is_one_line(tiny_run, run_here, words):
    assert_one_line_error(run_here("app.py", "--run_dir", "run", *words, cwd=tiny_run), 2, words[0])


def test_a_port_in_use_and_gradio_missing_are_one_line(tiny_run, run_here, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as other:
        result = run_here("app.py", "--run_dir", "run", "--port", other.getsockname()[1], cwd=tiny_run)
        assert_one_line_error(result, 2, "--port", "in use")
    monkeypatch.setitem(sys.modules, "gradio", None)
    result = run_here("app.py", "--run_dir", "run", cwd=tiny_run)
    assert_one_line_error(result, 1, "gradio is not installed", "pip install -r requirements-app.txt")


def test_a_run_that_still_trains_is_shown_with_its_newest_whole_epoch(copy):
    import app as script

    assert script.Run(str(copy / "run")).title.endswith("epoch 2 of 2")
    path = copy / "run/unet_set2.json"
    path.write_text(sign(json.loads(path.read_text()) | {"finished": False}))
    shutil.copy(path, copy / "run/unet_set3_step9.json")
    run = script.Run(str(copy / "run"))
    assert run.name == "unet_ckpt2" and "the newest whole one: its training is not finished" in run.title
