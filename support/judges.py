"""Networks that judge pictures: which words a photograph shows, what a painted scene shows. Trained once, then kept.

What it is not: part of a run. A judge learns from the run's training pictures or from scenes of its own, never from the
U-Net, and nothing of the run learns from it.

The words of photographs (WordJudge) are those that the text encoder splits captions into, in any language: not too rare,
not in most captions, and readable: on training pictures that the judge has not learned from, its AUC is above READABLE.
"""

from collections import Counter
from functools import partial

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import metrics
import scenes
from data import Scenes, read_pictures, to_float
from scenes import COLOURS, PLACES, SUBJECTS, full_caption, make_scene
from support.prepared import prepare, source_hash
from support.show import Progress, progress_bar
from training import seed_step

SIDE = 64  # pixels at which judges look
SEED = CLASSIFIER_SERIES = 101  # a series of scenes that no training uses
CLASSIFIER_SCENES, CLASSIFIER_EPOCHS = 8192, 4
ATTRIBUTES = {"subject": list(SUBJECTS), "colour": list(COLOURS), "place": list(PLACES)}
SHARE, LEAST_PICTURES = (0.015, 0.5), 50  # of the training pictures that a word must be said of
READABLE = 0.7  # AUC
STEPS, BATCH, LR = 2_700, 64, 2e-3
SHOWN_PIXELS = 2**25  # of training pictures that the judge sees as the VAE shows them, too


class WordJudge(nn.Module):
    """x: (B, 3, H, W) in [-1, 1] -> features (B, 256), logits of the words (B, W). readable: (W,), set by its training."""

    def __init__(self, num_words, width=32):
        super().__init__()
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        self.stem = nn.Conv2d(3, width, 5, stride=2, padding=2)
        strides = (1, 2, 2, 2)
        self.blocks = nn.Sequential(*(ResidualBlock(a, b, s) for a, b, s in zip(widths, widths[1:], strides)))
        self.norm = nn.BatchNorm2d(widths[-1])
        self.head = nn.Sequential(nn.Dropout(0.3), nn.Linear(widths[-1], num_words))
        self.register_buffer("readable", torch.zeros(num_words, dtype=torch.bool))

    def forward(self, x):
        features = F.relu(self.norm(self.blocks(self.stem(shrink(x))))).mean(dim=(2, 3))
        return features, self.head(features)


class ResidualBlock(nn.Module):
    """Pre-activation residual block with BatchNorm (He et al. 2016, arXiv 1603.05027); its shortcut always projects."""

    def __init__(self, in_channels, out_channels, stride):
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(in_channels), nn.BatchNorm2d(out_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x):
        h = F.relu(self.norm1(x))
        return self.shortcut(h) + self.conv2(F.relu(self.norm2(self.conv1(h))))


def small(pixels):
    """uint8 pictures (N, 3, S, S) -> uint8 (N, 3, SIDE, SIDE)."""
    return torch.cat([shrink(x.float()).round().byte() for x in pixels.split(256)])


def shrink(x):
    """(B, 3, H, W) -> (B, 3, SIDE, SIDE), by averaging."""
    on = "cpu" if x.device.type == "mps" else x.device  # MPS shrinks by whole factors alone
    return F.interpolate(x.to(on), SIDE, mode="area").to(x.device)


def fit(judge, steps, weight_decay, draw_loss, what):
    """Train a judge by AdamW; the learning rate rises and falls once. draw_loss() -> the loss of a batch that it draws."""
    optimizer = torch.optim.AdamW(judge.parameters(), lr=LR, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps)
    progress = Progress(steps, what)
    for _ in range(steps):
        optimizer.zero_grad()
        draw_loss().backward()
        optimizer.step()
        schedule.step()
        progress.update()
    progress.close()
    return judge.eval()


