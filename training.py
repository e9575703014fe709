"""What both trainings share: seeds by step, learning rate, optimizer, the guard against NaN, averaged weights.

What it is not: a Trainer. It has no loop, no hooks, no files and no processes.

Randomness is a function of progress (after EDM2, Karras et al. 2024, arXiv 2312.02696): (seed, epoch) gives the order
of the data, (seed, step) all else that is random. So a resumed run draws what an unbroken one would.
"""

import hashlib
import math
from dataclasses import dataclass

import torch

from muon import Muon
from support.errors import UserError

LOG_EVERY = 20  # steps per row of the training CSVs; the end of an epoch ends a row too

# ---- Progress -------------------------------------------------------------------------------------------


@dataclass
class State:
    """How far training has come: what resuming needs beside the weights and the optimizer's state."""

    step: int
    epoch: int  # whole epochs done
    count: int  # steps since the last row of the CSV
    window: torch.Tensor  # sums of the losses of these steps
    restart: int = 0  # the step after which the optimizer began anew

    def add(self, losses):
        self.window += losses
        self.count += 1

    def take_means(self):
        """End a row of the CSV -> its mean losses."""
        means = self.window / self.count
        self.window, self.count = torch.zeros_like(self.window), 0
        return means.tolist()


@dataclass
class Plan:
    """How training divides into epochs and steps."""

    pictures: int
    batch_size: int
    num_epochs: int
    max_steps: int | None
    seed: int

    def __post_init__(self):
        self.steps_per_epoch = math.ceil(self.pictures / self.batch_size)
        self.total_steps = min(self.num_epochs * self.steps_per_epoch, self.max_steps or math.inf)
        self.last_epoch = math.ceil(self.total_steps / self.steps_per_epoch)

    def batches(self, epoch, step):
        """The batches of an epoch that follow `step` -> tuple of index tensors."""
        first = (epoch - 1) * self.steps_per_epoch
        order = epoch_order(self.seed, epoch, self.pictures)
        return order.split(self.batch_size)[step - first : self.total_steps - first]

    def ends_row(self, state):
        ends_epoch = state.step % self.steps_per_epoch == 0 or state.step == self.total_steps
        return state.count == LOG_EVERY or ends_epoch


# ---- Randomness -----------------------------------------------------------------------------------------


def hash_seed(*parts):
    """A 63-bit seed that is a function of its arguments alone."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def seed_step(seed, step):
    """Make everything drawn until the next call a function of (seed, step)."""
    torch.manual_seed(hash_seed(seed, "step", step))


def epoch_order(seed, epoch, count):
    """The order in which an epoch goes through `count` pictures -> (count,)."""
    generator = torch.Generator().manual_seed(hash_seed(seed, "order", epoch))
    return torch.randperm(count, generator=generator)


# ---- The optimizer's step -------------------------------------------------------------------------------


def lr_at(step, total_steps, cfg, restart=0):
    """Learning rate of step 1 .. total_steps: a linear warm-up times a constant or a cosine to 0 (Loshchilov & Hutter
    2017, arXiv 1608.03983, Eq. 5 without restarts)."""
    warmup = min(1.0, (step - restart) / (cfg.lr_warmup_steps + 1))
    cosine = 0.5 * (1 + math.cos(math.pi * (step - 1) / total_steps))
    return cfg.lr * warmup * (cosine if cfg.lr_schedule == "cosine" else 1.0)


def make_optimizer(modules, cfg):
    """The optimizer that cfg names, for all parameters of the modules that require gradients, in order."""
    named = [(name, p) for module in modules for name, p in module.named_parameters() if p.requires_grad]
    options = {"lr": cfg.lr, "betas": (0.9, cfg.adam_beta2), "weight_decay": cfg.weight_decay}
    if cfg.optimizer == "muon":
        outer = {"conv_in", "conv_out", "linear_1", "linear_2"}  # Muon is for the layers between these
        hidden = [p for name, p in named if p.dim() > 1 and not outer & set(name.split("."))]
        return Muon([p for _, p in named], hidden, **options)
    return torch.optim.Adam([p for _, p in named], fused=True, **options)  # Kingma & Ba 2015, arXiv 1412.6980


def clip_gradients(optimizer, max_grad_norm):
    """Clip the gradients to max_grad_norm unless that is 0 -> their norm before clipping. Those of the first group: a
    discriminator is not clipped."""
    parameters = optimizer.param_groups[0]["params"]
    if max_grad_norm:
        return torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def optimizer_step(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_factor", 1.0)
    optimizer.step()


class FiniteGuard:
    """Keeps a step whose loss or gradient is NaN or infinite from changing the weights, and names the first such step.

    On CUDA nothing waits for the device: the optimizer itself skips such a step, and check() later looks at all steps
    since its last call. Elsewhere judge() calls check(): on a CPU that costs nothing, on MPS it waits for the step.
    """

    def __init__(self, device, run):
        self.lazy, self.run, self.unchecked = device.type == "cuda", run, []

    def judge(self, optimizer, loss, grad_norm, step):
        """Call it between backward pass and optimizer step. loss: the same on all processes."""
        figures = torch.stack([loss.detach(), grad_norm])
        self.unchecked.append((step, figures))
        if self.lazy:
            optimizer.found_inf = (~figures.isfinite().all()).float()
        else:
            self.check()

    def check(self):
        """UserError if a step since the last call was not finite. Call it before anything is saved or logged."""
        steps, figures = zip(*self.unchecked) if self.unchecked else ((), None)
        self.unchecked = []
        for step, (loss, grad_norm) in zip(steps, torch.stack(figures).tolist() if figures else ()):
            if not math.isfinite(loss + grad_norm):
                raise UserError(
                    f"--lr: step {step} gives loss {loss:.3g} and gradient norm {grad_norm:.3g}; start over with a "
                    f"lower --lr and --overwrite; the newest set is {self.run.last_saved}"
                )

    def check_held_out(self, figure, step):
        """UserError if a held-out figure is not finite: then the weights are useless, though each step was finite."""
        if not math.isfinite(figure):
            raise UserError(
                f"--lr: after step {step} the held-out figures are not numbers; start over with a lower --lr and "
                f"--overwrite; the newest set is {self.run.last_saved}"
            )


# ---- The averaged weights -------------------------------------------------------------------------------


def ema_decay_at(step, cfg):
    """Decay of the averaged weights (EMA) at step 1, 2, ...: cfg.ema_warmup lets them soon forget the initial ones."""
    return min(cfg.ema_decay, (1 + step) / (10 + step)) if cfg.ema_warmup else cfg.ema_decay


def random_share(steps, cfg):
    """How much of the averaged weights is still the random ones that they began with."""
    first = min(steps, 1000)  # a warm-up has forgotten them by then
    return math.prod(ema_decay_at(step, cfg) for step in range(1, first + 1)) * cfg.ema_decay ** (steps - first)


@torch.no_grad()
def update_average(average, weights, decay):
    """average <- decay * average + (1 - decay) * weights; both lists of tensors, all updated at once."""
    torch._foreach_lerp_(average, weights, 1 - decay)
