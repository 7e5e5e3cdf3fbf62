"""A run that was killed and resumed ends in the same bits as an uninterrupted one. A broken checkpoint is an error that
names its folder."""

import dataclasses
import errno
import gc
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from apr_jax.data.packing import flatten_thread
from apr_jax.errors import UserError
from apr_jax.model.family import config_json
from apr_jax.train.checkpoint import CheckpointError, Checkpoints, load_meta, load_model, newest_step
from apr_jax.train.metrics import MetricsLog
from apr_jax.train.sft import SftConfig, SftJob, run_sft
from apr_jax.train.step import NotFiniteError, Trainer, data_mesh
from apr_jax.train.termination import Terminated
from tests.tiny import make_model, random_thread
from tests.train import runs
from tests.train.runs import KINDS

ROOT = Path(__file__).absolute().parent.parent.parent
RUN = {"sft": runs.sft, "grpo": runs.grpo}


def bits(model):
    """The bytes of all weights."""
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(nnx.state(model))]


def lines(folder):
    """The logged metrics by step, without those that depend on the time."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    clocks = ("tokens_per_second", "model_flops_per_second")
    return [{k: value for k, value in row.items() if k not in clocks and "seconds/" not in k} for row in rows]


@pytest.fixture(scope="module", params=list(KINDS))
def whole(request, tmp_path_factory):
    """(kind, folder, bits of the weights) of an uninterrupted run."""
    folder = tmp_path_factory.mktemp(request.param) / "run"
    return request.param, folder, bits(RUN[request.param](folder))


def saved(folder):
    """The saved steps of a run, in ascending order."""
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdigit())


def test_every_step_is_logged_once_and_the_last_checkpoints_are_kept(whole):
    kind, folder, _ = whole
    last = KINDS[kind]
    steps = [row["step"] for row in lines(folder) if "validation_loss" not in row]
    assert steps == list(range(0 if kind == "grpo" else 1, last + 1))  # GRPO validates before its first step
    assert saved(folder) == [last - 2 if kind == "sft" else last - 1, last]
    assert (kind == "grpo") != any("validation_loss" in row for row in lines(folder))
    if kind == "grpo":
        assert all(row["train/threads"] > 0 for row in lines(folder)[1:]), (
            "a step that trains on nothing cannot tell whether resuming works"
        )
        accuracies = {row["step"]: row["validation/accuracy"] for row in lines(folder)}
        best = max(accuracies, key=lambda step: (accuracies[step], -step))
        assert [path.name for path in (folder / "best").iterdir() if path.name.isdigit()] == [str(best)]
        assert load_model(folder / "best")[1]["validation_accuracy"] == accuracies[best]


@pytest.mark.parametrize("lost", [1, 2])
def test_a_run_that_lost_its_newest_checkpoints_ends_in_the_same_bits(whole, tmp_path, lost):
    kind, folder, right = whole
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    for step in saved(copy)[-lost:]:
        shutil.rmtree(copy / "checkpoints" / str(step))
    with (copy / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # a line that a kill cut short
    assert bits(RUN[kind](copy)) == right
    assert lines(copy) == lines(folder)
    assert saved(copy)[-1] == KINDS[kind]


def test_a_finished_run_is_loaded_and_not_repeated(whole, tmp_path):
    kind, folder, right = whole
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    assert bits(RUN[kind](copy)) == right
    assert lines(copy) == lines(folder)


POINTS = [("sft", "log"), ("sft", "save"), ("grpo", "log"), ("grpo", "save"), ("grpo", "inner")]
PHASES = [pytest.param("grpo", phase, marks=pytest.mark.slow) for phase in ("sample", "update", "validate", "best")]


@pytest.mark.parametrize("whole, point", [*POINTS, *PHASES], indirect=["whole"])
def test_a_run_that_was_killed_ends_in_the_same_bits(whole, tmp_path, point):
    kind, folder, right = whole
    copy = tmp_path / "run"
    command = [sys.executable, "-m", "tests.train.runs", kind, str(copy), point]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert all(step < KINDS[kind] for step in saved(copy))  # none is saved if the first was still being written
    assert bits(RUN[kind](copy)) == right
    assert lines(copy) == lines(folder)
    if kind == "grpo":
        assert bits(load_model(copy / "best")[0]) == bits(load_model(folder / "best")[0])


@pytest.mark.slow
def test_five_kills_at_random_times_change_no_bit(tmp_path):
    """Each kill comes up to 2 seconds after the resumed run has saved a step, during a step, a validation or a save."""
    right, rng, reached = bits(runs.long_sft(tmp_path / "whole")), random.Random(os.urandom(8)), []
    command = [sys.executable, "-m", "tests.train.runs", "sft", str(tmp_path / "run"), "long"]
    for _ in range(5):
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
        before = time.monotonic()
        while process.poll() is None and not newest(tmp_path / "run") > max(reached, default=0):
            time.sleep(0.05)
            assert time.monotonic() - before < 120
        time.sleep(rng.uniform(0, 2))
        reached.append(newest(tmp_path / "run"))
        process.kill()
        assert process.wait() == -signal.SIGKILL, "the run ended before it was killed"
    print("killed at steps", reached)
    assert bits(runs.long_sft(tmp_path / "run")) == right
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")


def newest(folder):
    """The last step that was saved, 0 if there is none."""
    return max(saved(folder), default=0) if (folder / "checkpoints").is_dir() else 0


def test_a_kill_between_the_validation_and_the_last_checkpoint_loses_no_validation(tmp_path):
    """The validation line is written before the last save, so a stage that counts as finished has it."""
    runs.sft(tmp_path / "whole")
    runs.sft(tmp_path / "run")
    shutil.rmtree(
        tmp_path / "run" / "checkpoints" / str(saved(tmp_path / "run")[-1])
    )  # as a kill before its save leaves it
    runs.sft(tmp_path / "run")
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")


def test_steps_that_are_not_finite_change_no_weights_and_too_many_end_the_run(tmp_path):
    """A gain of infinity makes every gradient NaN."""
    segments = [flatten_thread(random_thread(random.Random(0), depth=0)) for _ in range(4)]
    broken = make_model(0)
    broken.norm_D[...] = jnp.full_like(broken.norm_D[...], jnp.inf)
    config = SftConfig(4, 2, 64, runs.OPTIMIZER, log_every=1, max_skipped_steps=4)
    before = bits(broken)
    assert bits(run_sft(SftJob(broken, config, segments, data_mesh(2), tmp_path / "counted"))) == before
    assert [line["skipped"] for line in lines(tmp_path / "counted")] == [1, 2, 3, 4]
    with pytest.raises(UserError, match=" 3 steps .* step 3 .*max_skipped_steps .* 2"):
        config = dataclasses.replace(config, max_skipped_steps=2)
        run_sft(SftJob(broken, config, segments, data_mesh(2), tmp_path / "run"))
    assert not saved(tmp_path / "run")


def test_a_single_step_that_is_not_finite_is_skipped(tmp_path, monkeypatch):
    """The weights after the skipped step equal those before it, and training continues."""
    seen = []
    step = Trainer.step

    def poisoned(self, state, batches, divisor=None, flag=False):
        weights = [np.asarray(leaf) for leaf in jax.tree.leaves(state.weights)]
        seen.append(weights)
        return step(self, state, batches, float("nan") if len(seen) == 3 else divisor)

    monkeypatch.setattr(Trainer, "step", poisoned)
    runs.sft(tmp_path / "run")
    same = [all(np.array_equal(a, b) for a, b in zip(*pair, strict=True)) for pair in itertools.pairwise(seen)]
    assert same == [False, False, True, False, False]
    assert [line["skipped"] for line in lines(tmp_path / "run") if "skipped" in line] == [0, 0, 1, 1, 1, 1]


def test_a_loss_that_is_not_finite_is_neither_applied_nor_saved(tmp_path):
    """A token outside the vocabulary has a loss of NaN and a finite gradient."""
    good = [flatten_thread(random_thread(random.Random(n), depth=0)) for n in range(8)]
    broken = [dataclasses.replace(segment, tokens=np.full_like(segment.tokens, 900)) for segment in good]
    config = SftConfig(3, 2, 64, runs.OPTIMIZER, log_every=1, max_skipped_steps=3)
    model = make_model(0)
    assert bits(run_sft(SftJob(model, config, broken, data_mesh(2), tmp_path / "counted"))) == bits(model)
    found = lines(tmp_path / "counted")
    assert [(line["skipped"], line["loss"]) for line in found] == [(1, None), (2, None), (3, None)]
    assert all(np.isfinite(line["gradient_norm"]) for line in found)
    with pytest.raises(NotFiniteError, match="3 steps"):
        run_sft(SftJob(model, dataclasses.replace(config, max_skipped_steps=2), broken, data_mesh(2), tmp_path / "run"))
    with pytest.raises(NotFiniteError, match="validation_loss"):
        run_sft(SftJob(model, config, good, data_mesh(2), tmp_path / "validated", broken))
    assert not saved(tmp_path / "run") and not saved(tmp_path / "validated")


@pytest.mark.parametrize("step", [3, 4, "last"])
def test_a_sigterm_makes_a_run_save_and_end_and_the_same_command_resumes_it(whole, tmp_path, monkeypatch, step):
    """The signal comes between two regular saves, at one, or in the last step. No later step may begin."""
    kind, folder, right = whole
    step = {"last": KINDS[kind] + 2 * (kind == "grpo")}.get(step, step)
    # SFT logs a step after it has dispatched the next one, GRPO at once.
    signalled, stops = (step - 1, step) if kind == "sft" else (step - 2, step - 2)
    write = MetricsLog.write

    def log(self, at, values):
        write(self, at, values)
        if at == signalled:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "write", log)
        handler = signal.getsignal(signal.SIGTERM)
        with pytest.raises(Terminated, match=f"step {stops} "):
            RUN[kind](tmp_path / "run")
        assert saved(tmp_path / "run")[-1] == stops
        assert signal.getsignal(signal.SIGTERM) is handler
    assert bits(RUN[kind](tmp_path / "run")) == right
    assert lines(tmp_path / "run") == lines(folder)


def test_batch_rows_that_the_devices_do_not_divide_are_refused(tmp_path):
    with pytest.raises(ValueError, match="batch_rows .3.*2 devices"):
        runs.sft(tmp_path / "run", batch_rows=3)


# ---------------------------------------------------------------------- logs


def test_a_full_disk_is_an_error_of_the_write_and_not_of_the_close(tmp_path):
    """An error of the close would hide the error that stopped the run."""
    log = MetricsLog(tmp_path, 0)
    log._file = open("/dev/full", "w")
    with pytest.raises(OSError, match="No space left"):
        log.write(1, {"loss": 1.0})
    log.close()


def test_a_resumed_log_drops_the_steps_that_will_be_repeated(tmp_path):
    log = MetricsLog(tmp_path, 0)
    for step in (1, 2, 3):
        log.write(step, {"loss": step / 2})
    log.close()
    log = MetricsLog(tmp_path, 2)
    log.write(3, {"loss": 9.0})
    log.close()
    assert [(row["step"], row["loss"]) for row in lines(tmp_path)] == [(1, 0.5), (2, 1.0), (3, 9.0)]


# ---------------------------------------------------------------------- checkpoints


def state_of(seed=0, width=32):
    return {"weights": nnx.to_pure_dict(nnx.state(make_model(seed, width=width))), "step": jnp.asarray(7, jnp.int32)}


META = {"model": config_json(make_model(0).config), "variant": "apr"}


@pytest.fixture
def checkpoints(tmp_path):
    """Checkpoints with step 1, of the weights of seed 0."""
    found = Checkpoints(tmp_path / "checkpoints")
    found.save(1, state_of(0), META)
    found.wait()
    yield found
    found.close()


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_a_restored_state_equals_the_saved_one(checkpoints):
    checkpoints.save(2, state_of(1), META)
    checkpoints.wait()
    assert checkpoints.latest == 2
    step, state = checkpoints.restore(state_of(5))
    assert step == 2 and same(state, state_of(1))
    assert same(checkpoints.restore(state_of(5), step=1)[1], state_of(0))
    for folder in (checkpoints.folder, checkpoints.folder / "2"):
        model, meta = load_model(folder)
        assert bits(model) == bits(make_model(1)) and meta == META


def test_restoring_a_checkpoint_of_another_shape_is_an_error_with_its_folder(checkpoints):
    for other in (state_of(width=16), {"weights": state_of()["weights"]}, {"other": jnp.zeros(3)}):
        with pytest.raises(CheckpointError, match=str(checkpoints.folder)):
            checkpoints.restore(other)


def test_a_missing_checkpoint_is_an_error_with_its_folder(tmp_path, checkpoints):
    for folder in (tmp_path / "none", tmp_path / "none" / "1", checkpoints.folder / "5"):
        with pytest.raises(CheckpointError, match=str(folder)):
            load_model(folder)
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path, tmp_path / "empty"):
        with pytest.raises(CheckpointError, match=str(folder)):
            load_model(folder)
    empty = Checkpoints(tmp_path / "new")
    with pytest.raises(CheckpointError, match=str(tmp_path / "new")):
        empty.restore(state_of())
    with pytest.raises(CheckpointError, match=str(checkpoints.folder)):
        checkpoints.restore(state_of(), step=9)
    empty.close()


def files_of(folder):
    """The files of a checkpoint that are not empty."""
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and path.stat().st_size]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax does not close its readers
@pytest.mark.parametrize("damage", ["half", "empty", "gone"])
def test_a_damaged_file_is_a_checkpoint_error_or_changes_nothing(checkpoints, tmp_path, damage):
    """Loading and restoring give the saved weights or a CheckpointError, never another exception."""
    right, errors = state_of(0), 0
    for path in files_of(checkpoints.folder / "1"):
        copy = tmp_path / "copy"
        shutil.copytree(checkpoints.folder, copy)
        victim = copy / path.relative_to(checkpoints.folder)
        if damage == "gone":
            victim.unlink()
        else:
            victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2 if damage == "half" else 0])
        try:
            model, _ = load_model(copy)
            assert bits(model) == bits(make_model(0)), victim
        except CheckpointError as error:
            assert str(copy) in str(error)
            errors += 1
        reader = Checkpoints(copy)
        try:
            assert same(reader.restore(state_of(5))[1], right), victim
        except CheckpointError as error:
            assert str(copy) in str(error)
            errors += 1
        finally:
            reader.close()
        shutil.rmtree(copy)
    gc.collect()
    assert errors >= 2


def empty(step):
    shutil.rmtree(step)
    step.mkdir()


def without_state(step):
    shutil.rmtree(step / "state")


def without_meta(step):
    (step / "meta" / "metadata").write_text("")


def cut_arrays(step):
    for path in (step / "state").rglob("d/*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


BROKEN = [empty, without_state, without_meta, cut_arrays]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax does not close its readers
@pytest.mark.parametrize("damage", BROKEN)
def test_the_newest_readable_step_is_used_and_one_line_reports_the_broken_one(checkpoints, capfd, damage):
    checkpoints.save(2, state_of(1), META)
    checkpoints.wait()
    damage(checkpoints.folder / "2")
    capfd.readouterr()
    for _ in range(2):
        assert bits(load_model(checkpoints.folder)[0]) == bits(make_model(0))
        assert load_meta(checkpoints.folder)[1] == META
        if damage is not cut_arrays:  # cut arrays are found only by reading them
            assert newest_step(checkpoints.folder) == checkpoints.folder / "1"
    printed = capfd.readouterr().err
    assert printed.count("\n") == 1 and all(f"{checkpoints.folder}/{step} " in printed for step in (1, 2)), printed
    assert (checkpoints.folder / "2").exists(), "reading must not rename a step"
    with pytest.raises(CheckpointError, match=f"{checkpoints.folder}/2"):
        load_model(checkpoints.folder / "2")  # a step that is named is never replaced by another
    again = Checkpoints(checkpoints.folder)
    step, state = again.restore(state_of(5))
    assert step == again.latest == 1 and same(state, state_of(0))
    again.save(2, state_of(3), META)
    again.close()
    assert bits(load_model(checkpoints.folder)[0]) == bits(make_model(3))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", BROKEN)
def test_without_a_readable_step_an_error_names_the_folder(checkpoints, damage):
    """Loading and restoring raise the error. Without it a run that resumes would begin anew."""
    damage(checkpoints.folder / "1")
    with pytest.raises(CheckpointError, match=str(checkpoints.folder)):
        load_model(checkpoints.folder)
    again = Checkpoints(checkpoints.folder)
    with pytest.raises(CheckpointError, match=f"{checkpoints.folder}"):
        again.restore(state_of(5))
    again.close()
    assert (checkpoints.folder / "1").exists()


def test_a_step_of_another_shape_does_not_count_as_broken(checkpoints):
    """The step before it is not used instead."""
    checkpoints.save(2, state_of(1), META)
    checkpoints.wait()
    with pytest.raises(CheckpointError, match=f"step 2 under {checkpoints.folder}"):
        checkpoints.restore(state_of(width=16))
    assert checkpoints.latest == 2 and saved(checkpoints.folder.parent) == [1, 2]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", [empty, cut_arrays])
def test_a_run_whose_last_step_is_broken_ends_in_the_same_bits(whole, tmp_path, damage):
    kind, folder, right = whole
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    damage(copy / "checkpoints" / str(KINDS[kind]))
    assert bits(RUN[kind](copy)) == right
    assert lines(copy) == lines(folder)
    assert saved(copy)[-1] == KINDS[kind] and bits(load_model(copy / "checkpoints")[0]) == right


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("handler", [ocp.StandardCheckpointHandler, ocp.JsonCheckpointHandler])
def test_a_full_disk_is_a_checkpoint_error_and_earlier_steps_stay(checkpoints, monkeypatch, handler):
    """The disk is full when the state is written, or the meta after it."""

    def full(*args, **kwargs):
        raise FULL

    with monkeypatch.context() as patch:
        for name in ("save", "async_save"):
            if hasattr(handler, name):
                patch.setattr(handler, name, full)
        with pytest.raises(CheckpointError, match="disk is full") as caught:
            checkpoints.save(2, state_of(1), META)
            checkpoints.wait()
        assert str(checkpoints.folder) in str(caught.value) and "step 2" in str(caught.value)
    again = Checkpoints(checkpoints.folder)
    assert again.latest == 1 and same(again.restore(state_of(5))[1], state_of(0))
    again.save(2, state_of(1), META)
    again.wait()
    assert same(again.restore(state_of(5))[1], state_of(1))
    again.close()


def test_an_error_without_a_message_is_a_checkpoint_error_too(checkpoints, monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError

    monkeypatch.setattr(checkpoints._manager, "restore", fail)
    monkeypatch.setattr(checkpoints._manager, "save", fail)
    with pytest.raises(CheckpointError, match=str(checkpoints.folder)):
        checkpoints.restore(state_of())
    with pytest.raises(CheckpointError, match=str(checkpoints.folder)):
        checkpoints.save(2, state_of(), META)
