"""How fast the project is beside what people would otherwise use: diffusers' modules, a torchvision data loader.

  python tests/benchmark.py                 everything, in one run; minutes on two cores
  python tests/benchmark.py unet sample     only these: unet, vae, sample, data
  python tests/benchmark.py --json FILE     the figures as JSON too

Both sides do the same work with the same weights and take turns, so that a busy machine is busy for both; a ratio is
that of the medians. "eager" is diffusers as most would run it (fp32, Adam); "tuned" has what we have: the precision and
the memory layout of our trainers, fused Adam. What it is not: a test. Times depend on the machine; nothing here fails.
"""

import argparse
import io
import json
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import diffusers
import numpy as np
import torch
import torchvision
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from test_models import randomize, their_unet, their_vae  # noqa: E402

from config import PRESETS, VAE_PRESETS, SDConfig  # noqa: E402
from data import Pictures, read_pictures  # noqa: E402
from diffusion import baab, make_process, prediction_loss, q_sample, sampling_grid, to_x0_eps  # noqa: E402
from samplers import ddpm  # noqa: E402
from training import (  # noqa: E402
    backward,
    check_finite,
    computes_in_bf16,
    conv_layout,
    make_autocast,
    make_optimizer,
    optimizer_step,
    pick_device,
    show_progress,
    to_float,
    use_large_pages,
)
from unet import TimeEmbedding, UNetLatent  # noqa: E402
from vae import AutoencoderKL, vae_loss  # noqa: E402


def in_turns(sides, rounds, device):
    """{name: function} -> {name: [seconds]}: one warm-up each, then all in turn, `rounds` times."""
    times = {name: [] for name in sides}
    for n in range(rounds + 1):
        for name, function in sides.items():
            start = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if n:
                times[name].append(time.perf_counter() - start)
    return times


def summary(times, unit=1.0):
    """Medians in seconds, their ratio to ours, and the spread of each (quartiles over the median)."""
    ours = statistics.median(times["ours"])
    rows = {}
    for name, seconds in times.items():
        low, middle, high = statistics.quantiles(seconds, n=4)
        rows[name] = {"median_s": middle * unit, "ratio_to_ours": statistics.median(seconds) / ours,
                      "quartiles": [low / middle, high / middle], "n": len(seconds)}  # fmt: skip
    return rows


def bench_unet(device, rounds):
    """One training step of preset coco, batch 32: forward, loss, backward, clipping, Adam."""
    cfg = SDConfig(**PRESETS["coco"])
    autocast = make_autocast(device, cfg.mixed_precision)
    ours, t_ember = randomize(UNetLatent(cfg)).to(device).train(), randomize(TimeEmbedding(cfg.time_dim)).to(device)
    weights = ours.state_dict() | {f"time_embedding.{k}": v for k, v in t_ember.state_dict().items()}
    z, noise = (torch.randn(cfg.batch_size, *ours.latent_shape, device=device) for _ in range(2))
    t = torch.randint(cfg.timesteps, (cfg.batch_size,), device=device)
    text_emb = torch.randn(cfg.batch_size, cfg.text_length, cfg.text_dim, device=device)
    z_t = q_sample(z, t, noise, baab()[2].to(device))
    optimizer = make_optimizer([*ours.parameters(), *t_ember.parameters()], cfg)

    def our_step():
        with autocast():
            eps = ours(z_t, t_ember(t), text_emb)
        loss = prediction_loss(eps, noise).mean()
        check_finite(loss, backward(optimizer, loss, cfg.max_grad_norm), 1, cfg.lr, "")
        optimizer_step(optimizer, cfg.lr)

    def their_side(tuned):
        unet = their_unet(cfg).to(device).train()
        unet.load_state_dict(weights)
        if tuned:
            unet = unet.to(memory_format=conv_layout(device))
        adam = torch.optim.Adam(
            unet.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True if tuned else None
        )

        def step():
            with torch.autocast(device.type, torch.bfloat16, enabled=tuned and computes_in_bf16(device)):
                eps = unet(z_t, t, text_emb).sample
            loss = torch.nn.functional.mse_loss(eps.float(), noise)
            adam.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(unet.parameters(), cfg.max_grad_norm)
            adam.step()

        return step

    sides = {"ours": our_step, "diffusers eager": their_side(False), "diffusers tuned": their_side(True)}
    return summary(in_turns(sides, rounds, device))


def bench_vae(device, rounds):
    """One training step of preset coco at 128 px, batch 4: encode, draw, decode, loss, backward, Adam."""
    cfg = SDConfig(**(PRESETS["coco"] | VAE_PRESETS["coco"]))
    autocast, size = make_autocast(device, cfg.mixed_precision), (4, 3, cfg.image_size, cfg.image_size)
    ours = randomize(AutoencoderKL(cfg)).to(device, memory_format=conv_layout(device)).train()
    weights, pixels = ours.state_dict(), torch.rand(size, device=device) * 2 - 1
    optimizer = make_optimizer(ours.parameters(), cfg)

    def our_step():
        x = pixels.contiguous(memory_format=conv_layout(device))
        with autocast():
            mu, log_var, x_hat = ours(x)
        loss, _, _ = vae_loss(x, mu.float(), log_var.float(), x_hat.float(), cfg.beta)
        check_finite(loss, backward(optimizer, loss, cfg.max_grad_norm), 1, cfg.lr, "")
        optimizer_step(optimizer, cfg.lr)

    def their_side(tuned):
        vae = their_vae(cfg).to(device).train()
        vae.load_state_dict(weights)
        layout = conv_layout(device) if tuned else torch.contiguous_format
        vae = vae.to(memory_format=layout)
        adam = torch.optim.Adam(vae.parameters(), lr=cfg.lr, fused=True if tuned else None)

        def step():
            x = pixels.contiguous(memory_format=layout)
            with torch.autocast(device.type, torch.bfloat16, enabled=tuned and computes_in_bf16(device)):
                posterior = vae.encode(x).latent_dist
                x_hat = vae.decode(posterior.sample()).sample
            loss = torch.nn.functional.mse_loss(x_hat.float(), x) + cfg.beta * posterior.kl().mean()
            adam.zero_grad()
            loss.backward()
            adam.step()

        return step

    sides = {"ours": our_step, "diffusers eager": their_side(False), "diffusers tuned": their_side(True)}
    return summary(in_turns(sides, rounds, device))


