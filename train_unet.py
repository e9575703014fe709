"""Train the denoising U-Net on the latents of the run's VAE. Run train_vae.py first.

  python train_unet.py                     COCO if it is there (README.md), else the embedded demo
  python train_unet.py --preset demo       minutes on two CPU cores
  python train_unet.py --text_encoder DIR  CLIP from a directory instead of the hub

Writes to the run directory: unet_ckpt{E}.pth, t_ember_ckpt{E}.pth (time embedding) and ema_unet_ckpt{E}.pth
(plain state_dicts), unet_train.csv, unet_held_out.csv, unet_curves.png, and unet_samples_epoch{E}.png:
the same prompts from the same noise at every epoch.
What it is not: schedule and loss are in diffusion.py, samplers in samplers.py, the model in unet.py, every setting in config.py.
"""

import copy
import math
import os

import numpy as np
import torch

import text_encoder as text_encoder_code
import vae as vae_code
from checkpoint import Run, load_vae
from config import parse_training_args
from cuda_graph import recorded
from data import choose_captions, draw_mirrored, fingerprint, number_captions, open_dataset, read_pictures
from diffusion import (
    add_noise,
    configured_process,
    draw_times,
    drop_captions,
    held_out_losses,
    min_snr_weights,
    prediction_loss,
    sample,
)
from prepared import code_of, prepare
from text_encoder import make_text_encoder
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
    ema_decay_at,
    epoch_batches,
    fetched_ahead,
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
    send,
    share_of,
    show_progress,
    take,
    to_float,
    update_average,
    use_large_pages,
)
from unet import TimeEmbedding, UNetLatent
from vae import num_together, reparameterize

SAMPLES_PER_PROMPT = 2
# captions; always the same ones, because another grouping could give other last bits
ENCODED_TOGETHER = {"cuda": 128, "other": 32}
LOG_EVERY = 20  # steps per row, and at the end of an epoch, of unet_train.csv
COMPILE_PAYS = 20_000  # steps on CUDA that win back what compiling takes, from what both took on an H200


