"""Train the autoencoder.

  python train_vae.py                      COCO if it is there (README.md), else the built-in demo
  python train_vae.py --preset demo        64-pixel painted scenes, minutes on two CPU cores
  python train_vae.py --dataset folder --data_root my_pictures --run_dir runs/mine
  python train_vae.py --run_dir runs/sharper --finetune_decoder_of runs/coco --l1_weight 0.1   for sample.py --vae

Writes to the run directory: vae_ckpt_epoch{E}.pth (a plain state_dict), vae_train.csv, vae_held_out.csv,
vae_curves.png, vae_pictures_epoch{E}.png: held-out pictures above their reconstructions; and report.html, which shows
all of them.
What it is not: it never looks at captions. Loss and model are in vae.py, every setting in config.py.
"""

from functools import partial

import torch

import data
import training
from support import checkpoint, devices, flags, models, processes, show
from support.cuda_graph import record_cuda_graph
from support.errors import run_script
from support.report import write_report
from support.signals import command_line
from vae import AutoencoderKL, held_out_figures, pictures_per_pass, vae_loss

GRID_PICTURES = 8
COMPILE_FROM = 2_200  # steps on CUDA from which torch.compile saves more time than it takes, as timed on an H200


def main():
    # ---- Set-up ----
    cfg, args = flags.parse_training_args(__doc__, "vae")
    devices.use_large_pages()
    world = processes.join_world()
    device = world.device
    run = checkpoint.Run(args, "vae", cfg, world)
    if cfg.finetune_decoder_of:
        found = models.load_vae(cfg, cfg.finetune_decoder_of, device, "--finetune_decoder_of", args.given)
        vae, run.about["made_from"] = found
    if run.finished():
        return
    run.open()
    autocast = devices.make_autocast(device, cfg.mixed_precision)

    # ---- Data ----
    pixels, held_out = read_data(cfg, run)

    # ---- Model ----
    torch.manual_seed(cfg.seed)
    if not cfg.finetune_decoder_of:
        vae = AutoencoderKL(cfg)
    vae.decoder.requires_grad_(True)  # load_vae() froze the whole VAE; fine-tuning is for the decoder alone
    vae.to(device, memory_format=devices.memory_format(device))
    parameters = [p for p in vae.parameters() if p.requires_grad]
    optimizer = training.make_optimizer([vae], cfg)
    print(f"VAE: {sum(p.numel() for p in parameters) / 1e6:.2f}M trainable parameters")

    # ---- State ----
    plan = training.Plan(len(pixels), cfg.batch_size, cfg.num_epochs, args.max_steps, cfg.seed)
    autoencode = world.data_parallel(vae)
    autoencode = devices.maybe_compile(autoencode, cfg.compile, device, plan.total_steps >= COMPILE_FROM)
    start = training.State(0, 0, 0, window=torch.zeros(3, device=device))
    state = run.resume([vae], optimizer, start, plan)
    gradients = partial(batch_gradients, autoencode, optimizer, autocast, cfg, world)
    if world.size == 1:
        gradients = record_cuda_graph(gradients, device, parameters)
    guard, progress = training.FiniteGuard(device, run), show.Progress(plan.total_steps, "train_vae", state.step)

    for epoch in range(state.epoch + 1, plan.last_epoch + 1):
        for index in plan.batches(epoch, state.step):
            state.step += 1
            lr = training.lr_at(state.step, plan.total_steps, cfg, state.restart)
            training.seed_step(cfg.seed, state.step)
            eps = torch.randn(len(index), cfg.latent_channels, cfg.latent_size, cfg.latent_size, device=device)
            crops = data.draw_crops(len(index), cfg)
            mine = world.share(len(index))  # draws are for the whole batch: the same with any number of processes
            x = data.to_float(data.crop_pictures(pixels, index[mine], crops[mine], cfg.image_size), device)
            losses, grad_norm = gradients(len(index), x, eps[mine])
            guard.judge(optimizer, losses[0], grad_norm, state.step)
            training.optimizer_step(optimizer, lr)
            state.add(losses)
            if plan.ends_row(state):
                guard.check()
                loss, mse, kl = state.take_means()
                run.log("train", {"step": state.step, "lr": lr, "loss": loss, "mse": mse, "kl": kl})
            progress.update()
            if run.save_is_due():
                guard.check()
                run.save(f"{epoch}_step{state.step}", state)

        if world.rank == 0:
            figures = evaluate(vae, held_out, device, cfg)
            guard.check_held_out(figures["mse"], state.step)
            run.log("held_out", {"epoch": epoch, "step": state.step} | figures)
            progress.say(f"epoch {epoch}: {summary(figures)}")
            show_reconstructions(vae, held_out, device, cfg, run, epoch)
            draw_run(run)
        state.epoch = epoch
        run.save(f"{epoch}", state, finished=epoch == plan.last_epoch)

    # ---- Done ----
    progress.close()
    print(f"wrote {run.path(f'vae_ckpt_epoch{plan.last_epoch}.pth')}; next: {next_command(cfg, args, run)}")


