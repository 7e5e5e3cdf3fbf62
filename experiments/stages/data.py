"""The data stage: the problems of a run, and the demonstrations of its variants."""

import contextlib
import os
import time
from pathlib import Path

import jax

from apr_jax.data.dataset import SHARD_PROBLEMS, make_dataset, read_manifest
from apr_jax.data.folder import DataFolder
from apr_jax.data.problems import shared
from apr_jax.errors import UserError
from apr_jax.io.files import write_text
from apr_jax.io.progress import Progress
from apr_jax.train.grpo import hold_back
from experiments.settings import Settings
from experiments.stages.run import Run

POLL_SECONDS = 1.0  # between two checks whether process 0 has made the data set


def run(run: Run) -> None:
    """Make the data set of a run.

    Of several processes, process 0 makes it. The others wait for the manifest, which is written last. If process 0
    fails, they raise UserError with its error.
    """
    if jax.process_count() == 1:
        with run.workspace.making(run.data) as folder:
            make_data(run.settings, folder)
        return
    failure = run.workdir / f"data_failed.{run.attempt}"
    if jax.process_index() == 0:
        _make_first(run, failure)
    while read_manifest(run.data.path) is None:
        if failure.exists():
            raise UserError(f"process 0 failed in the data stage: {failure.read_text()}")
        time.sleep(POLL_SECONDS)
    make_data(run.settings, run.data.path)  # makes nothing now, only checks that the run can use the data set


def _make_first(run: Run, failure: Path) -> None:
    """Make the data set in process 0.

    After an error, `failure` has one line about the error for some seconds, in which the other processes read it.
    """
    try:
        with run.workspace.making(run.data) as folder:
            make_data(run.settings, folder)
    except BaseException as error:
        line = (str(error).strip().splitlines() or [""])[0]
        with contextlib.suppress(OSError):
            write_text(failure, line if isinstance(error, UserError) else f"{type(error).__name__}: {line}")
            time.sleep(5 * POLL_SECONDS)
            failure.unlink()
        raise


def make_data(settings: Settings, folder: Path, processes: int = 0, shard: tuple[int, int] = (0, 1)) -> dict | None:
    """Make the missing parts of a run's data set. Return the manifest, or None while parts of other calls are missing.

    `shard` is (i, n): this call makes every n-th shard, from number i on. `processes` is the number of worker
    processes; 0 stands for one per core, or for one if the training problems fit one shard. Raises UserError for a data
    set that the later stages of the run could not use.
    """
    if not processes:
        processes = 1 if settings.data.train <= SHARD_PROBLEMS else os.cpu_count() or 1
    manifest = make_dataset(settings.data, folder, processes=processes, shard=shard, progress=Progress)
    if manifest is None:
        return None
    dataset = DataFolder(folder, settings.task)
    if manifest["config"].get("imported"):
        _check_imported(settings, dataset)
    if settings.grpo.steps and settings.grpo.validate_every:
        hold_back(dataset.problems("train"), settings.grpo, settings.task.key)  # raises an error now, not after SFT
    return manifest


def _check_imported(settings: Settings, dataset: DataFolder) -> None:
    """Raise UserError if the later stages of a run could not use an imported data set."""
    folder, manifest = dataset.folder, dataset.manifest
    if (theirs := manifest["config"].get("task")) != settings.task.spec:
        raise UserError(f"{folder} was imported for the task {theirs}, the run's is {settings.task.spec}")
    if not manifest["held_out_problems"]:
        raise UserError(f"{folder} has no held-out problems to evaluate on: import it again with --held_out=FILE")
    if count := shared(settings.task, dataset.problems("train"), dataset.problems("held_out")):
        raise UserError(f"{count} held-out problems of {folder} are among its training problems: import it again")
    if bool(theirs := manifest["config"]["tokenizer"]) != bool(settings.tokenizer):
        raise UserError(
            f"{folder} was imported in the tokens of {theirs or 'our own tokenizer'}: set tokenizer.name to {theirs!r}"
        )
    if (size := len(dataset.tokenizer(settings.tokenizer))) != manifest["vocabulary"]:
        raise UserError(
            f"{folder} was imported in the tokens of {theirs or 'our own tokenizer'}, which has "
            f"{manifest['vocabulary']}, tokenizer.name {settings.tokenizer!r} has {size}: set tokenizer.name"
        )