def main():
    # ---- Set-up ----
    cfg, args = parse_training_args(__doc__, "unet")
    use_large_pages()
    world = join_world()
    device = world.device
    run = Run(args, "unet", cfg, world)
    vae, run.about["made_from"] = load_vae(cfg, args.run_dir, device, given=args.given)
    if run.finished():
        return
    run.open()
    autocast = make_autocast(device, cfg.mixed_precision)
    text_encoder = make_text_encoder(cfg.text_encoder, cfg.text_dim, cfg.text_length).to(device).eval()
    run.about["text"] = text_encoder.key()
    # of what runs: asked later, it would be of files that may have been edited meanwhile
    run.about["code"] = code_of_rows()

    # ---- Data ----
    train_set, held_out_set = open_dataset(cfg)
    with first_alone(world):
        pixels, captions = read_pictures(train_set, cfg, show_progress("read training pictures"))
        held_out_pixels, held_out_captions = read_pictures(held_out_set, cfg, show_progress("read held-out pictures"))
        run.about["data"] = fingerprint(pixels, captions, held_out_pixels, held_out_captions)
        latents = [encode_all(vae, pixels, run.about, device, cfg, "encode training pictures")]
        if cfg.horizontal_flips:
            latents.append(encode_all(vae, pixels, run.about, device, cfg, "encode mirrored pictures", mirrored=True))
        held_out = encode_all(vae, held_out_pixels, run.about, device, cfg, "encode held-out pictures").to(device)
        first_rows = number_captions(captions)
        embed_captions = caption_embeddings(text_encoder, captions, run.about, device, cfg)

    # ---- Model ----
    torch.manual_seed(cfg.seed)
    unet, t_ember = UNetLatent(cfg).to(device), TimeEmbedding(cfg.time_dim).to(device)
    ema = copy.deepcopy(unet).requires_grad_(False)
    weights, average = list(unet.parameters()), list(ema.parameters())
    parameters = [*weights, *t_ember.parameters()]
    optimizer = make_optimizer(parameters, cfg)
    process = configured_process(cfg)
    print(f"U-Net with time embedding: {sum(p.numel() for p in parameters) / 1e6:.2f}M parameters")

    # ---- State ----
    steps_per_epoch = math.ceil(len(pixels) / cfg.batch_size)
    total_steps = min(cfg.num_epochs * steps_per_epoch, args.max_steps or math.inf)
    last_epoch = math.ceil(total_steps / steps_per_epoch)
    predict = compiled(in_parallel(unet, world), cfg.compile, device, total_steps >= COMPILE_PAYS)
    embed_t = in_parallel(t_ember, world)
    modules = [unet, t_ember, ema]
    start = {"step": 0, "epoch": 0, "count": 0, "window": torch.zeros(())}  # window: sum of the losses of `count` steps
    at = run.resume(modules, optimizer, start)
    step, epochs_done, count, window = at["step"], at["epoch"], at["count"], at["window"].to(device)

    def save(tag):
        counters = {"step": step, "epoch": epochs_done, "count": count, "window": window.cpu()}
        run.save(tag, epochs_done == last_epoch, modules, optimizer, counters)

    def gradients(z_t, target, t, text_emb, snr_weights):
        """Leaves the gradients of a batch in the parameters -> its loss, and the gradients' norm."""
        batch_loss = torch.zeros((), device=device)
        optimizer.zero_grad()
        for part, weight in parts_of(len(index), world, cfg.grad_accumulation):
            with autocast():
                out = predict(z_t[part], embed_t(t[part]), text_emb[part])
            loss = weight * (snr_weights[part] * prediction_loss(out, target[part])).mean()
            loss.backward()
            batch_loss += loss.detach()
        return average_over(batch_loss, world), clip_gradients(optimizer, cfg.max_grad_norm)

    if world.size == 1:
        gradients = recorded(gradients, device, parameters)
    interrupts, progress = Interrupts(cfg.save_minutes, world.rank), Progress(total_steps, "train_unet", step)
    guard = FiniteGuard(device)

    for epoch in range(epochs_done + 1, last_epoch + 1):
        batches = epoch_batches(cfg.seed, epoch, len(pixels), cfg.batch_size)
        for index in batches[step - epochs_done * steps_per_epoch : total_steps - epochs_done * steps_per_epoch]:
            step += 1
            lr = lr_at(step, total_steps, cfg)
            seed_step(cfg.seed, step)
            # drawn anew at each use, as if encoded again
            z = reparameterize(*latents_of(latents, index, draw_mirrored(len(index), cfg), device))
            t = draw_times(len(z), cfg)
            noise = torch.randn_like(z)
            rows = drop_captions(choose_captions(first_rows, index), first_rows[-1], cfg.caption_dropout)
            snr_weights = send(min_snr_weights(process, t, cfg.min_snr_gamma), device)
            mine = share_of(len(index), world)  # what is drawn above is of the whole batch
            z_t, target = add_noise(process, z[mine], t[mine], noise[mine])
            batch_loss, grad_norm = gradients(
                z_t, target, send(t[mine], device), embed_captions(rows[mine]), snr_weights[mine]
            )
            guard.judge(optimizer, batch_loss, grad_norm, step, run.last_saved)
            optimizer_step(optimizer, lr)
            update_average(average, weights, ema_decay_at(step, cfg))
            window += batch_loss
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
            held_out_loss = evaluate(unet, t_ember, text_encoder, held_out, held_out_captions, process, cfg)
            check_held_out(held_out_loss, step, run.last_saved)
            append_csv(
                os.path.join(args.run_dir, "unet_held_out.csv"), {"epoch": epoch, "step": step, "loss": held_out_loss}
            )
            progress.say(f"epoch {epoch}: held-out loss {held_out_loss:.4f}")
            path = os.path.join(args.run_dir, f"unet_samples_epoch{epoch}.png")
            show_samples((unet, vae, t_ember, text_encoder), process, autocast, cfg, path)
            draw_curves(args.run_dir)
        epochs_done = epoch
        if epoch % cfg.save_every == 0 or epoch == last_epoch:
            save(f"{epoch}")
            interrupts.saved(step)

    # ---- Done ----
    progress.close()
    print(f"wrote {os.path.join(args.run_dir, f'unet_ckpt{last_epoch}.pth')}; "
          f"next: {command_line('python', 'sample.py', '--run_dir', args.run_dir, '--prompt', 'a red sports car')}")  # fmt: skip


def code_of_rows():
    """What the prepared latents and captions are made by, for their keys."""
    return {
        "latents": code_of(vae_code, encode_all, to_float),
        "captions": code_of(text_encoder_code, caption_embeddings),
    }


