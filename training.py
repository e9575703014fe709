"""What the scripts share: device and precision, randomness by step, weights on disk, records, curves, progress.

What it is not: a Trainer. There are no hooks and no loop here, and nothing knows what is being trained.

Randomness is a function of progress (after EDM2, Karras et al. 2024, arXiv 2312.02696): data order from
(seed, epoch), everything else from (seed, step). Nothing else has to be remembered to repeat a run.
"""

import csv
import fnmatch
import hashlib
import json
import math
import os
import re
import sys
import time
from dataclasses import asdict

import torch
from PIL import Image
from torchvision.utils import make_grid
from tqdm import tqdm

from config import PRESETS, SDConfig, UserError

# ---- Errors ---------------------------------------------------------------------------------------------


def run_script(main):
    """Run a script's main(); what the user can put right ends in one line on stderr and exit code 1."""
    try:
        main()
    except UserError as e:
        fail(str(e))
    except OSError as e:
        fail(f"{e.filename}: {e.strerror}; check the path, its permissions and the disk" if e.filename else str(e))
    except (RuntimeError, MemoryError) as e:
        if "DataLoader worker" in str(e):
            fail("--num_workers: a process that reads pictures died; give fewer, or 0")
        if "memory" not in str(e) and not isinstance(e, MemoryError):
            raise
        fail("--batch_size: not enough memory; give a smaller one, or fewer --max_images")
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        sys.exit(130)


def fail(message):
    """Exit with code 1 and one line; names in it may hold line breaks and escape codes."""
    if sys.stderr.isatty():
        print(file=sys.stderr)  # leave the line of a progress bar
    sys.exit("error: " + "".join(c if c.isprintable() else "?" for c in " ".join(message.split())))


# ---- Device and precision -------------------------------------------------------------------------------


def pick_device():
    """CUDA, else MPS, else CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def use_large_pages():
    """Large memory pages for large tensors, on Linux: on a CPU a fifth of a step goes into page faults otherwise."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read by PyTorch at its first large allocation


def computes_in_bf16(device):
    """Whether the processor has bf16 arithmetic, rather than imitating it slowly."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):
        found = torch.cpu.get_capabilities()
        return any(found.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return False


def conv_layout(device):
    """The memory format in which convolutions are fastest; MPS is left as it is."""
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def make_autocast(device, mixed_precision):
    """-> autocast(), a context for the forward pass; weights, losses and gradients' sums stay in float32."""
    bf16 = mixed_precision == "bf16" or (mixed_precision == "auto" and computes_in_bf16(device))
    print(f"device {device.type}, forward pass in {'bfloat16 autocast' if bf16 else 'float32'}")
    return lambda: torch.autocast(device.type, torch.bfloat16, enabled=bf16)


# ---- Randomness and progress ----------------------------------------------------------------------------


def hash_seed(*parts):
    """A 63-bit seed that is a function of its arguments alone."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def seed_step(seed, step):
    """Make everything drawn until the next call a function of (seed, step)."""
    torch.manual_seed(hash_seed(seed, "step", step))


def epoch_batches(seed, epoch, num_samples, batch_size):
    """The data order of one epoch -> list of index tensors; the last may be shorter."""
    generator = torch.Generator().manual_seed(hash_seed(seed, "order", epoch))
    return torch.randperm(num_samples, generator=generator).split(batch_size)


def lr_at(step, total_steps, cfg):
    """Learning rate of step 1 .. total_steps: linear warm-up, then constant or cosine to 0 (Loshchilov & Hutter
    2017, arXiv 1608.03983, Eq. 5 without restarts)."""
    warmup = min(1.0, step / (cfg.lr_warmup_steps + 1))
    cosine = 0.5 * (1 + math.cos(math.pi * (step - 1) / total_steps))
    return cfg.lr * warmup * (cosine if cfg.lr_schedule == "cosine" else 1.0)


def make_optimizer(parameters, cfg):
    """Adam (Kingma & Ba 2015, arXiv 1412.6980), all parameters updated by one fused kernel."""
    betas = (0.9, cfg.adam_beta2)
    return torch.optim.Adam(parameters, lr=cfg.lr, betas=betas, weight_decay=cfg.weight_decay, fused=True)


def optimizer_step(optimizer, loss, lr, max_grad_norm):
    """One step of gradient descent, the gradient clipped to max_grad_norm unless that is 0."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    if max_grad_norm:
        torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], max_grad_norm)
    optimizer.step()


