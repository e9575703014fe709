"""The tests, tested: each copy of the project with one promise broken must turn them red.

A copy differs in one place; the tests named beside it run against it. That they pass on the whole project is what the
rest of the suite shows.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import ROOT

RESUME, FAULTS, DOWNLOAD, EXPORT = "test_resume.py", "test_faults.py", "test_download.py", "test_export.py"
TEXT, PREPARED = "test_text.py", "test_prepared.py"
STOPPED_VAE, STOPPED_UNET = "goes_on_to_the_same_bits and 15-2-vae", "goes_on_to_the_same_bits and 15-2-unet"

# what is broken: (file, text, what stands there instead, test file, -k)
COPIES = {
    "no temporary file": ("checkpoint.py", 'temporary = f"{path}.tmp"', "temporary = path", FAULTS, "old_file_survives"),
    "nothing flushed": ("checkpoint.py", "os.fsync(f.fileno())", "pass", FAULTS, "flushed_before"),
    "a failed save passes": ("checkpoint.py", "            os.remove(temporary)\n", "            os.remove(temporary)\n        return\n", FAULTS, "failing_flush"),
    "manifest before the files": ("checkpoint.py", "        files = {}\n", "        files = {}\n        self.prune(0)\n", FAULTS, "every_moment"),
    "no checksum": ("checkpoint.py", 'or hashlib.sha256(data).hexdigest() != entry["sha256"]', "", FAULTS, "damaged_checkpoint_is_named and flipped"),
    "manifest unsigned": ("checkpoint.py", 'manifest["sha256"] == own_hash(manifest)', "True", FAULTS, "changed_setting"),
    "pickles execute": ("checkpoint.py", "weights_only=True)\n    except", "weights_only=False)\n    except", FAULTS, "executes_does_not"),
    "NaN weights load": ("checkpoint.py", "if not tensor.isfinite().all():", "if False:", FAULTS, "do_not_fit and nan"),
    "a pipe is opened": ("checkpoint.py", "if not stat.S_ISREG(found.st_mode):", "if False:", FAULTS, "refused_unread and pipe"),
    "Adam starts anew": ("checkpoint.py", 'load_adam(path, optimizer, state["adam"])', "pass", RESUME, STOPPED_VAE),
    "EMA starts anew": ("checkpoint.py", "in zip(names, modules):", "in zip(names, modules[:2]):", RESUME, STOPPED_UNET),
    "rows written twice": ("checkpoint.py", "self.restore_csv(name, text)", "pass", RESUME, "goes_on_to_the_same_bits and 9-4-vae"),
    "held out no longer": ("train_vae.py", "[len(pixels), len(held_out)], ", "", RESUME, "held_out_picture"),
    "silent fresh start": ("checkpoint.py", "self.check_empty(damaged)", "pass", RESUME, "fresh_start"),
    "another run's settings": ("checkpoint.py", "        if changed:\n", "        if False:\n", RESUME, "another_run_is_refused"),
    "no step back": ("checkpoint.py", "            except Damaged as e:\n                damaged.append", "            except ZeroDivisionError as e:\n                damaged.append", RESUME, "put_aside and cut-vae"),
    "no lock": ("checkpoint.py", "        if fcntl:\n", "        if False:\n", RESUME, "two_trainings"),
    "the epoch starts over": ("train_vae.py", "batches[step - epochs_done * steps_per_epoch :", "batches[0 :", RESUME, STOPPED_VAE),
    "random numbers not by step": ("train_unet.py", "            seed_step(cfg.seed, step)\n", "", RESUME, STOPPED_UNET),
    "the window starts anew": ("train_vae.py", 'at["window"].to(device)', "torch.zeros(3)", RESUME, STOPPED_VAE),
    "bad steps are taken": ("training.py", "if not math.isfinite(loss + grad_norm):", "if False:", RESUME, "not_finite"),
    "a signal is not heard": ("training.py", "self.signal, self.asked = number,", "self.asked =", RESUME, "can_be_resumed and vae"),
    "bombs are unpacked": ("data.py", "if picture.width * picture.height > MAX_PIXELS:", "if False:", FAULTS, "bad_picture and 51"),
    "cut pictures are filled up": ("data.py", "    found = os.stat(path)\n    if", "    from PIL import ImageFile\n    ImageFile.LOAD_TRUNCATED_IMAGES = True\n    found = os.stat(path)\n    if", FAULTS, "bad_picture and half"),
    "names may climb": ("data.py", '".." not in parts', "True", FAULTS, "stay_in_the_folder"),
    "links lead anywhere": ("data.py", "    if not any(os.path.commonpath", "    if False and not any(os.path.commonpath", FAULTS, "link_out"),
    "a half download has the name": ("download.py", 'f"{path}.part", ""', 'path, ""', DOWNLOAD, "download_stopped"),
    "a download is not decoded": ("download.py", "            check(part)\n", "", DOWNLOAD, "fault_that_stays and html"),
    "half an export has the name": ("export.py", 'new = f"{folder}.{os.getpid()}.tmp"', "new = folder", EXPORT, "killed"),
    "an export of other noise": ("export.py", '"fixed_large"', '"fixed_small"', EXPORT, "snippet and hash_run"),
    "a question about custom code": ("text_encoder.py", "        if asks:", "        if False:", TEXT, "asks_for_custom_code"),
    "custom code runs": ("text_encoder.py", 'where["trust_remote_code"] = False', "pass", TEXT, "nobody_looked"),
    "a stopped preparation is trusted": ("prepared.py", "and zlib.crc32(data, len(lines)) == checksum", "", PREPARED, "only_as_far"),
    "two builds end in one file": ("prepared.py", "            check_size(part, f, (count - len(bad)) * row_bytes)\n", "", PREPARED, "locks_do_not_hold"),
    "a cache is not checked": ("prepared.py", 'manifest["content"] == file_sha256(path)', "True", PREPARED, "damaged_file and flip"),
    "a cache of other pictures": ("data.py", ", found.st_ctime_ns", "", PREPARED, "same_names"),
    "guidance the wrong way round": ("diffusion.py", "out_uncond + w * (out_cond - out_uncond)", "out_cond + w * (out_uncond - out_cond)", "test_diffusion.py", "guid"),
    "one step of the sampler too few": ("samplers.py", "zip(range(len(a) - 1), a, b, a[1:], b[1:])", "zip(range(len(a) - 2), a, b, a[1:], b[1:])", "test_samplers.py", "ddim"),
}  # fmt: skip


def run_against(name, folder):
    file, text, instead, tests, expression = COPIES[name]
    folder.mkdir()
    for path in ROOT.glob("*.py"):
        source = path.read_text()
        if path.name == file:
            assert text in source, f"{name}: {file} no longer says {text!r}"
            source = source.replace(text, instead)
        (folder / path.name).write_text(source)
    here = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-c", here.parent / "pytest.ini"]
    command += ["--rootdir", here.parent, "--basetemp", folder / "tmp", here / tests, "-k", expression]
    env = os.environ | {"SD_CODE": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def verdicts(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("copies")
    asked = [item.callspec.params["name"] for item in request.session.items if item.path == request.path]
    with ThreadPoolExecutor(2) as pool:
        jobs = {name: pool.submit(run_against, name, folder / str(i)) for i, name in enumerate(asked)}
        return {name: job.result() for name, job in jobs.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", COPIES)
def test_a_broken_copy_is_noticed(verdicts, name):
    """Exit code 1 of pytest: tests ran, and some failed."""
    assert verdicts[name].returncode == 1, f"{name}: not noticed\n{verdicts[name].stdout[-2000:]}"