def encode_all(vae, pixels, about, device, cfg, what, mirrored=False):
    """uint8 pictures (N, 3, S, S) -> (N, 2, latent_channels, s, s): mu and log_var of each, computed once."""
    together = num_together(cfg.image_size**2)

    @torch.no_grad()
    def rows(first):
        progress = Progress(len(pixels), what, first)
        parts = pixels[first:].split(together) if first < len(pixels) else ()
        encoded = (vae.encode(to_float(x.flip(3) if mirrored else x, device)) for x in parts)
        for part in fetched_ahead(torch.stack(pair, dim=1) for pair in encoded):
            yield from part.numpy()  # (B, 2, C, s, s)
            progress.update(len(part))
        progress.close()

    key = {"pixels": fingerprint(pixels), "vae": about["made_from"], "code": about["code"]["latents"]}
    key |= {"machine": last_bits_of(about, device)}
    key |= {"mirrored": True} if mirrored else {}
    shape = (2, cfg.latent_channels, cfg.latent_size, cfg.latent_size)
    latents, _ = prepare(cfg.cache_dir, "latents", key, shape, np.float32, len(pixels), rows, together)
    return near(latents, device)


def latents_of(latents, index, mirrored, device):
    """mu, log_var (B, latent_channels, s, s) of pictures by their number. latents: of all, and of all mirrored if
    `mirrored` (B,) may be 1."""
    found = [take(several, index, device) for several in latents]  # (B, 2, C, s, s) each
    if len(found) > 1:
        found = [torch.where(send(mirrored == 1, device)[:, None, None, None, None], found[1], found[0])]
    return found[0].unbind(1)


def last_bits_of(about, device):
    """What of the machine the last bits of a forward pass depend on, for the keys of prepared files."""
    without = {"processes"} | ({"threads"} if torch.device(device).type == "cuda" else set())
    return {name: value for name, value in about["machine"].items() if name not in without}


def caption_embeddings(text_encoder, captions, about, device, cfg):
    """-> embed(rows): captions by their number (k,), counted through all pictures -> (k, L, text_dim) float32.

    The number after the last is the empty caption's.

    Out of a prepared file, computed once; without --cache_dir computed at each use. Rounded to float16 either way.
    """
    texts = [*(text for several in captions for text in several), ""]
    together = ENCODED_TOGETHER["cuda" if device.type == "cuda" else "other"]
    if not cfg.cache_dir:
        return lambda rows: text_encoder([texts[i] for i in rows]).half().float()

    def encode(first):
        progress = Progress(len(texts), "encode captions", first)
        parts = (texts[i : i + together] for i in range(first, len(texts), together))
        for part in fetched_ahead(text_encoder(part).half() for part in parts):
            yield from part.numpy()  # (B, L, text_dim)
            progress.update(len(part))
        progress.close()

    key = {"captions": fingerprint(texts), "text_encoder": about["text"], "machine": last_bits_of(about, device)}
    key |= {"together": together, "code": about["code"]["captions"]}
    shape = (cfg.text_length, cfg.text_dim)
    embedded, _ = prepare(cfg.cache_dir, "captions", key, shape, np.float16, len(texts), encode, together)
    embedded = near(embedded, device)
    return lambda rows: take(embedded, rows, device).float()


def evaluate(unet, t_ember, text_encoder, held_out, captions, process, cfg):
    """Held-out loss at the same latents, noise and timesteps at every epoch."""
    seed_step(cfg.seed, 0)
    first_captions = [several[0] for several in captions]
    z = reparameterize(*held_out.unbind(1))
    return held_out_losses(unet, t_ember, text_encoder, z, first_captions, process, cfg.batch_size)[1].mean().item()


def log_training(run, step, loss, lr):
    if run.world.rank == 0:
        append_csv(os.path.join(run.dir, "unet_train.csv"), {"step": step, "lr": lr, "loss": loss.item()})


def show_samples(models, process, autocast, cfg, path):
    """A row per prompt, from the same noise at every epoch."""
    prompts = [p for p in cfg.sample_prompts for _ in range(SAMPLES_PER_PROMPT)]
    with autocast():
        images = sample(*models, prompts, cfg.sample_steps or cfg.timesteps, len(prompts), process=process,
                        guidance_scale=cfg.guidance_scale, guidance_interval=cfg.guidance_interval,
                        seeds=list(range(len(prompts))))  # fmt: skip
    save_grid(path, images, columns=SAMPLES_PER_PROMPT)


def draw_curves(run_dir):
    train = read_csv(os.path.join(run_dir, "unet_train.csv"))
    held_out = read_csv(os.path.join(run_dir, "unet_held_out.csv"))
    plot_curves(os.path.join(run_dir, "unet_curves.png"), "step", {
        "loss": {"training, as drawn and weighted": (train["step"], train["loss"]),
                 "held-out, times evenly spread": (held_out["step"], held_out["loss"])},
        "learning rate": {"learning rate": (train["step"], train["lr"])},
    })  # fmt: skip


if __name__ == "__main__":
    run_script(main)
