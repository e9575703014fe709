"""Train the autoencoder.

  python train_vae.py                      COCO if it is there (README.md), else the embedded demo
  python train_vae.py --preset demo        64-pixel painted scenes, minutes on two CPU cores
  python train_vae.py --dataset folder --data_root my_pictures --run_dir runs/mine
  python train_vae.py --run_dir runs/sharper --finetune_decoder_of runs/coco --l1_weight 0.1   then sample.py --vae

Writes to the run directory: vae_ckpt_epoch{E}.pth (a plain state_dict), vae_train.csv, vae_held_out.csv,
vae_curves.png, and vae_pictures_epoch{E}.png: held-out pictures above their reconstructions.
What it is not: it never looks at captions. Loss and model are in vae.py, every setting in config.py.
"""

import math
import os

import torch

from checkpoint import Run, load_vae
from config import flags_to_hand_on, parse_training_args
from cuda_graph import recorded
from data import draw_views, fingerprint, open_dataset, read_pictures, take_views
from training import (
    FiniteGuard,
    Interrupts,
    Progress,
    append_csv,
    average_over,
    check_held_out,
    clip_gradients,
    command_line,
    compiled,
    conv_layout,
    epoch_batches,
    first_alone,
    in_parallel,
    join_world,
    lr_at,
    make_autocast,
    make_optimizer,
    near,
    optimizer_step,
    parts_of,
    plot_curves,
    read_csv,
    run_script,
    save_grid,
    seed_step,
    share_of,
    show_progress,
    to_float,
    use_large_pages,
)
from vae import AutoencoderKL, draw_transform, held_out_figures, measure_latents, num_together, transformed, vae_loss

GRID_PICTURES = 8
LOG_EVERY = 20  # steps per row, and at the end of an epoch, of vae_train.csv
COMPILE_PAYS = 2_200  # steps on CUDA that win back what compiling takes, from what both took on an H200


def main():
    # ---- Set-up ----
    cfg, args = parse_training_args(__doc__, "vae")
    use_large_pages()
    world = join_world()
    device = world.device
    run = Run(args, "vae", cfg, world)
    if cfg.finetune_decoder_of:
        vae, run.about["made_from"] = load_vae(
            cfg, cfg.finetune_decoder_of, device, "--finetune_decoder_of", args.given
        )
    if run.finished():
        return
    run.open()
    autocast = make_autocast(device, cfg.mixed_precision)

    # ---- Data ----
    train_set, held_out_set = open_dataset(cfg, cfg.random_crop)
    with first_alone(world):
        pixels, _ = read_pictures(train_set, cfg, show_progress("read training pictures"))
        held_out, _ = read_pictures(held_out_set, cfg, show_progress("read held-out pictures"))
    run.about["data"] = fingerprint(pixels, [len(pixels), len(held_out)], held_out)
    pixels = near(pixels, device)

    # ---- Model ----
    torch.manual_seed(cfg.seed)
    if not cfg.finetune_decoder_of:
        vae = AutoencoderKL(cfg)
    vae.decoder.requires_grad_(True)  # of a finished VAE nothing else learns
    vae.to(device, memory_format=conv_layout(device))
    parameters = [p for p in vae.parameters() if p.requires_grad]
    optimizer = make_optimizer(parameters, cfg)
    print(f"VAE: {sum(p.numel() for p in parameters) / 1e6:.2f}M parameters that learn")

    # ---- State ----
    steps_per_epoch = math.ceil(len(pixels) / cfg.batch_size)
    total_steps = min(cfg.num_epochs * steps_per_epoch, args.max_steps or math.inf)
    last_epoch = math.ceil(total_steps / steps_per_epoch)
    # with equivariance there is code for each transform, too much to win back
    pays = total_steps >= COMPILE_PAYS and not cfg.equivariance
    autoencode = compiled(in_parallel(vae, world), cfg.compile, device, pays)
    start = {"step": 0, "epoch": 0, "count": 0, "window": torch.zeros(3)}  # window: sums of loss, mse, kl
    at = run.resume([vae], optimizer, start)
    step, epochs_done, count, window = at["step"], at["epoch"], at["count"], at["window"].to(device)

    def save(tag):
        counters = {"step": step, "epoch": epochs_done, "count": count, "window": window.cpu()}
        run.save(tag, epochs_done == last_epoch, [vae], optimizer, counters)

    def gradients(x, eps):
        """Leaves the gradients of a batch in the parameters -> loss, mse, kl (3,), and the gradients' norm."""
        losses = torch.zeros(3, device=device)
        optimizer.zero_grad()
        for part, weight in parts_of(len(index), world, cfg.grad_accumulation):
            with autocast():
                mu, log_var, x_hat = autoencode(x[part], eps[part], transform)
            loss, mse, kl = vae_loss(transformed(x[part], transform), mu.float(), log_var.float(), x_hat.float(),
                                     cfg.beta, cfg.l1_weight, cfg.ms_ssim_weight)  # fmt: skip
            (weight * loss).backward()
            losses += weight * torch.stack([loss, mse, kl]).detach()
        return average_over(losses, world), clip_gradients(optimizer, cfg.max_grad_norm)

    if world.size == 1 and not cfg.equivariance:
        gradients = recorded(gradients, device, parameters)
    interrupts, progress = Interrupts(cfg.save_minutes, world.rank), Progress(total_steps, "train_vae", step)
    guard = FiniteGuard(device)

    for epoch in range(epochs_done + 1, last_epoch + 1):
        batches = epoch_batches(cfg.seed, epoch, len(pixels), cfg.batch_size)
        for index in batches[step - epochs_done * steps_per_epoch : total_steps - epochs_done * steps_per_epoch]:
            step += 1
            lr = lr_at(step, total_steps, cfg)
            seed_step(cfg.seed, step)
            eps = torch.randn(len(index), cfg.latent_channels, cfg.latent_size, cfg.latent_size, device=device)
            views = draw_views(len(index), cfg)
            transform = draw_transform(cfg.equivariance)
            mine = share_of(len(index), world)  # what is drawn above is of the whole batch
            x = to_float(take_views(pixels, index[mine], views[mine], cfg.image_size), device)
            losses, grad_norm = gradients(x.contiguous(memory_format=conv_layout(device)), eps[mine])
            guard.judge(optimizer, losses[0], grad_norm, step, run.last_saved)
            optimizer_step(optimizer, lr)
            window += losses
            count += 1
            if count == LOG_EVERY or step % steps_per_epoch == 0 or step == total_steps:
                guard.check(run.last_saved)
                log_training(run, step, window / count, lr)
                window, count = torch.zeros_like(window), 0
            progress.update()
            if interrupts.due():
                guard.check(run.last_saved)
                save(f"{epoch}_step{step}")
                interrupts.saved(step)

        if world.rank == 0:
            figures = evaluate(vae, held_out, device, cfg)
            check_held_out(figures["mse"], step, run.last_saved)
            append_csv(os.path.join(args.run_dir, "vae_held_out.csv"), {"epoch": epoch, "step": step} | figures)
            progress.say(f"epoch {epoch}: held-out MSE {figures['mse']:.4f} ({figures['psnr_db']:.1f} dB), latent mean "
                         f"{figures['latent_mean']:+.3f}, std {figures['latent_std']:.3f}")  # fmt: skip
            show_reconstructions(
                vae, held_out, device, cfg, os.path.join(args.run_dir, f"vae_pictures_epoch{epoch}.png")
            )
            draw_curves(args.run_dir)
        if epoch == last_epoch and cfg.normalize_latents and not cfg.finetune_decoder_of and world.rank == 0:
            normalize(vae, pixels, device, cfg)
        epochs_done = epoch
        if epoch % cfg.save_every == 0 or epoch == last_epoch:
            save(f"{epoch}")
            interrupts.saved(step)

    # ---- Done ----
    progress.close()
    following = ["train_unet.py", "--preset", args.preset, "--run_dir", args.run_dir, *flags_to_hand_on(args)]
    if cfg.finetune_decoder_of:
        following = ["sample.py", "--run_dir", cfg.finetune_decoder_of, "--vae", args.run_dir]
        following += ["--prompt", "a red sports car"]
    written = os.path.join(args.run_dir, f"vae_ckpt_epoch{last_epoch}.pth")
    print(f"wrote {written}; next: {command_line('python', *following)}")


