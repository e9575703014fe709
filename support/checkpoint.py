"""A run's files: sets that appear whole or not at all, exact resume, the lock. Nothing that is read is trusted.

A set is what one save writes: the weights (plain state_dicts under the recipe's names), the state that resuming
needs, and last a manifest with size and SHA-256 of each file. The set exists once the manifest has its name, so one
rename makes it visible; a run killed anywhere leaves whole sets and files that no manifest lists.

  unet_ckpt5.pth, t_ember_ckpt5.pth, ema_unet_ckpt5.pth, unet_state5.pth, unet_set5.json      after epoch 5
  unet_ckpt6_step900.pth, ..., unet_set6_step900.json    in epoch 6, after step 900; deleted once two newer sets exist

What it is not: no loop, no loss. Files are opened with weights_only=True after size and SHA-256 have been found right,
which bars code from running but does not make a stranger's weights good ones.
"""

import contextlib
import hashlib
import io
import json
import math
import os
import re
import time
import zipfile
from dataclasses import asdict, fields, replace

import torch

from config import SDConfig
from support.devices import processor
from support.errors import UserError, printable, warn
from support.files import Damaged, entry_of, lock, read_file, remove, write_file
from support.show import append_csv, make_grid, save_grid
from support.signals import Interrupts
from support.tensorboard import Board
from training import State, lr_at

FORMAT = 1  # of manifest and state; a change that older code would misread raises it
PLAN = ("num_epochs", "max_steps")  # may change while a run goes on, and when it is finished
INITIAL_TAG = "1_step0"  # of the set that a run begins with
KEPT_SETS = 2  # newest sets that can be resumed from: should one be damaged, there is another
PREFIXES = {"vae": ("vae_ckpt_epoch",), "unet": ("unet_ckpt", "t_ember_ckpt", "ema_unet_ckpt")}
SAMPLING = ("sample_prompts", "sample_steps", "guidance_scale", "guidance_interval", "guidance_rescale")
NOT_OF = {  # settings that no weight of the one depends on
    "vae": "unet_block_out_channels unet_layers_per_block unet_norm_num_groups num_heads time_dim text_encoder text_dim "
    "text_length timesteps beta_start beta_end scale_betas prediction_type flow_time_mean caption_dropout ema_decay ema_warmup "
    "captions_per_image",
    "unet": "random_crop random_scale beta l1_weight ms_ssim_weight lpips_weight adversarial_weight adversarial_start matching_weight",
}
SHAPES = {  # settings that weights can only be used with
    "vae": "latent_channels block_out_channels layers_per_block norm_num_groups",
    "unet": "latent_channels unet_block_out_channels unet_layers_per_block unet_norm_num_groups num_heads time_dim text_dim "
    "prediction_type",
}
MAX_MANIFEST_BYTES = 1 << 20
MAX_STATE_TEXT = 64 << 20  # the CSV text within a state
RETIRED = {  # settings that older code had -> the only value that this code can go on with
    "equivariance": 0.0,
    "beta_schedule": "linear",
    "rescale_betas_zero_snr": False,
    "min_snr_gamma": 0.0,
    "flow_times": "logit_normal",
    "ema_sigma_rel": 0.0,
    "normalize_latents": False,
}
READ_BY_SAMPLING = ("beta_schedule", "rescale_betas_zero_snr", "normalize_latents")

# ---- Weights --------------------------------------------------------------------------------------------


def plain_weights(module):
    """A state_dict on the CPU, contiguous: opens with torch.load(path, weights_only=True)."""
    return {k: v.detach().cpu().contiguous() for k, v in module.state_dict().items()}


def num_bytes(module):
    return sum(v.numel() * v.element_size() for v in module.state_dict().values())


def most_bytes(weights):
    """What a file of so many bytes of weights may have, names and padding included."""
    return 2 * weights + (1 << 20)


