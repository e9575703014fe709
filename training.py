"""What both trainings share: seeds by step, learning rate, optimizer, the guard against NaN, averaged weights.

What it is not: a Trainer. It has no loop, no hooks, no files and no processes.

Randomness is a function of progress (after EDM2, Karras et al. 2024, arXiv 2312.02696): (seed, epoch) gives the order
of the data, (seed, step) all else that is random. So a resumed run draws what an unbroken one would.
"""

import hashlib
import math
from dataclasses import dataclass

import torch

from support.cuda_graph import record_cuda_graph
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


class Muon(torch.optim.Adam):
    """Adam, but for hidden matrices Muon (Jordan et al. 2024), which sets all singular values of their momentum to 1.

    A k x k convolution counts as a matrix (out_channels, in_channels * k * k). Muon's update is scaled to the size of
    Adam's (Liu et al. 2025, arXiv 2502.16982): one learning rate serves both. Hidden matrices have no weight decay.
    """

    MOMENTUM, SCALE = 0.95, 0.2

    def __init__(self, parameters, hidden, **options):
        super().__init__(parameters, fused=True, **options)
        self.hidden = hidden
        self.update = record_cuda_graph(self.update_hidden, hidden[0].device)

    def step(self):
        gradients = [p.grad for p in self.hidden]
        for p in self.hidden:
            p.grad = None  # so that Adam skips it
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        super().step()
        for p, gradient in zip(self.hidden, gradients):
            p.grad = gradient
        skipped = getattr(self, "found_inf", torch.zeros((), device=p.device))  # from FiniteGuard: 1 skips the step
        lr = torch.full((), self.param_groups[0]["lr"], device=p.device)
        self.update(lr * (1 - skipped), skipped > 0, *gradients)

    @torch.no_grad()
    def update_hidden(self, lr, skipped, *gradients):
        """Step all hidden matrices, those of one shape together as (n, rows, columns): fewer and larger kernels."""
        by_shape = {}
        for p, gradient in zip(self.hidden, gradients):
            matrices = [as_matrix(x) for x in (p, self.state[p]["momentum"], gradient)]
            by_shape.setdefault(matrices[0].shape, []).append(matrices)
        for shape, group in by_shape.items():
            parameters, momenta, gradients = map(list, zip(*group))
            # lerp() then leaves momentum as it is
            gradients = [torch.where(skipped, *pair) for pair in zip(momenta, gradients)]
            torch._foreach_lerp_(momenta, gradients, 1 - self.MOMENTUM)
            nesterov = torch.stack(torch._foreach_lerp(gradients, momenta, self.MOMENTUM))
            update = orthogonal(nesterov) * (lr * self.SCALE * max(shape) ** 0.5)
            torch._foreach_sub_(parameters, list(update))


def as_matrix(x):
    """A weight (rows, ...) -> (rows, columns), a view: the columns are in the order in which they lie in memory."""
    return (x if x.is_contiguous() else x.movedim(1, -1)).flatten(1)


def orthogonal(x, steps=5):
    """Matrices (n, rows, columns) -> the same with all singular values near 1: Newton-Schulz iteration of a polynomial
    of degree 5 (Jordan et al. 2024). In bfloat16 on a GPU; on a CPU that would be slower."""
    x = x.bfloat16() if x.is_cuda else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    wide = x if x.shape[1] <= x.shape[2] else x.mT
    wide = wide if x.is_cuda else newton_schulz_product(wide @ wide.mT, steps) @ wide
    for _ in range(steps if x.is_cuda else 0):
        square = wide @ wide.mT
        wide = 3.4445 * wide + (-4.7750 * square + 2.0315 * square @ square) @ wide
    return (wide if x.shape[1] <= x.shape[2] else wide.mT).float()


def newton_schulz_product(square, steps):
    """All that these steps multiply x by, from square = x x^T alone: fewer numbers where x is wide. In bfloat16 their
    rounding errors would grow."""
    product = None
    for i in range(steps):
        factor = torch.baddbmm(square, square, square, beta=-4.7750, alpha=2.0315)
        factor.diagonal(dim1=1, dim2=2).add_(3.4445)
        product = factor if product is None else factor @ product
        square = factor @ square @ factor if i < steps - 1 else None
    return product


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