def kept(judge, folder, name, key, train):
    """`judge` with the weights of the one that train() makes: trained once and kept in `folder` ("": not) under `key`."""
    state = judge.state_dict()
    sizes = [value.numel() for value in state.values()]

    def rows(first):
        yield torch.cat([value.flatten().cpu().float() for value in train().state_dict().values()]).numpy()

    (row,), _ = prepare(folder, name, key | {"torch": torch.__version__}, (sum(sizes),), np.float32, 1, rows)
    judge.load_state_dict({name: part.view(v.shape) for (name, v), part in zip(state.items(), row.split(sizes))})
    return judge.eval()


# ---- The words of photographs ---------------------------------------------------------------------------


def word_judge(pixels, captions, split, decode, key, folder, device):
    """-> (WordJudge, {word that it reads: column of its logits}, why there are none). Kept in `folder` ("": not).

    pixels: uint8 training pictures (N, 3, S, S); captions: N lists of strings; split(caption) -> its words;
    decode(pixels) -> the same as the VAE shows them; key: what pictures, captions and VAE are, to know the file by.
    """
    words = frequent_words(captions, split)
    if not words:
        return None, {}, f"no word is said of {LEAST_PICTURES} training pictures and of no more than half of them"

    train = partial(train_word_judge, pixels, captions, words, split, decode, device)
    key = {"run": key, "words": words}
    key["code"] = source_hash(WordJudge, ResidualBlock, train_word_judge, fit, augmented)
    judge = kept(WordJudge(len(words)).to(device), folder, "judge", key, train)
    columns = {words[i]: i for i in judge.readable.nonzero().flatten().tolist()}
    return judge, columns, "" if columns else "the judge can read none of the frequent words off the pictures"


def frequent_words(captions, split):
    """Words that captions say of enough training pictures, and not of most: most frequent first."""
    said = Counter(word for texts in captions for word in set().union(*map(split, texts)))
    least, most = max(LEAST_PICTURES, SHARE[0] * len(captions)), SHARE[1] * len(captions)
    return sorted((word for word in said if least <= said[word] <= most), key=lambda word: (-said[word], word))


def label(captions, words, split):
    """N lists of captions -> (N, W): the share of a picture's captions that say the word."""
    number = {word: i for i, word in enumerate(words)}
    labels = torch.zeros(len(captions), len(words))
    for row, texts in zip(labels, captions):
        for text in texts:
            row[[number[word] for word in set(split(text)) if word in number]] += 1 / len(texts)
    return labels


