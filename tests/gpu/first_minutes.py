"""The first minutes on a GPU, in less than ten: how long one waits for the first step, and what a step then takes.

  python tests/gpu/first_minutes.py DATA OUT            DATA: a folder of captioned pictures (docs/own-pictures.md)
  python tests/gpu/first_minutes.py DATA OUT --small    the same with tiny nets, to see that it runs

Prints the seconds from the command to the first step of train_vae.py, with nothing prepared, with prepared pictures, and
compiled with a cold and a warm cache; how often a run of two epochs with a smaller last batch compiles; and for both nets
of preset coco what a step takes as it comes, recorded as a CUDA graph, compiled, and both, and from how many steps on
compiling pays: the trainers' COMPILE_FROM. What it is not: a test. Nothing passes or fails.
"""

import argparse
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

from photographs import ROOT, SMALL, say

sys.path.insert(0, str(ROOT))
COUNTED = "import torch, train_vae; train_vae.main(); print(torch._dynamo.utils.counters['stats']['unique_graphs'])"
WARM_UP = 4  # calls: the fourth is recorded


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("data")
    parser.add_argument("out", type=Path)
    parser.add_argument("--max_images", type=int, default=3205, help="training pictures; no multiple of 32")
    parser.add_argument("--steps", type=int, default=30, help="that are timed, of each kind")
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    words = ["--preset", "coco", "--dataset", "folder", "--data_root", Path(args.data).resolve()]
    words += ["--max_images", args.max_images, "--cache_dir", args.out / "prepared", *(SMALL.split() * args.small)]
    waits = {}
    for what, how in {
        "nothing prepared": "--no-compile",
        "prepared pictures": "--no-compile",
        "compiled, cold cache": "--compile",
        "compiled, warm cache": "--compile",
    }.items():
        waits[what] = until_first_step(args.out / what, [*words, how])
        say(f"train_vae.py, {what}: {waits[what]:.1f} s until the first step")
    command = [sys.executable, "-c", COUNTED, *words, "--compile", "--num_epochs", 2, "--run_dir", args.out / "whole"]
    begun = time.monotonic()
    found = subprocess.run(list(map(str, command)), cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    say(f"two epochs: {time.monotonic() - begun:.0f} s, compiled graphs: {found.stdout.splitlines()[-1]}")
    time_steps("vae", args, words, waits["compiled, cold cache"] - waits["prepared pictures"])
    time_steps("unet", args, words)
    say("done")


def until_first_step(run, words):
    """Seconds from the command until the first step is saved; the process is then ended."""
    command, begun = [sys.executable, ROOT / "train_vae.py", *words, "--run_dir", run], time.monotonic()
    with open(f"{run}.log", "w") as log:
        process = subprocess.Popen(
            list(map(str, [*command, "--save_minutes", 0])), stdout=log, stderr=subprocess.STDOUT
        )
        while not (run / "vae_set1_step1.json").exists():
            if process.poll() is not None:
                sys.exit(Path(log.name).read_text()[-3000:])
            time.sleep(0.05)
        seconds = time.monotonic() - begun
        process.kill()
        process.wait()
    return seconds


def time_steps(kind, args, words, cold=None):
    """Forward, loss, backward pass and clipping of a trainer, in all four ways. Data and optimizer take no part.

    cold: seconds of compiling with a cold cache; without it those of the first step here are taken.
    """
    import torch

    from support import devices, flags
    from support.cuda_graph import record_cuda_graph

    torch.manual_seed(0)
    cfg, _ = flags.parse_training_args("", kind, list(map(str, [*words, "--compile", "--run_dir", args.out / kind])))
    device, milliseconds, seconds = devices.pick_device(), {}, 0
    devices.keep_compiled(cfg, device)  # the VAE's is there already
    for compiled in (False, True):
        gradients, parameters, inputs = step_of(kind, cfg, device, compiled)
        begun = time.monotonic()
        gradients(*inputs)
        seconds = time.monotonic() - begun  # of the compiled one, at last
        for recorded in (False, True):
            call = record_cuda_graph(gradients, device, parameters) if recorded else gradients
            how = ("compiled" if compiled else "as it comes") + (", recorded" if recorded else "")
            milliseconds[how] = time_calls(partial(call, *inputs), device, args.steps)
            say(f"{kind}, {how}: {milliseconds[how]:.2f} ms a step (median of {args.steps})")
    gain = milliseconds["as it comes, recorded"] - milliseconds["compiled, recorded"]
    pays = f"pays from {1000 * (cold or seconds) / gain:.0f} steps on" if gain > 0 else "never pays"
    say(
        f"{kind}: the first compiled step took {seconds:.1f} s here; with a cold cache {cold or seconds:.1f} s, which {pays}"
    )


def step_of(kind, cfg, device, compiled):
    """-> gradients(*inputs) as in the trainer, its parameters, inputs of the right shapes."""
    import torch

    import train_unet
    import train_vae
    import training
    from support import devices
    from support.processes import World
    from unet import TimeEmbedding, UNetLatent
    from vae import AutoencoderKL

    world, n, side = World(0, 1, device), cfg.batch_size, cfg.latent_size
    autocast = devices.make_autocast(device, cfg.mixed_precision)
    latents = [torch.randn(n, cfg.latent_channels, side, side, device=device) for _ in range(2)]
    if kind == "vae":
        model, others, widths = AutoencoderKL(cfg), [], cfg.block_out_channels[0]
        inputs = n, torch.rand(n, 3, cfg.image_size, cfg.image_size, device=device) * 2 - 1, latents[0], False
    else:
        model, others, widths = UNetLatent(cfg), [TimeEmbedding(cfg.time_dim).to(device)], None
        text = torch.randn(n, cfg.text_length, cfg.text_dim, device=device)
        inputs = n, *latents, torch.randint(cfg.timesteps, (n,), device=device), text
    model.to(device, memory_format=devices.memory_format(device, widths))
    optimizer = training.make_optimizer([model, *others], cfg)
    call = devices.maybe_compile(model, cfg, device, True, n) if compiled else model
    if kind == "vae":
        gradients = partial(train_vae.batch_gradients, call, None, None, optimizer, autocast, cfg, world)
    else:
        gradients = partial(train_unet.batch_gradients, call, *others, optimizer, autocast, cfg, world)
    return gradients, [p for m in (model, *others) for p in m.parameters()], inputs


def time_calls(call, device, count):
    import torch

    wait, times = torch.cuda.synchronize if device.type == "cuda" else lambda: None, []
    for _ in range(WARM_UP + count):
        begun = time.perf_counter()
        call()
        wait()
        times.append(1000 * (time.perf_counter() - begun))
    return statistics.median(times[WARM_UP:])


if __name__ == "__main__":
    main()
