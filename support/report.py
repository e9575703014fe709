"""report.html: what a run looks like, in one file to open by a double click or to send to a friend; it needs no network.

What it is not: it measures and draws nothing; it shows what both trainers have left in the run directory so far.
"""

import base64
import contextlib
import csv
import html
import os
import re
from string import Template

from support import checkpoint, flags, show
from support.errors import UserError, printable
from support.files import Damaged, read_file, write_file

MOST_EPOCHS, MOST_BYTES = 40, 8 << 20  # of a trainer's grids; of a longer run some epochs are shown, evenly chosen
PAGE = Template("""<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>$title</title>
<meta http-equiv="Content-Security-Policy" content="default-src data: 'unsafe-inline'">
<style>
body { font: 1rem/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem }
figure { margin: 0 } figure img { min-width: min(100%, 24rem) } img, input { max-width: 100% } input { width: 24rem }
th, td { text-align: left; vertical-align: top; padding-right: 2rem } pre { white-space: pre-wrap; background: #eee }
</style><noscript><style>input { display: none }</style></noscript>
<script>const pick = ({ value, parentNode }) => {
 parentNode.querySelectorAll("figure").forEach((grid, i) => { grid.hidden = i != value });
}</script>
<h1>$title</h1>
$body</html>
""")


def write_report(run_dir, rank=0):
    """Write report.html anew; UserError if the disk does not take it. Of several processes only that of rank 0 writes."""
    if rank:
        return
    body = epochs(run_dir, "unet_samples_epoch", "Samples of the prompts in the U-Net's settings")
    body += epochs(run_dir, "vae_pictures_epoch", "Held-out pictures, and below them what the VAE makes of them")
    page = PAGE.substitute(title=escape(run_dir), body=body + facts(run_dir))
    write_file(os.path.join(run_dir, "report.html"), page.encode())


def epochs(run_dir, prefix, title):
    """A trainer's grids: the newest, and where scripts run a slider for the others."""
    found = sorted(int(m[1]) for m in (re.fullmatch(rf"{prefix}(\d+)\.png", name) for name in os.listdir(run_dir)) if m)
    if not found:
        return ""
    newest = image(run_dir, f"{prefix}{found[-1]}.png")
    last = min(len(found), MOST_EPOCHS, max(1, MOST_BYTES // len(newest))) - 1
    slider = f'<input type="range" aria-label="epoch" max="{last}" value="{last}" oninput="pick(this)">' if last else ""
    text = f"<h2>{title}</h2>\n<div>{slider}\n"
    for i in range(last, -1, -1):  # backwards from the newest
        epoch = found[-1 - i * (len(found) - 1) // max(last, 1)]
        caption = f"<figcaption>after epoch {epoch}</figcaption>"
        text += f"<figure{' hidden' if i else ''}>{image(run_dir, f'{prefix}{epoch}.png')}{caption}</figure>\n"
    return f"{text}</div>\n"


def image(run_dir, name):
    """A PNG of the run, within the page; its name if it cannot be read."""
    data = b""
    with contextlib.suppress(Damaged):
        data = base64.b64encode(read_file(os.path.join(run_dir, name), 4 * MOST_BYTES))
    return f'<img alt="{name}" src="data:image/png;base64,{data.decode()}">'


def facts(run_dir):
    """Of each trainer the command line, curves, newest held-out figures and settings, as HTML."""
    text = ""
    for kind in checkpoint.PREFIXES:
        try:
            manifest = checkpoint.read_manifest(run_dir, kind, checkpoint.sets_of(run_dir, kind)[0])
        except (IndexError, UserError):  # not yet there, or damaged
            continue
        found, settings = {}, {k: v for k, v in vars(manifest["cfg"]).items() if v != ""}
        with contextlib.suppress(OSError, ValueError, csv.Error, IndexError):
            found = show.csv_rows(os.path.join(run_dir, f"{kind}_held_out.csv"))[-1]
        command = escape(flags.training_command(kind, run_dir, manifest))
        text += f"<h2>train_{kind}.py</h2>\n<pre>{command}</pre>\n{image(run_dir, f'{kind}_curves.png')}\n"
        for title, rows in ("Held-out figures, newest epoch", found), ("Settings", settings):
            cells = "".join(f"\n<tr><th>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in rows.items())
            text += f"<details{' open' * (rows is found)}><summary>{title}</summary><table>{cells}</table></details>\n"
    return text


def escape(text):
    return html.escape(printable(text))
