"""Train the autoencoder.

  python train_vae.py                      COCO if it is there (README.md), else the built-in demo
  python train_vae.py --preset demo        64-pixel painted scenes, minutes on two CPU cores
  python train_vae.py --dataset folder --data_root my_pictures --run_dir runs/mine
  python train_vae.py --preset demo --run_dir runs/sharper --finetune_decoder_of runs/demo     for sample.py --vae

Writes to the run directory: vae_ckpt_epoch{E}.pth (a plain state_dict), vae_train.csv, vae_held_out.csv,
vae_curves.png, report.html that shows all, and vae_pictures_epoch{E}.png: held-out pictures above their reconstructions (in
finetuning, those of the decoder as it was come between).
What it is not: it never looks at captions. Loss and model are in vae.py, every setting in config.py.
"""

import copy
from functools import partial

import torch

import adversarial
import data
import training
from support import checkpoint, devices, flags, models, processes, published, report, show
from support.cuda_graph import record_cuda_graph
from support.errors import UserError, run_script
from support.signals import command_line
from vae import AutoencoderKL, held_out_figures, pictures_per_pass, vae_loss

LOSSES = ("loss", "mse", "kl", "adversarial", "discriminator")  # the last two with --adversarial_weight
GRID_PICTURES = 8
COMPILE_FROM = 2_200  # steps from which torch.compile pays on an H200: 89 s over 63 - 22 ms a step


def main():
    # ---- Set-up ----
    cfg, args = flags.parse_training_args(__doc__, "vae")
    devices.use_large_pages()
    world = processes.join_world()
    device, run = world.device, checkpoint.Run(args, "vae", cfg, world)
    if cfg.finetune_decoder_of:
        found = models.load_vae(cfg, cfg.finetune_decoder_of, device, "--finetune_decoder_of", args.given)
        vae, run.about["made_from"] = found
    before = copy.deepcopy(vae.decoder) if cfg.finetune_decoder_of else None
    if run.finished():
        return
    run.open()
    autocast = devices.make_autocast(device, cfg.mixed_precision)
    lpips = published.load_lpips(cfg.image_size, device) if cfg.lpips_weight else None

    # ---- Data ----
    pixels, held_out = read_data(cfg, run)

    # ---- Model ----
    torch.manual_seed(cfg.seed)
    if not cfg.finetune_decoder_of:
        vae = AutoencoderKL(cfg)
    vae.decoder.requires_grad_(True)  # load_vae() froze the whole VAE; fine-tuning is for the decoder alone
    vae.to(device, memory_format=devices.memory_format(device, cfg.block_out_channels[0]))
    devices.checkpoint_blocks(vae, cfg.grad_checkpointing)
    parameters = [p for p in vae.parameters() if p.requires_grad]
    optimizer = training.make_optimizer([vae], cfg)
    discriminator = adversarial.make_discriminator(cfg, optimizer, device)
    print(f"VAE: {sum(p.numel() for p in parameters) / 1e6:.2f}M trainable parameters")

    # ---- State ----
    plan = training.Plan(len(pixels), cfg.batch_size, cfg.num_epochs, args.max_steps, cfg.seed)
    check_start(cfg, plan)
    pays = plan.total_steps >= COMPILE_FROM and not discriminator
    autoencode = devices.maybe_compile(world.data_parallel(vae), cfg, device, pays, world.part_size(plan, cfg))
    start = training.State(0, 0, 0, torch.zeros(5 if discriminator else 3, device=device))
    state = run.resume([vae], optimizer, start, plan, [discriminator] if discriminator else [])
    parameters, last = checkpoint.parameters_of(optimizer), vae.decoder.conv_out.weight
    adversary = discriminator and (world.data_parallel(discriminator), discriminator.balance, last)
    gradients = partial(batch_gradients, autoencode, lpips, adversary, optimizer, autocast, cfg, world)
    gradients = record_cuda_graph(gradients, device, parameters) if world.size == 1 else gradients
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
            pulled = discriminator is not None and state.step > cfg.adversarial_start
            losses, grad_norm = gradients(len(index), x, eps[mine], pulled)
            guard.judge(optimizer, losses[0] + 0 * losses.sum(), grad_norm, state.step)  # NaN if any of them is
            training.optimizer_step(optimizer, lr)
            state.add(losses)
            if plan.ends_row(state):
                guard.check()
                run.log("train", {"step": state.step, "lr": lr} | dict(zip(LOSSES, state.take_means())))
            progress.update()
            if run.save_is_due():
                guard.check()
                run.save(f"{epoch}_step{state.step}", state)

        if world.rank == 0:
            figures = evaluate(vae, held_out, device, cfg)
            guard.check_held_out(figures["mse"], state.step)
            run.log("held_out", {"epoch": epoch, "step": state.step} | figures)
            progress.say(f"epoch {epoch}: {summary(figures)}")
            show_reconstructions(vae, before, held_out, device, cfg, run, epoch)
            draw_curves(run)
        state.epoch = epoch
        run.save(f"{epoch}", state, finished=epoch == plan.last_epoch)
        report.write_report(run.dir, world.rank)

    # ---- Done ----
    progress.close()
    print(f"wrote {run.path(f'vae_ckpt_epoch{plan.last_epoch}.pth')}; next: {next_command(cfg, args, run)}")


