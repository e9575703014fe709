"""Muon, an optimizer that needs fewer steps than Adam: for the matrices within a network.

What it is not: for first and last layers, biases and norms, which stay Adam's; or a faster step, only fewer of them.

Papers:
  Jordan et al. 2024, Muon: An optimizer for hidden layers in neural networks
  Liu et al. 2025, Muon is Scalable for LLM Training (arXiv 2502.16982), section 2.2: the update's size
"""

import torch

from support.cuda_graph import record_cuda_graph


class Muon(torch.optim.Adam):
    """Adam, but for hidden matrices Muon (Jordan et al. 2024), which brings all singular values of their momentum near 1.

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
            # (rows, columns) each, in the order in which p's columns lie in memory: views, but for an odd gradient
            several = (p, self.state[p]["momentum"], gradient)
            matrices = [(x if p.is_contiguous() else x.movedim(1, -1)).flatten(1) for x in several]
            by_shape.setdefault(matrices[0].shape, []).append(matrices)
        for shape, group in by_shape.items():
            parameters, momenta, gradients = map(list, zip(*group))
            # lerp() then leaves momentum as it is
            gradients = [torch.where(skipped, *pair) for pair in zip(momenta, gradients)]
            torch._foreach_lerp_(momenta, gradients, 1 - self.MOMENTUM)
            nesterov = torch.stack(torch._foreach_lerp(gradients, momenta, self.MOMENTUM))
            update = orthogonal(nesterov) * (lr * self.SCALE * max(shape) ** 0.5)
            torch._foreach_sub_(parameters, list(update))


def orthogonal(x, steps=5):
    """Matrices (n, rows, columns) -> the same with all singular values near 1: Newton-Schulz iteration of a polynomial
    of degree 5 (Jordan et al. 2024). In bfloat16 on a GPU; on a CPU that would be slower."""
    x = x.bfloat16() if x.is_cuda else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    wide = x if x.shape[1] <= x.shape[2] else x.mT
    wide = wide if x.is_cuda else newton_schulz_product(wide @ wide.mT, steps) @ wide
    for _ in range(steps if x.is_cuda else 0):
        square = wide @ wide.mT
        wide = torch.baddbmm(wide, torch.baddbmm(square, square, square, beta=-4.7750, alpha=2.0315), wide, beta=3.4445)
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
