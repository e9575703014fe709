"""Measure a finished run: the figures of a trained model in README.md come from here.

  python evaluate.py                                    the newest of runs/<preset>
  python evaluate.py --run_dir runs/demo --ema --num_prompts 1024 --steps 50

Prints a table; writes evaluation.json, evaluation_samples.png and evaluation_nearest.png (evaluation_ema... with
--ema) to the run directory:
  VAE          held-out MSE and PSNR, mean and std of the latents
  loss         held-out, in ten bins of t, over the least that Gaussian latents of the training set's covariance
               allow (1: as good as the best linear denoiser), and over that of white ones (what their variance tells)
  captions     what the loss gains by another picture's caption, and by an empty one: near 0, the text is not heard
  distances    Frechet and kernel distance of generated to real pictures, and of real to real ones: the floor
  brightness   how much generated latents differ in their channel means, over how much those of training do
  memorised    the training picture nearest to each generated one, beside that nearest to each held-out one
  prompts      on scenes: a small classifier, trained here on freshly painted scenes of a series of its own, reads
               subject, colour and place off pictures of prompts; its accuracy on real scenes is the most they can reach
  composition  the same for combinations of the three that training never showed, after --held_out_combinations
What it is not: nothing of the run is trained or changed, and the distances are no FID: on scenes their features are
the classifier's; on photographs those of a random network, which notices wrong colours, textures and layouts but
knows no objects. They compare runs on the same pictures, at the same number of pictures; --fid_and_clip has FID.
"""

import json
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

import metrics
from checkpoint import check_text_encoder, load_models, newest_run, write_file
from config import Parser, SDConfig, UserError, positive_int
from data import Scenes, read_pictures, read_pictures_of
from diffusion import configured_process, fitted_start, held_out_losses, levels, sample
from scenes import COLOURS, PLACES, SUBJECTS, full_caption, make_scene, split_combinations
from text_encoder import make_text_encoder
from training import (
    Progress,
    add_sampling_flags,
    encode_pictures,
    make_autocast,
    pick_device,
    run_script,
    sampling_options,
    save_grid,
    seed_step,
    show_progress,
    to_float,
)
from vae import held_out_figures, num_together, reparameterize

CLASSIFIER_SERIES, REAL_SERIES, PROMPT_SERIES = 101, 102, 103  # series of scenes that no training uses
CLASSIFIER_SCENES, CLASSIFIER_EPOCHS, REAL_SCENES = 8192, 4, 1024
CLASSIFIER_SIZE = 64  # pixels; larger pictures are reduced to it
ATTRIBUTES = {"subject": list(SUBJECTS), "colour": list(COLOURS), "place": list(PLACES)}
LOSS_BINS = 10
LOSS_DRAWS = 4  # times and noises per held-out picture
LATENT_NUMBERS = 2**24  # of the training latents that are looked at: bounds memory, and time without a GPU
NEAREST_SIZE, NEAREST_SHOWN = 16, 8  # side at which pictures are compared [pixels]; pairs in the PNG
BATCH = 32  # prompts at a time


class Model(NamedTuple):
    """A trained run, ready to be measured."""

    cfg: SDConfig
    vae: nn.Module
    unet: nn.Module
    t_embedder: nn.Module
    text_encoder: nn.Module
    device: torch.device
    autocast: Callable


