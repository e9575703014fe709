"""Measure a finished run.

  python evaluate.py                                    the newest of runs/<preset>
  python evaluate.py --run_dir runs/demo --ema --num_prompts 1024 --steps 50

Prints a table and writes evaluation.json, evaluation_samples.png and evaluation_nearest.png (with --ema
evaluation_ema..., with --epoch 5 evaluation_epoch5..., with --vae evaluation_vae...) to the run directory:
  VAE          MSE, PSNR and SSIM of held-out pictures, and how much of their energy survives, by octave of frequency;
               mean and standard deviation of latents; with --vae how far the pictures of both decoders are from real ones
  loss         of held-out pictures, divided by the least that Gaussian latents allow: with the covariance of training
               (wiener; 1 is as good as the best linear denoiser), and with its mean variance alone (white)
  captions     how much the loss rises with another picture's caption, or none; near 0, the text is not heard
  words        on photographs: how well a small network, trained here on the training pictures, reads the prompts' words
               off the pictures (mean AUC: 0.5 is nothing heard), beside real pictures, and real ones through the VAE
  distances    Frechet and kernel distance of generated to real pictures, and of other real ones to the same
  looks        contrast and colourfulness of generated pictures, divided by those of real ones through the VAE
  channels     how much the channel means of generated latents vary, divided by how much those of training do
  memorised    how near the nearest training picture is to generated ones, and to held-out ones
  prompts      on scenes: how often a small classifier reads the prompt's subject, colour and place off the picture; its
               accuracy on real scenes is the most that is possible
  composition  the same for combinations of the three that training never showed (--held_out_combinations)
What it is not: the run is neither trained nor changed, and the distances are no FID: their features are those of the
judges in support/judges.py. They compare runs on the same pictures, at the same number of pictures. --fid and
--clip_score give the measures of published papers.
"""

import json
import math
import os
from functools import partial
from types import SimpleNamespace

import torch

import data
import metrics
from diffusion import amplitudes, configured_process, decode, held_out_losses, sample
from scenes import split_combinations
from support import checkpoint, devices, errors, files, flags, judges, models, published, show
from support.judges import ATTRIBUTES, paint_scenes, scenes_of
from text_encoder import CLIP_NAME
from training import seed_step
from vae import held_out_figures, pictures_per_pass, reparameterize

REAL_SERIES, PROMPT_SERIES = 102, 103  # series of scenes that neither a training nor a judge uses
REAL_SCENES = 1024
LEAST_PROMPTS = 5  # with a word, and without it, that its AUC is measured from
LOSS_BINS, LOSS_DRAWS = 10, 4  # bins of t; times and noises per held-out picture
LATENT_NUMBERS = 2**24  # of the training latents that are looked at: bounds memory and time
LARGEST_COVARIANCE = 4096  # numbers in a latent (256 pixels): beyond it the eigenvalues take hours
NEAREST_SIZE, NEAREST_SHOWN = 16, 8  # side at which pictures are compared [pixels]; pairs in the PNG
BATCH = 32  # prompts at a time


