"""Train the denoising U-Net on the latents of the run's VAE. Run train_vae.py first.

  python train_unet.py                     COCO if it is there (README.md), else the built-in demo
  python train_unet.py --preset demo       minutes on two CPU cores
  python train_unet.py --text_encoder DIR  CLIP from a directory instead of the hub

Writes to the run directory: unet_ckpt{E}.pth, t_ember_ckpt{E}.pth (time embedding) and ema_unet_ckpt{E}.pth
(plain state_dicts), unet_train.csv, unet_held_out.csv, unet_curves.png, unet_samples_epoch{E}.png: the same prompts
from the same noise at every epoch; and report.html, which shows all of them.
What it is not: more than a loop. Schedule and loss are in diffusion.py, samplers in samplers.py, the model in unet.py,
every setting in config.py.
"""

import copy
from functools import partial

import torch

import data
import diffusion
import training
from support import checkpoint, devices, encoded, flags, models, processes, report, show
from support.cuda_graph import record_cuda_graph
from support.errors import run_script, warn
from unet import TimeEmbedding, UNetLatent
from vae import reparameterize

SAMPLES_PER_PROMPT = 2
COMPILE_FROM = 20_000  # steps from which torch.compile pays on an H200: 70 s over 10.7 - 7.1 ms a step


def main():
    # ---- Set-up ----
    cfg, args = flags.parse_training_args(__doc__, "unet")
    devices.use_large_pages()
    world = processes.join_world()
    device, run = world.device, checkpoint.Run(args, "unet", cfg, world)
    vae, run.about["made_from"] = models.training_vae(cfg, args, device)
    if run.finished():
        return
    run.open()
    autocast = devices.make_autocast(device, cfg.mixed_precision)
    text_encoder = models.training_text_encoder(cfg, args.run_dir, args.overwrite, device)
    run.about["code"] = encoded.hash_code()  # now: the code may be edited later

    # ---- Data ----
    latents, first_rows, embed, held_out, held_out_captions = read_data(cfg, run, vae, text_encoder)

    # ---- Model ----
    torch.manual_seed(cfg.seed)
    unet, t_embedder = UNetLatent(cfg), TimeEmbedding(cfg.time_dim).to(device)
    unet.to(device, memory_format=devices.memory_format(device))
    ema = copy.deepcopy(unet).requires_grad_(False)
    devices.checkpoint_blocks(unet, cfg.grad_checkpointing)
    weights, average = list(unet.parameters()), list(ema.parameters())
    parameters = [*weights, *t_embedder.parameters()]
    process, optimizer = diffusion.configured_process(cfg), training.make_optimizer([unet, t_embedder], cfg)
    print(f"U-Net with time embedding: {sum(p.numel() for p in parameters) / 1e6:.2f}M trainable parameters")

    # ---- State ----
    plan = training.Plan(len(latents[0]), cfg.batch_size, cfg.num_epochs, args.max_steps, cfg.seed)
    pays, embed_t = plan.total_steps >= COMPILE_FROM, world.data_parallel(t_embedder)
    predict = devices.maybe_compile(world.data_parallel(unet), cfg, device, pays, world.part_size(plan, cfg))
    start = training.State(0, 0, 0, torch.zeros((), device=device))
    state = run.resume([unet, t_embedder, ema], optimizer, start, plan)
    gradients = partial(batch_gradients, predict, embed_t, optimizer, autocast, cfg, world)
    gradients = record_cuda_graph(gradients, device, parameters) if world.size == 1 else gradients
    guard, progress = training.FiniteGuard(device, run), show.Progress(plan.total_steps, "train_unet", state.step)

    for epoch in range(state.epoch + 1, plan.last_epoch + 1):
        for index in plan.batches(epoch, state.step):
            state.step += 1
            lr = training.lr_at(state.step, plan.total_steps, cfg, state.restart)
            training.seed_step(cfg.seed, state.step)
            mirrored = data.draw_mirrored(len(index), cfg)
            z = reparameterize(*pick_latents(latents, index, mirrored, device))  # drawn anew at each use
            t = diffusion.draw_times(len(z), cfg)
            noise = torch.randn_like(z)
            rows = data.choose_captions(first_rows, index)
            rows = diffusion.drop_captions(rows, first_rows[-1], cfg.caption_dropout)
            mine = world.share(len(index))  # draws are for the whole batch: the same with any number of processes
            z_t, target = diffusion.add_noise(process, z[mine], t[mine], noise[mine])
            loss, grad_norm = gradients(len(index), z_t, target, devices.to_device(t[mine], device), embed(rows[mine]))
            guard.judge(optimizer, loss, grad_norm, state.step)
            training.optimizer_step(optimizer, lr)
            training.update_average(average, weights, training.ema_decay_at(state.step, cfg))
            state.add(loss)
            if plan.ends_row(state):
                guard.check()
                run.log("train", {"step": state.step, "lr": lr, "loss": state.take_means()})
            progress.update()
            if run.save_is_due():
                guard.check()
                run.save(f"{epoch}_step{state.step}", state)

        if world.rank == 0:
            figures = evaluate(unet, t_embedder, text_encoder, held_out, held_out_captions, process, cfg)
            guard.check_held_out(figures["loss"], state.step)
            run.log("held_out", {"epoch": epoch, "step": state.step} | figures)
            progress.say(f"epoch {epoch}: {summary(figures)}")
            show_samples((unet, vae, t_embedder, text_encoder), process, autocast, cfg, run, epoch)
            draw_curves(run)
            if epoch == plan.last_epoch:
                warn_if_captions_are_ignored(figures, cfg)
        state.epoch = epoch
        run.save(f"{epoch}", state, finished=epoch == plan.last_epoch)
        report.write_report(run.dir, world.rank)

    # ---- Done ----
    progress.close()
    print(f"wrote {run.path(f'unet_ckpt{plan.last_epoch}.pth')}; next: {next_command(run)}")


