"""Measures in closed form, of a denoiser and of sets of pictures, for evaluate.py.

What it is not: no model, no files, no random numbers. Functions on tensors, computed in double precision on the CPU.

Papers:
  Heusel et al. 2017, GANs Trained by a Two Time-Scale Update Rule (arXiv 1706.08500), Eq. 6: the Frechet distance
  Binkowski et al. 2018, Demystifying MMD GANs (1801.01401): the kernel distance (KID)
  Hanley & McNeil 1982, The Meaning and Use of the Area under a ROC Curve
  Hasler & Susstrunk 2003, Measuring Colourfulness in Natural Images
  Lin et al. 2023 (2305.08891), section 3: a schedule with signal left at its last step makes samples too uniform
"""

import torch
import torch.nn.functional as F

CHUNK = 1024  # rows at a time where all pairs of rows are looked at


def latent_covariance(mu, log_var):
    """Covariance of z ~ N(mu, exp(log_var)) over a set of pictures: (N, ...) twice -> (D, D) double.

    By the law of total variance: the covariance of mu, plus the mean of exp(log_var) on the diagonal. The small
    eigenvalues come out too small unless N is far above D.
    """
    mu, variance = mu.flatten(1), log_var.flatten(1).double().exp().mean(dim=0)  # (N, D), (D,)
    mean = mu.double().mean(dim=0)
    covariance = torch.diag(variance)
    for part in mu.split(CHUNK):
        x = part.double() - mean
        covariance += x.T @ x / (len(mu) - 1)
    return covariance


def wiener_bound(a, b, eigenvalues, target):
    """The least mean squared error per element in predicting `target` from z = a x0 + b eps, for Gaussian x0: Wiener's.

    a, b: (N,) double; eigenvalues: (D,) of the covariance of x0 -> (N,).
    Each target is p eps + q x0: epsilon is eps, v_prediction a eps - b x0, flow eps - x0. Along an eigenvector with
    eigenvalue l, x0 given z has the variance b^2 l / (a^2 l + b^2). As eps = (z - a x0) / b, an error in x0 is an error
    of -a / b times that in eps. So the variance of the target is (q - p a / b)^2 times that of x0.
    """
    p, q = {"epsilon": (1.0, 0.0), "v_prediction": (a, -b), "flow": (1.0, -1.0)}[target]
    signal, noise = a.square()[:, None] * eigenvalues, b.square()[:, None]  # (N, D), (N, 1)
    return (q * b - p * a).square() * (eigenvalues / (signal + noise)).mean(dim=1)


def mean_by_bin(values, bins, count):
    """Mean of values (N,) in each of `count` bins; bins: (N,) int64 -> list of floats, None for an empty bin."""
    return [values[bins == b].mean().item() if (bins == b).any() else None for b in range(count)]


def frechet_distance(x, y):
    """|m_x - m_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2)) of features (N, d), (M, d) (Heusel et al., Eq. 6) -> float.

    With R the root of C_x, the last trace is that of (R C_y R)^(1/2). This matrix is symmetric, so its eigenvalues are
    real, and those that rounding makes negative can be set to 0. The fewer the rows, the more it is too large.
    """
    x, y = x.double(), y.double()
    values, vectors = torch.linalg.eigh(x.T.cov())
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ y.T.cov() @ root).clamp(min=0).sqrt().sum()
    return ((x.mean(0) - y.mean(0)).square().sum() + x.var(0).sum() + y.var(0).sum() - 2 * cross).item()


def kernel_distance(x, y):
    """KID (Binkowski et al.): unbiased squared MMD of features (N, d), (M, d) for k(u, v) = (u.v / d + 1)^3 -> float."""
    x, y = x.double(), y.double()
    return (mean_of_pairs(x) + mean_of_pairs(y) - 2 * kernel_sum(x, y) / (len(x) * len(y))).item()


def mean_of_pairs(x):
    """Mean of k over all pairs of two different rows."""
    n, d = x.shape
    return (kernel_sum(x, x) - (x.square().sum(1) / d + 1).pow(3).sum()) / (n * (n - 1))


def kernel_sum(x, y):
    """Sum of k over all pairs of a row of x and a row of y."""
    return sum((part @ y.T / x.shape[1] + 1).pow(3).sum() for part in x.split(CHUNK))


def channel_mean_variances(z):
    """How much pictures differ in brightness and colour: latents (N, C, h, w) -> variance of the channels' means (C,)."""
    return z.double().mean(dim=(2, 3)).var(dim=0)


def shrink(pixels, side):
    """uint8 pictures (N, 3, S, S) -> (N, 3 side side) floats in [0, 1], by averaging; in parts, to save memory."""
    return torch.cat([F.interpolate(x.float() / 255, side, mode="area") for x in pixels.split(32)]).flatten(1)


def nearest_rows(x, chunks):
    """For each row of x (N, d), the nearest of many rows that come in chunks (M, d): root mean squared difference per
    element (N,), and number of that row, counted through all chunks (N,)."""
    distance, number, first = torch.full((len(x),), torch.inf), torch.zeros(len(x), dtype=torch.long), 0
    for y in chunks:
        # by differences: the faster way, by scalar products, loses all digits where two pictures are the same
        d, i = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").min(dim=1)
        number = torch.where(d < distance, first + i, number)
        distance, first = torch.minimum(d, distance), first + len(y)
    return distance / x.shape[1] ** 0.5, number


def auc(scores, labels):
    """Area under the ROC curve of each column: scores (N, W), labels (N, W) of 0 and 1 -> (W,) double; NaN where all are alike.

    The chance that a row with the label scores higher than one without; a tie counts half (Hanley & McNeil 1982).
    """
    areas = []
    for score, label in zip(scores.double().T, labels.bool().T):
        above = score[label][:, None] - score[~label]
        areas.append((above > 0).double().mean() + (above == 0).double().mean() / 2)
    return torch.stack(areas)


def contrast(pixels):
    """Standard deviation of the numbers of a picture, mean over uint8 pictures (N, 3, H, W) -> float, in [0, 1]."""
    return torch.cat([(x.float() / 255).flatten(1).std(dim=1) for x in pixels.split(CHUNK)]).mean().item()


def colourfulness(pixels):
    """Mean over uint8 pictures (N, 3, H, W), of values in [0, 1] (Hasler & Susstrunk 2003, section 7)."""
    found = []
    for x in pixels.split(CHUNK):
        red, green, blue = (x.double() / 255).unbind(dim=1)
        opponents = torch.stack([red - green, (red + green) / 2 - blue]).flatten(2)  # (2, B, H W)
        spread, mean = opponents.var(dim=2).sum(dim=0).sqrt(), opponents.mean(dim=2).square().sum(dim=0).sqrt()
        found.append(spread + 0.3 * mean)
    return torch.cat(found).mean().item()
