#!/usr/bin/env bash
# What: torch 2.14.1, torch.compile of blocks one by one ("regional compilation"), one class with other sizes.
# Guess: what torch.compile() returns belongs to its own module. So each of 12 blocks, which is
#       only ever called at one size, is compiled once, and the limit of 8 recompilations (config.recompile_limit) does not
#       touch them: it is for one thing that is called in ever new ways.
# Seen: 8 of the 12 are compiled. All blocks of a class share one forward(), whose compiled forms are counted together; the
#       four blocks over the limit run as they are, for good, after one warning in the log. dynamic=None is no way round it.
# Consequence: a U-Net of 11 resnets of different widths compiled block by block is in part not compiled, and a measurement of
#       it is of a mixture. Raise the limit to the number of blocks, or compile the whole.
# Run by hand: bash findings/compiled_blocks_share_a_limit.sh (installs PyTorch: minutes). Fails if the behaviour has changed.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.14.1
cat >"$folder/blocks.py" <<'PYTHON'
import torch


class Block(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.linear = torch.nn.Linear(width, width)

    def forward(self, x):
        return self.linear(x).relu()


def count_compiled(**options):
    """Compile 12 blocks of other widths, call each three times at its only size -> how many graphs were compiled."""
    compiled = []
    torch._dynamo.reset()

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    blocks = [(width, torch.compile(Block(width), backend=backend, **options)) for width in range(8, 104, 8)]
    for _ in range(3):
        for width, block in blocks:
            block(torch.ones(2, width))
    return len(compiled)


limit = torch._dynamo.config.recompile_limit
counts = {dynamic: count_compiled(dynamic=dynamic) for dynamic in (False, None)}
print("torch", torch.__version__, "| limit", limit, "| graphs of 12 blocks, by `dynamic`:", counts)
assert set(counts.values()) == {limit} == {8}, "the behaviour has changed"
torch._dynamo.config.recompile_limit = 12
raised = count_compiled(dynamic=False)
print("with a limit of 12:", raised)
assert raised == 12, "the behaviour has changed"
PYTHON
"$folder/venv/bin/python" "$folder/blocks.py" 2>"$folder/log" || { cat "$folder/log"; exit 1; }
grep -c "recompile_limit" "$folder/log" | sed 's/^/warnings: /'
echo "as seen before"
