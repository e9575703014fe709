"""Pictures from pictures: sampling that begins with a picture, keeps a part of it, or begins between two noises.

What it is not: a sampler. from_picture() and between_seeds() take one and give back another of the same interface
(samplers.py), which diffusion.sample(..., edit=...) runs in its place. They go with all samplers, because a sampler
treats each number of z by itself: only the model looks at its neighbours.

Papers:
  Meng et al. 2022, SDEdit (arXiv 2108.01073): from_picture() without a mask
  Lugmayr et al. 2022, RePaint (2201.09865), Eq. 8: its mask; the resampling of their section 4.2 is not here
  White 2016, Sampling Generative Networks (1609.04468): spherical interpolation
"""

import math

import torch
import torch.nn.functional as F

from diffusion import noise_source


def latent_mask(white, z0):
    """(H, W) bool, the pixels to repaint -> (h, w) bool, the places of z0 that hold any of them."""
    return F.max_pool2d(white[None].float(), white.shape[0] // z0.shape[1])[0].bool()


def from_picture(sampler, z0, strength, repaint):
    """-> a sampler that begins with z0 (C, h, w) noised to the level that strength in [0, 1] names, in whole steps.

    repaint: bool, (h, w) or one for all. Where it is False, z is at each level the noised z0, and z0 in the end.
    Strength 0 gives z0; strength 1 where all is repainted is the sampler itself.
    """

    def edited(denoise, noise, a, b, draw_noise):
        n, a_at, b_at = len(a) - 1, a.tolist(), b.tolist()
        first = n - round(strength * n)

        def noised(i):  # by one noise, as deterministic samplers have it; RePaint draws anew at each level
            return a_at[i] * z0 + b_at[i] * noise

        def denoise_unknown(z, i):
            return denoise(torch.where(repaint, z, noised(first + i)), first + i)

        z = noised(first) if first else noise  # plain sampling begins with nothing of z0, whatever a_0 is
        z = sampler(denoise_unknown, z, a[first:], b[first:], draw_noise)
        return torch.where(repaint, z, z0)

    return edited


def between_seeds(sampler, seeds, u):
    """-> a sampler with noise between its own, u = 0, and that of `seeds`, u = 1. u: (B,), one for each of B seeds.

    The way is a circle: with x, y ~ N(0, I) independent, so is cos(c) x + sin(c) y at each c = pi u / 2. On the
    straight line the variance falls to a half, and the model has never seen so little noise.
    """

    def edited(denoise, noise, a, b, draw_noise):
        draw_other = noise_source(noise.shape[1:], len(noise), noise.device, seeds)
        # cos(c) as sin(pi/2 - c), which is exactly 0 at the end
        x_share, y_share = (torch.sin(c * math.pi / 2).view(-1, 1, 1, 1).to(noise) for c in (1 - u, u))

        def mixed(x):
            return x_share * x + y_share * draw_other()

        return sampler(denoise, mixed(noise), a, b, lambda: mixed(draw_noise()))

    return edited


@torch.no_grad()
def between_prompts(text_encoder, first, last, u):
    """Embeddings between two prompts -> (B, L, text_dim), for sample(). u: (B,) from 0, the first, to 1, the last.

    The way is a straight line: attention takes embeddings through linear maps, and WordHashTextEncoder's places
    without a word are zero vectors, which have no direction.
    """
    x, y = (text_encoder([prompt] * len(u)) for prompt in (first, last))
    u = u.view(-1, 1, 1).to(x)
    return (1 - u) * x + u * y