def main():
    # ---- Set-up ----
    args = parse_args()
    run_dir = args.run_dir or newest_run()
    model, name = load_run(run_dir, args)
    cfg = model.cfg
    options = sampling_options(args, cfg)
    library = load_library(model.device) if args.fid_and_clip else None  # first, because it may not be there
    asked = options | {"start": args.start, "pictures": args.num_prompts}
    results = {"run_dir": run_dir, "model": name, "ema": args.ema, "sampling": asked}
    files = os.path.join(run_dir, "evaluation_ema" if args.ema else "evaluation")

    # ---- Data ----
    train, _, held_out, captions = read_pictures_of(run_dir, cfg, args.data_root, show_progress)
    if len(train) < 2:
        raise UserError(f"--run_dir {run_dir}: trained on one picture, whose variance is unknown; train on more")
    some = train[: max(2, LATENT_NUMBERS // latent_numbers(cfg) // (2 if cfg.horizontal_flips else 1))]
    latents = encode(model, torch.cat([some, some.flip(3)]) if cfg.horizontal_flips else some)
    held_out_latents = encode(model, held_out)
    if args.start == "fitted":
        options["start"] = fitted_start(*metrics.latent_gaussian(*latents), configured_process(cfg))
    seen, unseen = split_combinations(cfg.held_out_combinations)
    if cfg.dataset == "scenes":
        judge, prompts = train_classifier(cfg, model.device), scene_prompts(args.num_prompts, seen)
        real = paint_scenes(REAL_SERIES, max(REAL_SCENES, 2 * args.num_prompts), cfg, seen)
    else:
        judge, prompts = random_classifier(held_out, model.device), caption_prompts(captions, args.num_prompts)
        real = held_out

    # ---- VAE and denoiser ----
    seed_step(cfg.seed, 0)
    results["vae"] = held_out_figures(model.vae, batches(held_out, model.device))
    losses = caption_losses(model, held_out_latents, [several[0] for several in captions])
    results["denoising"] = loss_over_bounds(*losses["matched"], latents, cfg)
    results["captions"] = conditioning_gaps(losses)

    # ---- Generated pictures ----
    pictures, z = generate(model, prompts, 0, options, "generate")
    results["distances"] = distances(judge, pictures, real, model.device)
    results["channel_means"] = channel_means(z, held_out_latents, latents)
    results["memorisation"] = memorisation(pictures, held_out, train, cfg, f"{files}_nearest.png")
    if cfg.dataset == "scenes":
        results["prompts"] = prompt_accuracy(judge, pictures, real, seen, model.device)
    if cfg.held_out_combinations:
        strange, _ = generate(model, scene_prompts(args.num_prompts, unseen), len(prompts), options, "generate unseen")
        real_strange = paint_scenes(REAL_SERIES, REAL_SCENES, cfg, unseen)
        results["composition"] = prompt_accuracy(judge, strange, real_strange, unseen, model.device)
    save_grid(f"{files}_samples.png", pictures[:64].float() / 255, columns=8)
    write_file(f"{files}.json", json.dumps(results, indent=1).encode())
    if library:  # last, because downloads may fail
        results["library"] = library_metrics(*library, pictures, real, prompts, model.device)
        write_file(f"{files}.json", json.dumps(results, indent=1).encode())

    # ---- Done ----
    print(table(results))


def parse_args():
    parser = Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--run_dir", help="a finished run (default: the newest of runs/<preset>)")
    parser.add_argument("--ema", action="store_true", help="measure the averaged weights")
    parser.add_argument("--num_prompts", type=positive_int, default=256,
                        help="pictures to generate, and as many of combinations held out (default: 256)")  # fmt: skip
    add_sampling_flags(parser)
    parser.add_argument("--text_encoder", help="clip, hash or a directory, if not what the run was trained with")
    parser.add_argument("--data_root", help="where the pictures of the run are, if they have moved")
    parser.add_argument("--fid_and_clip", action="store_true", help="FID and CLIP score too; needs torchmetrics")
    args = parser.parse_args()
    if args.num_prompts < 2:
        parser.error("--num_prompts: 1 is out of range; give 2 or more")
    return args


def load_run(run_dir, args):
    """-> Model, name of the U-Net's file."""
    device = pick_device()
    cfg, name, vae, unet, t_embedder = load_models(run_dir, args.ema, device)
    source = args.text_encoder or cfg.text_encoder
    text_encoder = make_text_encoder(source, cfg.text_dim, cfg.text_length, cfg.text_encoder).to(device).eval()
    check_text_encoder(run_dir, text_encoder)
    autocast = make_autocast(device, cfg.mixed_precision)
    return Model(cfg, vae, unet, t_embedder, text_encoder, device, autocast), name


# ---- Between the model and its measures -----------------------------------------------------------------


def latent_numbers(cfg):
    return cfg.latent_channels * cfg.latent_size**2


def encode(model, pixels):
    return encode_pictures(model.vae, pixels, model.device, Progress(len(pixels), "encode pictures"))


def caption_losses(model, latents, captions):
    """-> {matched, shuffled, empty: (t, loss)}, (LOSS_DRAWS N,) each: held-out losses at the same z, t and noise,
    differing only in the captions; picture i has the rows i, i + N, i + 2N ...
    """
    cfg, losses = model.cfg, {}
    others = captions[1:] + captions[:1]  # the pictures are in no order, so the next one is any other
    for kind, texts in {"matched": captions, "shuffled": others, "empty": [""] * len(captions)}.items():
        seed_step(cfg.seed, 1)
        z = torch.cat([reparameterize(*latents) for _ in range(LOSS_DRAWS)]).to(model.device)
        t, loss = held_out_losses(model.unet, model.t_embedder, model.text_encoder, z, texts * LOSS_DRAWS,
                                  configured_process(cfg), BATCH)  # fmt: skip
        losses[kind] = t.cpu(), loss.cpu().double()
    return losses


@torch.no_grad()
def generate(model, prompts, first_seed, options, what):
    """One picture per prompt -> uint8 (N, 3, S, S), as a file would keep them, and their latents before decoding."""
    pictures, latents, progress = [], [], Progress(len(prompts), what)
    hook = model.vae.decoder.register_forward_pre_hook(lambda _, inputs: latents.append(inputs[0].cpu()))
    for i in range(0, len(prompts), BATCH):
        part = prompts[i : i + BATCH]
        seeds = range(first_seed + i, first_seed + i + len(part))
        with model.autocast():
            x = sample(model.unet, model.vae, model.t_embedder, model.text_encoder, part, num_samples=len(part),
                       process=configured_process(model.cfg), seeds=seeds, **options)  # fmt: skip
        if not x.isfinite().all():
            raise UserError("--run_dir: its U-Net gives values that are not numbers; train again with a lower --lr")
        pictures.append((255 * x).round().byte().cpu())
        progress.update(len(part))
    hook.remove()
    progress.close()
    return torch.cat(pictures), torch.cat(latents)


def scene_prompts(count, combinations):
    return [full_caption(s.subject, s.colour, s.place) for s in scenes_of(PROMPT_SERIES, count, combinations)]


def caption_prompts(captions, count):
    """`count` captions of held-out pictures: the first of each picture, then the second ones, and so round."""
    several = [captions[i % len(captions)] for i in range(count)]
    return [texts[i // len(captions) % len(texts)] for i, texts in enumerate(several)]


# ---- Measures -------------------------------------------------------------------------------------------


def loss_over_bounds(t, loss, latents, cfg):
    """Losses at times t (N,), and latents of training (mu, log_var) -> dict: loss and its ratio to the two bounds,
    mean and by bin of t, least noise first. wiener is None where latents are too large for their covariance.
    """
    target, (a, b) = cfg.prediction_type, levels(configured_process(cfg), t)
    bins = (t * LOSS_BINS / cfg.timesteps).long()
    figures = {"target": target, "mean": loss.mean().item(), "by_timestep": metrics.mean_by_bin(loss, bins, LOSS_BINS)}
    figures |= {"latents": len(latents[0]), "latent_numbers": latent_numbers(cfg), "wiener": None}
    eigenvalues = {"white": latents[0].double().var(dim=0).mean() + latents[1].double().exp().mean()}
    if latent_numbers(cfg) <= metrics.LARGEST_COVARIANCE:
        eigenvalues["wiener"] = torch.linalg.eigvalsh(metrics.latent_covariance(*latents)).clamp(min=0)
    for kind, values in eigenvalues.items():
        bound = metrics.wiener_bound(a, b, values.reshape(-1), target)
        by_bin = zip(figures["by_timestep"], metrics.mean_by_bin(bound, bins, LOSS_BINS))
        figures[kind] = {"bound": bound.mean().item(), "ratio": (loss.mean() / bound.mean()).item(),
                         "by_timestep": [v and v / w for v, w in by_bin]}  # fmt: skip
    return figures


def conditioning_gaps(losses):
    """-> {shuffled, empty: how much more that costs than the matched caption, and its standard error over pictures}."""
    gaps = {}
    for kind in ("shuffled", "empty"):
        by_picture = (losses[kind][1] - losses["matched"][1]).view(LOSS_DRAWS, -1).mean(dim=0)
        gaps[kind] = dict(zip(("gap", "standard_error"), metrics.mean_and_error(by_picture)))
    return gaps


def distances(judge, generated, real, device):
    """Distances of n generated to n real pictures, and of n other real ones to the same: the floor; {} without them."""
    n = min(len(generated), len(real) // 2)
    if n < 2:
        return {}
    g, a, b = (features_of(judge, x, device) for x in (generated[:n], real[:n], real[n : 2 * n]))
    return {"pictures": n, "frechet": metrics.frechet_distance(g, a), "frechet_floor": metrics.frechet_distance(b, a),
            "kernel": metrics.kernel_distance(g, a), "kernel_floor": metrics.kernel_distance(b, a)}  # fmt: skip


def channel_means(z, held_out, train):
    """How much generated latents z (N, C, h, w) differ in brightness, over how much those of training do: variances of
    the channels' means over pictures, summed over channels, and by channel. held_out: the same ratio for real pictures
    not trained on. Latents, not pictures, because it is there that a schedule shows; as decoded, that is scaled and
    clipped. held_out, train: (mu, log_var).
    """
    seed_step(CLASSIFIER_SERIES, 1)
    real, generated = (metrics.channel_mean_variances(x) for x in (reparameterize(*train), z))
    other = metrics.channel_mean_variances(reparameterize(*held_out)) if len(held_out[0]) > 1 else None  # one has none
    return {"ratio": (generated.sum() / real.sum()).item(), "by_channel": (generated / real).tolist(),
            "held_out": None if other is None else (other.sum() / real.sum()).item()}  # fmt: skip


def memorisation(generated, held_out, train, cfg, path):
    """Root mean squared differences, in pixel values of [0, 1], to the nearest training picture at NEAREST_SIZE.

    nearer: share of the generated pictures that are nearer than the nearest 5 % of the held-out ones, about 0.05 if
    nothing is memorised. path: PNG of the closest pairs, the generated picture left of the training picture.
    """

    def chunks():
        for mirrored in (False, True) if cfg.horizontal_flips else (False,):
            for x in train.split(1024):
                yield metrics.reduced(x.flip(3) if mirrored else x, NEAREST_SIZE)

    distance, number = metrics.nearest(metrics.reduced(generated, NEAREST_SIZE), chunks())
    usual, _ = metrics.nearest(metrics.reduced(held_out, NEAREST_SIZE), chunks())
    closest = distance.argsort()[:NEAREST_SHOWN]
    n = len(train)
    near = torch.stack([train[i] if i < n else train[i - n].flip(2) for i in number[closest].tolist()])
    pairs = torch.stack([generated[closest], near], dim=1).flatten(0, 1)
    save_grid(path, pairs.float() / 255, columns=4)
    return {"nearer": (distance < usual.quantile(0.05)).float().mean().item(),
            "generated": {"median": distance.median().item(), "least": distance.min().item()},
            "held_out": {"median": usual.median().item(), "least": usual.min().item()}}  # fmt: skip


def prompt_accuracy(judge, pictures, real, combinations, device):
    """-> shares right of pictures of the prompts with these combinations, and of the real scenes with them."""
    return {"num_prompts": len(pictures)} | {
        kind: accuracy(judge, batches(x, device), scene_labels(series, len(x), combinations))
        for kind, x, series in (("generated", pictures, PROMPT_SERIES), ("real", real, REAL_SERIES))
    }


def batches(pixels, device):
    return (to_float(x, device) for x in pixels.split(num_together(pixels[0, 0].numel())))


@torch.no_grad()
def accuracy(classifier, batches, labels):
    """batches of x (B, 3, H, W) in [-1, 1] -> share right, by attribute and with all three right."""
    read = torch.cat([torch.stack([out.argmax(1) for out in classifier(x)], dim=1) for x in batches])
    right = read == labels.to(read.device)
    return {a: right[:, i].float().mean().item() for i, a in enumerate(ATTRIBUTES)} | {
        "all": right.all(dim=1).float().mean().item()
    }


# ---- The judge ------------------------------------------------------------------------------------------


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

    def describe(self, x):
        on = "cpu" if x.device.type == "mps" else x.device  # MPS shrinks by whole factors alone
        return self.features(F.interpolate(x.to(on), CLASSIFIER_SIZE, mode="area").to(x.device))

    def forward(self, x):
        h = self.describe(x)
        return [head(h) for head in self.heads]


@torch.no_grad()
def features_of(judge, pixels, device):
    """uint8 pictures (N, 3, S, S) -> the judge's features (N, 256), double, on the CPU."""
    return torch.cat([judge.describe(x).cpu().double() for x in batches(pixels, device)])


def scenes_of(series, count, combinations=None):
    return [make_scene(series, i, combinations) for i in range(count)]


def scene_labels(series, count, combinations=None):
    """-> (count, 3) int64: subject, colour and place of the scenes of a series."""
    scenes = scenes_of(series, count, combinations)
    return torch.tensor([[names.index(getattr(s, a)) for a, names in ATTRIBUTES.items()] for s in scenes])


def paint_scenes(series, count, cfg, combinations=None):
    """-> uint8 (count, 3, S, S): the first scenes of a series."""
    scenes = Scenes(series, count, cfg.image_size, combinations)
    return read_pictures(scenes, cfg, show_progress(f"paint series {series}"))[0]


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
def random_classifier(pixels, device):
    """For photographs: the classifier untrained, its weights the same for every run, its BatchNorms set by `pixels`.

    Without the latter its signal would drown in its biases. Naeem et al. 2020 (2002.09797) find random features
    sensible far from ImageNet; features of the run's own VAE would change with the run that they are to judge.
    """
    seed_step(CLASSIFIER_SERIES, 0)
    judge = SceneClassifier().to(device)
    for norm in (m for m in judge.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.momentum = 1.0  # running statistics: those of the one batch
    judge.describe(to_float(pixels[: 8 * BATCH], device))
    return judge.eval()


# ---- By other people's weights --------------------------------------------------------------------------


def load_library(device):
    """torchmetrics' FID (Inception-v3) and CLIP score (CLIP ViT-L/14); UserError if they or their weights are not there.

    Written from their documentation and tried only where they are missing: no weights could be had here.
    """
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
        from torchmetrics.multimodal.clip_score import CLIPScore

        return FrechetInceptionDistance().to(device), CLIPScore("openai/clip-vit-large-patch14").to(device)
    except Exception as e:  # missing packages and failed downloads raise many kinds
        raise UserError(f"--fid_and_clip: {type(e).__name__}: {str(e)[:200]}; pip install torchmetrics torch-fidelity "
                        "transformers, and see that their weights can be downloaded; or leave it out") from None  # fmt: skip


@torch.no_grad()
def library_metrics(fid, clip, pictures, real, prompts, device):
    """uint8 pictures of prompts, and as many real ones where there are -> {"fid", "clip_score", "pictures"}."""
    for x in real[: len(pictures)].split(BATCH):
        fid.update(x.to(device), real=True)
    for i, x in enumerate(pictures.split(BATCH)):
        fid.update(x.to(device), real=False)
        clip.update(list(x.to(device)), prompts[i * BATCH : i * BATCH + len(x)])
    return {
        "fid": fid.compute().item(),
        "clip_score": clip.compute().item(),
        "pictures": [len(pictures), min(len(real), len(pictures))],
    }


# ---- The table ------------------------------------------------------------------------------------------


def table(results):
    """All figures as one text: what was measured, and what to hold it against."""
    sampling, denoising = results["sampling"], results["denoising"]
    title = f"{results['run_dir']}, {results['model']}: " + ", ".join(f"{k} {v}" for k, v in sampling.items())
    rows = [("", "measured", "to compare with"), *loss_rows(results), *picture_rows(results)]
    lines = [f"{what:34}{measured:>10}   {compare}".rstrip() for what, measured, compare in rows]
    lines += ["by timestep, least noise first", by_bin("loss", denoising["by_timestep"], 4)]
    lines += [by_bin(f"over {k}", denoising[k]["by_timestep"], 2) for k in ("white", "wiener") if denoising[k]]
    return "\n".join([title, *lines])


def loss_rows(results):
    vae, denoising = results["vae"], results["denoising"]
    yield "VAE, held-out MSE", f"{vae['mse']:.4f}", f"PSNR {vae['psnr_db']:.1f} dB"
    yield "latent std", f"{vae['latent_std']:.3f}", f"mean {vae['latent_mean']:+.3f}"
    yield f"loss ({denoising['target']})", f"{denoising['mean']:.4f}", ""
    for kind in (kind for kind in ("white", "wiener") if denoising[kind]):
        bound = denoising[kind]
        yield f"loss over {kind} bound", f"{bound['ratio']:.3f}", f"1 is a loss of {bound['bound']:.4f}"
    for kind, gap in results["captions"].items():
        error = "" if gap["standard_error"] is None else f"standard error {gap['standard_error']:.4f}"
        yield f"loss, {kind} - matched caption", f"{gap['gap']:+.4f}", error


def picture_rows(results):
    distances, means, nearest = (results[k] for k in ("distances", "channel_means", "memorisation"))
    if distances:
        yield f"Frechet distance, n = {distances['pictures']}", *pair(distances, "frechet", "frechet_floor", "{:.4g}")
        yield f"kernel distance, n = {distances['pictures']}", *pair(distances, "kernel", "kernel_floor", "{:.4g}")
    yield "channel-mean variance ratio", *pair(means, "ratio", "held_out", "{:.3f}")
    medians = {kind: nearest[kind]["median"] for kind in ("generated", "held_out")}
    yield "nearest training picture, median", *pair(medians, "generated", "held_out", "{:.4f}")
    yield "nearer than 5 % of real ones", f"{nearest['nearer']:.1%}", "5.0%"
    for kind in (kind for kind in ("prompts", "composition") if kind in results):
        for a in (*ATTRIBUTES, "all"):
            shares = {who: results[kind][who][a] for who in ("generated", "real")}
            yield f"{kind}, {a} right", *pair(shares, "generated", "real", "{:.1%}")
    if library := results.get("library"):
        generated, real = library["pictures"]
        yield f"FID, n = {generated} and {real} real", f"{library['fid']:.4g}", "lower with more pictures"
        yield f"CLIP score, n = {generated}", f"{library['clip_score']:.2f}", ""


def pair(figures, measured, real, form):
    """-> the second and third column: a figure, and the same of real pictures."""
    return form.format(figures[measured]), "" if figures[real] is None else f"real {form.format(figures[real])}"


def by_bin(what, values, digits):
    return f"{what:12}" + " ".join(f"{'-':>6}" if v is None else f"{v:6.{digits}f}" for v in values)


if __name__ == "__main__":
    run_script(main)
