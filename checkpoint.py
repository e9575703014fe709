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
import errno
import hashlib
import io
import json
import os
import re
import shutil
import stat
import sys
import time
import zipfile
from dataclasses import asdict, fields

import torch

from config import PRESETS, SDConfig, UserError, printable
from unet import TimeEmbedding, UNetLatent
from vae import AutoencoderKL

try:
    import fcntl
except ImportError:  # Windows: two trainings in one directory are not noticed there
    fcntl = None

FORMAT = 1  # of manifest and state; a change that older code would misread raises it
FIRST = "1_step0"  # tag of the set that a run begins with
KEPT_SETS = 2  # newest sets that can be resumed from: should one be damaged, there is another
PREFIXES = {"vae": ("vae_ckpt_epoch",), "unet": ("unet_ckpt", "t_ember_ckpt", "ema_unet_ckpt")}
MAX_MANIFEST_BYTES = 1 << 20
MAX_STATE_TEXT = 64 << 20  # the CSV text within a state
VAE_SETTINGS = (
    "image_size", "latent_channels", "block_out_channels", "layers_per_block", "norm_num_groups", "normalize_latents"
)  # fmt: skip


class Damaged(UserError):
    """A file of a set is missing or is not what was saved."""


# ---- Files ----------------------------------------------------------------------------------------------


def write_file(path, data):
    """Bytes under a temporary name, flushed to the disk, read back, renamed: the name never shows half a file."""
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        with open(temporary, "rb") as f:
            if f.read() != data:
                raise OSError(errno.EIO, "it does not read back as written")
        os.replace(temporary, path)
        sync_folder(os.path.dirname(path))
    except OSError as e:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise UserError(f"{path}: could not be written ({e.strerror}; {len(data) / 1e6:.1f} MB needed, "
                        f"{free_megabytes(path)} free); make room or mend the disk, then give the same command again: "
                        "what was saved before is whole") from None  # fmt: skip


def free_megabytes(path):
    try:
        return f"{shutil.disk_usage(os.path.dirname(path) or '.').free / 1e6:.1f} MB"
    except OSError:
        return "nothing"


