"""Measure a finished run: every figure that README.md quotes comes from here.

  python evaluate.py                       the newest of runs/coco and runs/demo
  python evaluate.py --run_dir runs/demo --ema

Prints, and writes to <run_dir>/evaluation.json (evaluation_ema.json with --ema):
  VAE        held-out MSE and PSNR, mean and std of the latents
  denoising  held-out noise-prediction loss in ten bins of t
  prompts    on scenes only: pictures are generated for the prompts of a series that training does not use (not
             for new combinations: the 480 all occur in training), and a small classifier, trained here on
             freshly painted scenes of a series of its own, reads subject, colour and place off them. Its
             accuracy on real scenes is printed beside: it is the most that generated ones can reach.
What it is not: nothing of the run is trained or changed.
"""

import json
import os

import torch
import torch.nn as nn
import torch.nn.functional as F

from checkpoint import load_models, newest_run, write_file
from config import Parser, positive_int
from data import Scenes, open_dataset, read_pictures
from diffusion import configured_process, held_out_losses, sample
from scenes import COLOURS, PLACES, SUBJECTS, full_caption, make_scene
from text_encoder import make_text_encoder
from training import Progress, pick_device, run_script, save_grid, seed_step, show_progress, to_float
from vae import held_out_figures, reparameterize

CLASSIFIER_SERIES, REAL_SERIES, PROMPT_SERIES = 101, 102, 103  # series of scenes that no training uses
CLASSIFIER_SCENES, CLASSIFIER_EPOCHS, REAL_SCENES = 8192, 4, 1024
LOSS_BINS = 10
BATCH = 32  # pictures at a time
CLASSIFIER_SIZE = 64  # pixels; larger pictures are reduced to it
ATTRIBUTES = {"subject": list(SUBJECTS), "colour": list(COLOURS), "place": list(PLACES)}


def main():
    args = parse_args()
    run_dir = args.run_dir or newest_run()
    device = pick_device()
    cfg, _, vae, unet, t_embedder = load_models(run_dir, args.ema, device)
    source = args.text_encoder or cfg.text_encoder
    text_encoder = make_text_encoder(source, cfg.text_dim, cfg.text_length, cfg.text_encoder).to(device)

    held_out_set = open_dataset(cfg)[1]
    held_out, captions = read_pictures(held_out_set, cfg, show_progress("read held-out pictures"))
    suffix = "_ema" if args.ema else ""
    results = {"run_dir": run_dir, "ema": args.ema}
    seed_step(cfg.seed, 0)
    results["vae"] = held_out_figures(vae, (to_float(x, device) for x in held_out.split(BATCH)))
    results["denoising"] = denoising_losses(vae, unet, t_embedder, text_encoder, held_out, captions, cfg, device)
    if cfg.dataset == "scenes":
        results["prompts"], images = prompt_accuracy(vae, unet, t_embedder, text_encoder, args.num_prompts, cfg, device)
        save_grid(os.path.join(run_dir, f"evaluation{suffix}_samples.png"), images[:64], columns=8)
    report(results)
    write_file(os.path.join(run_dir, f"evaluation{suffix}.json"), json.dumps(results, indent=1).encode())


def parse_args():
    parser = Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--run_dir", help="a finished run (default: the newest of runs/coco and runs/demo)")
    parser.add_argument("--ema", action="store_true", help="measure the averaged weights")
    parser.add_argument(
        "--num_prompts", type=positive_int, default=256, help="prompts to judge, on scenes (default: 256)"
    )
    parser.add_argument("--text_encoder", help="clip, hash or a directory, if not what the run was trained with")
    return parser.parse_args()


def denoising_losses(vae, unet, t_embedder, text_encoder, held_out, captions, cfg, device):
    """-> {"mean": loss, "by_timestep": one loss per bin of t, least noise first}, at fixed noise."""
    seed_step(cfg.seed, 0)
    with torch.no_grad():
        z = torch.cat([reparameterize(*vae.encode(to_float(x, device))) for x in held_out.split(BATCH)])
    first_captions = [several[0] for several in captions]
    process = configured_process(cfg)
    t, loss = held_out_losses(unet, t_embedder, text_encoder, z, first_captions, process, BATCH)
    bins = t * LOSS_BINS // cfg.timesteps
    by_bin = [loss.cpu()[bins == b].mean().item() if (bins == b).any() else None for b in range(LOSS_BINS)]
    return {"mean": loss.mean().item(), "by_timestep": by_bin}


