#!/usr/bin/env bash
# What: torch-fidelity 0.4.0, the option feature_extractor_internal_dtype="float64" of its FID (documented: "Supported values
#       are 'float32' (default), and 'float64'").
# Guess, written down before running: the Inception features are computed in float64; float32 features differ in the last bits.
# Seen: the name is looked up in a table that maps "float64" to torch.float32. The option changes nothing, and nothing says so.
# Consequence: who wants FID in double precision has to cast the extractor. The square root of the covariances is in double
#       precision either way (numpy), so a FID of few pictures is no worse for it.
# Run by hand: bash findings/torch_fidelity_float64.sh (installs PyTorch: minutes). Fails if the behaviour has changed.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.14.1 torch-fidelity==0.4.0
"$folder/venv/bin/python" - <<'PYTHON'
import torch
import torch_fidelity
from torch_fidelity.helpers import text_to_dtype

print("torch", torch.__version__, "torch-fidelity", torch_fidelity.__version__)
asked = {name: text_to_dtype(name) for name in ("float32", "float64")}
print("asked for -> computed in:", asked)
assert asked["float64"] is torch.float32, "the behaviour has changed"
PYTHON
echo "as seen before"
