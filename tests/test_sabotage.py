"""The tests, tested: each copy of the project with one promise broken must turn them red.

A copy differs in one place; the tests named beside it run against it, in a process that the fork server forks, so that
nothing is loaded anew but the copy. That they pass on the whole project is what the rest of the suite shows.
"""

import re
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import CONTEXT, ROOT

HERE = Path(__file__).parent


class Copy(NamedTuple):
    """What is broken: in `file` stands `instead` in the place of `text`; these tests must notice it."""

    file: str
    text: str
    instead: str
    tests: str  # file
    chosen: str  # pytest's -k


FOLDERS, PICTURES = "support/folders.py", "support/pictures.py"
FILES, CHECKPOINT, PREPARED = "support/files.py", "support/checkpoint.py", "support/prepared.py"
OF_CHECKPOINT, OF_PREPARED, OF_FAULTS = "test_checkpoint.py", "test_prepared.py", "test_faults.py"
STOPPED_VAE, STOPPED_UNET = "goes_on_to_the_same_bits and 15-2-vae", "goes_on_to_the_same_bits and 15-2-unet"
READS_A_PICTURE = "    with Image.open(file, formats=FORMATS) as picture:\n"
FILLS_UP = "    from PIL import ImageFile\n    ImageFile.LOAD_TRUNCATED_IMAGES = True\n"
SKIPS_DAMAGED = "if not isinstance(e, Damaged):"
GUIDED = "out_uncond + w * (out_cond - out_uncond)"
LINKS = "allowed is None or any("

COPIES = {
    # whole files
    "no temporary file": Copy(FILES, 'f"{path}.tmp"', "path", "test_files.py", "old_file_survives"),
    "nothing flushed": Copy(FILES, "os.fsync(f.fileno())", "pass", "test_files.py", "flushed_before"),
    "a failed save passes": Copy(
        FILES, "os.remove(temporary)\n", "os.remove(temporary)\n        return\n", OF_CHECKPOINT, "failing_flush"
    ),
    "what is written is not read back": Copy(
        FILES, "if f.read() != data:", "if False:", "test_files.py", "keeps_something_else"
    ),
    "a pipe is opened": Copy(
        FILES, "if not stat.S_ISREG(found.st_mode):", "if False:", OF_CHECKPOINT, "unread and pipe"
    ),
    # sets
    "sets are pruned before the new one is whole": Copy(
        CHECKPOINT, "        files = {}\n", "        files = {}\n        self.tidy(0)\n", OF_CHECKPOINT, "every_moment"
    ),
    "no checksum": Copy(
        CHECKPOINT, "if entry_of(data) != entry:", "if False:", OF_CHECKPOINT, "checkpoint_is_named and flipped"
    ),
    "manifest unsigned": Copy(
        CHECKPOINT, 'manifest["sha256"] == own_hash(manifest)', "True", OF_CHECKPOINT, "changed_setting"
    ),
    "pickles execute": Copy(
        CHECKPOINT,
        "weights_only=True)\n    except",
        "weights_only=False)\n    except",
        OF_CHECKPOINT,
        "executes_does_not",
    ),
    "NaN weights load": Copy(
        CHECKPOINT, "if not tensor.isfinite().all():", "if False:", OF_CHECKPOINT, "do_not_fit and nan"
    ),
    "silent fresh start": Copy(CHECKPOINT, "self.check_empty(damaged)", "pass", OF_CHECKPOINT, "fresh_start"),
    "another run's settings": Copy(
        CHECKPOINT, "if changed:\n            raise", "if False:\n            raise", OF_CHECKPOINT, "other_settings_is"
    ),
    "no step back": Copy(
        CHECKPOINT,
        SKIPS_DAMAGED,
        SKIPS_DAMAGED.replace("Damaged", "ZeroDivisionError"),
        OF_CHECKPOINT,
        "put_aside and cut-vae",
    ),
    "no lock": Copy(FILES, "if fcntl:\n", "if False:\n", OF_CHECKPOINT, "two_trainings"),
    "a setting that is no more is passed over": Copy(
        CHECKPOINT,
        "for k, v in RETIRED.items() if then[k] != v]",
        "for k, v in ()]",
        "test_old_run.py",
        "bars_from_going_on",
    ),
    # the same bits
    "Adam starts anew": Copy(
        CHECKPOINT, 'load_adam(path, self.optimizer, saved["adam"])', "pass", OF_CHECKPOINT, STOPPED_VAE
    ),
    "EMA starts anew": Copy(
        CHECKPOINT, "in zip(names, self.modules):", "in zip(names, self.modules[:2]):", OF_CHECKPOINT, STOPPED_UNET
    ),
    "rows written twice": Copy(CHECKPOINT, "self.restore_csv(csv)", "pass", OF_CHECKPOINT, "not_written_twice and vae"),
    "the window starts anew": Copy(
        CHECKPOINT, "state.window = state.window.to(", "state.window = 0 * state.window.to(", OF_CHECKPOINT, STOPPED_VAE
    ),
    "the epoch starts over": Copy(
        "training.py",
        "[step - first : self.total_steps - first]",
        "[: self.total_steps - first]",
        OF_CHECKPOINT,
        STOPPED_VAE,
    ),
    "random numbers not by step": Copy(
        "train_unet.py", "            training.seed_step(cfg.seed, state.step)\n", "", OF_CHECKPOINT, STOPPED_UNET
    ),
    "held out no longer": Copy("train_vae.py", "[len(pixels), len(held_out)], ", "", OF_CHECKPOINT, "held_out_picture"),
    # steps and signals
    "bad steps are taken": Copy(
        "training.py", "if not math.isfinite(loss + grad_norm):", "if False:", OF_CHECKPOINT, "not_finite and poison"
    ),
    "a signal is not heard": Copy(
        "support/signals.py",
        "self.signal, self.asked = number, ",
        "self.asked = ",
        OF_CHECKPOINT,
        "can_be_resumed and vae",
    ),
    "lines for a terminal that is gone": Copy(
        "support/signals.py",
        "            leave_terminal()\n",
        "            pass\n",
        "test_signals.py",
        "terminal_that_is_closed",
    ),
    "one process counts twice": Copy(
        "support/processes.py",
        "len(part) * self.size / count",
        "len(part) / count",
        "test_processes.py",
        "shares_add_up",
    ),
    # pictures and captions
    "bombs are unpacked": Copy(
        PICTURES, "if picture.width * picture.height > MAX_PIXELS:", "if False:", OF_FAULTS, "bad_picture and 51"
    ),
    "cut pictures are filled up": Copy(
        PICTURES, READS_A_PICTURE, FILLS_UP + READS_A_PICTURE, OF_FAULTS, "bad_picture and half"
    ),
    "names may climb": Copy(FOLDERS, '".." in parts', "False", OF_FAULTS, "stay_in_the_folder"),
    "links lead anywhere": Copy(FOLDERS, LINKS, "True or any(", OF_FAULTS, "link_out"),
    "a half download has the name": Copy(
        "support/coco.py", 'f"{path}.part", ""', 'path, ""', "test_coco.py", "download_stopped"
    ),
    "a download is not decoded": Copy(
        "support/coco.py", "            check(part)\n", "", "test_coco.py", "fault_that_stays and html"
    ),
    # prepared arrays
    "a stopped preparation is trusted": Copy(
        PREPARED, 'sha256.hexdigest() == manifest["content"]', "True", OF_PREPARED, "only_if_it_is_whole"
    ),
    "two builds end in one file": Copy(
        PREPARED,
        "                kept = rows_kept(path, key, row_bytes)\n",
        "                return mapped(path, dtype, (count, *row_shape)), {}\n",
        OF_PREPARED,
        "locks_do_not_hold",
    ),
    "a stop leaves the sum of other rows": Copy(
        PREPARED, "kept.sha256.copy()", "kept.sha256", OF_PREPARED, "within_a_row"
    ),
    "a manifest is believed": Copy(
        PREPARED, 'manifest["sha256"] == own_hash(manifest)', "True", OF_PREPARED, "manifest_that_was_changed"
    ),
    "a cache of other pictures": Copy("data.py", ", found.st_ctime_ns", "", OF_PREPARED, "same_names"),
    # text, sampling, export
    "a question about custom code": Copy(
        "text_encoder.py",
        "if b'\"auto_map\"' in f.read():",
        "if False:",
        "test_text_encoder.py",
        "asks_for_custom_code",
    ),
    "custom code runs": Copy(
        "text_encoder.py", 'where["trust_remote_code"] = False', "pass", "test_text_encoder.py", "nobody_looked"
    ),
    "guidance the wrong way round": Copy(
        "diffusion.py", GUIDED, "out_cond + w * (out_uncond - out_cond)", "test_diffusion.py", "guidance_is_uncond"
    ),
    "one step of the sampler too few": Copy(
        "samplers.py", "zip(range(len(a) - 1), a, b", "zip(range(len(a) - 2), a, b", "test_samplers.py", "ddim_equals"
    ),
    "the model does not see what is kept": Copy(
        "edit.py", "torch.where(repaint, z, noised(first + i))", "z", "test_edit.py", "model_sees_the_picture and euler"
    ),
    "strength counts from the other end": Copy(
        "edit.py",
        "n - round(strength * n)",
        "round(strength * n)",
        "test_edit.py",
        "ddim_from_a_picture_equals and 0.6",
    ),
    "half an export has the name": Copy(
        "support/export.py", 'new = f"{folder}.{os.getpid()}.tmp"', "new = folder", "test_export.py", "is_killed"
    ),
    "an export of other noise": Copy(
        "support/export.py", '"fixed_large"', '"fixed_small"', "test_export.py", "snippet and models"
    ),
}