def check_finite(values, step, lr):
    """UserError if a figure of the training is NaN or infinite: from there on it would only waste time."""
    if not all(math.isfinite(v) for v in values):
        raise UserError(
            f"--lr: the loss is no longer a number at step {step} (learning rate {lr:.2g}); give a lower one"
        )


class Progress:
    """A bar with rate and time left on a terminal, otherwise a plain line now and then."""

    def __init__(self, total, what, seconds_between_lines=10):
        self.total, self.what, self.done, self.pause = total, what, 0, seconds_between_lines
        self.bar = tqdm(total=total, desc=what, disable=None, dynamic_ncols=True)
        self.start = self.last = time.monotonic()

    def update(self, count=1):
        self.done += count
        self.bar.update(count)
        now = time.monotonic()
        if self.bar.disable and (now - self.last > self.pause or self.done == self.total):
            self.last = now
            rate = self.done / max(now - self.start, 1e-9)
            left = (self.total - self.done) / rate
            print(f"{self.what}: {self.done}/{self.total}, {rate:.1f}/s, {left:.0f} s left", flush=True)

    def say(self, text):
        """Print a line, above the bar if there is one."""
        self.bar.write(text) if not self.bar.disable else print(text, flush=True)

    def close(self):
        self.bar.close()


# ---- The run directory ----------------------------------------------------------------------------------


def read_records(run_dir):
    """config.json of a run directory -> {script: {"settings": ..., "finished_epoch": ..., ...}}; {} if absent."""
    path = os.path.join(run_dir, "config.json")
    try:
        with open(path, encoding="utf-8") as f:
            records = json.load(f)
        # asked for here, so that a file that was edited or comes from elsewhere is refused in one place
        if all(isinstance(r["settings"], dict) and "finished_epoch" in r for r in records.values()):
            return records
    except FileNotFoundError:
        return {}
    except (ValueError, AttributeError, TypeError, KeyError):
        pass
    raise UserError(f"{path}: not the record of a run; restore it or train into another --run_dir")


def write_record(run_dir, script, record):
    """Put one script's record into config.json."""
    text = json.dumps(read_records(run_dir) | {script: record}, indent=1)
    write_whole(os.path.join(run_dir, "config.json"), lambda path: open(path, "w").write(text))


def read_config(run_dir, script):
    """The SDConfig that `script` trained with in run_dir; UserError if it has not run there."""
    record = read_records(run_dir).get(script)
    if record is None:
        raise UserError(
            f"--run_dir {run_dir}: nothing was trained here; run python {script}.py --run_dir {run_dir} first"
        )
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in record["settings"].items() if k != "max_steps"}
    try:
        return SDConfig(**settings)
    except (TypeError, UserError) as e:
        raise UserError(f"{os.path.join(run_dir, 'config.json')}: {e}; restore it or train again") from None


def new_record(script, cfg, args):
    """The record of this run of `script`, not yet written; None if the very same run is finished already.

    UserError if the run directory holds another run, or an unfinished one, unless --overwrite is given.
    """
    settings = json.loads(json.dumps(asdict(cfg) | {"max_steps": args.max_steps}))  # lists for tuples, as in the file
    old = read_records(args.run_dir).get(script)
    if old and not args.overwrite:
        where, then = old["settings"], f"--run_dir {args.run_dir}: holds"
        changed = [f"{k} was {where.get(k)}, now {v}" for k, v in settings.items() if where.get(k) != v]
        if changed:
            raise UserError(f"{then} a run with other settings ({'; '.join(changed)}); give another --run_dir, or "
                            "--overwrite to start over")  # fmt: skip
        if not old["finished_epoch"]:
            raise UserError(f"{then} an unfinished run of {script}.py; give --overwrite to start over")
        print(f"{args.run_dir}: this run is finished (epoch {old['finished_epoch']}); --overwrite starts it over")
        return None
    return {"preset": args.preset, "finished_epoch": None, "settings": settings}


def claim_run(args, script, record, files):
    """Begin a run: make its directory, write the record; with --overwrite delete what an earlier run left (patterns)."""
    os.makedirs(args.run_dir, exist_ok=True)
    old = [name for name in sorted(os.listdir(args.run_dir)) if any(fnmatch.fnmatch(name, f) for f in files)]
    if old and not args.overwrite:
        raise UserError(f"--run_dir {args.run_dir}: holds {old[0]}, of a run that config.json does not tell of; give "
                        "another --run_dir, or --overwrite to delete it")  # fmt: skip
    for name in old:
        os.remove(os.path.join(args.run_dir, name))
    write_record(args.run_dir, script, record)


