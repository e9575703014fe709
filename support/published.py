"""The measures of published papers, by networks that others have trained: FID, CLIP score, LPIPS.

What it is not: it knows no runs; evaluate.py and train_vae.py give it pictures and prompts. Each load function finds and tries all that
its measure needs, so that nothing turns out to be missing once the pictures are made.

Papers:
  Heusel et al. 2017, GANs Trained by a Two Time-Scale Update Rule (arXiv 1706.08500), Eq. 6: FID, by torch-fidelity
  Hessel et al. 2021, CLIPScore (2104.08718), Eq. 1, with the usual factor of 100 in place of 2.5
  Zhang et al. 2018, The Unreasonable Effectiveness of Deep Features (1801.03924): LPIPS, by the package of that name
"""

import contextlib
import os
import re

import torch
from torch.utils.data import Subset

from support.errors import UserError, printable
from text_encoder import CLIP_REVISION, ClipTextEncoder

BATCH = 32  # pictures at a time


@contextlib.contextmanager
def one_line(flag, package, remedy):
    """Turn what a library raises, of whatever kind, into a UserError."""
    try:
        yield
    except Exception as e:
        why = re.split(r"[.;]\s", printable(e).removeprefix("--text_encoder: "))[0][:300] or type(e).__name__
        remedy = f"pip install '{package}'" if isinstance(e, ImportError) else remedy
        raise UserError(f"{flag}: {why}; {remedy}, or leave the flag out") from None


def load_fid(weights, device):
    """-> measure(pictures, real, prompts): FID of N uint8 pictures (N, 3, S, S) to N real ones, or to all.
    weights: torch-fidelity's file of Inception-v3, or "" for the copy that the library downloads once."""
    folder, remedy = torch.hub.get_dir(), "give --fid WEIGHTS, torch-fidelity's weights-inception-2015-12-05 file"
    with one_line(f"--fid: {weights or folder}", "torch-fidelity", remedy):
        from torch_fidelity import KEY_METRIC_FID, FeatureExtractorInceptionV3, calculate_metrics

        if weights:
            torch.load(weights, weights_only=True)  # the library would run the code that other files can hold
        FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], weights or None)

    def measure(pictures, real, prompts):
        sets = [Subset(x, range(min(len(x), len(pictures)))) for x in (pictures, real)]
        how = {"cuda": device.type == "cuda", "batch_size": BATCH, "save_cpu_ram": True, "verbose": False}
        how |= {"input1": sets[0], "input2": sets[1], "feature_extractor_weights_path": weights or None}
        return {"value": calculate_metrics(fid=True, **how)[KEY_METRIC_FID], "pictures": [len(x) for x in sets]}

    return measure


def load_lpips(side, device):
    """-> distance(x_hat, x): LPIPS of pictures (B, 3, side, side) in [-1, 1], mean over the batch. The package downloads its
    weights once."""
    folder = torch.hub.get_dir()
    with one_line(f"--lpips_weight: {folder}", "lpips", "put alexnet-owt-7be5be79.pth into its checkpoints/"):
        import lpips

        network = lpips.LPIPS(net="alex", verbose=False).to(device).eval().requires_grad_(False)
        network(*torch.zeros(2, 1, 3, side, side, device=device))  # pictures may be too small
    return lambda x_hat, x: network(x_hat, x).mean()


def load_clip_score(source, device):
    """-> measure(pictures, real, prompts): mean of 100 max(cos(picture, prompt), 0), and with the next prompt if
    that is another (None: all are alike).
    source: a directory with a CLIP model and its tokenizer, or the name that text_encoder.py knows."""
    with one_line(f"--clip_score: {source}", "transformers>=5.4", "give --clip_score DIR, a whole CLIP model"):
        tokenize, processor, model = load_clip(source)
        model.to(device)

        @torch.no_grad()
        def measure(pictures, real, prompts):
            prompts, found = [p.encode("utf-8", "replace").decode() for p in prompts], []  # no lone surrogates
            for i in range(0, len(pictures), BATCH):
                x = processor(list(pictures[i : i + BATCH]), input_data_format="channels_first", return_tensors="pt")
                out = model(input_ids=tokenize(prompts[i : i + BATCH]).to(device), **x.to(device))
                found.append(torch.stack([out.image_embeds, out.text_embeds]))  # (2, B, D), each of length 1
            images, texts = torch.cat(found, dim=1)
            own, other = ((images * x).sum(dim=1).clamp(min=0) for x in (texts, texts.roll(-1, dims=0)))
            other = other[torch.tensor([a != b for a, b in zip(prompts, prompts[1:] + prompts[:1])], device=device)]
            shuffled = 100 * other.mean().item() if len(other) else None
            return {"value": 100 * own.mean().item(), "shuffled": shuffled, "pictures": len(pictures)}

        measure(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), None, ["a cat"])
    return measure


def load_clip(source):
    """-> tokenize(prompts), image processor, CLIPModel."""
    tokenize = ClipTextEncoder(source).tokenize  # first, because it knows when to ask the hub
    from transformers import CLIPImageProcessorPil, CLIPModel, logging  # Pil: the one that needs no torchvision

    where = {"local_files_only": True} | ({} if os.path.isdir(source) else {"revision": CLIP_REVISION})
    logging.set_verbosity_error()
    model, info = CLIPModel.from_pretrained(source, output_loading_info=True, dtype=torch.float32, **where)
    if info["missing_keys"]:
        raise ValueError(f"its weights lack {min(info['missing_keys'])}")
    if any(os.path.isfile(os.path.join(source, f"{name}_config.json")) for name in ("preprocessor", "processor")):
        return tokenize, CLIPImageProcessorPil.from_pretrained(source), model.eval()
    side = model.config.vision_config.image_size
    return tokenize, CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=side), model.eval()
