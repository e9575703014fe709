"""Several processes that train as one: who this one is, its share of a batch, sums over all of them.

What it is not: a launcher. torchrun starts the processes; without it there is one, and nothing here does anything.
"""

import contextlib
import math
import os
import sys
from datetime import timedelta
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from support.devices import pick_device
from support.errors import UserError

LONGEST_WAIT = timedelta(days=2)  # all wait while rank 0 prepares data and samples; torchrun notices a dead process


class World(NamedTuple):
    """This process among those that torchrun has started: rank 0 .. size - 1, and its device."""

    rank: int
    size: int
    device: torch.device

    def wait(self):
        """Go on when all processes are here."""
        if self.size > 1:
            dist.barrier()

    @contextlib.contextmanager
    def rank0_first(self):
        """Rank 0 does it first; the others then find it done."""
        if self.rank:
            self.wait()
        yield
        if not self.rank:
            self.wait()

    def data_parallel(self, module):
        """The module to call in training: several processes average its gradients."""
        if self.size == 1:
            return module
        devices = [self.device] if self.device.type == "cuda" else None
        return torch.nn.parallel.DistributedDataParallel(module, device_ids=devices)

    def share(self, count):
        """-> slice: the samples of a batch of `count` that this process computes; the first, if none is left for it."""
        return slice(self.rank, count, self.size) if self.rank < count else slice(0, 1)

    def micro_batches(self, count, parts):
        """This process's share of a batch of `count` in at most `parts` parts -> [(slice of the share, weight)].

        The weighted means of the parts' losses, summed over parts and averaged over processes, are the batch's mean.
        """
        share = range(len(range(self.rank, count, self.size)))
        parts = min(parts, math.ceil(count / self.size))  # as many in each process: each part ends in a common sum
        nothing = slice(0, 1), 0.0  # no sample is left: compute one that counts for nothing
        return [
            (slice(part[0], part[-1] + 1), len(part) * self.size / count) if len(part) else nothing
            for part in np.array_split(share, parts)
        ]

    def part_size(self, plan, cfg):
        """How many samples the first micro batch of a whole batch has."""
        return self.micro_batches(min(plan.batch_size, plan.pictures), cfg.grad_accumulation)[0][0].stop

    def average(self, tensor):
        """The tensor's mean over all processes, the same on each; in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
            tensor /= self.size
        return tensor


def join_world():
    """-> World. Only rank 0 speaks and writes."""
    device = pick_device()
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return World(0, 1, device)
    if device.type == "mps":  # no process group moves its tensors
        device = torch.device("cpu")
    try:
        size, rank, local_rank, _ = (int(os.environ[k]) for k in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT"))
    except (KeyError, ValueError) as e:
        what = f"is set in the environment, but what goes with it is not ({e})"
        raise UserError(f"WORLD_SIZE: {what}; start several processes by torchrun, or unset it") from None
    if device.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UserError(f"--nproc_per_node: process {local_rank} has no GPU; give {torch.cuda.device_count()}")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", timeout=LONGEST_WAIT, device_id=device)
    else:
        dist.init_process_group("gloo", timeout=LONGEST_WAIT)
    if rank:
        sys.stdout = open(os.devnull, "w", errors="backslashreplace")
    return World(rank, size, device)