def sync_folder(folder):
    """Put renames on the disk too, where a folder can be opened for that."""
    if os.name == "posix":
        handle = os.open(folder or ".", os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def read_file(path, most):
    """The bytes of a regular file of at most `most` bytes; pipes and giants are refused unopened."""
    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            raise Damaged(f"{path}: not a regular file; restore it")
        if found.st_size > most:
            raise Damaged(f"{path}: {found.st_size} bytes, {most} at most were expected; restore it")
        with open(path, "rb") as f:
            return f.read(most + 1)
    except FileNotFoundError:
        raise Damaged(f"{path}: missing; restore it") from None
    except OSError as e:
        raise Damaged(f"{path}: cannot be read ({e.strerror}); restore it") from None


def read_tensors(path, entry, most):
    """What torch.save put into a file -> object on the CPU; Damaged unless size and SHA-256 are those of `entry`."""
    data = read_file(path, most)
    if len(data) != entry["bytes"] or hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise Damaged(f"{path}: not the file that was saved (size or SHA-256 differ from the manifest's); restore it")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as z:  # torch.load would unpack a compressed bomb
            if sum(i.file_size for i in z.infolist()) > most or any(i.compress_type for i in z.infolist()):
                raise ValueError("packed")
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception:  # a file that is no checkpoint raises one of many kinds, whose texts advise unsafe loading
        raise Damaged(f"{path}: not a checkpoint of plain tensors; restore it") from None


# ---- Weights --------------------------------------------------------------------------------------------


def plain_weights(module):
    """A state_dict on the CPU, contiguous: opens with torch.load(path, weights_only=True)."""
    return {k: v.detach().cpu().contiguous() for k, v in module.state_dict().items()}


def num_bytes(module):
    return sum(v.numel() * v.element_size() for v in module.state_dict().values())


def most_bytes(weights):
    """What a file of so many bytes of weights may have, names and padding included."""
    return 2 * weights + (1 << 20)


def load_weights(path, entry, module):
    """Copy a checked file into module (strictly); Damaged, in one line, if a tensor is missing, other, or not finite."""
    weights, own = read_tensors(path, entry, most_bytes(num_bytes(module))), module.state_dict()
    if not isinstance(weights, dict) or not all(is_plain(v) for v in weights.values()):
        raise Damaged(f"{path}: holds no plain weights; restore it")
    kind = type(module).__name__
    for name in [k for k in own if k not in weights] + [k for k in weights if k not in own]:
        verb = "lacks" if name in own else "holds"
        raise Damaged(f"{path}: not the {kind} of these settings: it {verb} {printable(name)}; restore it")
    for name, tensor in weights.items():
        if tensor.dtype != own[name].dtype or tensor.shape != own[name].shape:
            raise Damaged(f"{path}: not the {kind} of these settings: {name} is {describe(tensor)} instead of "
                          f"{describe(own[name])}; restore it")  # fmt: skip
        if not tensor.isfinite().all():
            raise Damaged(f"{path}: {name} holds values that are not finite numbers; restore it")
    module.load_state_dict(weights)


def is_plain(value):
    """Whether it is a tensor with numbers of its own: not sparse, nested, quantized or without storage."""
    return isinstance(value, torch.Tensor) and not value.is_nested and value.layout == torch.strided and value.is_cpu


def describe(tensor):
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def adam_state(optimizer):
    """Step, mean and mean square of the gradient of each parameter, in order; [] before the first step."""
    states = [optimizer.state[p] for p in optimizer.param_groups[0]["params"] if optimizer.state[p]]
    return [{k: v.detach().cpu() for k, v in s.items()} for s in states]


def load_adam(path, optimizer, saved):
    parameters = optimizer.param_groups[0]["params"]
    optimizer.state.clear()  # a set that turned out to be damaged may have been here before
    if len(saved) not in (0, len(parameters)):
        raise Damaged(f"{path}: holds the Adam state of another model; restore it")
    for p, s in zip(parameters, saved):
        for name, shape in (("exp_avg", p.shape), ("exp_avg_sq", p.shape), ("step", ())):
            if not is_plain(s[name]) or s[name].shape != shape or s[name].dtype != torch.float32:
                raise Damaged(f"{path}: holds the Adam state of another model; restore it")
            if not s[name].isfinite().all():
                raise Damaged(f"{path}: holds values that are not finite numbers; restore it")
        # copied into tensors laid out like p, because the fused kernel walks through all of them in step
        optimizer.state[p] = {k: torch.empty_like(p).copy_(s[k]) for k in ("exp_avg", "exp_avg_sq")}
        optimizer.state[p]["step"] = s["step"].to(p.device)


# ---- Manifests ------------------------------------------------------------------------------------------


def sets_of(run_dir, kind):
    """Tags of the sets in a run directory, newest first. "5" is the set after epoch 5, "6_step900" one within epoch 6."""
    pattern = re.compile(rf"{kind}_set(\d+)(?:_step(\d+))?\.json")
    found = [m for m in map(pattern.fullmatch, os.listdir(run_dir) if os.path.isdir(run_dir) else []) if m]
    age = {m[0]: (int(m[1]) - bool(m[2]), int(m[2] or 0)) for m in found}  # epochs done, then steps
    return [n.removeprefix(f"{kind}_set").removesuffix(".json") for n in sorted(age, key=age.get, reverse=True)]


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
            raise UserError(f"{path}: of format {manifest['format']}, this is the code of format {FORMAT}; use the "
                            "version of this project that wrote it, or train again")  # fmt: skip
        manifest["cfg"] = settings_to_config(manifest["settings"], path)
        entries = [*manifest["files"].values(), *manifest.get("made_from", {}).values()]
        whole = whole and all(f"{prefix}{tag}.pth" in manifest["files"] for prefix in PREFIXES[kind])
        whole = whole and all(type(manifest[k]) is t for k, t in (("finished", bool), ("epoch", int), ("step", int)))
        if whole and all(type(e["bytes"]) is int and type(e["sha256"]) is str for e in entries):
            return manifest
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        pass  # each means that the file is not what write_file() was given
    raise Damaged(f"{path}: not the manifest that was saved; restore it")


def settings_to_config(settings, path):
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items() if k != "max_steps"}
    try:
        return SDConfig(**settings)
    except UserError as e:
        raise Damaged(f"{path}: {e}") from None


