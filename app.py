"""A page in the browser: type a prompt, and watch its pictures emerge from noise.

  pip install -r requirements-app.txt
  python app.py                                       the newest of runs/<preset>
  python app.py --run_dir runs/mine --port 8000
  python app.py --host 0.0.0.0                        for everybody on the network, without a password

Its pictures have the bits of those of sample.py, and hold the same `parameters`. Visitors share the models and take turns.
What it is not: it writes nothing into the run, loads nothing from elsewhere, and guards nothing from who can reach the port.
"""

import html
import math
import queue
import socket
import sys
import threading
import time
from argparse import Namespace
from functools import partial

from config import MAX_SEED, check
from diffusion import configured_process, decode, sample
from samplers import SAMPLERS_FOR
from support import checkpoint, devices, errors, flags, models, report, show

MOST = {"steps": 1000, "pictures": 16, "seed": MAX_SEED - 16}
MOST_KEPT, PAUSE = 64, 0.1  # pictures in a visitor's gallery; seconds between two pictures on the way, at least
STYLE = "<style>#picture img { width: 100%; height: 26rem; object-fit: contain !important }</style>"


def main():
    args = parse_args()
    try:
        import gradio  # noqa: F401
    except ImportError:
        raise errors.UserError("app.py: gradio is not installed; pip install -r requirements-app.txt") from None
    page = make_page(Run(args.run_dir or models.newest_run()))
    page.launch(server_name=args.host, server_port=args.port, share=False, prevent_thread_lock=True, quiet=True)
    print(f"{page.title}; open {page.local_url} (Ctrl-C ends it)", flush=True)
    page.block_thread()


def parse_args():
    parser = flags.Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--run_dir", help="a run with a trained U-Net (default: the newest of runs/<preset>)")
    parser.add_argument("--port", type=flags.positive_int, help="(default: the first that is free from 7860)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: this machine alone)")
    args = parser.parse_args()
    try:
        socket.create_server((args.host, args.port or 0)).close()
    except (OSError, OverflowError) as e:
        what = f"--port: {args.port}" if args.port else f"--host: {args.host}"
        parser.error(f"{what}: cannot be had ({e}); give another")
    return args


class Run:
    """The models of a run's newest whole epoch, loaded once for all visitors."""

    def __init__(self, run_dir):
        self.dir, self.busy, device = run_dir, threading.Lock(), devices.pick_device()
        self.cfg, self.name, self.vae, unet, t_embedder = models.load_models(run_dir, False, device)
        self.models = unet, self.vae, t_embedder, models.load_text_encoder(run_dir, self.cfg, None, device)
        self.autocast = devices.make_autocast(device, self.cfg.mixed_precision)
        tag, manifest = checkpoint.newest_epoch_set(run_dir, "unet")
        self.example = manifest.get("caption", self.cfg.sample_prompts[0])
        early = "" if manifest["finished"] else ", the newest whole one: its training is not finished"
        self.title = errors.printable(f"{run_dir}: epoch {tag} of {self.cfg.num_epochs}{early}")


def generate(run, made, *order):
    """Yields (picture, gallery, made): x0 on the way, then the result. made: [(picture, its parameters)], newest first."""
    import gradio as gr

    try:
        prompt, seeds, options = check_order(run.cfg, *order)
        unheard = models.prompt_warning(prompt, run.cfg, run.models[-1])
        for warning in filter(None, (unheard, flags.guidance_warning(options, run.cfg))):
            gr.Warning(warning)
        for step, x in emerge(run, prompt, seeds, options):
            label = f"step {step} of {options['num_steps']}: x0 as the model sees it" if step else prompt
            grid = show.to_pil(show.make_grid(x, math.ceil(math.sqrt(len(x)))))
            yield gr.Image(grid, label=label), gr.skip(), gr.skip()
    except Exception as e:
        message = e if isinstance(e, errors.UserError) else errors.explain(e)
        if message is None:  # a fault of ours: show the traceback
            raise
        raise gr.Error(errors.printable(message).removeprefix("--"), print_exception=False) from None
    made = [*(sign(run, prompt, options, seed, image) for seed, image in zip(seeds, x)), *made][:MOST_KEPT]
    yield gr.skip(), made, made


