"""How fast the project is beside what people would otherwise use: diffusers' modules, a loader that decodes JPEGs.

  python tests/benchmark.py                 everything, in one run; minutes on two cores
  python tests/benchmark.py unet sample     or of these: unet, compile, vae, sample, data, save, memory, growth, start
  python tests/benchmark.py demo --against DIR   the demo's three commands, of this checkout and of another, in turns
  python tests/benchmark.py --json FILE     the figures as JSON too

Both sides do the same work with the same weights and take turns, so that a busy machine is busy for both; a ratio is
that of the medians. "eager" is diffusers as most would run it (fp32, Adam); "tuned" has the precision of our trainers,
fused Adam and channels_last, and once more the usual layout where ours has that. On a GPU our steps are timed as they
come: without the CUDA graph that the trainers record, and, but for `compile`, not compiled. Utilisation is the step's
operations (torch's counter) over what a large matrix product reaches in the same precision in the same run. growth is
time per picture at three sizes of a data set or of an order of pictures; start is how long one waits for the first step
and the first picture. ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 before the command makes a newer CPU behave as one
that has AVX2 alone. What it is not: a test. Times depend on the
machine; nothing here fails.
"""

import argparse
import contextlib
import copy
import io
import itertools
import json
import os
import platform
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
sys.path.insert(0, str(HERE))

from conftest import flags, randomize  # noqa: E402
from test_unet import their_unet  # noqa: E402
from test_vae import their_vae  # noqa: E402

import training  # noqa: E402
from config import LARGEST, PRESETS, VAE_PRESETS, SDConfig  # noqa: E402
from data import Pictures, crop_pictures, draw_crops, open_dataset, read_pictures, to_float  # noqa: E402
from diffusion import baab, guided_denoiser, make_process, prediction_loss, q_sample, sampling_grid  # noqa: E402
from samplers import ddpm  # noqa: E402
from support import devices  # noqa: E402
from support.checkpoint import Run  # noqa: E402
from support.processes import World  # noqa: E402
from support.show import progress_bar  # noqa: E402
from unet import TimeEmbedding, UNetLatent  # noqa: E402
from vae import AutoencoderKL, vae_loss  # noqa: E402


def in_turns(sides, rounds, device):
    """{name: function} -> {name: [seconds]}: one warm-up each, then all in turn, `rounds` times."""
    times = {name: [] for name in sides}
    for n in range(rounds + 1):
        for name, function in sides.items():
            start = time.perf_counter()
            function()
            if device.type != "cpu":
                torch.accelerator.synchronize()
            if n:
                times[name].append(time.perf_counter() - start)
    return times