def read_tensors(path, entry, most):
    """What torch.save put into a file -> object on the CPU; Damaged unless size and SHA-256 are those of `entry`."""
    data = read_file(path, most)
    if entry_of(data) != entry:
        raise Damaged(f"{path}: not the file that was saved (size or SHA-256 differ from the manifest's); restore it")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as z:  # torch.load would unpack a compressed bomb
            if sum(i.file_size for i in z.infolist()) > most or any(i.compress_type for i in z.infolist()):
                raise ValueError("packed")
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception:  # a file that is no checkpoint raises one of many kinds, whose texts advise unsafe loading
        raise Damaged(f"{path}: not a checkpoint of plain tensors; restore it") from None


def load_weights(path, entry, module):
    """Copy a checked file into module, strictly; Damaged if a tensor is missing, other, or not finite."""
    copy_weights(path, read_tensors(path, entry, most_bytes(num_bytes(module))), module)


def copy_weights(path, weights, module):
    """Into module, strictly; Damaged if they are not its own. path: of the file that they come from."""
    own = module.state_dict()
    if not isinstance(weights, dict) or not all(is_plain(v) for v in weights.values()):
        raise Damaged(f"{path}: holds no plain weights; restore it")
    wrong = f"{path}: not the {type(module).__name__} of these settings:"
    for name in own.keys() ^ weights.keys():
        raise Damaged(f"{wrong} it {'lacks' if name in own else 'holds'} {printable(name)}; restore it")
    for name, tensor in weights.items():
        if tensor.dtype != own[name].dtype or tensor.shape != own[name].shape:
            raise Damaged(f"{wrong} {name} is {describe(tensor)} instead of {describe(own[name])}; restore it")
        if not tensor.isfinite().all():
            raise Damaged(f"{path}: {name} holds values that are not finite numbers; restore it")
    module.load_state_dict(weights)


def is_plain(value):
    """Whether it is a tensor with numbers of its own: not sparse, nested, quantized or without storage."""
    return isinstance(value, torch.Tensor) and not value.is_nested and value.layout == torch.strided and value.is_cpu


def describe(tensor):
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def adam_state(optimizer):
    """Step, mean and mean square of the gradient of each parameter, in order, {} of those that had none; [] of nothing."""
    states = [{k: v.detach().cpu() for k, v in optimizer.state[p].items()} for p in parameters_of(optimizer)]
    return states if any(states) else []


