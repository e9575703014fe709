"""Networks that judge pictures: which words a photograph shows, what a painted scene shows. Trained once, then kept.

What it is not: part of a run. A judge learns from the run's training pictures or from scenes of its own, never from the
U-Net, and nothing of the run learns from it.

The words of photographs (WordJudge) are those that the text encoder splits captions into, in any language: not too rare,
not in most captions, and readable: on training pictures that the judge has not learned from, its AUC is above READABLE.
"""

import hashlib
import io
import json
import os
from collections import Counter
from contextlib import suppress

import torch
import torch.nn as nn
import torch.nn.functional as F

import metrics
import scenes
from data import Scenes, read_pictures, to_float
from scenes import COLOURS, PLACES, SUBJECTS, full_caption, make_scene
from support.errors import UserError
from support.files import read_file, write_file
from support.prepared import source_hash
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
    """x: (B, 3, SIDE, SIDE) in [-1, 1] -> features (B, 256), logits of the words (B, W)."""

    def __init__(self, num_words, width=32):
        super().__init__()
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        self.stem = nn.Conv2d(3, width, 5, stride=2, padding=2)
        strides = (1, 2, 2, 2)
        self.blocks = nn.Sequential(*(ResidualBlock(a, b, s) for a, b, s in zip(widths, widths[1:], strides)))
        self.norm = nn.BatchNorm2d(widths[-1])
        self.head = nn.Sequential(nn.Dropout(0.3), nn.Linear(widths[-1], num_words))

    def forward(self, x):
        features = F.relu(self.norm(self.blocks(self.stem(shrink(x))))).mean(dim=(2, 3))
        return features, self.head(features)


class ResidualBlock(nn.Module):
    """Pre-activation residual block with BatchNorm (He et al. 2016, arXiv 1603.05027)."""

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


# ---- The words of photographs ---------------------------------------------------------------------------


def word_judge(pixels, captions, split, decode, key, folder, device):
    """-> (WordJudge, words that it reads, why there are none). Kept in `folder` ("": not).

    pixels: uint8 training pictures (N, 3, S, S); captions: N lists of strings; split(caption) -> its words;
    decode(pixels) -> the same as the VAE shows them; key: what pictures, captions and VAE are, to know the file by.
    """
    words = frequent_words(captions, split)
    if not words:
        why = f"no word is said of {LEAST_PICTURES} training pictures and of no more than half of them"
        return None, [], why

    def make():
        judge, readable = train_word_judge(pixels, label(captions, words, split), decode, device)
        return {"weights": cpu_weights(judge), "readable": readable}

    key = {"run": key, "words": words, "code": source_hash(WordJudge, ResidualBlock, train_word_judge, augmented)}
    found = kept(folder, "judge", key, make)
    judge = WordJudge(len(words)).to(device).eval()
    judge.load_state_dict(found["weights"])
    readable = found["readable"].nonzero().flatten().tolist()
    why = "" if readable else "the judge can read none of the frequent words off the pictures"
    return judge, [(i, words[i]) for i in readable], why


def frequent_words(captions, split):
    """Words that captions say of enough training pictures, and not of most: most frequent first."""
    said = Counter(word for texts in captions for word in set().union(*map(split, texts)))
    least, most = max(LEAST_PICTURES, SHARE[0] * len(captions)), SHARE[1] * len(captions)
    return [
        word for word, count in sorted(said.items(), key=lambda item: (-item[1], item[0])) if least <= count <= most
    ]


def label(captions, words, split):
    """N lists of captions -> (N, W): the share of a picture's captions that say the word."""
    number = {word: i for i, word in enumerate(words)}
    labels = torch.zeros(len(captions), len(words))
    for row, texts in zip(labels, captions):
        for text in texts:
            row[[number[word] for word in set(split(text)) if word in number]] += 1 / len(texts)
    return labels


