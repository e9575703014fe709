"""The ladder of docs/results.md: from the faithful recipe upwards, one change per rung, at equal pictures seen.

  python tests/ladder.py OUT --seeds 0 1 2      trains and measures every rung for every seed (hours on two cores)
  python tests/ladder.py OUT --seeds 0 1 2 --only_table

Each rung is the preset demo (painted scenes, small nets, a tenth of the attribute combinations held out) with the flags
below; a run that is finished is not run again. What it is not: a test, or a search; the flags were set beforehand, the
guidance of the last rung by a run of another seed.
"""

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import zlib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import evaluate  # noqa: E402
from support import judges  # noqa: E402

# the demo as it was when the ladder was climbed: it has other numbers of scenes now, another U-Net, other learning rates,
# another optimizer and other guidance
COMMON = [
    "--preset",
    "demo",
    "--held_out_combinations",
    "48",
    "--save_minutes",
    "60",
    "--max_images",
    "4000",
    "--unet_block_out_channels",
    "32",
    "64",
    "128",
    "--time_dim",
    "128",
    "--optimizer",
    "adam",
    "--lr",
    "1e-3",
    "--lr_warmup_steps",
    "20",
]
VAE_AS_CLIMBED = "--num_epochs 2 --batch_size 4"
UNET_AS_CLIMBED = "--batch_size 16 --caption_dropout 0.1 --guidance_interval 0 1"
RECIPE = "--prediction_type epsilon --caption_dropout 0 --guidance_scale 1 --sample_steps 0"
V_PREDICTION = "--prediction_type v_prediction --scale_betas"
WITHOUT_EMA = "--no-ema_warmup --ema_decay 0.9999"
# rung: (flags of train_vae.py, flags of train_unet.py, flags of evaluate.py)
RUNGS = {
    "faithful": ("", f"{RECIPE} {WITHOUT_EMA}", ""),
    "faithful, averaged": ("", f"{RECIPE} {WITHOUT_EMA}", "--ema"),
    "+ EMA warm-up": ("", RECIPE, "--ema"),
    "+ scaled betas": ("", f"{RECIPE} --scale_betas", "--ema"),
    "+ guidance": ("", f"{RECIPE} --scale_betas --caption_dropout 0.1", "--ema --guidance_scale 2"),
    "v-prediction on scaled betas": ("", f"{RECIPE} {V_PREDICTION}", "--ema"),
    "the same + guidance": ("", f"{RECIPE} {V_PREDICTION} --caption_dropout 0.1", "--ema --guidance_scale 2"),
    "+ flow matching": ("", "", "--ema --guidance_scale 2"),
    "best: flow matching, less guidance": ("", "", "--ema --guidance_scale 1.25"),
}
COLUMNS = {
    "prompts, %": lambda r: 100 * r["prompts"]["generated"]["all"],
    "composition, %": lambda r: 100 * r["composition"]["generated"]["all"],
    "Frechet - floor": lambda r: r["distances"]["frechet"] - r["distances"]["frechet_floor"],
    "kernel": lambda r: r["distances"]["kernel"],
    "channel-mean ratio": lambda r: r["channel_means"]["ratio"],
    "loss / Wiener": lambda r: r["denoising"]["wiener"]["ratio"],
    "VAE MSE x 1000": lambda r: 1000 * r["vae"]["mse"],
    "U-Net, processor s": lambda r: r["seconds"],
}


def run(script, *words):
    """Run a script of the project -> seconds of processor time, which another load of the machine changes less."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run([sys.executable, str(ROOT / script), *map(str, words)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before


def name_of(words):
    return f"{zlib.crc32(words.encode()):08x}"


def train(out, seed, epochs, vae_flags, unet_flags):
    """-> the run directory of this seed and these flags, and the seconds of its U-Net; trained unless it is there."""
    vae_flags, unet_flags = f"{VAE_AS_CLIMBED} {vae_flags}", f"{UNET_AS_CLIMBED} {unet_flags}"
    common = [*COMMON, "--seed", seed, "--cache_dir", out / "prepared"]
    names = (vae_flags, f"{vae_flags}|{unet_flags}|{epochs}")
    vae_dir, run_dir = (out / f"seed{seed}-{name_of(words)}" for words in names)
    run("train_vae.py", *common, "--run_dir", vae_dir, *vae_flags.split())
    if not (run_dir / "seconds").exists():
        run_dir.mkdir(exist_ok=True)
        for path in vae_dir.glob("vae_*"):
            shutil.copy(path, run_dir)
        seconds = run(
            "train_unet.py", *common, "--run_dir", run_dir, "--num_epochs", epochs, *unet_flags.split(), "--overwrite"
        )  # one that was interrupted would count the rest of its seconds alone
        (run_dir / "seconds").write_text(str(seconds))
    return run_dir, float((run_dir / "seconds").read_text())


def measure(run_dir, num_prompts, steps, flags):
    command = ["evaluate.py", "--run_dir", run_dir, "--num_prompts", num_prompts, "--steps", steps, *flags.split()]
    sys.argv = [str(word) for word in command]
    evaluate.main()
    return json.loads((run_dir / f"evaluation{'_ema' if '--ema' in flags else ''}.json").read_text())


def train_one_judge():
    """All rungs of a process are judged by the same classifier, which does not depend on them."""
    real, kept = judges.train_classifier, []

    def train_classifier(cfg, device):
        if not kept:
            kept.append(real(cfg, device))
        return kept[0]

    judges.train_classifier = train_classifier


def table(out, seeds):
    """Markdown: mean over seeds, and the spread (largest less smallest)."""
    lines = ["| rung | n | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 2) + "|"]
    for rung in RUNGS:
        results = [
            json.loads(p.read_text()) for p in (out / f"{rung}, seed {seed}.json" for seed in seeds) if p.exists()
        ]
        if results:
            values = [[column(r) for r in results] for column in COLUMNS.values()]
            cells = (f"{statistics.mean(v):.3g} ({max(v) - min(v):.2g})" for v in values)
            lines.append(f"| {rung} | {len(results)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--num_prompts", type=int, default=128)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--only_table", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    train_one_judge()
    for seed in () if args.only_table else args.seeds:
        for rung, (vae_flags, unet_flags, evaluate_flags) in RUNGS.items():
            file = args.out / f"{rung}, seed {seed}.json"
            asked = [vae_flags, unet_flags, evaluate_flags, args.epochs, args.num_prompts, args.steps]
            if not file.exists() or json.loads(file.read_text()).get("asked") != asked:
                run_dir, seconds = train(args.out, seed, args.epochs, vae_flags, unet_flags)
                result = measure(run_dir, args.num_prompts, args.steps, evaluate_flags)
                file.write_text(json.dumps(result | {"seconds": seconds, "asked": asked}))
    print(table(args.out, args.seeds))


if __name__ == "__main__":
    main()