def newest_epoch_set(run_dir, kind, flag="--run_dir"):
    """Tag and manifest of the newest set of a whole epoch. flag: the one that named run_dir."""
    tags = [tag for tag in sets_of(run_dir, kind) if "_" not in tag]
    if not tags:
        raise UserError(f"{flag} {run_dir}: no {kind}_set*.json of a whole epoch here; run python train_{kind}.py "
                        "first, with this folder as its --run_dir")  # fmt: skip
    return tags[0], read_manifest(run_dir, kind, tags[0])


# ---- Trained models -------------------------------------------------------------------------------------


def newest_run():
    """The default run directory, runs/<preset>, in which train_unet.py saved an epoch last."""
    saved = {}
    for run_dir in (os.path.join("runs", preset) for preset in PRESETS):
        for tag in [tag for tag in sets_of(run_dir, "unet") if "_" not in tag][:1]:
            saved[os.path.getmtime(manifest_path(run_dir, "unet", tag))] = run_dir
    if not saved:
        raise UserError("--run_dir: no trained U-Net in runs/; run python train_vae.py and python train_unet.py")
    return saved[max(saved)]


def load_models(run_dir, ema, device, vae_dir=None):
    """The newest epoch's models -> cfg, name of the U-Net's file, vae, unet, t_embedder, ready for use.

    The VAE is the one that the U-Net was trained on, or that of vae_dir if only its decoder is another; UserError,
    naming the file, if any is not as it was saved.
    """
    tag, manifest = newest_epoch_set(run_dir, "unet")
    cfg, name = manifest["cfg"], f"{'ema_' if ema else ''}unet_ckpt{tag}"
    made_from = manifest.get("made_from", {})
    files, vae_file = manifest["files"] | made_from, os.path.basename(next(iter(made_from), "the VAE"))
    models = []
    for file, kind, size in ((vae_file, AutoencoderKL, cfg), (f"{name}.pth", UNetLatent, cfg),
                             (f"t_ember_ckpt{tag}.pth", TimeEmbedding, cfg.time_dim)):  # fmt: skip
        path = os.path.join(run_dir, file)
        if file not in files:
            raise UserError(f"{manifest_path(run_dir, 'unet', tag)}: does not list {file}; train again")
        with torch.device("meta"):  # takes no memory, however large the manifest says it is
            expected = num_bytes(kind(size))
        if not expected <= files[file]["bytes"] <= most_bytes(expected):
            raise UserError(
                f"{path}: {files[file]['bytes']} bytes are not a {kind.__name__} of these settings; restore it"
            )
        module = kind(size)
        try:
            load_weights(path, files[file], module)
        except Damaged as e:
            retrained = (
                f"; if train_vae.py has run again since, run python train_unet.py --run_dir {run_dir} --overwrite"
            )
            raise UserError(f"{e}{retrained if file == vae_file else ''}") from None
        # they stay as if to be trained: autocast casts weights once in all, not at each call, only if they want gradients
        models.append(module.to(device).eval())
    if vae_dir:
        own, (models[0], _) = models[0], load_vae(cfg, vae_dir, device, "--vae")
        if not has_latents_of(models[0], own):
            raise UserError(f"--vae {vae_dir}: its latents are not those that the U-Net in {run_dir} was trained on; give a "
                            f"run of train_vae.py --finetune_decoder_of {run_dir}")  # fmt: skip
    return cfg, name, *models