def main():
    # ---- Set-up ----
    args = parse_args()
    run_dir, device = args.run_dir or models.newest_run(), devices.pick_device()
    cfg, name, vae, unet, t_embedder = models.load_models(run_dir, args.ema, device, epoch=args.epoch)
    encoder = models.load_text_encoder(run_dir, cfg, args.text_encoder, device, args.epoch)
    run = SimpleNamespace(cfg=cfg, vae=vae, unet=unet, t_embedder=t_embedder, text_encoder=encoder, device=device)
    run.autocast = devices.make_autocast(device, cfg.mixed_precision)
    options = flags.sampling_options(args, cfg)
    # load these now, because what they need may not be there
    other = models.load_other_decoder(args.vae, cfg, vae, device, run_dir) if args.vae else None
    sources = ("fid", published.load_fid, args.fid), ("clip_score", published.load_clip_score, args.clip_score)
    measures = {name: make(source, device) for name, make, source in sources if source is not None}

    # ---- Data ----
    train, train_captions, held_out, captions = data.read_pictures_of(run_dir, cfg, args.data_root)
    if len(train) < 2:
        raise errors.UserError(f"--run_dir {run_dir}: trained on one picture, which has no variance; train on more")
    some = train[: max(2, LATENT_NUMBERS // math.prod(unet.latent_shape) // (2 if cfg.horizontal_flips else 1))]
    latents = encode(run, torch.cat([some, some.flip(3)]) if cfg.horizontal_flips else some)
    held_out_latents = encode(run, held_out)
    seen, unseen = split_combinations(cfg.held_out_combinations)
    if cfg.dataset == "scenes":
        judge, prompts = judges.scene_classifier(cfg, device), scenes_of(PROMPT_SERIES, args.num_prompts, seen)[0]
        real = paint_scenes(REAL_SERIES, max(REAL_SCENES, 2 * args.num_prompts), cfg, seen)
    else:
        made_from = checkpoint.newest_epoch_set(run_dir, "unet")[1]["made_from"]
        key = {"data": data.fingerprint(train, train_captions), "vae": made_from}
        show_it = partial(through_vae, run)
        judge, words, why = judges.word_judge(train, train_captions, encoder.split, show_it, key, cfg.cache_dir, device)
        real, prompts = held_out, caption_prompts(captions, args.num_prompts)
    run.vae = other or vae  # now: the judge of words has learned from pictures as the run's own VAE shows them
    if args.fid is not None and len(real) < 2:
        raise errors.UserError("--fid: one held-out picture has no variance; leave the flag out")

    # ---- VAE and denoiser ----
    results = {"run_dir": run_dir, "model": name, "ema": args.ema, "decoder": args.vae}
    results["sampling"] = options | {"pictures": args.num_prompts}
    seed_step(cfg.seed, 0)
    results["vae"] = held_out_figures(run.vae, batches(held_out, device))
    t, loss, gaps = caption_losses(run, held_out_latents, [several[0] for several in captions])
    results |= {"denoising": loss_over_bounds(t, loss, latents, cfg), "captions": gaps}

    # ---- Generated pictures ----
    pictures, z = generate(run, prompts, 0, options, "generate")
    seed_step(cfg.seed, 0)
    shown = through_vae(run, held_out)
    if other:
        whole = whole_judge(judge, train, train_captions, encoder.split, cfg, device)
        results["decoders"] = compare_decoders(whole, {"own": vae, "other": other}, z, held_out, real, run)
    results["looks"] = {
        name: measure(pictures) / max(measure(shown), 1e-6)
        for name, measure in (("contrast", metrics.contrast), ("colourfulness", metrics.colourfulness))
    }
    results["distances"] = distances(judge, pictures, real, device)
    results["channel_means"] = channel_means(z, held_out_latents, latents)
    suffix = ("_ema" if args.ema else "") + (f"_epoch{args.epoch}" if args.epoch else "") + ("_vae" if args.vae else "")
    stem = os.path.join(run_dir, f"evaluation{suffix}")
    results["memorisation"] = memorisation(pictures, held_out, train, cfg, f"{stem}_nearest.png")
    if cfg.dataset == "scenes":
        results["prompts"] = prompt_accuracy(judge, pictures, real, seen, device)
    else:
        index = torch.arange(len(prompts)) % len(held_out)
        sets = {"generated": pictures, "reconstructed": shown[index], "real": held_out[index]}
        results["words"] = words_heard(judge, words, why, prompts, sets, encoder.split, device)
    if cfg.held_out_combinations:
        strange_prompts, _ = scenes_of(PROMPT_SERIES, args.num_prompts, unseen)
        strange, _ = generate(run, strange_prompts, len(prompts), options, "generate unseen")
        real_strange = paint_scenes(REAL_SERIES, REAL_SCENES, cfg, unseen)
        results["composition"] = prompt_accuracy(judge, strange, real_strange, unseen, device)
    show.save_grid(f"{stem}_samples.png", pictures[:64].float() / 255, columns=8)
    files.write_file(f"{stem}.json", json.dumps(results, indent=1).encode())
    failures = measure_by_others(measures, results, pictures, real, prompts)
    files.write_file(f"{stem}.json", json.dumps(results, indent=1).encode())
    print(table(results))
    if failures:
        raise errors.UserError(f"{'; '.join(failures)}; all other figures are in {stem}.json")


def parse_args():
    parser = flags.Parser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--run_dir", help="a finished run (default: the newest of runs/<preset>)")
    add("--epoch", type=flags.positive_int, metavar="N", help="measure this epoch (default: the newest)")
    add("--ema", action="store_true", help="measure the averaged weights")
    add(
        "--vae",
        metavar="RUN_DIR",
        help="decode with this run's VAE (train_vae.py --finetune_decoder_of), and compare the two",
    )
    add("--num_prompts", type=flags.positive_int, default=256, help="pictures of each kind to generate (default: 256)")
    flags.add_sampling_flags(parser)
    add("--text_encoder", help="clip, hash or a directory, if not what the run was trained with")
    add("--data_root", help="where the pictures of the run are, if they have moved")
    weights = "FID too, by torch-fidelity; WEIGHTS: its file of Inception-v3 (default: it downloads it)"
    add("--fid", nargs="?", const="", metavar="WEIGHTS", help=weights)
    folder = f"CLIP score too; DIR: a CLIP model (default: {CLIP_NAME} from the hub)"
    add("--clip_score", nargs="?", const=CLIP_NAME, metavar="DIR", help=folder)
    args = parser.parse_args()
    if args.num_prompts < 2:
        parser.error("--num_prompts: 1 is out of range; give 2 or more")
    return args


def batches(pixels, device):
    """uint8 pictures (N, 3, S, S) -> float32 (B, 3, S, S) in [-1, 1] on `device`, part by part."""
    return (data.to_float(x, device) for x in pixels.split(pictures_per_pass(pixels[0, 0].numel())))


@torch.no_grad()
def encode(run, pixels):
    """uint8 pictures (N, 3, S, S) -> mu, log_var: (N, C, s, s) each, on the CPU."""
    progress, parts = show.Progress(len(pixels), "encode pictures"), []
    for x in batches(pixels, run.device):
        parts.append(torch.stack(run.vae.encode(x)).cpu())  # (2, B, C, s, s)
        progress.update(len(x))
    progress.close()
    return torch.cat(parts, dim=1)


@torch.no_grad()
def through_vae(run, pixels):
    """uint8 pictures (N, 3, S, S) -> the same as the VAE shows them, decoded from a draw of their latents."""
    shown = (run.vae(x)[2].clamp(-1, 1) for x in batches(pixels, run.device))
    return torch.cat([((x_hat + 1) * 127.5).round().byte().cpu() for x_hat in shown])


def caption_losses(run, latents, captions):
    """Held-out losses at times t -> t, loss: (LOSS_DRAWS N,) each; {shuffled, empty: what other captions cost more}.

    All at the same z, t and noise; picture i has the rows i, i + N, i + 2N ... Standard errors are over the pictures
    whose caption is another; None, and why, where there are none.
    """

    def losses(texts):
        seed_step(run.cfg.seed, 1)
        z = torch.cat([reparameterize(*latents) for _ in range(LOSS_DRAWS)]).to(run.device)
        networks, process = (run.unet, run.t_embedder, run.text_encoder), configured_process(run.cfg)
        t, loss = held_out_losses(*networks, z, texts * LOSS_DRAWS, process, BATCH)
        return t.cpu(), loss.cpu().double()

    t, matched = losses(captions)
    gaps = {}
    for kind, texts in {"shuffled": other_captions(captions), "empty": [""] * len(captions)}.items():
        differs = torch.tensor([text != own for text, own in zip(texts, captions)])
        gap = (losses(texts)[1] - matched).view(LOSS_DRAWS, -1).mean(dim=0)[differs]
        error = gap.std().item() / len(gap) ** 0.5 if len(gap) > 1 else None
        gaps[kind] = {"gap": gap.mean().item(), "standard_error": error} if len(gap) else None
    if gaps["shuffled"] is None:
        gaps["why"] = "no two held-out captions differ"
    return t, matched, gaps


def other_captions(captions):
    """For each picture the caption of the next one that has another; its own where all are alike."""
    twice = captions + captions  # the pictures are in no order, so the next one is any other
    following = (twice[i : i + len(captions)] for i in range(len(captions)))
    return [next((text for text in texts if text != texts[0]), texts[0]) for texts in following]


@torch.no_grad()
def generate(run, prompts, first_seed, options, what):
    """One picture per prompt -> uint8 (N, 3, S, S), rounded as in a file, and their latents before decoding."""
    pictures, latents, progress = [], [], show.Progress(len(prompts), what)
    hook = run.vae.decoder.register_forward_pre_hook(lambda _, inputs: latents.append(inputs[0].cpu()))
    networks, process = (run.unet, run.vae, run.t_embedder, run.text_encoder), configured_process(run.cfg)
    for i in range(0, len(prompts), BATCH):
        part = prompts[i : i + BATCH]
        seeds = range(first_seed + i, first_seed + i + len(part))
        with run.autocast():
            x = sample(*networks, part, num_samples=len(part), seeds=seeds, process=process, **options)
        if not x.isfinite().all():
            raise errors.UserError("--run_dir: its U-Net gives values that are not numbers; train with a lower --lr")
        pictures.append((255 * x).round().byte().cpu())
        progress.update(len(part))
    hook.remove()
    progress.close()
    return torch.cat(pictures), torch.cat(latents)


def caption_prompts(captions, count):
    """`count` captions of held-out pictures: the first of each picture, then the second ones, and so on."""
    several = [captions[i % len(captions)] for i in range(count)]
    return [texts[i // len(captions) % len(texts)] for i, texts in enumerate(several)]


# ---- Measures -------------------------------------------------------------------------------------------


def measure_by_others(measures, results, pictures, real, prompts):
    """Adds FID and CLIP score to the results -> [what failed and why]. Last and each by itself: nothing else is lost."""
    failures = []
    for name, measure in measures.items():
        print(f"measure {name}", flush=True)  # minutes on a CPU
        try:
            figures = measure(pictures, real, prompts)
            if not math.isfinite(figures["value"]):
                raise ValueError("its network gives values that are not numbers")
            results[name] = figures
        except Exception as e:  # of many kinds
            failures.append(f"--{name}: {str(e)[:300] or type(e).__name__}")
    return failures


def loss_over_bounds(t, loss, latents, cfg):
    """Losses at times t (N,), and latents of training (mu, log_var) -> dict: the loss, and its ratio to the bounds.

    Means, and by bin of t, least noise first. wiener is None where latents are too large for their covariance.
    """
    (a, b), size = amplitudes(configured_process(cfg), t), latents[0][0].numel()
    bins = (t * LOSS_BINS / cfg.timesteps).long()
    by_bin = metrics.mean_by_bin(loss, bins, LOSS_BINS)
    figures = {"target": cfg.prediction_type, "mean": loss.mean().item(), "by_timestep": by_bin}
    figures |= {"latents": len(latents[0]), "latent_numbers": size, "wiener": None}
    eigenvalues = {"white": latents[0].double().var(dim=0).mean() + latents[1].double().exp().mean()}
    if size <= LARGEST_COVARIANCE:
        eigenvalues["wiener"] = torch.linalg.eigvalsh(metrics.latent_covariance(*latents)).clamp(min=0)
    for kind, values in eigenvalues.items():
        bound = metrics.wiener_bound(a, b, values.reshape(-1), cfg.prediction_type)
        figures[kind] = {"bound": bound.mean().item(), "ratio": (loss.mean() / bound.mean()).item()}
        pairs = zip(by_bin, metrics.mean_by_bin(bound, bins, LOSS_BINS))
        figures[kind]["by_timestep"] = [v and v / least for v, least in pairs]
    return figures


@torch.no_grad()
def distances(judge, generated, real, device):
    """Distances of n generated to n real pictures, and of real pictures to others: the floor; {} without a judge or pictures.

    Where fewer than 2 n are real, the floor is measured between halves: the Frechet distance of two sets from one source is
    in proportion to 1 / n (docs/notebook.md), the kernel distance in expectation 0.
    """
    n, m = min(len(generated), len(real)), min(len(generated), len(real) // 2)
    if m < 2 or judge is None:
        return {}
    sets = (generated[:n], real[:n], real[:m], real[m : 2 * m])
    g, r, a, b = (features(judge, pixels, device) for pixels in sets)
    frechet, kernel = metrics.frechet_distance, metrics.kernel_distance
    figures = {"pictures": n, "frechet": frechet(g, r), "frechet_floor": frechet(b, a) * m / n}
    return figures | {"kernel": kernel(g, r), "kernel_floor": kernel(b, a)}


def features(judge, pixels, device):
    return torch.cat([judge(x)[0].cpu().double() for x in batches(pixels, device)])


def whole_judge(judge, train, captions, split, cfg, device):
    """A judge that has learned from whole pictures alone: to one that knows a VAE's reconstructions they look right."""
    if not isinstance(judge, judges.WordJudge):
        return judge
    key = {"data": data.fingerprint(train, captions), "vae": None}
    return judges.word_judge(train, captions, split, lambda pixels: pixels, key, cfg.cache_dir, device)[0]


@torch.no_grad()
def compare_decoders(judge, decoders, z, held_out, real, run):
    """{name: VAE} -> {name: how far its pictures are from real ones, in the features of a judge}; {} without a judge.

    frechet: of reconstructions to the pictures themselves. patches: of each by itself, as LPIPS without learned weights
    (Zhang et al. 2018, Eq. 1): squared differences of a patch's features of length 1, from 0 to 4; none for scenes.
    samples: Frechet distance of the latents z (N, C, h, w), decoded, to real pictures.
    """
    figures = {}
    for name, vae in decoders.items() if judge is not None and len(held_out) > 1 else ():
        seed_step(run.cfg.seed, 0)  # each decodes the same draws
        shown = through_vae(SimpleNamespace(vae=vae, device=run.device), held_out)
        made = torch.cat([(255 * decode(vae, part.to(run.device))).round().byte().cpu() for part in z.split(BATCH)])
        n = min(len(made), len(real))
        pairs = {"frechet": (shown, held_out), "samples": (made[:n], real[:n])}
        figures[name] = {
            kind: metrics.frechet_distance(*(features(judge, x, run.device) for x in pair))
            for kind, pair in pairs.items()
        }
        if isinstance(judge, judges.WordJudge):
            patches = partial(judges.patch_features, judge)
            both = (torch.cat([*map(patches, batches(pixels, run.device))]) for pixels in (shown, held_out))
            figures[name]["patches"] = torch.sub(*both).square().sum(dim=1).mean().item()
    return figures


def words_heard(judge, words, why, prompts, sets, split, device):
    """Mean AUC with which the judge reads the prompts' words off pictures of these prompts, real ones and generated.

    words: {word: column of the judge's logits}; sets: {what: uint8 (N, 3, S, S)}. share: what generated pictures have
    above 0.5, divided by what real ones through the VAE have. {"words": 0, "why": ...} where nothing can be measured.
    """
    if (sets["real"] == sets["real"][0]).all():
        return {"words": 0, "why": why or "the held-out pictures are all alike; hold out more"}
    said = judges.label([[prompt] for prompt in prompts], list(words), split) > 0  # (N, W)
    asked = [i for i, row in enumerate(said.T) if min(row.sum(), (~row).sum()) >= LEAST_PROMPTS]
    if not asked:
        too_few = f"no word that the judge reads is in {LEAST_PROMPTS} of the prompts; ask more"
        return {"words": 0, "why": why or too_few}
    columns, figures = torch.tensor([*words.values()])[asked], {"words": len(asked)}
    for kind, pixels in sets.items():
        scores = judges.read_words(judge, batches(pixels, device))[:, columns]
        figures[kind] = metrics.auc(scores, said[:, asked]).mean().item()
    heard, most = figures["generated"] - 0.5, figures["reconstructed"] - 0.5
    return figures | {"share": heard / most if most > 0 else None}


def channel_means(z, held_out, train):
    """Variance of the channels' means over pictures, of latents z (N, C, h, w) and of held-out ones, divided by that of
    training latents. held_out, train: (mu, log_var)."""
    seed_step(judges.SEED, 1)
    real, generated = (metrics.channel_mean_variances(x) for x in (reparameterize(*train), z))
    figures = {"ratio": (generated.sum() / real.sum()).item(), "by_channel": (generated / real).tolist()}
    if len(held_out[0]) == 1:  # one picture has no variance
        return figures | {"held_out": None}
    other = metrics.channel_mean_variances(reparameterize(*held_out))
    return figures | {"held_out": (other.sum() / real.sum()).item()}


def memorisation(generated, held_out, train, cfg, path):
    """Root mean squared differences, in pixel values of [0, 1], to the nearest training picture at NEAREST_SIZE.

    nearer: share of the generated pictures that are nearer than the nearest 5 % of the held-out ones, about 0.05 if
    nothing is memorised. None where those tell nothing: all are as near, or 5 % are copies of training pictures.
    path: PNG of the closest pairs, the generated picture on the left.
    """
    flips = (False, True) if cfg.horizontal_flips else (False,)
    chunks = (metrics.shrink(x.flip(3) if flip else x, NEAREST_SIZE) for flip in flips for x in train.split(1024))
    both = metrics.shrink(torch.cat([generated, held_out]), NEAREST_SIZE)
    distance, number = metrics.nearest_rows(both, chunks)
    distance, usual = distance.split([len(generated), len(held_out)])
    closest, n = distance.argsort()[:NEAREST_SHOWN], len(train)
    copied = torch.stack([train[i] if i < n else train[i - n].flip(2) for i in number[closest].tolist()])
    show.save_grid(path, torch.stack([generated[closest], copied], dim=1).flatten(0, 1).float() / 255, columns=4)
    near = usual.quantile(0.05)
    figures = {"nearer": (distance < near).float().mean().item() if 0 < near < usual.max() else None}
    for kind, values in {"generated": distance, "held_out": usual}.items():
        figures[kind] = {"median": values.median().item(), "least": values.min().item()}
    return figures


@torch.no_grad()
def prompt_accuracy(judge, pictures, real, combinations, device):
    """Shares right, by attribute and with all three right: of pictures of the prompts with these combinations, and of
    real scenes with them."""
    figures = {"num_prompts": len(pictures)}
    for kind, pixels, series in (("generated", pictures, PROMPT_SERIES), ("real", real, REAL_SERIES)):
        read = [torch.stack([out.argmax(1) for out in judge(x)[1]], dim=1) for x in batches(pixels, device)]
        right = torch.cat(read).cpu() == scenes_of(series, len(pixels), combinations)[1]  # (N, 3)
        shares = torch.column_stack([right, right.all(dim=1)]).float().mean(dim=0)
        figures[kind] = dict(zip((*ATTRIBUTES, "all"), shares.tolist()))
    return figures


ROWS = """\
VAE, held-out MSE | {vae[mse]:.4f} | PSNR {vae[psnr_db]:.1f} dB
energy of the finest octave | {vae[octave_1]:.1%} | next {vae[octave_2]:.0%}; 100%: as sharp as the pictures
SSIM | {vae[ssim]:.3f} | 1 is equal
latent std | {vae[latent_std]:.3f} | mean {vae[latent_mean]:+.3f}
loss ({denoising[target]}) | {denoising[mean]:.4f} |
loss over white bound | {denoising[white][ratio]:.3f} | 1 is a loss of {denoising[white][bound]:.4f}
loss over wiener bound | {denoising[wiener][ratio]:.3f} | 1 is a loss of {denoising[wiener][bound]:.4f}
more loss with another caption | {captions[shuffled][gap]:+.4f} | standard error {captions[shuffled][standard_error]:.4f}
more loss with another caption | {captions[why]:.0}- | {captions[why]}
more loss with no caption | {captions[empty][gap]:+.4f} | standard error {captions[empty][standard_error]:.4f}
words heard ({words[words]} words), AUC | {words[generated]:.3f} | real {words[real]:.3f}, through the VAE {words[reconstructed]:.3f}
words heard, of what the VAE shows | {words[share]:.2f} | 1
words heard | {words[why]:.0}- | {words[why]}
contrast ratio | {looks[contrast]:.3f} | 1: real pictures through the VAE
colourfulness ratio | {looks[colourfulness]:.3f} | 1: real pictures through the VAE
Frechet distance, n = {distances[pictures]} | {distances[frechet]:.4g} | real {distances[frechet_floor]:.4g}
Frechet distance, reconstructions | {decoders[other][frechet]:.4g} | the run's own decoder {decoders[own][frechet]:.4g}
patch features, reconstructions | {decoders[other][patches]:.4f} | the run's own decoder {decoders[own][patches]:.4f}
Frechet distance, samples | {decoders[other][samples]:.4g} | the run's own decoder {decoders[own][samples]:.4g}
kernel distance, n = {distances[pictures]} | {distances[kernel]:.4g} | real {distances[kernel_floor]:.4g}
channel-mean variance ratio | {channel_means[ratio]:.3f} | real {channel_means[held_out]:.3f}
nearest training picture, median | {memorisation[generated][median]:.4f} | real {memorisation[held_out][median]:.4f}
nearer than 5 % of real ones | {memorisation[nearer]:.1%} | 5.0%
prompts, * right | {prompts[generated][*]:.1%} | real {prompts[real][*]:.1%}
composition, * right | {composition[generated][*]:.1%} | real {composition[real][*]:.1%}
FID, n = {fid[pictures][0]} and {fid[pictures][1]} real | {fid[value]:.4g} | lower with more pictures
CLIP score, n = {clip_score[pictures]} | {clip_score[value]:.2f} | with another's prompt {clip_score[shuffled]:.2f}
"""  # name, figure, what to compare it with; a row with * stands for four


def table(results):
    """All figures as one text: what was measured, and what to compare it with."""
    asked = ", ".join(f"{k} {v}" for k, v in results["sampling"].items())
    lines = [f"{results['run_dir']}, {results['model']}: {asked}", f"{'':34}{'measured':>10}   to compare with"]
    for row in ROWS.splitlines():
        for attribute in (*ATTRIBUTES, "all") if "*" in row else ("",):
            what, measured, compare = (fill(cell, results) for cell in row.replace("*", attribute).split("|"))
            lines += [f"{what:34}{measured:>10}   {compare}".rstrip()] if measured else []
    lines.append("by timestep, least noise first")
    denoising = results["denoising"]
    bins = {"loss": denoising} | {f"over {kind}": denoising[kind] for kind in ("white", "wiener") if denoising[kind]}
    for what, figures in bins.items():
        form = "6.4f" if what == "loss" else "6.2f"
        cells = (f"{'-':>6}" if v is None else f"{v:{form}}" for v in figures["by_timestep"])
        lines.append(f"{what:12}" + " ".join(cells))
    return "\n".join(lines)


def fill(cell, results):
    """A cell of the table with its figures, or nothing if they were not measured."""
    try:
        return cell.strip().format(**results)
    except (KeyError, TypeError):
        return ""


if __name__ == "__main__":
    errors.run_script(main)