def read_data(cfg, run):
    """-> training pictures (N, 3, S, S), S = image_size + random_crop, and held-out ones of image_size; uint8."""
    train_set, held_out_set = data.open_dataset(cfg, cfg.random_crop)
    with run.world.rank0_first():
        pixels, captions = data.read_pictures(train_set, cfg, show.progress_bar("read training pictures"))
        held_out, held_out_captions = data.read_pictures(held_out_set, cfg, show.progress_bar("read held-out pictures"))
    run.about["data"] = data.fingerprint(pixels, [len(pixels), len(held_out)], held_out)
    run.about["caption"] = flags.example_caption([*held_out_captions, *captions])
    return devices.move_if_it_fits(pixels, run.world.device), held_out


def batch_gradients(autoencode, optimizer, autocast, cfg, world, count, x, eps):
    """Leaves the gradients of a batch in the parameters -> loss, mse, kl (3,), and the gradients' norm.

    x, eps: this process's share of a batch of `count` pictures, and of the noise of their latents.
    """
    losses = torch.zeros(3, device=x.device)
    x = x.contiguous(memory_format=devices.memory_format(x.device))
    optimizer.zero_grad()
    for part, weight in world.micro_batches(count, cfg.grad_accumulation):
        with autocast():
            mu, log_var, x_hat = autoencode(x[part], eps[part])
        out = mu.float(), log_var.float(), x_hat.float()
        loss, mse, kl = vae_loss(x[part], *out, cfg.beta, cfg.l1_weight, cfg.ms_ssim_weight)
        (weight * loss).backward()
        losses += weight * torch.stack([loss, mse, kl]).detach()
    return world.average(losses), training.clip_gradients(optimizer, cfg.max_grad_norm)


# ---- At the end of an epoch -----------------------------------------------------------------------------


def evaluate(vae, held_out, device, cfg):
    training.seed_step(cfg.seed, 0)  # the same noise at every epoch
    together = min(cfg.batch_size, pictures_per_pass(cfg.image_size**2))
    return held_out_figures(vae, (data.to_float(x, device) for x in held_out.split(together)))


def summary(figures):
    error = f"held-out MSE {figures['mse']:.4f} ({figures['psnr_db']:.1f} dB)"
    return f"{error}, latent mean {figures['latent_mean']:+.3f}, std {figures['latent_std']:.3f}"


@torch.no_grad()
def show_reconstructions(vae, held_out, device, cfg, run, epoch):
    """The same held-out pictures at every epoch, above their reconstructions: decoded from mu, not from a drawn z."""
    x = data.to_float(held_out[:GRID_PICTURES], device)
    x_hat = torch.cat([vae.decoder(vae.encode(part)[0]) for part in x.split(pictures_per_pass(cfg.image_size**2))])
    run.show("pictures", epoch, (torch.cat([x, x_hat]) + 1) / 2, columns=len(x))


def draw_run(run):
    """The curves, and the report of all that is there by now."""
    train, held_out = (show.read_csv(run.path(f"vae_{name}.csv")) for name in ("train", "held_out"))
    latents = {what: (held_out["step"], held_out[f"latent_{what}"]) for what in ("mean", "std")}
    panels = {
        "MSE": {"training": (train["step"], train["mse"]), "held-out": (held_out["step"], held_out["mse"])},
        "KL [nats per picture]": {"training": (train["step"], train["kl"])},
        "latents, held-out": latents,
    }
    show.plot_curves(run.path("vae_curves.png"), panels)
    write_report(run.dir)


def next_command(cfg, args, run):
    if cfg.finetune_decoder_of:
        words = "--run_dir", cfg.finetune_decoder_of, "--vae", args.run_dir
        return flags.sampling_command(run.about["caption"], *words)
    words = ["train_unet.py", "--preset", args.preset, "--run_dir", args.run_dir]
    return command_line("python", *words, *flags.flags_to_hand_on(args.given))


if __name__ == "__main__":
    run_script(main)