def check_text_encoder(run_dir, text_encoder):
    """UserError if the newest U-Net was trained with other weights of the text encoder."""
    tag, manifest = newest_epoch_set(run_dir, "unet")
    if manifest.get("text") not in (None, text_encoder.key()):
        raise UserError(f"--text_encoder: not the weights that {manifest_path(run_dir, 'unet', tag)} was trained with; give "
                        "the same ones")  # fmt: skip


def has_latents_of(vae, other):
    """Whether two VAEs of the same settings give the same latents: all but the weights of the decoder is equal."""
    theirs, free = other.state_dict(), {f"decoder.{name}" for name, _ in vae.decoder.named_parameters()}
    return all(torch.equal(v, theirs[name]) for name, v in vae.state_dict().items() if name not in free)


def load_vae(cfg, run_dir, device, flag="--run_dir", given=("dataset",)):
    """-> the run's VAE and {its file: size and SHA-256}; UserError if it is not finished or was made otherwise.

    given: settings that the user has named; a data set other than the VAE's must be among them.
    """
    tag, manifest = newest_epoch_set(run_dir, "vae", flag)
    theirs = manifest["cfg"]
    for name in VAE_SETTINGS:
        if getattr(theirs, name) != getattr(cfg, name):
            lead = f"--{name}" if flag == "--run_dir" else f"{flag} {run_dir}: {name}"
            raise UserError(f"{lead}: {getattr(cfg, name)} here, but the VAE in {run_dir} was trained with "
                            f"{getattr(theirs, name)} (--preset {manifest.get('preset')}); give the same, or another "
                            f"{flag}")  # fmt: skip
    if theirs.dataset != cfg.dataset:
        if "dataset" not in given:
            raise UserError(f"--dataset: {cfg.dataset} here, but the VAE in {run_dir} was trained on {theirs.dataset}; give "
                            f"--dataset and its flags as for the VAE, or --dataset {cfg.dataset} if that is meant")  # fmt: skip
        print(f"warning: the VAE was trained on --dataset {theirs.dataset}, this is for {cfg.dataset}", file=sys.stderr)
    if theirs.held_out_combinations != cfg.held_out_combinations:
        print("warning: the VAE was trained with other --held_out_combinations: what is new to the U-Net is not to it",
              file=sys.stderr)  # fmt: skip
    if not manifest["finished"]:
        raise UserError(f"{flag} {run_dir}: train_vae.py has not finished here; give its command again")
    file = f"vae_ckpt_epoch{tag}.pth"
    vae = AutoencoderKL(cfg)
    load_weights(os.path.join(run_dir, file), manifest["files"][file], vae)
    print(f"VAE: {os.path.join(run_dir, file)}")
    return vae.to(device).eval().requires_grad_(False), {file: manifest["files"][file]}