def parameters_of(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def load_adam(path, optimizer, saved):
    parameters = parameters_of(optimizer)
    optimizer.state.clear()  # a set that turned out to be damaged may have been here before
    if len(saved) not in (0, len(parameters)):
        raise Damaged(f"{path}: holds the Adam state of another model; restore it")
    for p, s in zip(parameters, saved):
        for name in state_names(optimizer, p) if s else ():  # a discriminator has none before it begins
            shape = () if name == "step" else p.shape
            if not is_plain(s[name]) or s[name].shape != shape or s[name].dtype != torch.float32:
                raise Damaged(f"{path}: holds the Adam state of another model; restore it")
            if not s[name].isfinite().all():
                raise Damaged(f"{path}: holds values that are not finite numbers; restore it")
            # copied into tensors laid out like p: the fused kernel walks through all of them in step
            like = s[name].to(p.device) if name == "step" else torch.empty_like(p).copy_(s[name])
            optimizer.state[p][name] = like


def state_names(optimizer, p):
    hidden = {id(q) for q in getattr(optimizer, "hidden", ())}
    return ("momentum",) if id(p) in hidden else ("step", "exp_avg", "exp_avg_sq")


# ---- Manifests ------------------------------------------------------------------------------------------


def sets_of(run_dir, kind):
    """Tags of the sets in a run directory, newest first. "5" is the set after epoch 5, "6_step900" one within epoch 6."""
    pattern = re.compile(rf"{kind}_set(\d+)(?:_step(\d+))?\.json")
    found = [m for m in map(pattern.fullmatch, os.listdir(run_dir) if os.path.isdir(run_dir) else []) if m]
    age = {m[0]: (int(m[1]) - bool(m[2]), int(m[2] or 0)) for m in found}  # epochs done, then steps
    return [n.removeprefix(f"{kind}_set").removesuffix(".json") for n in sorted(age, key=age.get, reverse=True)]


def epochs_of(run_dir, kind):
    """Tags of its sets of whole epochs, newest first."""
    return [tag for tag in sets_of(run_dir, kind) if "_" not in tag]


def manifest_path(run_dir, kind, tag):
    return os.path.join(run_dir, f"{kind}_set{tag}.json")


def own_hash(manifest):
    text = json.dumps({k: v for k, v in manifest.items() if k != "sha256"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def read_manifest(run_dir, kind, tag):
    """The manifest of one set; Damaged if it is not as written, UserError if it is of another format."""
    path = manifest_path(run_dir, kind, tag)
    try:
        manifest = json.loads(read_file(path, MAX_MANIFEST_BYTES))
        whole = manifest["sha256"] == own_hash(manifest) and manifest["kind"] == kind and manifest["format"] > 0
        if whole and manifest["format"] != FORMAT:
            raise UserError(
                f"{path}: of format {manifest['format']}, this is the code of format {FORMAT}; use the version of this "
                "project that wrote it, or train again"
            )
        manifest["cfg"] = settings_to_config(manifest["settings"], path)
        entries = [*manifest["files"].values(), *manifest.get("made_from", {}).values()]
        whole = whole and all(f"{prefix}{tag}.pth" in manifest["files"] for prefix in PREFIXES[kind])
        whole = whole and all(type(manifest[k]) is t for k, t in (("finished", bool), ("epoch", int), ("step", int)))
        if whole and all(type(e["bytes"]) is int and type(e["sha256"]) is str for e in entries):
            return manifest
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        pass  # each means that the file is not what write_file() was given
    raise Damaged(f"{path}: not the manifest that was saved; restore it")


def readable(run_dir, kind):
    """-> {tag: manifest} of the sets that can be read, newest first."""
    found = {}
    for tag in sets_of(run_dir, kind):
        with contextlib.suppress(UserError):
            found[tag] = read_manifest(run_dir, kind, tag)
    return found


def settings_to_config(settings, path):
    """The SDConfig of a manifest's settings, those of older code too where sampling does not depend on them."""
    for name in READ_BY_SAMPLING:
        if settings.get(name, RETIRED[name]) != RETIRED[name]:
            raise UserError(f"{path}: trained with --{name}, which is no more; use the version that trained it")
    kept = {k: v for k, v in settings.items() if k != "max_steps" and k not in RETIRED}
    try:
        return SDConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in kept.items()})
    except UserError as e:
        raise Damaged(f"{path}: {e}") from None


def newest_epoch_set(run_dir, kind, flag="--run_dir", epoch=None):
    """Tag and manifest of the newest set of a whole epoch, or of that epoch's. flag: the one that named run_dir."""
    found, tags = sets_of(run_dir, kind), epochs_of(run_dir, kind)
    if not tags:
        remedy = f"run python train_{kind}.py first, with this folder as its --run_dir"
        if found and found != [INITIAL_TAG]:
            step = int(found[0].partition("_step")[2]) + 1
            remedy = f"give the command of train_{kind}.py again, with --max_steps {step} if it is to end here"
        raise UserError(f"{flag} {run_dir}: no {kind}_set*.json of a whole epoch here; {remedy}")
    if epoch is not None and f"{epoch}" not in tags:
        raise UserError(f"--epoch {epoch}: not saved in {run_dir}; give one of {', '.join(reversed(tags))}")
    tag = tags[0] if epoch is None else f"{epoch}"
    return tag, read_manifest(run_dir, kind, tag)


def check_idle(run_dir, flag):
    """UserError if a training is going on in run_dir: what it holds is about to change."""
    with contextlib.suppress(OSError), open(os.path.join(run_dir, ".lock")) as f:
        if not lock(f, shared=True):  # others may ask at the same time
            raise UserError(f"{flag} {run_dir}: still trains ({printable(f.read(100))}); wait until it ends")


# ---- A training run -------------------------------------------------------------------------------------


class Run:
    """One trainer's place in a run directory.

    kind: "vae" or "unet". about: what its manifests say of the run. last_saved: the newest set.
    """

    def __init__(self, args, kind, cfg, world):
        self.world, self.dir, self.kind, self.overwrite, self.cfg = world, args.run_dir, kind, args.overwrite, cfg
        self.last_saved, self.lock, self.interrupts, self.source, self.board = "nothing", None, None, (), None
        self.kept = int(cfg.lr_schedule == "constant")  # states of a finished run: more epochs are then exact
        settings = json.loads(json.dumps(asdict(cfg) | {"max_steps": args.max_steps}))  # lists for tuples, as read back
        machine = {
            "torch": torch.__version__,
            "device": world.device.type,
            "threads": torch.get_num_threads(),
            "processor": processor(world.device),
            "processes": world.size,
        }
        self.about = {"preset": args.preset, "settings": settings, "machine": machine}
        self.csv = (f"{kind}_train.csv", f"{kind}_held_out.csv")
        self.prefixes = (*PREFIXES[kind], f"{kind}_state")  # of a set's files, in the order of the modules; state last

    def path(self, name):
        return os.path.join(self.dir, name)

    # ---- Before training ----

    def finished(self):
        """Whether this very run is finished; UserError if the directory holds one with other settings."""
        tags = [] if self.overwrite else sets_of(self.dir, self.kind)
        if self.cfg.init_from and not self.world.rank and tags in ([], [INITIAL_TAG]):
            self.source = self.find_source()
        for tag in tags[:1] if tags != [INITIAL_TAG] else []:
            with contextlib.suppress(Damaged):  # resume() deals with it, and says so
                manifest = read_manifest(self.dir, self.kind, tag)
                self.check_same(manifest)
                if self.is_done(tag, manifest):
                    kept, sampled = self.kept if manifest["finished"] else KEPT_SETS, self.follow_command()
                    if not self.world.rank and (sampled or self.surplus(kept)):  # a kill may have left a surplus
                        self.open()
                        self.tidy(kept)
                        self.write_manifests(sampled)
                    print(
                        f"{self.dir}: this run is finished (epoch {manifest['epoch']}), and the data is not looked at "
                        "again; a larger --num_epochs goes on, --overwrite starts it over"
                    )
                    return True
        return False

    def follow_command(self):
        """-> [(tag, manifest)] of the U-Net's sets with this command's settings of sampling, where they had others."""
        new, found = {name: self.about["settings"][name] for name in SAMPLING}, []
        for tag, manifest in readable(self.dir, "unet").items() if self.kind == "unet" else ():
            then = vars(manifest.pop("cfg"))
            if any(then[name] != getattr(self.cfg, name) for name in SAMPLING):
                found.append((tag, manifest | {"settings": manifest["settings"] | new}))
        return found

    def find_source(self):
        """-> [(path, size and SHA-256)] of the weights that --init_from names; UserError if they fit other settings."""
        tag, manifest = newest_epoch_set(self.cfg.init_from, self.kind, "--init_from")
        now, then = vars(self.cfg), vars(manifest["cfg"])
        if other := [f"{k} {then[k]} there, {now[k]} here" for k in SHAPES[self.kind].split() if then[k] != now[k]]:
            raise UserError(f"--init_from {self.cfg.init_from}: of another model ({'; '.join(other)}); give the same")
        texts, others = {now["text_encoder"], then["text_encoder"]}, []
        if self.kind == "unet" and self.about["made_from"] != manifest.get("made_from"):
            others = ["the latents of another VAE; copy its vae_* files"]
        if self.kind == "unet" and len(texts) > 1 and texts & {"hash", "words"}:  # not one CLIP under two names
            others += [f"the embeddings of --text_encoder {then['text_encoder']}; give the same"]
        for what in others:
            warn(f"--init_from {self.cfg.init_from}: has learned {what} for a better start")
        # the average starts from the trained weights: its own may hold much of random ones
        names = [f"{prefix.removeprefix('ema_')}{tag}.pth" for prefix in PREFIXES[self.kind]]
        return [(os.path.join(self.cfg.init_from, name), manifest["files"][name]) for name in names]

    def is_done(self, tag, manifest):
        """Whether a set is a whole epoch, undamaged, after which --num_epochs and --max_steps leave nothing to do."""
        cut = manifest["step"] == manifest["settings"].get("max_steps")  # perhaps within its epoch
        enough = manifest["step"] >= (self.about["settings"]["max_steps"] or math.inf)
        if "_" in tag or not (enough or (manifest["epoch"] >= self.cfg.num_epochs and not cut)):
            return False
        entries = {name: manifest["files"][name] for name in self.names_of(tag)[:-2]}
        return all(entry_of(read_file(self.path(name), e["bytes"])) == e for name, e in entries.items())

    def check_same(self, manifest):
        """UserError that lists every difference between the run that a manifest tells of and this one."""
        free = {f.name for f in fields(SDConfig) if f.metadata["free"]}
        defaults = json.loads(json.dumps(asdict(SDConfig())))  # of settings that older code did not know
        now, then = self.about["settings"], defaults | RETIRED | manifest["settings"]
        free |= {*PLAN, *NOT_OF[self.kind].split()}
        changed = [f"{k} was {then.get(k)}, now {v}" for k, v in now.items() if k not in free and then.get(k) != v]
        changed += [f"{k} was {then[k]}, which is no more" for k, v in RETIRED.items() if then[k] != v]
        for name, what in (
            ("data", "the pictures or their captions are others"),
            ("made_from", "the VAE is another"),
            ("text", "the text encoder's weights are others"),
        ):
            if name in self.about and self.about[name] != manifest.get(name):
                changed.append(what)
        if changed:
            raise UserError(
                f"--run_dir {self.dir}: holds a run that differs ({'; '.join(changed)}); give another --run_dir, or "
                "--overwrite to start over"
            )

    def open(self):
        """Make the directory and take its lock, which the system frees however this process ends."""
        if self.world.rank:
            return
        os.makedirs(self.dir, exist_ok=True)
        self.lock = open(self.path(".lock"), "a+")
        try:
            if not lock(self.lock):
                self.lock.seek(0)
                other = printable(self.lock.read(100)) or "another process"
                what = f"in use by {other}; wait for it, stop it, or give another --run_dir"
                raise UserError(f"--run_dir {self.dir}: {what}")
            self.lock.truncate(0)
            self.lock.write(f"process {os.getpid()}, started {time.strftime('%Y-%m-%d %H:%M:%S')}")
            self.lock.flush()
        except OSError as e:
            what = f"cannot be written to ({e.strerror}); make room, or give another"
            raise UserError(f"--run_dir {self.dir}: {what}") from None
        self.board = Board(self.path(f"tensorboard/{self.kind}")) if self.cfg.tensorboard else None

    # ---- Going on ----

    def resume(self, modules, optimizer, state, plan, helpers=()):
        """Load the newest good set into modules and optimizer -> its State; `state` if the run is a new one.

        modules: one per PREFIXES[kind], in that order; helpers: those that only resuming needs. A new run saves where it
        starts, so that a full disk shows now.
        UserError if nothing usable is where something should be, or if settings, data or VAE are not those of the set.
        """
        self.modules, self.helpers, self.optimizer, self.plan = modules, helpers, optimizer, plan
        if self.world.rank:  # rank 0 finds a set, or makes one
            self.world.wait()
            state = self.load(sets_of(self.dir, self.kind)[0], state)
        else:
            for (path, entry), module in zip(self.source, modules):
                load_weights(path, entry, module)
                print(f"starting from {path}")
            if self.overwrite:  # all but the words that this run has just learned
                new = f"words_{self.about.get('text', {}).get('words', '')[:8]}.safetensors"
                self.delete([name for name in self.names() if name != new])
            found = self.load_newest(state)
            self.tidy(KEPT_SETS)
            self.write_manifests(self.follow_command())
            self.write_config()
            if not found:
                self.save(INITIAL_TAG, state)
            elif found.step < found.epoch * plan.steps_per_epoch:  # --max_steps had ended it within this epoch
                whole, found.epoch = f"{found.epoch}", found.epoch - 1
                self.save(f"{whole}_step{found.step}", found)
                self.delete(self.names_of(whole))
            self.world.wait()
            state = found or state
            if self.board:
                self.board.start(state.step)
        self.interrupts = Interrupts(self.cfg.save_minutes, self.world.rank)
        return state

    def load_newest(self, start):
        """The State of the newest whole set, loaded; None if there never was one. Damaged sets are put aside."""
        damaged = []
        for tag in sets_of(self.dir, self.kind):
            try:
                state = self.load(tag, start)
            except UserError as e:
                if tag == INITIAL_TAG and not damaged:  # no step was taken with what it holds
                    print(f"begins anew, as no step was taken before: {str(e).rpartition('; ')[0]}")
                    remove(*map(self.path, self.csv))
                    self.delete(self.names_of(tag))
                    return None
                if not isinstance(e, Damaged):
                    raise
                damaged.append((tag, e))
                continue
            for bad, why in damaged:
                warn(f"{why}; put aside as *.damaged, going on from {self.last_saved}")
                self.put_aside(bad)
            print(f"resumed after step {state.step}")
            return state
        self.check_empty(damaged)
        return None

    def check_empty(self, damaged):
        """UserError if a run has been here: it must not be started over unasked."""
        if damaged:
            raise UserError(f"{damaged[0][1]}; or give --overwrite to start over: no other set in {self.dir} is whole")
        for name in sorted(os.listdir(self.dir)):
            weights = re.fullmatch(rf"(?:{'|'.join(self.prefixes)})(\d+(?:_step\d+)?)\.pth", name)
            # killed within its first save is no run yet
            if name in self.csv or (weights and weights[1] != INITIAL_TAG):
                raise UserError(
                    f"--run_dir {self.dir}: holds {name} but no {self.kind}_set*.json to go on from; restore it, give "
                    "another --run_dir, or --overwrite to start over"
                )

    def load(self, tag, start):
        """Load one whole set -> its State, of the same kinds as those of `start`; Damaged if any of it is not right."""
        manifest = read_manifest(self.dir, self.kind, tag)
        self.check_same(manifest)
        files, names = manifest["files"], self.names_of(tag)[:-1]
        if set(files) != set(names):
            raise Damaged(f"{manifest_path(self.dir, self.kind, tag)}: does not list this set's files; restore it")
        for name, module in zip(names, self.modules):
            load_weights(self.path(name), files[name], module)
        path, step, epoch = self.path(names[-1]), manifest["step"], manifest["epoch"]
        if manifest["finished"] and not os.path.lexists(path):  # nobody thought that it would go on
            counters = vars(replace(start, step=step, epoch=epoch, restart=step))
            saved = {"adam": [], "counters": counters, "csv": self.read_csv()}  # helpers begin anew
        else:
            most = 4 * sum(map(num_bytes, [*self.modules, *self.helpers])) + MAX_STATE_TEXT
            saved = read_tensors(path, files[names[-1]], most)
        try:
            for module, weights in zip(self.helpers, saved.get("helpers", ())):
                copy_weights(path, weights, module)
            load_adam(path, self.optimizer, saved["adam"])
            state, csv = State(**saved["counters"]), {name: saved["csv"].get(name) for name in self.csv}
            fits = state.step == step >= 0 and state.epoch == epoch >= 0
            fits = fits and all(type(v) is type(getattr(state, k)) for k, v in vars(start).items())
            fits = fits and state.window.shape == start.window.shape
        except (KeyError, TypeError, AttributeError, RuntimeError):
            fits = False
        if not fits:
            raise Damaged(f"{path}: not the state of such a run; restore it")
        self.check_plan(manifest, state)
        if not self.world.rank:
            self.restore_csv(csv)
        self.last_saved = manifest_path(self.dir, self.kind, tag)
        for name, value in self.about["machine"].items():
            if (then := manifest["machine"].get(name)) != value:
                warn(f"no longer exact to the bit: {name} was {then}, now {value}")
        state.window = state.window.to(start.window.device)
        return state

    def check_plan(self, manifest, state):
        """Say what more or fewer steps than were planned do to the learning rate; UserError if too many are taken."""
        now, then, total = self.about["settings"], manifest["settings"], self.plan.total_steps
        changed = ", ".join(f"{k} was {then.get(k)}, now {now[k]}" for k in PLAN if then.get(k) != now[k])
        if state.step + bool(state.count) > total:  # a row that has begun in the table needs a step to end it
            remedy = "give more --num_epochs or --max_steps, another --run_dir, or --overwrite to start over"
            raise UserError(
                f"--run_dir {self.dir}: has taken {state.step} steps of {total} asked for ({changed}); {remedy}"
            )
        what = "the optimizer and the discriminator begin" if self.helpers else "the optimizer begins"
        anew, rate = 0 < state.restart == state.step, lr_at(state.step + 1, total, self.cfg, state.restart)
        lr = f"the learning rate goes on along the cosine of all {total} steps, from {rate:.2g} down to 0"
        if self.cfg.lr_schedule == "constant":
            lr = f"the learning rate is constant{'' if anew else ', so this is exact'}"
        if changed:
            print(f"{changed}: {lr}{f'; {what} anew from the trained weights' if anew else ''}")

    def read_csv(self):
        """-> {name: text} of the run's CSV files that are there."""
        csv = {}
        for name in self.csv:
            with contextlib.suppress(FileNotFoundError), open(self.path(name), newline="") as f:
                csv[name] = f.read()
        return csv

    def restore_csv(self, csv):
        """Rows written after the set was saved will be written again."""
        for name, text in csv.items():
            if text is None:
                remove(self.path(name))
            else:
                write_file(self.path(name), text.encode())

    # ---- While it trains ----

    def log(self, name, row):
        """Append a row to the run's {kind}_{name}.csv."""
        if not self.world.rank:
            append_csv(self.path(f"{self.kind}_{name}.csv"), row)
        if self.board:
            self.board.log(name, row)

    def show(self, name, epoch, images, columns):
        """Write a grid of images (N, 3, H, W) in [0, 1] to {kind}_{name}_epoch{epoch}.png. For rank 0 alone."""
        save_grid(self.path(f"{self.kind}_{name}_epoch{epoch}.png"), images, columns)
        if self.board:
            self.board.show(name, make_grid(images, columns))

    def save_is_due(self):
        """Whether to save within the epoch: often enough for a crash to cost little, and when asked to stop."""
        return self.interrupts.save_is_due()

    def save(self, tag, state, finished=False):
        """Write one set; then exit if a signal has asked for that. UserError if the disk does not take it.

        tag: "5" after epoch 5, "6_step900" within epoch 6.
        """
        self.last_saved = manifest_path(self.dir, self.kind, tag)
        if not self.world.rank:
            self.write_set(tag, state, finished)
            self.tidy(self.kept if finished else KEPT_SETS)
        if self.interrupts:
            self.interrupts.saved(state.step)

    def write_set(self, tag, state, finished):
        counters = vars(state) | {"window": state.window.cpu()}
        resuming = {"format": FORMAT, "counters": counters, "adam": adam_state(self.optimizer), "csv": self.read_csv()}
        resuming |= {"helpers": list(map(plain_weights, self.helpers))} if self.helpers else {}
        files = {}
        for prefix, content in zip(self.prefixes, [*map(plain_weights, self.modules), resuming]):
            buffer = io.BytesIO()
            torch.save(content, buffer)
            name, data = f"{prefix}{tag}.pth", buffer.getvalue()
            write_file(self.path(name), data)
            files[name] = entry_of(data)
        manifest = {"format": FORMAT, "kind": self.kind, "step": state.step, "epoch": state.epoch}
        manifest |= {"finished": finished, "files": files} | self.about
        self.write_manifests([(tag, manifest)])

    def write_manifests(self, manifests):
        for tag, manifest in manifests:
            manifest["sha256"] = own_hash(manifest)
            write_file(manifest_path(self.dir, self.kind, tag), json.dumps(manifest, indent=1).encode())

    def write_config(self):
        """config.json: the settings of both trainers, for people; no script reads it."""
        records = {}
        with contextlib.suppress(Damaged, ValueError, TypeError, RecursionError):
            records = dict(json.loads(read_file(self.path("config.json"), MAX_MANIFEST_BYTES)))
        records[f"train_{self.kind}"] = self.about
        write_file(self.path("config.json"), json.dumps(records, indent=1).encode())

    # ---- Tidying ----

    def tidy(self, kept):
        """Delete what a killed run left, what only resuming needs of all but the newest `kept` sets, and epochs that are
        not to stay."""
        self.delete(self.surplus(kept))

    def surplus(self, kept):
        tags, names = sets_of(self.dir, self.kind), self.names()
        marked = {*re.findall(rf"^{self.kind}_set(.+)\.json\.tmp$", "\n".join(names), re.MULTILINE)}
        gone, found = {*tags[kept:]} - self.staying(tags) | marked - {*tags}, []
        for name in names:
            tag = (re.findall(r"(\d+(?:_step\d+)?)\.(?:pth|json)$", name) or [None])[0]  # of its set, if it is of one
            orphan = "_step" in name and tag not in tags
            for_resuming = name.startswith(self.prefixes[-1]) and tag not in tags[:kept]
            if name.endswith(".tmp") or (tag and (tag in gone or orphan or for_resuming)):
                found.append(name)
        return found

    def staying(self, tags):
        """Of these sets those whose weights stay: the newest whole epoch, VAEs that the U-Net was trained on, and the
        --keep_last newest of every --save_every epochs."""
        whole, sets = [tag for tag in tags if "_" not in tag], readable(self.dir, self.kind).items()
        # by each set's own settings: --save_every may have been another then
        between = {tag for tag, m in sets if m["epoch"] % m["cfg"].save_every and not m["finished"]}
        used = {name for manifest in readable(self.dir, "unet").values() for name in manifest.get("made_from", ())}
        due = [tag for tag in whole if tag not in between][: self.cfg.keep_last or None]
        return {*whole[:1], *due, *(tag for tag in whole if f"{self.prefixes[0]}{tag}.pth" in used)}

    def delete(self, names):
        """A set vanishes when its manifest is renamed, all at once; the new name marks its files until they are gone."""
        for path in (self.path(name) for name in names if name.endswith(".json")):
            with contextlib.suppress(FileNotFoundError):
                os.replace(path, f"{path}.tmp")
        remove(*(self.path(name) for name in names if ".json" not in name))
        remove(*(self.path(f"{name}{ending}") for name in names if ".json" in name for ending in ("", ".tmp")))

    def put_aside(self, tag):
        """Rename a damaged set's files to *.damaged, the manifest last."""
        for path in map(self.path, self.names_of(tag)):
            with contextlib.suppress(FileNotFoundError):
                os.replace(path, f"{path}.damaged")

    def names_of(self, tag):
        return [*(f"{prefix}{tag}.pth" for prefix in self.prefixes), f"{self.kind}_set{tag}.json"]

    def names(self):
        """The files in the directory that a run of this kind writes; others belong to somebody else."""
        tag, kind, tmp = r"\d+(_step\d+)?", self.kind, r"(\.tmp)?"
        pattern = rf"(({'|'.join(self.prefixes)}){tag}\.pth|{kind}_set{tag}\.json)(\.damaged|\.tmp)?|config\.json\.tmp"
        pattern += rf"|{kind}_((train|held_out)\.csv|(curves|(pictures|samples)_epoch\d+)\.png){tmp}|report\.html{tmp}"
        pattern += rf"|words_[0-9a-f]{{8}}\.safetensors{tmp}" if kind == "unet" else ""
        return [name for name in os.listdir(self.dir) if re.fullmatch(pattern, name)]