def evaluate(vae, held_out, device, cfg):
    seed_step(cfg.seed, 0)  # the same noise at every epoch
    together = min(cfg.batch_size, num_together(cfg.image_size**2))
    return held_out_figures(vae, (to_float(x, device) for x in held_out.split(together)))


def normalize(vae, pixels, device, cfg):
    """Measured on the middle of each training picture; on all of it without cfg.random_crop, or with cfg.random_scale."""
    progress = Progress(len(pixels), "measure latents")
    side = pixels.shape[-1] if cfg.random_scale else cfg.image_size
    corner = (pixels.shape[-1] - side) // 2

    def batches():
        for index in torch.arange(len(pixels)).split(num_together(cfg.image_size**2)):
            views = torch.tensor([[corner, corner, side, 0]]).expand(len(index), 4)
            yield to_float(take_views(pixels, index, views, cfg.image_size), device)
            progress.update(len(index))

    measure_latents(vae, batches())
    progress.close()
    for name in ("latent_mean", "latent_std"):
        print(f"{name} by channel:", *(f"{v:.3f}" for v in getattr(vae.decoder, name).flatten().tolist()))


def log_training(run, step, means, lr):
    loss, mse, kl = means.tolist()
    if run.world.rank == 0:
        append_csv(os.path.join(run.dir, "vae_train.csv"), {"step": step, "lr": lr, "loss": loss, "mse": mse, "kl": kl})


@torch.no_grad()
def show_reconstructions(vae, held_out, device, cfg, path):
    """The same held-out pictures at every epoch, above their reconstructions: decoded from mu, not from a draw."""
    x = to_float(held_out[:GRID_PICTURES], device)
    x_hat = torch.cat([vae.decoder(vae.encode(part)[0]) for part in x.split(num_together(cfg.image_size**2))])
    save_grid(path, (torch.cat([x, x_hat]) + 1) / 2, columns=len(x))


def draw_curves(run_dir):
    train = read_csv(os.path.join(run_dir, "vae_train.csv"))
    held_out = read_csv(os.path.join(run_dir, "vae_held_out.csv"))
    plot_curves(os.path.join(run_dir, "vae_curves.png"), "step", {
        "MSE": {"training": (train["step"], train["mse"]), "held-out": (held_out["step"], held_out["mse"])},
        "KL [nats per picture]": {"training": (train["step"], train["kl"])},
        "latents, held-out": {"mean": (held_out["step"], held_out["latent_mean"]),
                              "std": (held_out["step"], held_out["latent_std"])},
    })  # fmt: skip


if __name__ == "__main__":
    run_script(main)