def processor(device):
    """What the last bits of a sum depend on: the first GPU, of all processes alike, else PyTorch's instructions on this CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(0)
    found = getattr(torch.cpu, "get_capabilities", dict)()
    names = [name for name in ("avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16") if found.get(name)]
    return " ".join([torch.backends.cpu.get_cpu_capability(), *names])


# ---- A training run -------------------------------------------------------------------------------------


class Run:
    """One trainer's place in a run directory. kind: "vae" or "unet"; about: what its manifests say of the run.

    modules: one per PREFIXES[kind], in that order. counters: numbers and tensors that the loop goes on from.
    """

    def __init__(self, args, kind, cfg, world):
        self.world, self.dir, self.kind, self.overwrite, self.last_saved = (
            world,
            args.run_dir,
            kind,
            args.overwrite,
            "nothing",
        )
        settings = json.loads(json.dumps(asdict(cfg) | {"max_steps": args.max_steps}))  # lists for tuples, as read back
        machine = {"torch": torch.__version__, "device": world.device.type, "threads": torch.get_num_threads(),
                   "processor": processor(world.device), "processes": world.size}  # fmt: skip
        self.about = {"preset": args.preset, "settings": settings, "machine": machine}
        self.lock, self.csv = None, (f"{kind}_train.csv", f"{kind}_held_out.csv")
        self.prefixes = (*PREFIXES[kind], f"{kind}_state")  # of a set's files, in the order of the modules; state last

    def finished(self):
        """Whether this very run is finished; UserError if the directory holds one with other settings."""
        tags = [] if self.overwrite else sets_of(self.dir, self.kind)
        for tag in tags[:1]:
            with contextlib.suppress(Damaged):  # resume() deals with it, and says so
                manifest = read_manifest(self.dir, self.kind, tag)
                self.check_same(manifest)
                if manifest["finished"] and self.is_whole(tag, manifest):
                    self.finish_pruning()
                    print(f"{self.dir}: this run is finished (epoch {manifest['epoch']}), and the data is not looked at again; "
                          "--overwrite starts it over")  # fmt: skip
                    return True
        return False

    def finish_pruning(self):
        """Delete what only resuming needed, where a run was killed between its last manifest and doing so."""
        left = any("_state" in name or "_step" in name for name in os.listdir(self.dir) if self.is_ours(name))
        if left and not self.world.rank:
            self.open()
            self.prune(0)
            self.sweep()

    def is_whole(self, tag, manifest):
        for prefix in PREFIXES[self.kind]:
            entry = manifest["files"][f"{prefix}{tag}.pth"]
            data = read_file(os.path.join(self.dir, f"{prefix}{tag}.pth"), entry["bytes"])
            if hashlib.sha256(data).hexdigest() != entry["sha256"]:
                return False
        return True

    def check_same(self, manifest):
        """UserError that lists every difference between the run that a manifest tells of and this one."""
        free = {f.name for f in fields(SDConfig) if f.metadata["free"]}  # change the pace, never a result
        defaults = json.loads(json.dumps(asdict(SDConfig())))  # of settings that older code did not know
        now, then = self.about["settings"], defaults | manifest["settings"]
        changed = [f"{k} was {then.get(k)}, now {v}" for k, v in now.items() if k not in free and then.get(k) != v]
        for name, what in (("data", "the pictures or their captions are others"), ("made_from", "the VAE is another"),
                           ("text", "the text encoder's weights are others")):  # fmt: skip
            if name in self.about and self.about[name] != manifest.get(name):
                changed.append(what)
        if changed:
            raise UserError(f"--run_dir {self.dir}: holds a run that differs ({'; '.join(changed)}); give another "
                            "--run_dir, or --overwrite to start over")  # fmt: skip

    def open(self):
        """Make the directory and take its lock, which the system frees however this process ends."""
        if self.world.rank:
            return
        os.makedirs(self.dir, exist_ok=True)
        self.lock = open(os.path.join(self.dir, ".lock"), "a+")
        try:
            if fcntl:
                fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.lock.seek(0)
            raise UserError(f"--run_dir {self.dir}: in use by {printable(self.lock.read(100)) or 'another process'}; "
                            "wait for it, stop it, or give another --run_dir") from None  # fmt: skip
        try:
            self.lock.truncate(0)
            self.lock.write(f"process {os.getpid()}, started {time.strftime('%Y-%m-%d %H:%M:%S')}")
            self.lock.flush()
        except OSError as e:
            raise UserError(
                f"--run_dir {self.dir}: cannot be written to ({e.strerror}); make room, or give another"
            ) from None

    def resume(self, modules, optimizer, start):
        """Load the newest good set into modules and optimizer -> its counters; `start` if the run is a new one.

        A new run saves where it starts, so that a full disk shows now. UserError if nothing usable is where
        something should be, or if settings, data or VAE are not those of the set.
        """
        if self.world.rank:  # rank 0 has found a set, or made one
            self.world.wait()
            return self.load(sets_of(self.dir, self.kind)[0], modules, optimizer, start)
        if self.overwrite:
            self.delete_all()
        tags, damaged = sets_of(self.dir, self.kind), []
        for tag in tags:
            try:
                counters = self.load(tag, modules, optimizer, start)
            except Damaged as e:
                damaged.append((tag, e))
                continue
            for bad, why in damaged:
                print(f"warning: {why}; put aside as *.damaged, going on from {self.last_saved}", file=sys.stderr)
                self.put_aside(bad)
            print(f"resumed after step {counters['step']}")
            break
        else:
            self.check_empty(damaged)
            counters = None
        self.sweep()
        self.write_config()
        if counters is None:
            self.save(FIRST, False, modules, optimizer, start)
        self.world.wait()
        return counters or start

    def check_empty(self, damaged):
        """UserError if a run has been here: it must not be started over unasked."""
        if damaged:
            raise UserError(f"{damaged[0][1]}; or give --overwrite to start over: no other set in {self.dir} is whole")
        for name in sorted(os.listdir(self.dir)):
            weights = re.fullmatch(rf"(?:{'|'.join(self.prefixes)})(\d+(?:_step\d+)?)\.pth", name)
            if name in self.csv or (weights and weights[1] != FIRST):  # killed within its first save is no run yet
                raise UserError(f"--run_dir {self.dir}: holds {name} but no {self.kind}_set*.json to go on from; "
                                "restore it, give another --run_dir, or --overwrite to start over")  # fmt: skip

    def load(self, tag, modules, optimizer, start):
        """Load one whole set -> its counters, of the same kinds as those of `start`; Damaged if any of it is not right."""
        manifest = read_manifest(self.dir, self.kind, tag)
        self.check_same(manifest)
        files, names = manifest["files"], [f"{prefix}{tag}.pth" for prefix in self.prefixes]
        if set(files) != set(names):
            raise Damaged(f"{manifest_path(self.dir, self.kind, tag)}: does not list this set's files; restore it")
        for name, module in zip(names, modules):
            load_weights(os.path.join(self.dir, name), files[name], module)
        path = os.path.join(self.dir, names[-1])
        state = read_tensors(path, files[names[-1]], 4 * sum(map(num_bytes, modules)) + MAX_STATE_TEXT)
        try:
            load_adam(path, optimizer, state["adam"])
            counters, csv = state["counters"], {name: state["csv"].get(name) for name in self.csv}
            fits = counters["step"] == manifest["step"] >= 0 and counters["epoch"] == manifest["epoch"] >= 0
            fits = fits and all(type(v) is type(counters[k]) for k, v in start.items()) and len(counters) == len(start)
            fits = fits and all(v.shape == counters[k].shape for k, v in start.items() if isinstance(v, torch.Tensor))
        except (KeyError, TypeError, AttributeError, RuntimeError):
            fits = False
        if not fits:
            raise Damaged(f"{path}: not the state of such a run; restore it")
        for name, text in csv.items() if not self.world.rank else ():
            self.restore_csv(name, text)
        self.last_saved = manifest_path(self.dir, self.kind, tag)
        for name, value in self.about["machine"].items():
            if manifest["machine"].get(name) != value:
                print(f"warning: no longer exact to the bit: {name} was {manifest['machine'].get(name)}, now {value}",
                      file=sys.stderr)  # fmt: skip
        return counters

    def restore_csv(self, name, text):
        """Rows written after the set was saved will be written again."""
        path = os.path.join(self.dir, name)
        if text is not None:
            write_file(path, text.encode())
        elif os.path.exists(path):
            os.remove(path)

    def save(self, tag, finished, modules, optimizer, counters):
        """Write one set. tag: "5" after epoch 5, "6_step900" within epoch 6. UserError if the disk does not take it."""
        self.last_saved = manifest_path(self.dir, self.kind, tag)
        if self.world.rank:
            return
        csv = {}
        for name in self.csv:
            with contextlib.suppress(FileNotFoundError), open(os.path.join(self.dir, name), newline="") as f:
                csv[name] = f.read()
        state = {"format": FORMAT, "counters": counters, "adam": adam_state(optimizer), "csv": csv}
        contents = [plain_weights(m) for m in modules] + [state]
        files = {}
        for prefix, content in zip(self.prefixes, contents):
            buffer = io.BytesIO()
            torch.save(content, buffer)
            data = buffer.getvalue()
            write_file(os.path.join(self.dir, f"{prefix}{tag}.pth"), data)
            files[f"{prefix}{tag}.pth"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        manifest = {"format": FORMAT, "kind": self.kind, "step": counters["step"], "epoch": counters["epoch"],
                    "finished": finished, "files": files} | self.about  # fmt: skip
        manifest["sha256"] = own_hash(manifest)
        write_file(manifest_path(self.dir, self.kind, tag), json.dumps(manifest, indent=1).encode())
        self.prune(0 if finished else KEPT_SETS)

    def write_config(self):
        """config.json: the settings of both trainers, for people; no script reads it."""
        path = os.path.join(self.dir, "config.json")
        try:
            records = dict(json.loads(read_file(path, MAX_MANIFEST_BYTES)))
        except (Damaged, ValueError, TypeError, RecursionError):
            records = {}
        records[f"train_{self.kind}"] = self.about
        write_file(path, json.dumps(records, indent=1).encode())

    def prune(self, kept):
        """Delete what only resuming needs, of all but the newest `kept` sets; the weights of whole epochs stay."""
        for tag in sets_of(self.dir, self.kind)[kept:]:
            if "_" in tag:
                self.remove(f"{self.kind}_set{tag}.json")  # first, so that no manifest lists what is gone
                for prefix in self.prefixes[:-1]:
                    self.remove(f"{prefix}{tag}.pth")
            self.remove(f"{self.prefixes[-1]}{tag}.pth")

    def sweep(self):
        """Delete what a killed run left: temporary files, and files of sets that never got a manifest."""
        tags = set(sets_of(self.dir, self.kind))
        prefixes = "|".join(self.prefixes)
        for name in os.listdir(self.dir):
            orphan = re.fullmatch(rf"(?:{prefixes})(\d+_step\d+)\.pth", name)
            if (orphan and orphan[1] not in tags) or (name.endswith(".tmp") and self.is_ours(name)):
                self.remove(name)

    def put_aside(self, tag):
        for name in (f"{p}{tag}.pth" for p in self.prefixes):
            with contextlib.suppress(FileNotFoundError):
                os.replace(os.path.join(self.dir, name), os.path.join(self.dir, f"{name}.damaged"))
        path = manifest_path(self.dir, self.kind, tag)
        os.replace(path, f"{path}.damaged")

    def delete_all(self):
        """For --overwrite: the manifests first, so that at no time one lists what is gone."""
        names = [name for name in os.listdir(self.dir) if self.is_ours(name)]
        for name in sorted(names, key=lambda name: not name.endswith(".json")):
            self.remove(name)

    def is_ours(self, name):
        """Whether a run of this kind writes such a name; others in its directory belong to somebody else."""
        tag, kind = r"\d+(_step\d+)?", self.kind
        pattern = rf"(({'|'.join(self.prefixes)}){tag}\.pth|{kind}_set{tag}\.json)(\.damaged|\.tmp)?|config\.json\.tmp"
        pattern += rf"|{kind}_((train|held_out)\.csv|(curves|(pictures|samples)_epoch\d+)\.png)(\.tmp)?"
        return re.fullmatch(pattern, name) is not None

    def remove(self, name):
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(self.dir, name))
