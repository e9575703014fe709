"""Prints docs/settings.md, made from the fields of SDConfig: python tests/settings_page.py > docs/settings.md.

What it is not: a place for words about a setting; those are its help in config.py.
"""

import re
import sys
from dataclasses import fields
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if "conftest" not in sys.modules:  # which may have named a copy of the project
    sys.path.insert(0, str(ROOT))

from config import FINETUNING_PRESETS, LARGEST, PRESETS, VAE_PRESETS, SDConfig, kind_of  # noqa: E402

HEAD = """# Settings

Every field of `SDConfig` in `config.py` is a flag of both trainers: `--batch_size 16`. A setting that is on or off is
`--skip_bad` or `--no-skip_bad`; one with several values takes them in a row: `--block_out_channels 32 64`. The defaults
are those of preset `coco`. A run keeps its settings: they cannot change while it goes on, but for those marked **free** and
`num_epochs` ([long-runs.md](long-runs.md#plans-that-change)).

`python tests/settings_page.py > docs/settings.md` makes this page from `config.py`.
"""


def page():
    parts = [HEAD]
    for comment, members in groups():
        title, _, note = comment.partition("; ")
        parts += [f"## {title[0].upper()}{title[1:]}\n", *([f"{note[0].upper()}{note[1:]}.\n"] if note else [])]
        parts += ["| setting | default | values | what it is |", "|---|---|---|---|"]
        parts += [row(f) for f in members] + [""]
    parts += [
        "## Presets\n",
        "What each changes of the defaults above. `train_vae.py` takes what its column says besides.\n",
    ]
    parts += ["| preset | both trainers | `train_vae.py` besides |", "|---|---|---|"]
    parts += [f"| `{name}` | {listed(PRESETS[name])} | {listed(VAE_PRESETS[name])} |" for name in PRESETS]
    parts += ["", "With `--finetune_decoder_of`, `train_vae.py` takes besides:\n", "| preset | |", "|---|---|"]
    parts += [f"| `{name}` | {listed(settings)} |" for name, settings in FINETUNING_PRESETS.items()]
    return "\n".join(parts) + "\n"


def groups():
    """-> [(comment, fields)], as the comments of config.py group them."""
    body = (ROOT / "config.py").read_text().split("class SDConfig:")[1].split("def ")[0]
    by_name, found = {f.name: f for f in fields(SDConfig)}, []
    for comment, name in re.findall(r"^    # (.+)$|^    (\w+): ", body, re.MULTILINE):
        if comment:
            found.append((comment, []))
        else:
            found[-1][1].append(by_name[name])
    return found


def row(f):
    text = f.metadata["help"].replace("|", "\\|")
    return f"| `{f.name}` | {shown(f.default)} | {values(f)} | {text}{' **free**' if f.metadata['free'] else ''} |"


def values(f):
    """The choices or the range of a field, and whether it takes several."""
    low, high, choices = (f.metadata[k] for k in ("low", "high", "choices"))
    kind = kind_of(f)
    if choices:
        text = ", ".join(f"`{c}`" for c in choices)
    elif kind is bool:
        text = "on, off"
    elif kind is str:
        text = "text"
    else:
        ends = [None if end is None else f"{end:,}" if isinstance(end, int) else f"{end:g}" for end in (low, high)]
        name = "whole number" if kind is int else "number"
        if low is not None and low != -LARGEST:
            text = f"{name}, {ends[0]} to {ends[1]}" if high is not None else f"{name}, {ends[0]} or more"
        else:
            text = f"{name}, {ends[1]} or less" if high is not None else name
    if f.default is None:
        text += ", auto"
    return f"{text}; several" if isinstance(f.default, tuple) else text


def shown(value):
    if value is None:
        return "auto"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        quoted = [f'"{v}"' if isinstance(v, str) and " " in v else str(v) for v in value]
        return f"`{' '.join(quoted)}`"
    if value == "":
        return "none"
    return f"`{value}`"


def listed(changes):
    return ", ".join(f"`{name}` {shown(value)}" for name, value in changes.items()) or "nothing"


if __name__ == "__main__":
    print(page(), end="")