def prompt_accuracy(vae, unet, t_embedder, text_encoder, num_prompts, cfg, device):
    """-> shares right of generated and of real scenes, and the generated pictures (num_prompts, 3, H, W) in [0, 1]."""
    classifier = train_classifier(cfg, device)
    real = paint_scenes(REAL_SERIES, REAL_SCENES, cfg)
    real_labels = scene_labels(REAL_SERIES, REAL_SCENES)
    prompts = [full_caption(s.subject, s.colour, s.place) for s in scenes_of(PROMPT_SERIES, num_prompts)]
    images, progress = [], Progress(len(prompts), "generate")
    for i in range(0, len(prompts), BATCH):
        part = prompts[i : i + BATCH]
        images.append(sample(unet, vae, t_embedder, text_encoder, part, cfg.timesteps, len(part),
                             process=configured_process(cfg), seeds=range(i, i + len(part))))  # fmt: skip
        progress.update(len(part))
    progress.close()
    return {
        "num_prompts": len(prompts),
        "generated": accuracy(classifier, (2 * x - 1 for x in images), scene_labels(PROMPT_SERIES, len(prompts))),
        "real": accuracy(classifier, (to_float(x, device) for x in real.split(BATCH)), real_labels),
    }, torch.cat(images)


def report(results):
    """Print the figures as a table."""
    vae, denoising, prompts = results["vae"], results["denoising"], results.get("prompts")
    print(f"VAE, held-out     MSE {vae['mse']:.4f}, PSNR {vae['psnr_db']:.1f} dB, "
          f"latent mean {vae['latent_mean']:+.3f}, std {vae['latent_std']:.3f}")  # fmt: skip
    print(f"noise loss        {denoising['mean']:.4f}; by timestep "
          + " ".join("-" if v is None else f"{v:.3f}" for v in denoising["by_timestep"]))  # fmt: skip
    for kind in ("generated", "real") if prompts else ():
        shares = ", ".join(f"{name} {100 * share:.1f} %" for name, share in prompts[kind].items())
        print(f"prompts, {kind:10}{shares}")


class SceneClassifier(nn.Module):
    """x: (B, 3, 64, 64) in [-1, 1] -> logits of subject, colour and place."""

    def __init__(self):
        super().__init__()
        widths = (3, 32, 64, 128, 128)
        layers = []
        for a, b in zip(widths, widths[1:]):
            layers += [nn.Conv2d(a, b, 3, stride=2, padding=1), nn.BatchNorm2d(b), nn.ReLU()]
        self.features = nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 16, 256), nn.ReLU())  # (B, 256)
        self.heads = nn.ModuleList([nn.Linear(256, len(names)) for names in ATTRIBUTES.values()])

    def forward(self, x):
        h = self.features(F.interpolate(x, CLASSIFIER_SIZE, mode="area"))
        return [head(h) for head in self.heads]


def scene_labels(series, count):
    """-> (count, 3) int64: subject, colour and place of the scenes of a series."""
    rows = [[names.index(getattr(s, a)) for a, names in ATTRIBUTES.items()] for s in scenes_of(series, count)]
    return torch.tensor(rows)


def paint_scenes(series, count, cfg):
    """-> uint8 (count, 3, S, S): the first scenes of a series."""
    return read_pictures(Scenes(series, count, cfg.image_size), cfg, show_progress(f"paint series {series}"))[0]


def scenes_of(series, count):
    return [make_scene(series, i) for i in range(count)]


def train_classifier(cfg, device):
    """Train on freshly painted scenes, a little noise added so that it does not lean on single pixels."""
    labels = scene_labels(CLASSIFIER_SERIES, CLASSIFIER_SCENES).to(device)
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
        logits = classifier(x + 0.1 * torch.randn_like(x))
        loss = sum(F.cross_entropy(out, labels[index, i]) for i, out in enumerate(logits))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress.update()
    progress.close()
    return classifier.eval()


@torch.no_grad()
def accuracy(classifier, batches, labels):
    """batches of x (B, 3, H, W) in [-1, 1] -> share right, by attribute and with all three right."""
    read = torch.cat([torch.stack([out.argmax(1) for out in classifier(x)], dim=1) for x in batches])
    right = read == labels.to(read.device)
    return {a: right[:, i].float().mean().item() for i, a in enumerate(ATTRIBUTES)} | {
        "all": right.all(dim=1).float().mean().item()
    }


if __name__ == "__main__":
    run_script(main)