def train_word_judge(pixels, captions, words, split, decode, device):
    """-> WordJudge. Which words it reads is tried on every tenth picture, which it does not learn from."""
    labels = label(captions, words, split).to(device)
    seed_step(SEED, 1)  # decode() draws, too
    count = max(1, min(len(pixels), SHOWN_PIXELS // pixels[0, 0].numel()))
    looked_at, shown = (small(x).to(device) for x in (pixels, decode(pixels[:count])))
    unseen = torch.arange(len(pixels)) % 10 == 9
    learned = (~unseen).nonzero().flatten()
    seed_step(SEED, 0)
    judge = WordJudge(len(words)).to(device, memory_format=torch.channels_last)

    def draw_loss():
        index = learned[torch.randint(len(learned), (BATCH,))]
        through_vae = (torch.rand(BATCH) < 0.5) & (index < count)
        index, through_vae = index.to(device), through_vae.to(device)[:, None, None, None]
        x = torch.where(through_vae, shown[index.clamp(max=count - 1)], looked_at[index])
        _, logits = judge(augmented(to_float(x, device)))
        return F.binary_cross_entropy_with_logits(logits, labels[index])

    fit(judge, min(STEPS, 40 * len(learned) // BATCH + 1), 0.1, draw_loss, "train the judge of words")
    unseen = unseen.to(device)
    scores = read_words(judge, (to_float(x, device) for x in looked_at[unseen].split(256)))
    judge.readable.copy_(metrics.auc(scores, labels[unseen].cpu() > 0) > READABLE)  # NaN: not read
    return judge


@torch.no_grad()
def read_words(judge, batches):
    """batches of x (B, 3, H, W) in [-1, 1] -> logits (N, W) on the CPU."""
    return torch.cat([judge(x)[1].float().cpu() for x in batches])


def patch_features(judge, x):
    """x: (B, 3, H, W) in [-1, 1] -> features of its 16 patches before their mean, each of length 1: (B, 256, 4, 4)."""
    return F.normalize(F.relu(judge.norm(judge.blocks(judge.stem(shrink(x))))))


def augmented(x):
    """Crops of 0.65 to 1 of the side, mirrored or not, lighter or darker, a little noise: (B, 3, H, W) -> the same."""
    n, device = len(x), x.device
    side = 1 - 0.35 * torch.rand(n)
    affine = torch.zeros(n, 2, 3)
    affine[:, 0, 0], affine[:, 1, 1] = side * (1 - 2 * (torch.rand(n) < 0.5).float()), side
    affine[:, :, 2] = (1 - side)[:, None] * (2 * torch.rand(n, 2) - 1)
    grid = F.affine_grid(affine.to(device), x.shape, align_corners=False)
    x = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
    gain, bias = (torch.rand(2, n, 1, 1, 1) - 0.5).to(device)
    return x * (1 + 0.4 * gain) + 0.2 * bias + 0.03 * torch.randn_like(x)


# ---- Painted scenes -------------------------------------------------------------------------------------


class SceneClassifier(nn.Module):
    """x: (B, 3, H, W) in [-1, 1] -> features (B, 256), and logits of subject, colour and place."""

    def __init__(self):
        super().__init__()
        widths, layers = (3, 32, 64, 128, 128), []
        for a, b in zip(widths, widths[1:]):
            layers += [nn.Conv2d(a, b, 3, stride=2, padding=1), nn.BatchNorm2d(b), nn.ReLU()]
        self.features = nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 16, 256), nn.ReLU())
        self.heads = nn.ModuleList([nn.Linear(256, len(names)) for names in ATTRIBUTES.values()])

    def forward(self, x):
        h = self.features(shrink(x))
        return h, [head(h) for head in self.heads]


def scene_classifier(cfg, device):
    """-> SceneClassifier, trained on scenes of a series of its own. Kept in cfg.cache_dir."""
    key = {"size": cfg.image_size, "code": source_hash(scenes, SceneClassifier, train_classifier, fit)}
    train = partial(train_classifier, cfg, device)
    return kept(SceneClassifier().to(device), cfg.cache_dir, "classifier", key, train)


def train_classifier(cfg, device):
    """Train on freshly painted scenes, with a little noise, so that it does not rely on single pixels."""
    labels = scenes_of(CLASSIFIER_SERIES, CLASSIFIER_SCENES)[1].to(device)
    pixels = paint_scenes(CLASSIFIER_SERIES, CLASSIFIER_SCENES, cfg)
    seed_step(CLASSIFIER_SERIES, 0)
    classifier = SceneClassifier().to(device)

    def draw_loss():
        index = torch.randint(len(pixels), (BATCH,))
        x = to_float(pixels[index], device)
        _, logits = classifier(x + 0.1 * torch.randn_like(x))
        return sum(F.cross_entropy(out, labels[index, i]) for i, out in enumerate(logits))

    return fit(classifier, CLASSIFIER_EPOCHS * len(pixels) // BATCH, 0.01, draw_loss, "train classifier")


def scenes_of(series, count, combinations=None):
    """The first scenes of a series -> full captions; (count, 3) int64: the numbers of subject, colour and place."""
    found = [make_scene(series, i, combinations) for i in range(count)]
    labels = [[names.index(getattr(scene, a)) for a, names in ATTRIBUTES.items()] for scene in found]
    return [full_caption(scene.subject, scene.colour, scene.place) for scene in found], torch.tensor(labels)


def paint_scenes(series, count, cfg, combinations=None):
    """The same scenes as pictures -> uint8 (count, 3, S, S)."""
    dataset = Scenes(series, count, cfg.image_size, combinations)
    return read_pictures(dataset, cfg, progress_bar(f"paint series {series}"))[0]