@torch.no_grad()
def bench_sample(device, rounds, steps=20):
    """The loop of sample.py without decoding, 4 pictures of preset coco, `steps` of 200 steps."""
    cfg = SDConfig(**PRESETS["coco"])
    ours, t_ember = randomize(UNetLatent(cfg)).to(device), randomize(TimeEmbedding(cfg.time_dim)).to(device)
    theirs = their_unet(cfg).to(device)
    theirs.load_state_dict(ours.state_dict() | {f"time_embedding.{k}": v for k, v in t_ember.state_dict().items()})
    text_emb = torch.randn(4, cfg.text_length, cfg.text_dim, device=device)
    z, (ts, a, b) = torch.randn(4, *ours.latent_shape, device=device), sampling_grid(make_process(), steps)
    scheduler = diffusers.DDPMScheduler(cfg.timesteps, cfg.beta_start, cfg.beta_end, "linear", variance_type="fixed_large",
                                        clip_sample=False)  # fmt: skip
    scheduler.set_timesteps(steps)

    def our_loop():
        def denoise(z, i):
            eps = ours(z, t_ember(torch.full((4,), ts[i].item(), device=device)), text_emb)
            return to_x0_eps("epsilon", eps, z, a[i].item(), b[i].item())

        ddpm(denoise, z, a, b, lambda: torch.randn_like(z))

    def their_loop():
        x = z
        for t in scheduler.timesteps:
            x = scheduler.step(theirs(x, t, text_emb).sample, t, x).prev_sample

    return summary(in_turns({"ours": our_loop, "diffusers eager": their_loop}, rounds, device))


def bench_data(device, rounds, count=512):
    """One epoch of batches of 32 as float: out of the prepared file, and out of 640x480 JPEGs with torchvision."""
    side = 128
    with tempfile.TemporaryDirectory() as folder:
        noise = np.random.RandomState(0)
        os.makedirs(os.path.join(folder, "theirs", "jpeg"))
        for i in range(count):
            smooth = Image.fromarray(noise.randint(0, 256, (30, 40, 3), dtype=np.uint8)).resize((640, 480))
            data = io.BytesIO()
            smooth.save(data, "JPEG", quality=90)
            Path(folder, "theirs", "jpeg", f"{i}.jpg").write_bytes(data.getvalue())
        cfg = SDConfig(cache_dir=os.path.join(folder, "prepared"), image_size=side)
        records = [(os.path.join(folder, "theirs", "jpeg", f"{i}.jpg"), ["x"]) for i in range(count)]
        pixels, _ = read_pictures(Pictures(records, side), cfg, show_progress("prepare"))
        t = torchvision.transforms
        transform = t.Compose([t.Resize(side), t.CenterCrop(side), t.ToTensor(), t.Normalize([0.5] * 3, [0.5] * 3)])
        theirs = torchvision.datasets.ImageFolder(os.path.join(folder, "theirs"), transform)
        loader = torch.utils.data.DataLoader(theirs, 32, shuffle=True, num_workers=2, persistent_workers=True)

        def our_epoch():
            for index in torch.randperm(count).split(32):
                to_float(pixels[index], device)

        def their_epoch():
            for x, _ in loader:
                x.to(device)

        figures = summary(in_turns({"ours": our_epoch, "JPEGs, 2 workers": their_epoch}, rounds, device))
        return figures | {"pictures_per_second": count / figures["ours"]["median_s"]}


BENCHES = {"unet": bench_unet, "vae": bench_vae, "sample": bench_sample, "data": bench_data}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", nargs="*", metavar="unet | vae | sample | data", help="(default: all)")
    parser.add_argument("--rounds", type=int, default=7, help="(default: 7)")
    parser.add_argument("--json", help="file for the figures")
    args = parser.parse_args()
    use_large_pages()
    device = pick_device()
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"{os.cpu_count()} cores, {platform.machine()}"
    figures = {"machine": machine, "torch": torch.__version__, "diffusers": diffusers.__version__}
    print(", ".join(f"{k} {v}" for k, v in figures.items()))
    for name in args.what or BENCHES:
        figures[name] = BENCHES[name](device, args.rounds)
        print(f"{name}: {BENCHES[name].__doc__.splitlines()[0]}")
        for side, row in figures[name].items():
            if isinstance(row, dict):
                low, high = row["quartiles"]
                print(f"  {side:24s} {1000 * row['median_s']:9.1f} ms, {row['ratio_to_ours']:6.2f} x ours "
                      f"(quartiles {low:.2f} .. {high:.2f} of the median, n = {row['n']})")  # fmt: skip
    peak = (
        torch.cuda.max_memory_allocated() / 1e9
        if device.type == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    )
    print(f"peak memory: {peak:.2f} GB")
    if args.json:
        Path(args.json).write_text(json.dumps(figures | {"peak_memory_gb": peak}, indent=1))


if __name__ == "__main__":
    main()