def write_whole(path, write):
    """write(temporary path), then move it to `path`: the name never shows half a file."""
    temporary = f"{path}.tmp"
    write(temporary)
    os.replace(temporary, path)


def save_weights(path, module):
    """A plain state_dict, on the CPU, contiguous: opens with torch.load(path, weights_only=True)."""
    weights = {k: v.detach().cpu().contiguous() for k, v in module.state_dict().items()}
    write_whole(path, lambda temporary: torch.save(weights, temporary))


def load_weights(path, module):
    """Load a state_dict into module (strictly) and return it in eval mode, without gradients."""
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
        module.load_state_dict(weights)
    except (FileNotFoundError, PermissionError):
        raise
    except Exception as e:  # a file that is no checkpoint raises one of many kinds
        what = "does not fit the settings in config.json" if isinstance(e, RuntimeError) else "is not a checkpoint"
        raise UserError(f"{path}: {what}; train again with --overwrite, or restore the file") from None
    return module.eval().requires_grad_(False)


def newest_epoch(run_dir, prefix, script):
    """The highest epoch of the checkpoints prefix{epoch}.pth."""
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.pth")
    found = [int(m[1]) for m in map(pattern.fullmatch, os.listdir(run_dir) if os.path.isdir(run_dir) else []) if m]
    if not found:
        raise UserError(
            f"--run_dir {run_dir}: no {prefix}*.pth here; run python {script}.py first, with the same --run_dir"
        )
    return max(found)


def check_made_from(run_dir, script):
    """UserError unless the files that `script` built on are still the same; they are listed in its record."""
    for name, sha256 in read_records(run_dir)[script].get("made_from", {}).items():
        path = os.path.join(run_dir, name)
        if not os.path.exists(path) or file_sha256(path) != sha256:
            raise UserError(f"{path}: not the file that {script}.py was run with; run python {script}.py --overwrite")


def newest_run(script):
    """The default run directory, runs/<preset>, in which `script` finished last."""
    finished = {}
    for preset in PRESETS:
        run_dir = os.path.join("runs", preset)
        if read_records(run_dir).get(script, {}).get("finished_epoch"):
            finished[os.path.getmtime(os.path.join(run_dir, "config.json"))] = run_dir
    if not finished:
        raise UserError(
            f"--run_dir: no finished run of {script}.py in runs/; run python train_vae.py and python train_unet.py"
        )
    return finished[max(finished)]


def file_sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


# ---- What a run shows -----------------------------------------------------------------------------------


def append_csv(path, row):
    """Append one row (a dict) to a CSV file, with a header if it is new."""
    new = not os.path.exists(path)
    with open(path, "a", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, row)
        if new:
            writer.writeheader()
        writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})


def read_csv(path):
    """A CSV of numbers -> {column: [float]}."""
    with open(path, newline="", encoding="utf-8") as f:
        rows = list(csv.DictReader(f))
    return {name: [float(row[name]) for row in rows] for name in rows[0]}


def plot_curves(path, x_label, panels):
    """Draw {panel title: {label: (xs, ys)}} side by side into a PNG."""
    import matplotlib

    matplotlib.use("Agg")  # no window, no display needed
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 3.5), squeeze=False)
    for axis, (title, lines) in zip(axes[0], panels.items()):
        for label, (xs, ys) in lines.items():
            axis.plot(xs, ys, label=label, marker="." if len(xs) < 30 else None)
        axis.set(title=title, xlabel=x_label)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    write_whole(path, lambda temporary: figure.savefig(temporary, format="png", dpi=100))
    plt.close(figure)


def to_pil(x):
    """x: (3, H, W) in [0, 1] -> PIL picture."""
    return Image.fromarray((x.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy())


def save_grid(path, images, columns):
    """images: (N, 3, H, W) in [0, 1] -> one PNG, `columns` pictures to a row."""
    grid = to_pil(make_grid(images.float().cpu(), nrow=columns))
    write_whole(path, lambda temporary: grid.save(temporary, format="PNG"))


def to_float(pixels, device):
    """uint8 pictures (B, 3, H, W) -> float32 in [-1, 1] on `device`."""
    return pixels.to(device, non_blocking=True).float() / 127.5 - 1.0
