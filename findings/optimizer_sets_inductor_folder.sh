#!/usr/bin/env bash
# What: torch 2.14.1 (2.11.0 too), the environment variable TORCHINDUCTOR_CACHE_DIR: where torch.compile keeps its code.
# Guess, written down before running: users set it, PyTorch reads it at the first compilation. So a program can choose a folder
#       with os.environ.setdefault() right before torch.compile, and a user's own setting still wins.
# Seen: making any optimizer, plain SGD too, loads torch._dynamo, and that writes its default into os.environ. From then on
#       setdefault() does nothing and says nothing: the program finds a "setting" that no user made, and so do its children.
# Consequence: choose the folder before the first optimizer. What is set later by assignment does count, but then a user's
#       own setting can no longer be told from PyTorch's.
# Run by hand: bash findings/optimizer_sets_inductor_folder.sh (installs PyTorch: minutes). Fails if the behaviour has changed.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.14.1
env -u TORCHINDUCTOR_CACHE_DIR "$folder/venv/bin/python" - <<'PYTHON'
import os

import torch

weight = torch.nn.Parameter(torch.zeros(2))
before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
torch.optim.SGD([weight], lr=0.1)
after = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
print("torch", torch.__version__, "| before the optimizer:", before, "| after it: set:", after is not None)
assert before is None and after is not None, "the behaviour has changed"
chosen = os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", "my_folder")
print("setdefault() keeps:", "PyTorch's" if chosen == after else chosen)
assert chosen == after != "my_folder", "the behaviour has changed"
PYTHON
echo "as seen before"
