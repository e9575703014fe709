"""Train the denoising U-Net on the latents of the run's VAE. Run train_vae.py first.

  python train_unet.py                     COCO if it is there (README.md), else the embedded demo
  python train_unet.py --preset demo       minutes on two CPU cores
  python train_unet.py --text_encoder DIR  CLIP from a directory instead of the hub

Writes to the run directory: unet_ckpt{E}.pth, t_ember_ckpt{E}.pth (time embedding) and ema_unet_ckpt{E}.pth
(plain state_dicts), unet_train.csv, unet_held_out.csv, unet_curves.png, and unet_samples_epoch{E}.png:
the same prompts from the same noise at every epoch.
What it is not: schedule, loss and sampler are in diffusion.py, the model in unet.py, every setting in config.py.
"""

import math
import os

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from config import UserError, parse_training_args
from data import choose_captions, open_dataset, read_pictures
from diffusion import baab, held_out_losses, noise_prediction_loss, q_sample, sample
from text_encoder import make_text_encoder
from training import (
    Progress,
    append_csv,
    check_finite,
    claim_run,
    epoch_batches,
    file_sha256,
    load_weights,
    lr_at,
    make_autocast,
    make_optimizer,
    new_record,
    newest_epoch,
    optimizer_step,
    pick_device,
    plot_curves,
    read_config,
    read_csv,
    read_records,
    run_script,
    save_grid,
    save_weights,
    seed_step,
    to_float,
    use_large_pages,
    write_record,
)
from unet import TimeEmbedding, UNetLatent
from vae import AutoencoderKL, reparameterize

SAMPLES_PER_PROMPT = 2
LOG_EVERY = 20  # steps per row, and at the end of an epoch, of unet_train.csv
VAE_SETTINGS = ("image_size", "latent_channels", "block_out_channels", "layers_per_block", "norm_num_groups")


def main():
    # ---- Set-up ----
    cfg, args = parse_training_args(__doc__, "unet")
    record = new_record("train_unet", cfg, args)
    if record is None:
        return
    use_large_pages()
    device = pick_device()
    autocast = make_autocast(device, cfg.mixed_precision)
    vae, vae_path = load_vae(cfg, args.run_dir, device)
    text_encoder = make_text_encoder(cfg.text_encoder, cfg.text_dim, cfg.text_length).to(device).eval()

    # ---- Data ----
    train_set, held_out_set = open_dataset(cfg)
    pixels, captions = read_pictures(train_set, cfg, Progress(len(train_set), "read training pictures"))
    mu, log_var = encode_all(vae, pixels, device, cfg, "encode training pictures")
    pixels, held_out_captions = read_pictures(held_out_set, cfg, Progress(len(held_out_set), "read held-out pictures"))
    held_out = encode_all(vae, pixels, device, cfg, "encode held-out pictures")
    del pixels

    # ---- Model ----
    torch.manual_seed(cfg.seed)
    unet, t_ember = UNetLatent(cfg).to(device), TimeEmbedding(cfg.time_dim).to(device)
    ema = AveragedModel(unet, multi_avg_fn=get_ema_multi_avg_fn(cfg.ema_decay))
    parameters = [*unet.parameters(), *t_ember.parameters()]
    optimizer = make_optimizer(parameters, cfg)
    alpha_bar = baab(cfg.timesteps, cfg.beta_start, cfg.beta_end)[2].to(device)
    print(f"U-Net with time embedding: {sum(p.numel() for p in parameters) / 1e6:.2f}M parameters")

    # ---- State ----
    record |= {"made_from": {os.path.basename(vae_path): file_sha256(vae_path)}}
    claim_run(args, "train_unet", record, ["unet_*", "t_ember_*", "ema_unet_*"])
    steps_per_epoch = math.ceil(len(mu) / cfg.batch_size)
    total_steps = min(cfg.num_epochs * steps_per_epoch, args.max_steps or math.inf)
    last_epoch = math.ceil(total_steps / steps_per_epoch)
    step, count, window = 0, 0, torch.zeros((), device=device)  # sum of the losses over `count` steps
    progress = Progress(total_steps, "train_unet")

    for epoch in range(1, last_epoch + 1):
        for index in epoch_batches(cfg.seed, epoch, len(mu), cfg.batch_size)[: total_steps - step]:
            step += 1
            lr = lr_at(step, total_steps, cfg)
            seed_step(cfg.seed, step)
            z = reparameterize(mu[index], log_var[index])  # drawn anew at each use, as if encoded again
            t = torch.randint(cfg.timesteps, (len(z),)).to(device)
            noise = torch.randn_like(z)
            z_t = q_sample(z, t, noise, alpha_bar)
            text_emb = text_encoder(choose_captions(captions, index))
            with autocast():
                eps = unet(z_t, t_ember(t), text_emb)
            loss = noise_prediction_loss(eps, noise).mean()
            optimizer_step(optimizer, loss, lr, cfg.max_grad_norm)
            ema.update_parameters(unet)
            window += loss.detach()
            count += 1
            if count == LOG_EVERY or step % steps_per_epoch == 0 or step == total_steps:
                log_training(args.run_dir, step, window / count, lr)
                window, count = torch.zeros_like(window), 0
            progress.update()

        held_out_loss = evaluate(unet, t_ember, text_encoder, held_out, held_out_captions, alpha_bar, cfg)
        append_csv(
            os.path.join(args.run_dir, "unet_held_out.csv"), {"epoch": epoch, "step": step, "loss": held_out_loss}
        )
        progress.say(f"epoch {epoch}: held-out loss {held_out_loss:.4f}")
        show_samples(
            unet, vae, t_ember, text_encoder, cfg, os.path.join(args.run_dir, f"unet_samples_epoch{epoch}.png")
        )
        draw_curves(args.run_dir)
        if epoch % cfg.save_every == 0 or epoch == last_epoch:
            save_weights(os.path.join(args.run_dir, f"unet_ckpt{epoch}.pth"), unet)
            save_weights(os.path.join(args.run_dir, f"t_ember_ckpt{epoch}.pth"), t_ember)
            save_weights(os.path.join(args.run_dir, f"ema_unet_ckpt{epoch}.pth"), ema.module)

    # ---- Done ----
    progress.close()
    write_record(args.run_dir, "train_unet", record | {"finished_epoch": last_epoch})
    print(f"wrote {os.path.join(args.run_dir, f'unet_ckpt{last_epoch}.pth')}; "
          f'next: python sample.py --run_dir {args.run_dir} --prompt "a red sports car"')  # fmt: skip


