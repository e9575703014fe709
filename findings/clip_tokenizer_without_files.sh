#!/usr/bin/env bash
# What: transformers 5.24.0, CLIPTokenizer and AutoTokenizer on a model folder whose tokenizer files are missing (a download
#       that was cut short, or weights copied without them).
# Guess, written down before running: both raise OSError and name the missing vocab.json or tokenizer.json, as version 4 does.
# Seen: neither raises. Both build a tokenizer of two special tokens out of nothing. Every piece becomes the same unknown
#       token, so any two captions of equal length are the same to the text model: a training that hears no words.
# Consequence: check a known encoding after loading. "a photo of a cat" is 49406 320 1125 539 320 2368 49407.
# Run by hand: bash findings/clip_tokenizer_without_files.sh. Fails if the behaviour has changed.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.24.0
mkdir "$folder/clip"
echo '{"model_type": "clip", "architectures": ["CLIPModel"], "text_config": {}, "vision_config": {}}' > "$folder/clip/config.json"
"$folder/venv/bin/python" - "$folder/clip" <<'PYTHON'
import sys

import transformers
from transformers import AutoTokenizer, CLIPTokenizer

print("transformers", transformers.__version__)
for kind in (CLIPTokenizer, AutoTokenizer):
    tokenizer = kind.from_pretrained(sys.argv[1])
    cat, dog = (tokenizer(text).input_ids for text in ("a photo of a cat", "a photo of a dog"))
    print(f"{kind.__name__}: {len(tokenizer)} tokens; a photo of a cat: {cat}; a photo of a dog: {dog}")
    assert len(tokenizer) < 10 and cat == dog, "the behaviour has changed"
PYTHON
echo "as seen before"
