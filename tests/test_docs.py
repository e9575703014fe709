"""Promises of README.md and docs/: they stay short, their links lead somewhere, their files, flags and imports exist.

What it is not: a test of the figures in them.
"""

import ast
import importlib
import re
from dataclasses import fields
from pathlib import Path

import pytest

from config import SDConfig

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OF_OTHERS = {"help", "words", "logdir", "samples_per_plugin"}  # argparse, scenes.py, tensorboard
OF_OTHERS |= {"nproc_per_node", "nnodes", "node_rank", "master_addr"}  # torchrun


def prose(page):
    return re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)


def anchors(page):
    """The names that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 200
    assert len(text.encode()) <= 12_000


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_and_files_exist(page):
    sources = [p.read_text() for folder in (".", "support", "tests") for p in (ROOT / folder).glob("*.py")]
    known = OF_OTHERS | {f.name for f in fields(SDConfig)} | set(re.findall(r'\(\s*"--(\w+)"', "\n".join(sources)))
    text = page.read_text()
    if page.name == "notebook.md":  # it tells of settings that are gone
        text = text.replace(re.search(r"## Settings that are gone.*?(?=\n## )", text, re.DOTALL)[0], "")
        text = text.replace("--normalize_latents", "")
    for flag in set(re.findall(r"(?<![\w-])--(?:no-)?(\w+)", text)):
        assert flag in known, flag
    for file in set(re.findall(r"[`\s]((?:\w+/)*\w+\.py)\b", text)):
        assert (ROOT / file).exists(), file


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_code_imports_what_is_there(page):
    for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, name.name) for name in node.names), ast.unparse(node)
