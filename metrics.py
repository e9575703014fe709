"""Closed-form measures of a denoiser and of sets of pictures, for evaluate.py.

What it is not: no model, no files, no randomness. Functions on tensors, computed in double precision on the CPU.

Papers:
  Heusel et al. 2017, GANs Trained by a Two Time-Scale Update Rule (arXiv 1706.08500), Eq. 6: the Frechet distance
  Binkowski et al. 2018, Demystifying MMD GANs (1801.01401): the kernel distance (KID)
  Chong & Forsyth 2019 (1911.07023): the Frechet distance is biased by the number of pictures, hence the floor
  Lin et al. 2023 (2305.08891): what a schedule that keeps signal at its end does to the mean of a sample
The bound is that of Wiener (1949): the best linear estimate, which for Gaussian data is the best of all.
"""

import torch
import torch.nn.functional as F

LARGEST_COVARIANCE = 4096  # numbers in a latent (256 pixels): beyond it the eigenvalues take hours
CHUNK = 1024  # rows at a time where all pairs of two sets are looked at

# ---- The denoiser's loss, beside what is known without one ----------------------------------------------


def latent_covariance(mu, log_var):
    """Covariance of posterior samples z ~ N(mu, exp(log_var)) of a set of pictures: (N, ...) twice -> (D, D) double.

    By the law of total variance: the covariance of mu, plus the mean posterior variance on the diagonal, which
    drawing z could only estimate. With N not well above D the small eigenvalues come out too small.
    """
    mu, variance = mu.flatten(1), log_var.flatten(1).double().exp().mean(dim=0)
    mean = mu.double().mean(dim=0)
    covariance = torch.diag(variance)
    for part in mu.split(CHUNK):
        x = part.double() - mean
        covariance += x.T @ x / (len(mu) - 1)
    return covariance


def latent_gaussian(mu, log_var):
    """The Gaussian of the same moments as latents (mu, log_var) (N, C, h, w) each -> mean (D,), covariance (D, D)."""
    return mu.double().flatten(1).mean(dim=0), latent_covariance(mu, log_var)


def wiener_bound(a, b, eigenvalues, target):
    """Least mean squared error per element with which Gaussian data x0 lets `target` be told from z = a x0 + b eps.

    a, b: (N,) double; eigenvalues: (D,) of the covariance of x0, whose mean is known -> (N,). target: epsilon (the
    noise), v_prediction (a eps - b x0) or flow (eps - x0), so p eps + q x0 with the p and q below. Along an
    eigenvector x0 has the posterior variance b^2 l / (a^2 l + b^2), and since eps = (z - a x0) / b, whoever errs in x0
    errs -a/b times as much in eps: the target's variance is (q - p a/b)^2 times that of x0.
    """
    p, q = {"epsilon": (1.0, 0.0), "v_prediction": (a, -b), "flow": (1.0, -1.0)}[target]
    signal, noise = a.square()[:, None] * eigenvalues, b.square()[:, None]  # (N, D), (N, 1)
    return (q * b - p * a).square() * (eigenvalues / (signal + noise)).mean(dim=1)


def mean_by_bin(values, bins, count):
    """Mean of values (N,) in each of `count` bins, bins: (N,) int64 -> list of floats, None where a bin is empty."""
    return [values[bins == b].mean().item() if (bins == b).any() else None for b in range(count)]


def mean_and_error(values):
    """Mean of independent values (N,) and its standard error, None if there is but one."""
    error = values.std().item() / len(values) ** 0.5 if len(values) > 1 else None
    return values.mean().item(), error


# ---- Distances of two sets of features ------------------------------------------------------------------


def frechet_distance(x, y):
    """|m_x - m_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2)) of features (N, d), (M, d) (Heusel et al., Eq. 6) -> float.

    The root's trace is that of (R C_y R)^(1/2) with R the root of C_x: symmetric, so that eigenvalues exist and are
    real, and rounding below zero can be cut off. Biased upwards, the more so the fewer the rows.
    """
    x, y = x.double(), y.double()
    values, vectors = torch.linalg.eigh(x.T.cov())
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ y.T.cov() @ root).clamp(min=0).sqrt().sum()
    return ((x.mean(0) - y.mean(0)).square().sum() + x.var(0).sum() + y.var(0).sum() - 2 * cross).item()


def kernel_distance(x, y):
    """KID: the unbiased squared MMD of features (N, d), (M, d) for k(u, v) = (u.v / d + 1)^3 (Binkowski et al.) -> float.

    Unbiased, so it is 0 in the mean for two sets of the same kind, and can be below.
    """
    x, y = x.double(), y.double()
    (n, d), m = x.shape, len(y)
    own = sum(
        (kernel_sum(s, s) - (s.square().sum(1) / d + 1).pow(3).sum()) / (k * (k - 1)) for s, k in ((x, n), (y, m))
    )
    return (own - 2 * kernel_sum(x, y) / (n * m)).item()


def kernel_sum(x, y):
    """Sum of k over all pairs of a row of x and a row of y."""
    return sum((part @ y.T / x.shape[1] + 1).pow(3).sum() for part in x.split(CHUNK))


# ---- Single sets ----------------------------------------------------------------------------------------


def channel_mean_variances(z):
    """Variance, over pictures, of the mean of each channel: latents (N, C, h, w) -> (C,) double.

    How much pictures differ in overall brightness and colour. A sampler that starts from pure noise where training
    ended with signal left makes it too small (Lin et al., section 3).
    """
    return z.double().mean(dim=(2, 3)).var(dim=0)


def reduced(pixels, side):
    """uint8 pictures (N, 3, S, S) -> (N, 3 side side) in [0, 1], by averaging, for nearest()."""
    # in parts, because floats take four times the memory of bytes
    parts = [F.interpolate(x.float() / 255, side, mode="area") for x in pixels.split(32)]
    return torch.cat(parts).flatten(1)


def nearest(x, chunks):
    """The nearest of many rows to each row of x (N, d); chunks: their (M, d), one after the other
    -> root mean squared difference per element (N,), number of the row, counted through all chunks (N,)."""
    distance, number, first = torch.full((len(x),), torch.inf), torch.zeros(len(x), dtype=torch.long), 0
    for y in chunks:
        # by differences: the faster way, by scalar products, cancels where two pictures are the same
        d, i = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").min(dim=1)
        number = torch.where(d < distance, first + i, number)
        distance, first = torch.minimum(d, distance), first + len(y)
    return distance / x.shape[1] ** 0.5, number
