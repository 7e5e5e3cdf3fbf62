"""Reads a finished data set, for training, evaluation and export."""

import random
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from apr_jax.data.dataset import read_manifest
from apr_jax.data.packing import StoredSegments
from apr_jax.data.problems import ProblemFile, shared
from apr_jax.data.store import TreeStore
from apr_jax.errors import UserError
from apr_jax.tasks.task import Task
from apr_jax.text.hub import load_tokenizer
from apr_jax.text.tokenizer import Tokenizer

PARTS = ("train", "validation")


class DataFolder:
    """The data set of a task in a folder.

    Every method that reads files raises FileNotFoundError where the data stage has not run, and UserError, with a
    remedy, where a file is broken.
    """

    def __init__(self, folder: Path, task: Task):
        self.folder, self.task = folder, task

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """The data set's manifest (`read_manifest`)."""
        if (manifest := read_manifest(self.folder)) is None:
            raise FileNotFoundError(f"no manifest under {self.folder}: run --stage=data first")
        return manifest

    def tokenizer(self, name: str = "") -> Tokenizer:
        """Return the data set's tokenizer or, if `name` is not empty, the Hugging Face tokenizer of that name."""
        if name:
            return load_tokenizer(name)
        path = self.folder / "tokenizer.json"
        if not path.exists():
            raise FileNotFoundError(f"no tokenizer at {path}: run --stage=data first")
        return Tokenizer.load(path)

    def problems(self, split: str) -> Sequence[Any]:
        """Return the problems of a split, "train" or "held_out".

        Raises UserError where their number is not the number in the manifest.
        """
        path = self.folder / f"{split}.jsonl"
        if not path.exists():
            raise FileNotFoundError(f"no problems at {path}: run --stage=data first")
        problems, count = ProblemFile(self.task, path), self.manifest[f"{split}_problems"]
        if len(problems) != count:
            raise UserError(f"{path} holds {len(problems)} problems, its data set {count}: {self.remedy()}")
        return problems

    def held_out(self) -> Sequence[Any]:
        """Return the held-out problems, after reading all problems of both splits.

        Raises UserError for a broken line, and where a held-out problem is also a training problem: the two files then
        belong to different data sets.
        """
        problems = self.problems("held_out")
        try:
            count = shared(self.task, self.problems("train"), problems)
        except UserError as error:
            raise UserError(f"{error}: {self.remedy()}") from None
        if count:
            raise UserError(f"{count} problems of {problems.path} are among the training problems: {self.remedy()}")
        return problems

    def trees(self, variant: str, part: str) -> TreeStore:
        """Return the encoded demonstrations of a variant; `part` is "train" or "validation".

        Raises UserError where the data set has none of that variant.
        """
        try:
            return TreeStore(self.folder / f"{variant}_{part}")
        except FileNotFoundError:
            if (manifest := read_manifest(self.folder)) is not None and f"{variant}_{part}" not in manifest:
                there = [name for name in self.task.variants if f"{name}_train" in manifest]
                raise UserError(
                    f"the data set at {self.folder} has no {variant} demonstrations: give "
                    f"--variants={','.join(there)}, or import them, too"
                ) from None
            where = self.folder / f"{variant}_{part}"
            raise FileNotFoundError(f"no demonstrations at {where}: run --stage=data first") from None
        except UserError as error:
            raise UserError(f"{error}: {self.remedy()}") from None

    def segments(self, variant: str, part: str, children: int = 0, seed: int = 0) -> StoredSegments:
        """Return the segments of a variant's trees, to train on.

        Each tree gives its root and at most `children` of its other threads (0: all). These are drawn at random by
        `seed`; threads that returned a result have precedence. Raises UserError where there is no training tree.
        """
        store = self.trees(variant, part)
        if part == "train" and not len(store):
            raise UserError(f"{store.folder} has no demonstration to train on: give the task some, or {self.remedy()}")
        if not children:
            return StoredSegments(store)
        rng = random.Random(f"{seed}/{variant}/children")
        chosen: list[int] = []
        for tree, (first, end) in enumerate(zip(store.tree_threads, store.tree_threads[1:])):
            count = int(end - first)
            drawn = rng.sample(range(1, count), count - 1)
            found = set(store.info(tree)["found"])
            drawn.sort(key=lambda thread: thread not in found)
            chosen += [int(first) + thread for thread in (0, *drawn[:children])]
        return StoredSegments(store, np.array(chosen))

    def conditions(self, variant: str) -> dict[str, int]:
        """Return the number of a variant's training trees by condition, as ``{"Budget: 3 ": 120, ...}``.

        A condition is text at the start of a root's prompt that asks the model for a budget, such as a number of
        children. Conditions are ordered by the numbers in them. The key "" counts trees without a condition.
        The result is empty for a variant without training trees.
        """
        counted = self.manifest.get(f"{variant}_train", {}).get("conditions", {})
        return dict(sorted(counted.items(), key=lambda item: [int(number) for number in re.findall(r"\d+", item[0])]))

    def remedy(self) -> str:
        """Return what a user can do about a broken file of the data set, to end an error message with."""
        if (manifest := read_manifest(self.folder)) is not None and manifest["config"].get("imported"):
            return "import the data set again"
        return f"delete it and {self.folder / 'manifest.json'}, and run --stage=data again"