def train_word_judge(pixels, labels, decode, device):
    """-> WordJudge, and which words it reads (W,) on every tenth picture, which it does not learn from."""
    count = max(1, min(len(pixels), SHOWN_PIXELS // pixels[0, 0].numel()))
    looked_at, shown = (small(x).to(device) for x in (pixels, decode(pixels[:count])))
    labels = labels.to(device)
    unseen = torch.arange(len(pixels)) % 10 == 9
    learned = (~unseen).nonzero().flatten()
    seed_step(SEED, 0)
    judge = WordJudge(labels.shape[1]).to(device, memory_format=torch.channels_last)
    steps = min(STEPS, 40 * len(learned) // BATCH + 1)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=LR, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps)
    progress = Progress(steps, "train the judge of words")
    for _ in range(steps):
        index = learned[torch.randint(len(learned), (BATCH,))]
        through_vae = (torch.rand(BATCH) < 0.5) & (index < count)
        index, through_vae = index.to(device), through_vae.to(device)[:, None, None, None]
        x = torch.where(through_vae, shown[index.clamp(max=count - 1)], looked_at[index])
        _, logits = judge(augmented(to_float(x, device)))
        loss = F.binary_cross_entropy_with_logits(logits, labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress.update()
    progress.close()
    judge.eval()
    scores = read_words(judge, (to_float(x, device) for x in looked_at[unseen.to(device)].split(256)))
    return judge, metrics.auc(scores, labels[unseen.to(device)].cpu() > 0) > READABLE  # NaN: not read


@torch.no_grad()
def read_words(judge, batches):
    """batches of x (B, 3, H, W) in [-1, 1] -> logits (N, W) on the CPU."""
    return torch.cat([judge(x)[1].float().cpu() for x in batches])


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
    key = {"size": cfg.image_size, "code": source_hash(scenes, SceneClassifier, train_classifier)}
    classifier = SceneClassifier().to(device).eval()
    made = kept(cfg.cache_dir, "classifier", key, lambda: cpu_weights(train_classifier(cfg, device)))
    classifier.load_state_dict(made)
    return classifier


def train_classifier(cfg, device):
    """Train on freshly painted scenes, with a little noise, so that it does not rely on single pixels."""
    labels = scenes_of(CLASSIFIER_SERIES, CLASSIFIER_SCENES)[1].to(device)
    pixels = paint_scenes(CLASSIFIER_SERIES, CLASSIFIER_SCENES, cfg)
    seed_step(CLASSIFIER_SERIES, 0)
    classifier = SceneClassifier().to(device)
    steps = CLASSIFIER_EPOCHS * len(pixels) // 64
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    progress = Progress(steps, "train classifier")
    for _ in range(steps):
        index = torch.randint(len(pixels), (64,))
        x = to_float(pixels[index], device)
        _, logits = classifier(x + 0.1 * torch.randn_like(x))
        loss = sum(F.cross_entropy(out, labels[index, i]) for i, out in enumerate(logits))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress.update()
    progress.close()
    return classifier.eval()


def scenes_of(series, count, combinations=None):
    """The first scenes of a series -> full captions; (count, 3) int64: the numbers of subject, colour and place."""
    found = [make_scene(series, i, combinations) for i in range(count)]
    labels = [[names.index(getattr(scene, a)) for a, names in ATTRIBUTES.items()] for scene in found]
    return [full_caption(scene.subject, scene.colour, scene.place) for scene in found], torch.tensor(labels)


def paint_scenes(series, count, cfg, combinations=None):
    """The same scenes as pictures -> uint8 (count, 3, S, S)."""
    return read_pictures(
        Scenes(series, count, cfg.image_size, combinations), cfg, progress_bar(f"paint series {series}")
    )[0]


# ---- Kept for the next evaluation -----------------------------------------------------------------------


def kept(folder, name, key, make):
    """make(), a dict of tensors: computed once and kept in a file that is known by `key`. folder "": not kept."""
    if not folder:
        return make()
    digest = hashlib.sha256(json.dumps(key | {"torch": torch.__version__}, sort_keys=True).encode()).hexdigest()
    path = os.path.join(folder, f"{name}-{digest[:16]}.pth")
    with suppress(UserError, ValueError, RuntimeError, EOFError, OSError):
        content = read_file(path, 1 << 28)
        if content[:64].decode() == hashlib.sha256(content[64:]).hexdigest():
            return torch.load(io.BytesIO(content[64:]), weights_only=True)
    made, buffer = make(), io.BytesIO()
    torch.save(made, buffer)
    os.makedirs(folder, exist_ok=True)
    write_file(path, hashlib.sha256(buffer.getvalue()).hexdigest().encode() + buffer.getvalue())
    return made


def cpu_weights(module):
    return {name: value.cpu() for name, value in module.state_dict().items()}