def read_data(cfg, run):
    """-> training pictures (N, 3, S, S), S = image_size + random_crop, and held-out ones of image_size; uint8."""
    with run.world.rank0_first():
        pixels, captions, held_out, held_out_captions = data.read_dataset(cfg, cfg.random_crop)
    run.about["data"] = data.fingerprint(pixels, [len(pixels), len(held_out)], held_out)
    run.about["caption"] = flags.example_caption([*held_out_captions, *captions])
    devices.keep_compiled(cfg, run.world.device)
    return devices.move_if_it_fits(pixels, run.world.device), held_out


def check_start(cfg, plan):
    if cfg.adversarial_weight and cfg.adversarial_start >= plan.total_steps:
        what = f"{cfg.adversarial_start} is not before the last step, {plan.total_steps}; give less"
        raise UserError(f"--adversarial_start: {what}, or more --num_epochs")


def batch_gradients(autoencode, lpips, adversary, optimizer, autocast, cfg, world, count, x, eps, pulled):
    """Leaves the gradients of a batch in the parameters -> the LOSSES that there are, and the norm of the VAE's gradients.

    x, eps: this process's share of a batch of `count` pictures, and of the noise of their latents. adversary: the
    discriminator as it is to be called, its balance, the decoder's last weights; pulled: whether it is used yet.
    """
    losses = torch.zeros(5 if adversary else 3, device=x.device)
    edges = torch.zeros(2, *adversary[2].shape, device=x.device) if pulled else None
    x = x.contiguous(memory_format=devices.memory_format(x.device, cfg.block_out_channels[0]))
    optimizer.zero_grad()
    for part, weight in world.micro_batches(count, cfg.grad_accumulation):
        with autocast():
            mu, log_var, x_hat = autoencode(x[part], eps[part])
        out = mu.float(), log_var.float(), x_hat.float()
        loss, mse, kl = vae_loss(x[part], *out, cfg.beta, cfg.l1_weight, cfg.ms_ssim_weight)
        loss = loss + cfg.lpips_weight * lpips(out[2], x[part]) if lpips else loss
        if pulled:
            figures, gradients = adversarial.backward(*adversary, loss, x[part], out[2], weight, cfg, autocast)
            losses[3:] += weight * figures
            edges += weight * gradients
        else:
            (weight * loss).backward()
        losses[:3] += weight * torch.stack([loss, mse, kl]).detach()
    if pulled:
        adversary[1].copy_(adversarial.new_balance(world.average(edges)))
    return world.average(losses), training.clip_gradients(optimizer, cfg.max_grad_norm)


# ---- At the end of an epoch -----------------------------------------------------------------------------


def evaluate(vae, held_out, device, cfg):
    training.seed_step(cfg.seed, 0)  # the same noise at every epoch
    together = min(cfg.batch_size, pictures_per_pass(cfg.image_size**2))
    return held_out_figures(vae, (data.to_float(x, device) for x in held_out.split(together)))


def summary(figures):
    error = f"held-out MSE {figures['mse']:.4f} ({figures['psnr_db']:.1f} dB)"
    kept = figures["octave_1"]
    error += f", {kept:.0%} of the finest octave" if kept is not None else ""
    return f"{error}, latent mean {figures['latent_mean']:+.3f}, std {figures['latent_std']:.3f}"


@torch.no_grad()
def show_reconstructions(vae, before, held_out, device, cfg, run, epoch):
    """The same held-out pictures at every epoch, above their reconstructions: decoded from mu, not from a drawn z.
    before: the decoder that is being finetuned, which has a row of its own between the two."""
    x = data.to_float(held_out[:GRID_PICTURES], device)
    mu = [vae.encode(part)[0] for part in x.split(pictures_per_pass(cfg.image_size**2))]
    rows = [x, *(torch.cat([decoder(part) for part in mu]) for decoder in (before, vae.decoder) if decoder)]
    run.show("pictures", epoch, (torch.cat(rows) + 1) / 2, columns=len(x))


def draw_curves(run):
    train, held_out = (show.read_csv(run.path(f"vae_{name}.csv")) for name in ("train", "held_out"))
    latents = {what: (held_out["step"], held_out[f"latent_{what}"]) for what in ("mean", "std")}
    panels = {
        "MSE": {"training": (train["step"], train["mse"]), "held-out": (held_out["step"], held_out["mse"])},
        "KL [nats per picture]": {"training": (train["step"], train["kl"])},
        "latents, held-out": latents,
    }
    show.plot_curves(run.path("vae_curves.png"), panels)


def next_command(cfg, args, run):
    if cfg.finetune_decoder_of:
        words = "--run_dir", cfg.finetune_decoder_of, "--vae", args.run_dir
        return flags.sampling_command(run.about["caption"], *words)
    words = ["train_unet.py", "--preset", args.preset, "--run_dir", args.run_dir]
    return command_line("python", *words, *flags.flags_to_hand_on(args.given))


if __name__ == "__main__":
    run_script(main)
