"""The data stage: an experiment's settings as a data set, and what training and evaluation read of it."""

import os
import random
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from apr_jax.data.dataset import SHARD_PROBLEMS, DatasetConfig, ProblemFile, make_dataset, read_manifest
from apr_jax.data.packing import StoredSegments
from apr_jax.data.store import TreeStore
from apr_jax.errors import UserError
from apr_jax.io.progress import Progress
from apr_jax.tasks.countdown import CountdownProtocol, Problem
from apr_jax.tasks.countdown.recipe import Recipe
from apr_jax.text.hub import load_tokenizer
from apr_jax.text.tokenizer import Tokenizer
from apr_jax.train.grpo import hold_back
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
    manifest = make_dataset(dataset_config(settings), folder, processes=processes, shard=shard, progress=Progress)
    if manifest is None:
        return None
    if manifest["config"].get("imported"):
        _check_imported(settings, folder, manifest)
    if settings.grpo.steps and settings.grpo.validate_every:
        problems = load_problems(folder / "train.npy")
        hold_back(problems, settings.grpo, lambda problem: problem.key)  # now, not when SFT has ended
    return manifest


def _check_imported(settings: Settings, folder: Path, manifest: dict) -> None:
    """Raises UserError for an imported data set that the run's later stages could not use."""
    if not manifest["held_out_problems"]:
        raise UserError(f"{folder} has no held-out problems to evaluate on: import it again with --held_out=FILE")
    if count := _shared(*(np.load(folder / f"{name}.npy") for name in ("train", "held_out"))):
        raise UserError(f"{count} held-out problems of {folder} are among its training problems: import it again")
    if bool(theirs := manifest["config"]["tokenizer"]) != bool(settings.tokenizer):
        raise UserError(
            f"{folder} was imported in the tokens of {theirs or 'our own tokenizer'}: set tokenizer.name to {theirs!r}"
        )
    if (words := len(load_run_tokenizer(folder, settings.tokenizer))) != manifest["vocabulary"]:
        raise UserError(
            f"{folder} was imported in the tokens of {theirs or 'our own tokenizer'}, which has "
            f"{manifest['vocabulary']}, tokenizer.name {settings.tokenizer!r} has {words}: set tokenizer.name"
        )


def _shared(*files: np.ndarray) -> int:
    """How many problems two arrays [problems, numbers + 1], the target last, have in common, numbers in any order."""
    one, two = ({(*sorted(numbers), target) for *numbers, target in rows.tolist()} for rows in files)
    return len(one & two)


def load_pieces(folder: Path, style: str, part: str, children: int = 0, seed: int = 0) -> StoredSegments:
    """The threads of a style's trees ("train" or "validation") to train on: roots, and of each tree's children at most
    `children` (0: all), drawn by the seed, those that found the target first.

    Raises FileNotFoundError where the data stage has not run, ValueError where a file is broken.
    """
    try:
        store = TreeStore(folder / f"{style}_{part}")
    except FileNotFoundError:
        if (manifest := read_manifest(folder)) is not None and f"{style}_{part}" not in manifest:
            there = [name for name in STYLES if f"{name}_train" in manifest]
            raise UserError(
                f"the data set at {folder} has no {style} traces: give --styles={','.join(there)}, or import them, too"
            ) from None
        raise FileNotFoundError(f"no traces at {folder / f'{style}_{part}'}: run --stage=data first") from None
    except UserError as error:
        raise UserError(f"{error}: {_mend(folder)}") from None
    if not children:
        return StoredSegments(store)
    rng = random.Random(f"{seed}/{style}/children")
    chosen: list[int] = []
    for tree, (first, end) in enumerate(zip(store.tree_threads, store.tree_threads[1:])):
        count = int(end - first)
        drawn = rng.sample(range(1, count), count - 1)
        found = set(store.info(tree)["found"])
        drawn.sort(key=lambda thread: thread not in found)
        chosen += [int(first) + thread for thread in (0, *drawn[:children])]
    return StoredSegments(store, np.array(chosen))


def load_held_out(folder: Path) -> Sequence[Problem]:
    """The held-out problems of a data set. Raises FileNotFoundError where the data stage has not run, UserError where
    the file is broken or another data set's: its problems may have been trained on."""
    path = folder / "held_out.npy"
    problems, count = load_problems(path), load_manifest(folder)["held_out_problems"]
    if len(problems) != count:
        raise UserError(f"{path} holds {len(problems)} problems, its data set {count}: {_mend(folder)}")
    if count := _shared(*(np.load(folder / f"{name}.npy") for name in ("train", "held_out"))):
        raise UserError(f"{count} problems of {path} are among the training problems: {_mend(folder)}")
    return problems


def load_problems(path: Path) -> Sequence[Problem]:
    """Raises FileNotFoundError where the data stage has not run, ValueError where the file is broken."""
    if not path.exists():
        raise FileNotFoundError(f"no problems at {path}: run --stage=data first")
    try:
        return ProblemFile(path)
    except UserError:
        raise UserError(f"{path} is broken: {_mend(path.parent)}") from None


def _mend(folder: Path) -> str:
    """What to do where a file of a data set is broken."""
    if (manifest := read_manifest(folder)) is not None and manifest["config"].get("imported"):
        return "import the data set again"
    return f"delete it and {folder / 'manifest.json'}, and run --stage=data again"


def load_manifest(folder: Path) -> dict:
    """Raises FileNotFoundError where the data stage has not run to its end, ValueError where the file is broken."""
    if (manifest := read_manifest(folder)) is None:
        raise FileNotFoundError(f"no manifest under {folder}: run --stage=data first")
    return manifest


_BUDGET = re.compile(r"(?:Token|Sub Call) Budget: (\d+) ")


def load_conditions(folder: Path, style: str, tokenizer: Tokenizer) -> dict[str, int]:
    """How many of a style's training trees have which condition first on the root's prompt, as
    ``{"Sub Call Budget: 3 ": 120, ...}``, by rising budget; "" counts those without one. Nothing for a style without
    trees. Raises FileNotFoundError where the data stage has not run."""
    manifest = load_manifest(folder)
    if (counted := manifest.get(f"{style}_train")) is None:
        return {}
    own = next((recipe for recipe in manifest["config"].get("recipes", ()) if recipe["style"] == style), None)
    if own is not None and not own["conditioned"]:
        return {"": counted["trees"]}
    store, counts = TreeStore(folder / f"{style}_train"), Counter()
    for tree in range(len(store)):
        if own is not None:
            counts[store.info(tree)["budget"]] += 1
        else:  # imported: what the prompts say
            tokens, rows = store.thread(int(store.tree_threads[tree]))
            found = _BUDGET.search(tokenizer.decode(tokens[: rows[0, 1]].tolist()))
            counts[found and int(found[1])] += 1
    protocol = CountdownProtocol(style)
    rising = sorted(counts, key=lambda budget: -1 if budget is None else budget)
    return {protocol.condition(budget): counts[budget] for budget in rising}


def load_run_tokenizer(folder: Path, name: str) -> Tokenizer:
    """A data set's own tokenizer, or the Hugging Face one its settings name."""
    if name:
        return load_tokenizer(name)
    path = folder / "tokenizer.json"
    if not path.exists():
        raise FileNotFoundError(f"no tokenizer at {path}: run --stage=data first")
    return Tokenizer.load(path)