def flops_of(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def peak_flops(device):
    """Operations per second of a large matrix product, in the precision of our trainers; the best of ten."""
    n = 8192 if device.type == "cuda" else 2048  # a GPU would spend on a smaller one no longer than on its launch
    dtype = torch.bfloat16 if devices.computes_in_bf16(device) else torch.float32
    a = torch.randn(n, n, device=device).to(dtype)
    return 2 * n**3 / min(in_turns({"product": lambda: a @ a}, 10, device)["product"])


def with_utilisation(rows, step, device):
    """Adds to the rows of a training step how much of the machine it used."""
    flops, peak = flops_of(step), peak_flops(device)
    for row in rows.values():
        row["utilisation"] = flops / row["median_s"] / peak
    return rows | {"flops": flops, "peak_flops": peak}


def summary(times, unit=1.0):
    """Medians in seconds, their ratio to ours, and the spread of each (quartiles over the median)."""
    ours = statistics.median(times["ours"])
    rows = {}
    for name, seconds in times.items():
        low, middle, high = statistics.quantiles(seconds, n=4)
        rows[name] = {
            "median_s": middle * unit,
            "ratio_to_ours": statistics.median(seconds) / ours,
            "quartiles": [low / middle, high / middle],
            "n": len(seconds),
        }
    return rows


def unet_steps(device):
    """Makers of one training step of preset coco, batch 32, all on the same weights and batch: (our_step, their_step)."""
    cfg = SDConfig(**PRESETS["coco"])
    autocast = devices.make_autocast(device, cfg.mixed_precision)
    first = randomize(UNetLatent(cfg)).to(device, memory_format=devices.memory_format(device))
    first_t_ember = randomize(TimeEmbedding(cfg.time_dim)).to(device)
    weights = first.state_dict() | {f"time_embedding.{k}": v for k, v in first_t_ember.state_dict().items()}
    z, noise = (torch.randn(cfg.batch_size, *first.latent_shape, device=device) for _ in range(2))
    t = torch.randint(cfg.timesteps, (cfg.batch_size,), device=device)
    text_emb = torch.randn(cfg.batch_size, cfg.text_length, cfg.text_dim, device=device)
    z_t = q_sample(z, t, noise, baab()[2].to(device))
    guard = training.FiniteGuard(device, SimpleNamespace(last_saved="nothing"))

    def our_step(compile=False):
        unet, t_ember = copy.deepcopy(first).train(), copy.deepcopy(first_t_ember)
        optimizer = training.make_optimizer([unet, t_ember], cfg)
        predict = devices.maybe_compile(unet, replace(cfg, compile=compile, cache_dir=""), device, False, len(z_t))

        def step():
            with autocast():
                eps = predict(z_t, t_ember(t), text_emb)
            loss = prediction_loss(eps, noise).mean()
            optimizer.zero_grad()
            loss.backward()
            guard.judge(optimizer, loss, training.clip_gradients(optimizer, cfg.max_grad_norm), 1)
            training.optimizer_step(optimizer, cfg.lr)

        return step

    def their_step(tuned, compile=False, layout=torch.contiguous_format):
        unet = their_unet(cfg).to(device, memory_format=layout).train()
        unet.load_state_dict(weights)
        adam = torch.optim.Adam(
            unet.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True if tuned else None
        )
        predict = torch.compile(unet, dynamic=False) if compile else unet

        def step():
            with torch.autocast(device.type, torch.bfloat16, enabled=tuned and devices.computes_in_bf16(device)):
                eps = predict(z_t, t, text_emb).sample
            loss = torch.nn.functional.mse_loss(eps.float(), noise)
            adam.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(unet.parameters(), cfg.max_grad_norm)
            adam.step()

        return step

    return our_step, their_step


def bench_unet(device, rounds):
    """One training step of preset coco, batch 32: forward, loss, backward, clipping, Adam."""
    our_step, their_step = unet_steps(device)
    ours = our_step()
    sides = {
        "ours": ours,
        "diffusers eager": their_step(False),
        "diffusers tuned": their_step(True, layout=torch.channels_last),
        "diffusers tuned, usual layout": their_step(True),
    }
    return with_utilisation(summary(in_turns(sides, rounds, device)), ours, device)


def bench_compile(device, rounds):
    """The same step with --compile; what compiling takes comes before."""
    our_step, their_step = unet_steps(device)
    sides = {
        "ours": our_step(True),
        "ours, not compiled": our_step(),
        "diffusers eager": their_step(False),
        "diffusers tuned and compiled": their_step(True, True, torch.channels_last),
    }
    for side in ("ours", "diffusers tuned and compiled"):
        start = time.perf_counter()
        sides[side]()
        print(f"  the first step of {side}: {time.perf_counter() - start:.0f} s", flush=True)
    return summary(in_turns(sides, rounds, device))


def bench_vae(device, rounds):
    """One training step of preset coco at 128 px, batch 4: encode, draw, decode, loss, backward, Adam."""
    cfg = SDConfig(**(PRESETS["coco"] | VAE_PRESETS["coco"]))
    autocast, size = devices.make_autocast(device, cfg.mixed_precision), (4, 3, cfg.image_size, cfg.image_size)
    our_layout = devices.memory_format(device, cfg.block_out_channels[0])
    ours = randomize(AutoencoderKL(cfg)).to(device, memory_format=our_layout).train()
    weights, pixels = ours.state_dict(), torch.rand(size, device=device) * 2 - 1
    guard = training.FiniteGuard(device, SimpleNamespace(last_saved="nothing"))
    optimizer = training.make_optimizer([ours], cfg)

    def our_step():
        x = pixels.contiguous(memory_format=our_layout)
        with autocast():
            mu, log_var, x_hat = ours(x)
        loss, _, _ = vae_loss(x, mu.float(), log_var.float(), x_hat.float(), cfg.beta)
        optimizer.zero_grad()
        loss.backward()
        guard.judge(optimizer, loss, training.clip_gradients(optimizer, cfg.max_grad_norm), 1)
        training.optimizer_step(optimizer, cfg.lr)

    def their_side(tuned):
        vae = their_vae(cfg).to(device).train()
        vae.load_state_dict(weights)
        layout = torch.channels_last if tuned else torch.contiguous_format
        vae = vae.to(memory_format=layout)
        adam = torch.optim.Adam(vae.parameters(), lr=cfg.lr, fused=True if tuned else None)

        def step():
            x = pixels.contiguous(memory_format=layout)
            with torch.autocast(device.type, torch.bfloat16, enabled=tuned and devices.computes_in_bf16(device)):
                posterior = vae.encode(x).latent_dist
                x_hat = vae.decode(posterior.sample()).sample
            loss = torch.nn.functional.mse_loss(x_hat.float(), x) + cfg.beta * posterior.kl().mean()
            adam.zero_grad()
            loss.backward()
            adam.step()

        return step

    sides = {"ours": our_step, "diffusers eager": their_side(False), "diffusers tuned": their_side(True)}
    return with_utilisation(summary(in_turns(sides, rounds, device)), our_step, device)


@torch.no_grad()
def bench_sample(device, rounds, steps=200):
    """The loop of sample.py without decoding, 4 pictures of preset coco, 200 steps."""
    cfg = SDConfig(**PRESETS["coco"])
    autocast = devices.make_autocast(device, cfg.mixed_precision)
    ours = randomize(UNetLatent(cfg)).to(device, memory_format=devices.memory_format(device))
    t_ember = randomize(TimeEmbedding(cfg.time_dim)).to(device)
    theirs = their_unet(cfg).to(device)
    theirs.load_state_dict(ours.state_dict() | {f"time_embedding.{k}": v for k, v in t_ember.state_dict().items()})
    text_emb = torch.randn(4, cfg.text_length, cfg.text_dim, device=device)
    process = make_process()
    z, (ts, a, b) = torch.randn(4, *ours.latent_shape, device=device), sampling_grid(process, steps)
    scheduler = diffusers.DDPMScheduler(
        cfg.timesteps, cfg.beta_start, cfg.beta_end, "linear", variance_type="fixed_large", clip_sample=False
    )
    scheduler.set_timesteps(steps)

    def our_loop():
        with autocast():
            denoise = guided_denoiser(ours, t_ember, lambda prompts: text_emb, [""] * 4, process, ts)
            ddpm(denoise, z, a, b, lambda: torch.randn_like(z))

    def their_loop():
        x = z
        for t in scheduler.timesteps:
            x = scheduler.step(theirs(x, t, text_emb).sample, t, x).prev_sample

    return summary(in_turns({"ours": our_loop, "diffusers eager": their_loop}, rounds, device))


class Jpegs(torch.utils.data.Dataset):
    """Files decoded at each use, as the usual loaders do: shorter side resized, centre cropped, floats in [-1, 1]."""

    def __init__(self, paths, side):
        self.paths, self.side = paths, side

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        with Image.open(self.paths[i]) as picture:
            x = picture.convert("RGB")
        scale = self.side / min(x.size)
        x = x.resize([round(scale * length) for length in x.size], Image.Resampling.BILINEAR)
        left, top = ((length - self.side) // 2 for length in x.size)
        x = torch.from_numpy(np.array(x.crop((left, top, left + self.side, top + self.side))))
        return (x.permute(2, 0, 1).float() / 255 - 0.5) / 0.5


def bench_data(device, rounds, count=512):
    """One epoch of batches of 32 as float: out of the prepared file, and out of 640x480 JPEGs as they lie there."""
    side = 128
    with tempfile.TemporaryDirectory() as folder:
        noise = np.random.RandomState(0)
        os.makedirs(os.path.join(folder, "theirs", "jpeg"))
        for i in range(count):
            smooth = Image.fromarray(noise.randint(0, 256, (30, 40, 3), dtype=np.uint8)).resize((640, 480))
            data = io.BytesIO()
            smooth.save(data, "JPEG", quality=90)
            Path(folder, "theirs", "jpeg", f"{i}.jpg").write_bytes(data.getvalue())
        cfg, homes = SDConfig(cache_dir=os.path.join(folder, "prepared"), image_size=side), {os.path.realpath(folder)}
        records = [(os.path.join(folder, "theirs", "jpeg", f"{i}.jpg"), ["x"]) for i in range(count)]
        pixels, _ = read_pictures(Pictures(records, side, homes), cfg, progress_bar("prepare"))
        theirs = Jpegs([path for path, _ in records], side)
        loader = torch.utils.data.DataLoader(theirs, 32, shuffle=True, num_workers=2, persistent_workers=True)

        def our_epoch():
            for index in torch.randperm(count).split(32):
                to_float(crop_pictures(pixels, index, draw_crops(len(index), cfg), side), device)

        def their_epoch():
            for x in loader:
                x.to(device)

        figures = summary(in_turns({"ours": our_epoch, "JPEGs, 2 workers": their_epoch}, rounds, device))
        return figures | {"pictures_per_second": count / figures["ours"]["median_s"]}


def bench_save(device, rounds):
    """One set of files of the U-Net at coco's size, and the same tensors by bare torch.save()."""
    cfg = SDConfig()
    unet, t_ember = UNetLatent(cfg), TimeEmbedding(cfg.time_dim)
    parameters = [*unet.parameters(), *t_ember.parameters()]
    optimizer, modules = training.make_optimizer([unet, t_ember], cfg), (unet, t_ember, copy.deepcopy(unet))
    for p in parameters:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    with tempfile.TemporaryDirectory(dir=".") as folder:
        args = argparse.Namespace(run_dir=os.path.join(folder, "ours"), overwrite=False, max_steps=None, preset="coco")
        os.makedirs(args.run_dir)
        run, number, bare = (
            Run(args, "unet", cfg, World(0, 1, device)),
            itertools.count(1),
            os.path.join(folder, "bare"),
        )
        plan = training.Plan(1, 1, LARGEST, None, 0)
        state = run.resume(modules, optimizer, training.State(0, 0, 0, torch.zeros(())), plan)

        def ours():
            state.step = next(number)
            run.save(f"1_step{state.step}", state)

        def theirs():
            for i, content in enumerate([*(m.state_dict() for m in modules), optimizer.state_dict()]):
                torch.save(content, f"{bare}{i}.pth")

        figures = summary(in_turns({"ours": ours, "torch.save": theirs}, rounds, device))
        sizes = (
            sum(os.path.getsize(path) for path in Path(folder).glob(pattern))
            for pattern in (f"ours/*1_step{next(number) - 1}.*", "bare*")
        )
        return figures | dict(zip(("our_bytes", "their_bytes"), sizes))


COUNTS = (1_000, 10_000, 40_000)
SMALL = {
    "image_size": 16,
    "block_out_channels": (8, 8),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "timesteps": 4,
    "unet_block_out_channels": (8, 16),
    "unet_norm_num_groups": 4,
    "time_dim": 32,
    "text_encoder": "hash",
    "text_length": 8,
    "batch_size": 32,
    "held_out_images": 32,
}


def link_pictures(folder, count):
    """A data set of `count` names for 64 pictures of a photograph's size, in the layout of --dataset folder."""
    images, noise = Path(folder, "images"), np.random.RandomState(0)
    images.mkdir(parents=True)
    for i in range(64):
        Image.fromarray(noise.randint(0, 256, (30, 40, 3), dtype=np.uint8)).resize((640, 480)).save(images / f"{i}.jpg")
    for i in range(64, count):
        os.link(images / f"{i % 64}.jpg", images / f"{i}.jpg")
    lines = (json.dumps({"file_name": f"images/{i}.jpg", "text": f"number {i}"}) for i in range(count))
    Path(folder, "metadata.jsonl").write_text("\n".join(lines))


def timed_script(script, *words, cwd):
    """Run a script -> (seconds, the most memory of its own that it had, page cache apart, in GB)."""
    start, peak = time.perf_counter(), 0
    command = python(script, *words)
    with subprocess.Popen(command, cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            time.sleep(0.02)
            with contextlib.suppress(OSError, StopIteration):
                status = Path(f"/proc/{process.pid}/status").read_text().splitlines()
                peak = max(peak, int(next(line for line in status if line.startswith("RssAnon")).split()[1]))
        if process.returncode:
            sys.exit(process.stderr.read())
    return time.perf_counter() - start, peak / 1e6


def python(script, *words):
    return [sys.executable, str(HERE.parent / script), *map(str, words)]


def in_slices(commands, cwd, slice_s=0.25):
    """Run commands side by side, but only one at a time: each goes on for a moment, then is stopped -> {name: seconds}.

    Whole runs of minutes, one after the other, differ by a fifth on a machine that others use too; so it is the same to all.
    """
    running, used = {}, dict.fromkeys(commands, 0.0)
    try:
        while len(running) < len(commands) or any(process.poll() is None for process in running.values()):
            for name, command in commands.items():
                start = time.perf_counter()
                if name not in running:
                    running[name] = subprocess.Popen(
                        command,
                        cwd=cwd,
                        stdout=subprocess.DEVNULL,
                        stderr=subprocess.PIPE,
                        text=True,
                        start_new_session=True,
                    )
                process = running[name]
                if process.poll() is not None:
                    continue
                os.killpg(process.pid, signal.SIGCONT)
                while process.poll() is None and time.perf_counter() - start < slice_s:
                    time.sleep(0.002)
                if process.returncode is None:
                    os.killpg(process.pid, signal.SIGSTOP)
                elif process.returncode:
                    sys.exit(process.stderr.read())
                used[name] += time.perf_counter() - start
    finally:
        for process in running.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return used


def bench_memory(device, rounds):
    """GB that each trainer, with the smallest nets, holds on 1,000 and 40,000 pictures of 128 pixels, page cache apart."""
    if not os.path.exists("/proc/self/status"):
        print("  needs Linux, whose /proc says what a process holds")
        return {}
    rows, settings = {}, SMALL | {"image_size": 128, "block_out_channels": (4, 4, 4, 4), "num_workers": 0}
    with tempfile.TemporaryDirectory(dir=".") as folder:
        for n in (COUNTS[0], COUNTS[-1]):
            link_pictures(os.path.join(folder, str(n)), n)
            data = {"dataset": "folder", "data_root": n, "run_dir": f"run{n}", "max_images": n, "max_steps": 20}
            for script in ("train_vae.py", "train_unet.py"):
                words = [*flags(data | settings), "--overwrite"]
                timed_script(script, *words, cwd=folder)  # prepares what it reads
                rows[f"{script}, {n}"] = {"memory_gb": timed_script(script, *words, cwd=folder)[1]}
                print(f"  {script} on {n:6,d} pictures: {rows[f'{script}, {n}']['memory_gb']:.3f} GB", flush=True)
    return rows


def prepare_often(root, count, times):
    """Prepare the first `count` training pictures of a data set, `times` times as if never before."""
    cfg = SDConfig(**(SMALL | {"dataset": "folder", "data_root": str(root), "max_images": count}))
    for _ in range(times):
        with tempfile.TemporaryDirectory(dir=".") as folder:
            read_pictures(open_dataset(cfg)[0], replace(cfg, cache_dir=folder), progress_bar("prepare"))


def bench_growth(device, rounds):
    """Milliseconds per picture at each count: to prepare, to train a VAE on, to generate in one order (the smallest models).

    As many pictures are prepared, pass through the training and come out of the sampler at each count: in more data sets,
    epochs or prompts where the count is small. Taken off, because it does not depend on the count: start-up, that of the
    processes that read among it, the end of an epoch (figures and curves), all measured on one batch, and the first
    hundred pictures of a prompt, which have a grid.
    """
    total, shown, batch, held_out = max(COUNTS), 100, SMALL["batch_size"], SMALL["held_out_images"]
    with tempfile.TemporaryDirectory(dir=".") as folder:
        training, sampling = {}, {}
        link_pictures(os.path.join(folder, "few"), 10 * held_out)
        for n in COUNTS:
            link_pictures(os.path.join(folder, str(n)), n)
            common = flags(
                SMALL
                | {
                    "dataset": "folder",
                    "data_root": n,
                    "max_images": n,
                    "num_epochs": total // n,
                    "save_every": LARGEST,
                    "save_minutes": 60,
                }
            )
            for script in ("train_vae.py", "train_unet.py"):
                timed_script(script, *common, "--run_dir", f"run{n}", "--max_steps", 1, cwd=folder)
            vae = python("train_vae.py", *common, "--run_dir")
            training |= {
                (n, "prepare"): prepare_command(n, n - held_out, total // n),
                (n, "prepare one batch"): prepare_command("few", batch, total // n),
                (n, "start"): [*vae, f"b{n}", "--max_steps", "1"],
                (n, "train"): [*vae, f"c{n}"],
                (n, "one batch"): [*vae, f"d{n}", "--max_images", str(batch)],
            }
            order = python("sample.py", "--run_dir", f"run{n}", "--steps", 1, "--prompt", *"x" * (total // n))
            sampling |= {
                (n, "few"): [*order, "--num_images", str(shown), "--out", f"few{n}"],
                (n, "many"): [*order, "--num_images", str(n), "--out", f"many{n}"],
            }
        seconds = in_slices(training, folder) | in_slices(sampling, folder)
    rows = {}
    for n in COUNTS:
        prepare, prepare_one, start, train, one, few, many = (
            seconds[n, what] for what in ("prepare", "prepare one batch", "start", "train", "one batch", "few", "many")
        )
        more = total // n * (n - held_out - batch)  # training pictures beyond those of the one batch
        rows[n] = {
            "prepare_ms": 1e3 * (prepare - prepare_one) / more,
            "epoch_end_s": (one - start) / (total // n),
            "train_ms": 1e3 * (train - one) / more,
            "sample_ms": 1e3 * (many - few) / (total - total // n * shown),
        }
        print(f"  {n:6d} pictures: " + ", ".join(f"{k} {v:.3f}" for k, v in rows[n].items()), flush=True)
    return rows


def prepare_command(root, count, times):
    return [
        sys.executable,
        "-c",
        f"import sys; sys.path.insert(0, {str(HERE)!r}); import benchmark; "
        f"benchmark.prepare_often({str(root)!r}, {count}, {times})",
    ]


def seconds_until(command, made, cwd):
    """Run a command until a file of this pattern is there, then kill it -> seconds."""
    start = time.perf_counter()
    with subprocess.Popen(command, cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        while not any(Path(cwd).glob(made)):
            time.sleep(0.01)
            if process.poll():
                sys.exit(process.stderr.read())
        seconds = time.perf_counter() - start
        process.kill()
    return seconds


def bench_start(device, rounds):
    """Preset demo, from the command to the first step, saved, and to the first picture; cold: nothing is prepared yet."""
    times = {}
    with tempfile.TemporaryDirectory(dir=".") as folder:
        for n in range(rounds):
            for cache in ("cold", "warm"):
                common = ["--preset", "demo", "--cache_dir", f"cache{n}", "--run_dir", f"{cache}{n}"]
                for script, kind in (("train_vae.py", "vae"), ("train_unet.py", "unet")):
                    words = [*common, "--save_minutes", "0"]
                    seconds = seconds_until(python(script, *words), f"{cache}{n}/{kind}_set1_step1.json", folder)
                    times.setdefault(f"{script}, first step, {cache}", []).append(seconds)
                    timed_script(script, *common, "--max_steps", 1, "--sample_steps", 1, "--overwrite", cwd=folder)
            sampling = python("sample.py", "--run_dir", f"warm{n}", "--steps", 50, "--prompt", "a red house")
            times.setdefault("sample.py, first picture", []).append(
                seconds_until(sampling, f"warm{n}/samples/*.png", folder)
            )
    return {name: {"seconds": statistics.median(seconds), "n": rounds} for name, seconds in times.items()}


def bench_demo(device, rounds, against):
    """The demo's three commands by this checkout and by the one in `against`, a quarter of a second of each in turn."""
    checkouts, totals, rows = {"ours": HERE.parent, "against": Path(against).resolve()}, {}, {}
    # earlier checkouts imitate bfloat16, slowly, on a processor that is told to be one without
    precision = ["--mixed_precision", "auto" if devices.computes_in_bf16(device) else "no"]
    with tempfile.TemporaryDirectory(dir=".") as folder:
        for script in ("train_vae.py", "train_unet.py", "sample.py"):
            words = ["--prompt", "a red house"] if script == "sample.py" else ["--preset", "demo"]
            commands = {}
            for side, root in checkouts.items():
                caches = [] if script == "sample.py" else ["--cache_dir", f"prepared_{side}"]
                commands[side] = [sys.executable, str(root / script), "--run_dir", side, *caches, *precision, *words]
            seconds = in_slices(commands, folder)
            for side in checkouts:
                rows[f"{script}, {side}"] = {"seconds": seconds[side]}
                totals[side] = totals.get(side, 0) + seconds[side]
    return rows | {f"together, {side}": {"seconds": seconds} for side, seconds in totals.items()}


def kind_of_processor(device):
    arithmetic = "bfloat16" if devices.computes_in_bf16(device) else "float32, for want of bfloat16"
    return f"{devices.processor(device).split()[0] if device.type == 'cpu' else device.type}, trains in {arithmetic}"


BENCHES = {
    "unet": bench_unet,
    "compile": bench_compile,
    "vae": bench_vae,
    "sample": bench_sample,
    "data": bench_data,
    "save": bench_save,
    "memory": bench_memory,
    "growth": bench_growth,
    "start": bench_start,
    "demo": bench_demo,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", nargs="*", metavar=" | ".join(BENCHES), help="(default: all)")
    parser.add_argument("--rounds", type=int, default=7, help="(default: 7)")
    parser.add_argument("--json", help="file for the figures")
    parser.add_argument("--against", metavar="DIR", help="demo: another checkout")
    args = parser.parse_args()
    if "demo" in args.what and not args.against:
        parser.error("demo needs --against DIR")
    if unknown := set(args.what) - set(BENCHES):
        parser.error(f"{min(unknown)}: is none of {', '.join(BENCHES)}")
    devices.use_large_pages()
    device = devices.pick_device()
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"{os.cpu_count()} cores, {platform.machine()}"
    figures = {
        "machine": machine,
        "kind": kind_of_processor(device),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }
    print(", ".join(f"{k} {v}" for k, v in figures.items()))
    for name in args.what or [name for name in BENCHES if name != "demo"]:
        more = {"against": args.against} if name == "demo" else {}
        figures[name] = BENCHES[name](device, args.rounds, **more)
        print(f"{name}: {BENCHES[name].__doc__.splitlines()[0]}")
        for side, row in figures[name].items():
            if isinstance(row, int):
                print(f"  {side} {row:,}")
            if isinstance(row, dict) and "seconds" in row:
                print(f"  {side:36s} {row['seconds']:7.1f} s")
            if isinstance(row, dict) and "median_s" in row:
                low, high = row["quartiles"]
                used = f", utilisation {100 * row['utilisation']:.0f} %" if "utilisation" in row else ""
                print(
                    f"  {side:28s} {1000 * row['median_s']:9.1f} ms, {row['ratio_to_ours']:6.2f} x ours "
                    f"(quartiles {low:.2f} .. {high:.2f} of the median, n = {row['n']}){used}"
                )
    peak = (
        torch.cuda.max_memory_allocated() / 1e9
        if device.type == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)
    )
    print(f"peak memory: {peak:.2f} GB")
    if args.json:
        Path(args.json).write_text(json.dumps(figures | {"peak_memory_gb": peak}, indent=1))


if __name__ == "__main__":
    main()
