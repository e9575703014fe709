"""A sharper decoder: a discriminator that tells pictures from reconstructions, and how it pulls at the decoder.

A decoder that learns by squared error paints the mean of what it cannot know, which is smooth. A discriminator sees that.
What it is not: it needs nobody's weights, and without --adversarial_weight nothing of it runs.

Papers:
  Isola et al. 2017, pix2pix (arXiv 1611.07004), section 3.2.2: a discriminator that judges patches
  Lim & Ye 2017, Geometric GAN (1705.02894): the hinge loss
  Wang et al. 2018, pix2pixHD (1711.11585), Eq. 4: feature matching
  Esser et al. 2021, VQGAN (2012.09841), Eq. 7: the adaptive weight
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

# of the levels; each halves the picture. A patch of the first is 4 pixels wide, then 10, then 22
CHANNELS = (32, 64, 128)
BETAS = (0.5, 0.9)  # of its Adam: short memories, because the reconstructions change
LR_FACTOR = 4.0  # it learns faster than the decoder (Heusel et al. 2017, arXiv 1706.08500, section 2)
LARGEST_WEIGHT = 1e4  # of the adaptive weights, as in VQGAN


class Discriminator(nn.Module):
    """x: (B, 3, H, W) in [-1, 1] -> features and logits of each level: [(B, C, H/2, W/2), ...], [(B, 1, H/2, W/2), ...].

    A logit is high where the patch looks like a picture's, low where it looks like a reconstruction's.
    """

    def __init__(self):
        super().__init__()
        sizes = zip((3, *CHANNELS), CHANNELS)
        self.levels = nn.ModuleList(nn.Conv2d(a, b, 4, stride=2, padding=1) for a, b in sizes)
        self.heads = nn.ModuleList(nn.Conv2d(c, 1, 1) for c in CHANNELS)
        self.register_buffer("balance", torch.zeros(()))  # the adaptive weight, from new_balance()

    def forward(self, x):
        features, logits = [], []
        for level, head in zip(self.levels, self.heads):
            x = F.leaky_relu(level(x), 0.2)
            features.append(x)
            logits.append(head(x))
        return features, logits


def make_discriminator(cfg, optimizer, device):
    """-> a Discriminator whose parameters the optimizer steps too; None without --adversarial_weight."""
    if not cfg.adversarial_weight:
        return None
    discriminator = Discriminator().to(device)
    own = {"params": list(discriminator.parameters()), "betas": BETAS, "weight_decay": 0.0, "lr_factor": LR_FACTOR}
    optimizer.add_param_group(own)
    return discriminator


def hinge_loss(real, fake):
    """What the discriminator lessens (Lim & Ye, Eq. 9): logits of pictures and of reconstructions, a mean over levels."""
    return sum(F.relu(1 - r).mean() + F.relu(1 + f).mean() for r, f in zip(real, fake)) / (2 * len(real))


def decoder_loss(fake, features, real_features, matching):
    """What the decoder lessens: minus the logits of its reconstructions, and `matching` times the mean absolute
    difference of their features from the picture's (pix2pixHD, Eq. 4); means over levels."""
    loss = -sum(f.mean() for f in fake)
    if matching:
        loss = loss + matching * sum(F.l1_loss(h, real.detach()) for h, real in zip(features, real_features))
    return loss / len(fake)


def backward(discriminate, balance, last, loss, x, x_hat, weight, cfg, autocast):
    """Leaves the gradients of `weight` x (loss + adversarial_weight x balance x decoder_loss) in the VAE, and the
    discriminator's own in it.

    x, x_hat: (B, 3, H, W). last: weights of the decoder's last layer -> the losses of decoder and discriminator (2,), and
    the gradients of loss and decoder_loss in `last` (2, ...), for new_balance().
    """
    leaf = x_hat.detach().requires_grad_()  # one pass of the discriminator serves both
    with autocast():
        features, logits = discriminate(torch.cat([x, leaf]))
    (real_features, features), (real, fake) = (zip(*(h.float().chunk(2) for h in each)) for each in (features, logits))
    pulling, own = decoder_loss(fake, features, real_features, cfg.matching_weight), hinge_loss(real, fake)
    (pull,) = torch.autograd.grad(pulling, leaf, retain_graph=True)
    (weight * own).backward()
    gradients = [torch.autograd.grad(y, last, g, retain_graph=True)[0] for y, g in ((loss, None), (x_hat, pull))]
    torch.autograd.backward((weight * loss, x_hat), (None, weight * cfg.adversarial_weight * balance * pull))
    return torch.stack([pulling, own]).detach(), torch.stack(gradients)


def new_balance(gradients):
    """The adaptive weight (VQGAN, Eq. 7): with it both losses pull at the last layer alike. gradients: (2, ...).

    Each step uses the one of the step before: so it is of whole batches, in however many parts and processes.
    """
    reconstruction, adversarial = gradients.flatten(1).norm(dim=1)
    return (reconstruction / (adversarial + 1e-6)).clamp(max=LARGEST_WEIGHT)