def load_vae(cfg, run_dir, device):
    """-> the run's VAE and its path; UserError if there is none, it is not finished, or has other settings."""
    epoch = newest_epoch(run_dir, "vae_ckpt_epoch", "train_vae")
    theirs = read_config(run_dir, "train_vae")
    for name in VAE_SETTINGS:
        if getattr(theirs, name) != getattr(cfg, name):
            raise UserError(f"--{name}: {getattr(cfg, name)} here, but the VAE in {run_dir} was trained with "
                            f"{getattr(theirs, name)}; give the same, or another --run_dir")  # fmt: skip
    if read_records(run_dir)["train_vae"]["finished_epoch"] != epoch:
        raise UserError(f"--run_dir {run_dir}: train_vae.py has not finished here; let it finish, or start it over")
    path = os.path.join(run_dir, f"vae_ckpt_epoch{epoch}.pth")
    print(f"VAE: {path}")
    return load_weights(path, AutoencoderKL(cfg)).to(device), path


@torch.no_grad()
def encode_all(vae, pixels, device, cfg, what):
    """uint8 pictures (N, 3, S, S) -> mu, log_var of all of them: (N, latent_channels, s, s) each, on `device`."""
    progress, parts = Progress(len(pixels), what), []
    for x in pixels.split(cfg.batch_size):
        parts.append(vae.encode(to_float(x, device)))
        progress.update(len(x))
    progress.close()
    return torch.cat([mu for mu, _ in parts]), torch.cat([log_var for _, log_var in parts])


def evaluate(unet, t_ember, text_encoder, held_out, captions, alpha_bar, cfg):
    """Held-out loss at the same latents, noise and timesteps at every epoch."""
    seed_step(cfg.seed, 0)
    first_captions = [several[0] for several in captions]
    z = reparameterize(*held_out)
    return held_out_losses(unet, t_ember, text_encoder, z, first_captions, alpha_bar, cfg.batch_size)[1].mean().item()


def log_training(run_dir, step, loss, lr):
    check_finite([loss.item()], step, lr)
    append_csv(os.path.join(run_dir, "unet_train.csv"), {"step": step, "lr": lr, "loss": loss.item()})


def show_samples(unet, vae, t_ember, text_encoder, cfg, path):
    """A row per prompt, from the same noise at every epoch."""
    prompts = [p for p in cfg.sample_prompts for _ in range(SAMPLES_PER_PROMPT)]
    alpha_bar = baab(cfg.timesteps, cfg.beta_start, cfg.beta_end)[2]
    images = sample(unet, vae, t_ember, text_encoder, prompts, cfg.timesteps, len(prompts),
                    alpha_bar=alpha_bar, seeds=list(range(len(prompts))))  # fmt: skip
    save_grid(path, images, columns=SAMPLES_PER_PROMPT)


def draw_curves(run_dir):
    train = read_csv(os.path.join(run_dir, "unet_train.csv"))
    held_out = read_csv(os.path.join(run_dir, "unet_held_out.csv"))
    plot_curves(os.path.join(run_dir, "unet_curves.png"), "step", {
        "noise-prediction loss": {"training": (train["step"], train["loss"]),
                                  "held-out": (held_out["step"], held_out["loss"])},
        "learning rate": {"learning rate": (train["step"], train["lr"])},
    })  # fmt: skip


if __name__ == "__main__":
    run_script(main)
