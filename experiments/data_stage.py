"""The data stage: the data set of a run, and whether its later stages can use it."""

import os
from pathlib import Path

from apr_jax.data.dataset import SHARD_PROBLEMS, make_dataset
from apr_jax.data.folder import DataFolder
from apr_jax.data.problems import shared
from apr_jax.errors import UserError
from apr_jax.io.progress import Progress
from apr_jax.train.grpo import hold_back
from experiments.settings import Settings


def make_data(settings: Settings, folder: Path, processes: int = 0, shard: tuple[int, int] = (0, 1)) -> dict | None:
    """Makes what is missing of a run's data set; returns the manifest, None while other shares are missing. `processes`
    0: one per core where there is work for more than one. Raises UserError for a data set that the run's later stages
    could not use."""
    if not processes:
        processes = 1 if settings.data.train <= SHARD_PROBLEMS else os.cpu_count() or 1
    manifest = make_dataset(settings.data, folder, processes=processes, shard=shard, progress=Progress)
    if manifest is None:
        return None
    dataset = DataFolder(folder, settings.task)
    if manifest["config"].get("imported"):
        _check_imported(settings, dataset)
    if settings.grpo.steps and settings.grpo.validate_every:
        hold_back(dataset.problems("train"), settings.grpo, settings.task.key)  # now, not when SFT has ended
    return manifest


def _check_imported(settings: Settings, dataset: DataFolder) -> None:
    """Raises UserError for an imported data set that the run's later stages could not use."""
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
    if (words := len(dataset.tokenizer(settings.tokenizer))) != manifest["vocabulary"]:
        raise UserError(
            f"{folder} was imported in the tokens of {theirs or 'our own tokenizer'}, which has "
            f"{manifest['vocabulary']}, tokenizer.name {settings.tokenizer!r} has {words}: set tokenizer.name"
        )