def check_order(cfg, prompt, negative_prompt, steps, sampler, guidance_scale, low, high, seed, pictures):
    """What the page asks for -> prompt, seeds, arguments of sample(); UserError if it does not fit the run."""
    prompt, negative_prompt = (text.encode("utf-8", "replace").decode() for text in (prompt, negative_prompt))
    check(prompt.strip(), "prompt", "is empty; type what the picture is to show")
    for name, value in {"steps": steps, "pictures": pictures, "seed": seed}.items():
        least, most = int(name != "seed"), MOST[name]
        whole = value is not None and value % 1 == 0 and least <= value <= most
        check(whole, name, f"{value} is out of range; give a whole number from {least} to {most}")
    check(None not in (low, high), "guidance_interval", "is empty; give two numbers from 0 to 1")
    guidance = {"guidance_scale": guidance_scale, "guidance_interval": (low, high), "negative_prompt": negative_prompt}
    options = flags.check_sampling(Namespace(steps=int(steps), sampler=sampler, eta=0.0, **guidance), cfg)
    return prompt, range(int(seed), int(seed + pictures)), options | {"process": configured_process(cfg)}


def emerge(run, prompt, seeds, options):
    """Yields (step, x0 as pictures (N, 3, H, W)) on the way, then (None, the pictures).

    A thread of its own samples: Gradio runs each step of a generator on any thread, and PyTorch's modes are a thread's.
    """
    found, gone, due = queue.SimpleQueue(), threading.Event(), 0

    def watch(i, x0):
        nonlocal due
        if gone.is_set():
            sys.exit()  # ends this thread alone
        if (start := time.monotonic()) >= due:
            found.put((i + 1, decode(run.vae, x0).cpu()))
            due = time.monotonic() + max(PAUSE, 3 * (time.monotonic() - start))  # decoding takes a quarter at most

    def work():
        try:
            with run.busy, run.autocast():
                x = sample(*run.models, prompt, num_samples=len(seeds), seeds=seeds, watch=watch, **options).cpu()
            check(x.isfinite().all(), run.name, "gives values that are not numbers; train with a lower --lr")
            found.put((None, x))
        except Exception as e:
            found.put((None, e))

    threading.Thread(target=work, daemon=True).start()
    try:
        step = 0
        while step is not None:
            step, x = found.get()
            if isinstance(x, Exception):
                raise x
            yield step, x
    finally:
        gone.set()  # the visitor may have left


def sign(run, prompt, options, seed, image):
    """-> a picture with its parameters within, as sample.py writes it, and these."""
    picture = show.to_pil(image)
    picture.info["parameters"] = show.parameters(prompt, options, seed, image, run.name)
    return picture, picture.info["parameters"]


def make_page(run):
    """-> gradio.Blocks"""
    import gradio as gr

    cfg, samplers, number = run.cfg, SAMPLERS_FOR[run.cfg.prediction_type], partial(gr.Number, min_width=120)
    with gr.Blocks(title=run.title, analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.HTML(f"{STYLE}<h2>{html.escape(run.title)}</h2>")
        with gr.Row():
            with gr.Column():
                order = [gr.State([]), gr.Textbox(run.example, label="prompt", elem_id="prompt", max_lines=4)]
                order += [gr.Textbox(label="negative prompt", elem_id="negative_prompt", max_lines=4)]
                with gr.Row():
                    order += [number(cfg.sample_steps or cfg.timesteps, label="steps", elem_id="steps")]
                    order += [gr.Dropdown(samplers, value=samplers[0], label="sampler", min_width=120)]
                    order += [number(cfg.guidance_scale, label="guidance", elem_id="guidance", step=0.1)]
                    order += [number(cfg.guidance_interval[0], label="from (0 clean)", step=0.1)]
                    order += [number(cfg.guidance_interval[1], label="to (1 noise)", step=0.1)]
                    order += [number(0, label="seed", elem_id="seed"), number(4, label="pictures", elem_id="pictures")]
                with gr.Row():
                    go, stop = gr.Button("Generate", variant="primary", elem_id="go"), gr.Button("Stop")
            picture = gr.Image(format="png", label="picture", elem_id="picture", interactive=False)
        gallery = gr.Gallery(format="png", label="made so far", elem_id="gallery", columns=8, height="auto")
        gr.HTML(lambda: report.facts(run.dir))  # anew for each visitor
        outputs = [picture, gallery, order[0]]
        asked = gr.on([go.click, order[1].submit], partial(generate, run), order, outputs, show_progress="minimal")
        stop.click(None, cancels=asked)
    return page


if __name__ == "__main__":
    errors.run_script(main)
