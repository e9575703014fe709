#!/usr/bin/env bash
# What: sd-parsers 0.6 reads a PNG's `parameters` text, as AUTOMATIC1111's web UI writes it, with a quoted value that holds a comma.
# Guess, written down before running: quotes are respected, because the web UI itself puts a value with a comma into JSON's
#       quotes and reads it back whole.
# Seen: the line of settings is cut at every comma. The value ends in the middle with its opening quote, and what follows the
#       comma is lost. A value that holds a colon is dropped altogether. Nothing is raised.
# Consequence: who writes such a text escapes commas and colons within the quotes (\u002c, \u003a): JSON gives them back, and
#       readers that cut at commas find none.
# Run by hand: bash findings/sd_parsers_quoted_commas.sh (a few small packages). Fails if the behaviour has changed.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check sd-parsers==0.6 Pillow==12.3.0
FOLDER="$folder" "$folder/venv/bin/python" - <<'PYTHON'
import os
from importlib.metadata import version

from PIL import Image, PngImagePlugin
from sd_parsers import ParserManager

print("sd-parsers", version("sd-parsers"), "Pillow", version("Pillow"))


def read_back(vae):
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", f"a cat\nSteps: 5, Sampler: Euler, CFG scale: 2, Seed: 7, Size: 8x8, VAE: {vae}, Eta: 1")
    path = os.path.join(os.environ["FOLDER"], "picture.png")
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    return ParserManager().parse(path).metadata


seen = {'"one, two"': '"one', '"one: two"': None, r'"one\u002c two"': r'"one\u002c two"'}
for vae, expected in seen.items():
    found = read_back(vae)
    print(f"{vae:18} -> {found}")
    assert found.get("VAE") == expected and found["Eta"] == "1", "the behaviour has changed"
PYTHON
echo "as seen before"