def read_data(cfg, run, vae, text_encoder):
    """-> latents of the training pictures, for pick_latents(); first_rows, for data.choose_captions(); embed(), from
    caption numbers to embeddings; latents and captions of the held-out pictures."""
    device = run.world.device
    encode = partial(encoded.encode_pictures, vae, about=run.about, device=device, cfg=cfg)
    with run.world.rank0_first():
        pixels, captions, held_out, held_out_captions = data.read_dataset(cfg)
        run.about["data"] = data.fingerprint(pixels, captions, held_out, held_out_captions)
        run.about["caption"] = flags.example_caption([*held_out_captions, *captions])
        flags.warn_of_lost_quotes("--sample_prompts", cfg.sample_prompts, run.about["caption"])
        run.about["text"] = models.learn_words(text_encoder, captions, run)
        latents = [encode(pixels, what="encode training pictures")]
        if cfg.horizontal_flips:
            latents.append(encode(pixels, what="encode mirrored pictures", mirrored=True))
        held_out = encode(held_out, what="encode held-out pictures").to(device)
        embed = encoded.embed_captions(text_encoder, captions, run.about, device, cfg)
    devices.keep_compiled(cfg, device)
    return latents, data.number_captions(captions), embed, held_out, held_out_captions


def pick_latents(latents, index, mirrored, device):
    """-> mu, log_var (B, latent_channels, s, s) of the pictures numbered `index`.

    latents: [one tensor for all pictures], with horizontal_flips also one for all mirrored. mirrored: (B,), 1 or 0.
    """
    found = [devices.gather_rows(several, index, device) for several in latents]  # (B, 2, C, s, s) each
    if len(found) > 1:
        is_mirrored = devices.to_device(mirrored == 1, device)[:, None, None, None, None]
        found = [torch.where(is_mirrored, found[1], found[0])]
    return found[0].unbind(1)


def batch_gradients(predict, embed_t, optimizer, autocast, cfg, world, count, z_t, target, t, text_emb):
    """Leaves the gradients of a batch in the parameters -> its loss, and the gradients' norm.

    z_t, target, t, text_emb: this process's share of a batch of `count`.
    """
    batch_loss = torch.zeros((), device=z_t.device)
    optimizer.zero_grad()
    for part, weight in world.micro_batches(count, cfg.grad_accumulation):
        with autocast():
            out = predict(z_t[part], embed_t(t[part]), text_emb[part])
        loss = weight * diffusion.prediction_loss(out, target[part]).mean()
        loss.backward()
        batch_loss += loss.detach()
    return world.average(batch_loss), training.clip_gradients(optimizer, cfg.max_grad_norm)


