"""A page in the browser: type a prompt, and watch its pictures emerge from noise.

  python app.py                                       the newest of runs/<preset>
  python app.py --run_dir runs/mine --host 0.0.0.0    for everybody on the network, without a password

Its pictures have the bits of those of sample.py, and hold the same `parameters`. Visitors share the models and take turns.
What it is not: it writes nothing into the run, loads nothing from elsewhere, and guards nothing from who can reach the port.
"""

import queue
import socket
import threading
import time
from argparse import Namespace
from functools import partial

from config import MAX_SEED, check
from diffusion import configured_process, decode, sample
from samplers import SAMPLERS_FOR
from support import checkpoint, devices, errors, flags, models, report, show

MOST_KEPT, PAUSE = 64, 0.1  # pictures in a visitor's gallery; seconds between two pictures on the way, at least
ARROW_STEPS = {"steps": 1, "guidance": 0.1, "from (0 clean)": 0.1, "to (1 noise)": 0.1, "seed": 1, "pictures": 1}
STYLE = """#picture img { width: 100%; height: 26rem; object-fit: contain !important } #facts pre { white-space: pre-wrap }
#facts :is(th, td) { padding: 0 2rem 0 0; border: 0; vertical-align: top }"""


def main():
    args = parse_args()
    try:
        import gradio
    except ImportError:
        raise errors.UserError("app.py: gradio is not installed; pip install -r requirements-app.txt") from None
    page = make_page(gradio, Run(args.run_dir or models.newest_run()))
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
        parser.error(f"--{'port' if args.port else 'host'}: {args.port or args.host} cannot be had ({e}); give another")
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


def generate(gr, run, made, *order):
    """Yields (picture, made, gallery): x0 on the way, then the result. made: [(picture, its parameters)], newest first."""
    found, gone, step = queue.SimpleQueue(), threading.Event(), 0
    try:
        prompt, seeds, options = asked = check_order(run, gr.Warning, *order)
        # a thread of its own: Gradio runs each step of a generator on any thread, and PyTorch's modes are a thread's
        threading.Thread(target=emerge, args=(run, *asked, found, gone), daemon=True).start()
        while step is not None:
            step, x = found.get()
            if isinstance(x, Exception):
                raise x
            label = f"step {step}: x0 as the model sees it" if step else errors.printable(prompt)
            yield gr.Image(show.to_pil(show.square(x)), label=label), gr.skip(), gr.skip()
    except Exception as e:
        if (message := errors.explain(e)) is None:  # a fault of ours: show the traceback
            raise
        raise gr.Error(errors.printable(message).removeprefix("--"), print_exception=False) from None
    finally:
        gone.set()  # the visitor may have left
    texts = [show.parameters(prompt, options, seed, image, run.name) for seed, image in zip(seeds, x)]
    made = [*zip(map(show.to_pil, x), texts), *made][:MOST_KEPT]
    for picture, text in made:
        picture.info["parameters"] = text  # what Gradio writes into its file
    yield gr.skip(), made, made


def check_order(run, warn, prompt, negative_prompt, sampler, steps, guidance_scale, low, high, seed, pictures):
    """What the page asks for -> prompt, seeds, arguments of sample(); UserError if it does not fit the run."""
    check(prompt.strip(), "prompt", "is empty; type what the picture is to show")
    ranges = ("steps", steps, 1, 1000), ("pictures", pictures, 1, 16), ("seed", seed, 0, MAX_SEED - 16)
    for name, value, least, most in ranges:
        whole = value is not None and value % 1 == 0 and least <= value <= most
        check(whole, name, f"{value} is out of range; give a whole number from {least} to {most}")
    models.warn_of_unknown_words(f"{prompt} {negative_prompt}", run.cfg, run.models[-1], warn)
    guidance = {"guidance_scale": guidance_scale, "guidance_interval": (low, high), "negative_prompt": negative_prompt}
    options = flags.check_sampling(Namespace(steps=int(steps), sampler=sampler, eta=0.0, **guidance), run.cfg, warn)
    return prompt, range(int(seed), int(seed + pictures)), options | {"process": configured_process(run.cfg)}


def emerge(run, prompt, seeds, options, found, gone, due=0):
    """Puts (step, x0 as pictures (N, 3, H, W)) into `found` on the way, then (None, the pictures or an Exception)."""

    def watch(i, x0):
        nonlocal due
        if gone.is_set():
            raise SystemExit  # ends this thread alone
        if (start := time.monotonic()) >= due:
            found.put((f"{i + 1} of {options['num_steps']}", decode(run.vae, x0).cpu()))
            due = time.monotonic() + max(PAUSE, 3 * (time.monotonic() - start))  # decoding takes a quarter at most

    try:
        with run.busy, run.autocast():
            x = sample(*run.models, prompt, num_samples=len(seeds), seeds=seeds, watch=watch, **options).cpu()
        check(x.isfinite().all(), run.name, "gives values that are not numbers; train with a lower --lr")
    except Exception as e:
        x = e
    found.put((None, x))


def make_page(gr, run):
    values = run.cfg.sample_steps or run.cfg.timesteps, run.cfg.guidance_scale, *run.cfg.guidance_interval, 0, 4
    with gr.Blocks(title=run.title, analytics_enabled=False, delete_cache=(3600, 3600), fill_width=True) as page:
        gr.HTML(f"<style>{STYLE}</style><h2>{report.escape(run.title)}</h2>")
        with gr.Row():
            with gr.Column(scale=2, min_width=480):
                order = [gr.State([]), gr.Textbox(run.example, label="prompt", elem_id="prompt", max_lines=4)]
                order += [gr.Textbox(label="negative prompt", elem_id="negative_prompt", max_lines=4)]
                with gr.Row():
                    order += [gr.Dropdown(SAMPLERS_FOR[run.cfg.prediction_type], label="sampler", min_width=120)]
                    for (label, step), value in zip(ARROW_STEPS.items(), values):
                        order += [gr.Number(value, label=label, elem_id=label.split()[0], step=step, min_width=120)]
                    go, stop = gr.Button("Generate", variant="primary", elem_id="go"), gr.Button("Stop")
                outputs = [gr.Image(format="png", label="picture", elem_id="picture", interactive=False), order[0]]
                outputs += [gr.Gallery(format="png", label="made so far", elem_id="gallery", columns=8, height="auto")]
            with gr.Column(scale=3, min_width=640):
                gr.HTML(lambda: report.facts(run.dir), elem_id="facts")  # anew for each visitor
        asked = gr.on([go.click, order[1].submit], partial(generate, gr, run), order, outputs, show_progress="minimal")
        stop.click(None, cancels=asked)
    return page


if __name__ == "__main__":
    errors.run_script(main)