def copied(copy, folder):
    """The project with `copy` broken, in a folder."""
    (folder / "support").mkdir(parents=True)
    for path in [*ROOT.glob("*.py"), *ROOT.glob("support/*.py")]:
        name, source = str(path.relative_to(ROOT)), path.read_text()
        if name == copy.file:
            assert source.count(copy.text) == 1, f"{copy.file} no longer says {copy.text!r}"
            source = source.replace(copy.text, copy.instead)
        (folder / name).write_text(source)


@pytest.mark.slow
@pytest.mark.parametrize("name", COPIES)
def test_a_broken_copy_is_noticed(request, tmp_path, name):
    """Tests have run, and some have failed: not at their beginning, but at what they promise."""
    import child

    copy, code, out = COPIES[name], tmp_path / "code", tmp_path / "out"
    if copy.chosen in ("asks_for_custom_code", "nobody_looked"):
        request.getfixturevalue("real_data")
    copied(copy, code)
    words = ["-x", "--slow", "-p", "no:xdist", "-p", "no:cacheprovider", "-c", HERE.parent / "pytest.ini"]
    words += ["--rootdir", HERE.parent, "--basetemp", tmp_path / "tmp", HERE / copy.tests, "-k", copy.chosen]
    process = CONTEXT.Process(target=child.run_pytest, args=(str(code), [str(word) for word in words], str(out)))
    process.start()
    process.join(200)
    process.kill()
    text = out.read_text()
    assert process.exitcode == 1, f"not noticed\n{text[-2000:]}"
    assert re.search(r"^1 failed\b(?!.* error)", text, re.MULTILINE), text[-2000:]