# ---- At the end of an epoch -----------------------------------------------------------------------------


def evaluate(unet, t_embedder, text_encoder, held_out, captions, process, cfg):
    """Held-out loss, and by what share of it another picture's caption or no caption raises it, with standard errors.

    At the same latents, noise and timesteps at every epoch and for each caption. None where all captions are the same.
    """
    own, losses = [several[0] for several in captions], {}
    asked = {"own": own, "other": own[1:] + own[:1], "none": [""] * len(own)}
    for kind, texts in asked.items():
        training.seed_step(cfg.seed, 0)
        z = reparameterize(*held_out.unbind(1))
        _, losses[kind] = diffusion.held_out_losses(unet, t_embedder, text_encoder, z, texts, process, cfg.batch_size)
    loss = losses["own"].mean().item()
    figures = {"loss": loss}
    for kind in ("other", "none"):
        gap = (losses[kind] - losses["own"]).double() / loss
        error = gap.std().item() / len(gap) ** 0.5 if len(gap) > 1 else None
        found = (gap.mean().item(), error) if asked[kind] != own else (None, None)
        figures |= dict(zip((f"{kind}_caption", f"{kind}_caption_error"), found))
    return figures


def summary(figures):
    costs = []
    for kind, what in (("other", "another picture's caption"), ("none", "no caption")):
        gap, error = figures[f"{kind}_caption"], figures[f"{kind}_caption_error"]
        shown = "not measured, all are the same" if gap is None else f"{gap:+.2%}"
        costs.append(f"{what} {shown}" + (f" ({error:.2%})" if error is not None else ""))
    return f"held-out loss {figures['loss']:.4f}; {', '.join(costs)}"


def warn_if_captions_are_ignored(figures, cfg):
    """Warn if another picture's caption raises the loss by no more than two standard errors."""
    gap, error = figures["other_caption"], figures["other_caption_error"]
    if error is None or not gap <= 2 * error:  # without an error nothing is known, nothing is said
        return
    remedies = [f"--lr {10 * cfg.lr:.0e} with --lr_warmup_steps 200"] if cfg.lr < 5e-4 else []
    remedies += ["--prediction_type flow"] if cfg.prediction_type != "flow" else []
    warn(
        f"the U-Net seems to ignore captions: another picture's changes the loss by {gap:+.2%}, standard error "
        f"{error:.2%}; what helps: {', '.join([*remedies, 'more epochs, captions that fit their pictures'])}"
    )


def show_samples(models, process, autocast, cfg, run, epoch):
    """A row per prompt, from the same noise at every epoch."""
    prompts = [p for p in cfg.sample_prompts for _ in range(SAMPLES_PER_PROMPT)]
    options = {name: getattr(cfg, name) for name in ("guidance_scale", "guidance_interval", "guidance_rescale")}
    steps, seeds = cfg.sample_steps or cfg.timesteps, list(range(len(prompts)))
    with autocast():
        images = diffusion.sample(*models, prompts, steps, len(prompts), process=process, seeds=seeds, **options)
    run.show("samples", epoch, images, columns=SAMPLES_PER_PROMPT)


def draw_curves(run):
    train, held_out = (show.read_csv(run.path(f"unet_{name}.csv")) for name in ("train", "held_out"))
    losses = {
        "training, at the times drawn": (train["step"], train["loss"]),
        "held-out, times evenly spread": (held_out["step"], held_out["loss"]),
    }
    rates = {"learning rate": (train["step"], train["lr"])}
    show.plot_curves(run.path("unet_curves.png"), {"loss": losses, "learning rate": rates})


def next_command(run):
    return flags.sampling_command(run.about["caption"], "--run_dir", run.dir)


if __name__ == "__main__":
    run_script(main)
