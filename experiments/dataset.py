"""The data stage: an experiment's settings as a data set, and what training and evaluation read of it."""

import os
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from apr_jax.countdown import Problem
from apr_jax.countdown.dataset import SHARD_PROBLEMS, DatasetConfig, ProblemFile, make_dataset, read_manifest
from apr_jax.countdown.recipe import Recipe
from apr_jax.errors import UserError
from apr_jax.text.hub import load_tokenizer
from apr_jax.text.tokenizer import Tokenizer
from apr_jax.threads.store import TreeStore
from apr_jax.train.metrics import Progress
from apr_jax.train.pack import StoredPieces
from experiments.settings import STYLES, Settings


def dataset_config(settings: Settings) -> DatasetConfig:
    """What the data stage makes of an experiment's settings."""
    recipes = tuple(
        Recipe(style, settings.solvers[style], settings.window, settings.sft.row_length, **settings.recipes[style])
        for style in STYLES
    )
    return DatasetConfig(
        settings.problems, settings.train, settings.held_out, recipes, settings.max_number, settings.tokenizer,
        settings.repeats, settings.unseen_targets, seed=settings.seed,
    )  # fmt: skip


def make_data(settings: Settings, folder: Path, processes: int = 0, shard: tuple[int, int] = (0, 1)) -> dict | None:
    """Makes what is missing; the manifest, or None while other shares are missing. `processes` 0: one per core where
    there is work for more than one."""
    if not processes:
        processes = 1 if settings.train <= SHARD_PROBLEMS else os.cpu_count() or 1
    return make_dataset(dataset_config(settings), folder, processes=processes, shard=shard, progress=Progress)


def load_pieces(folder: Path, style: str, part: str, children: int = 0, seed: int = 0) -> StoredPieces:
    """The threads of a style's trees ("train" or "validation") to train on: roots, and of each tree's children at most
    `children` (0: all), drawn by the seed, those that found the target first.

    Raises FileNotFoundError where the data stage has not run, ValueError where a file is broken.
    """
    try:
        store = TreeStore(folder / f"{style}_{part}")
    except FileNotFoundError:
        raise FileNotFoundError(f"no traces at {folder / f'{style}_{part}'}: run --stage=data first") from None
    except UserError as error:
        raise UserError(f"{error}: delete it and run --stage=data again") from None
    if not children:
        return StoredPieces(store)
    rng = random.Random(f"{seed}/{style}/children")
    chosen: list[int] = []
    for tree, (first, end) in enumerate(zip(store.tree_threads, store.tree_threads[1:])):
        count = int(end - first)
        drawn = rng.sample(range(1, count), count - 1)
        found = set(store.info(tree)["found"])
        drawn.sort(key=lambda thread: thread not in found)
        chosen += [int(first) + thread for thread in (0, *drawn[:children])]
    return StoredPieces(store, np.array(chosen))


def load_problems(path: Path) -> Sequence[Problem]:
    """Raises FileNotFoundError where the data stage has not run, ValueError where the file is broken."""
    if not path.exists():
        raise FileNotFoundError(f"no problems at {path}: run --stage=data first")
    try:
        return ProblemFile(path)
    except UserError:
        raise UserError(f"{path} is broken: delete it and run --stage=data again") from None


def load_manifest(folder: Path) -> dict:
    """Raises FileNotFoundError where the data stage has not run to its end, ValueError where the file is broken."""
    if (manifest := read_manifest(folder)) is None:
        raise FileNotFoundError(f"no manifest under {folder}: run --stage=data first")
    return manifest


def load_run_tokenizer(folder: Path, name: str) -> Tokenizer:
    """A data set's own tokenizer, or the Hugging Face one its settings name."""
    if name:
        return load_tokenizer(name)
    path = folder / "tokenizer.json"
    if not path.exists():
        raise FileNotFoundError(f"no tokenizer at {path}: run --stage=data first")
    return Tokenizer.load(path)
