"""Data sets of trees that were made elsewhere, as the authors' published ones."""

import dataclasses
import json
from collections import Counter
from collections.abc import Hashable, Iterable
from pathlib import Path

import numpy as np

from apr_jax.data.dataset import SHARD_PROBLEMS, VALIDATION
from apr_jax.data.store import write_shard
from apr_jax.errors import UserError
from apr_jax.io.files import remove_left, whole, write_text
from apr_jax.tasks.countdown.problem import Problem, solvable
from apr_jax.tasks.countdown.recipe import COUNTED, DROPPED, count_tree, gave_up
from apr_jax.tasks.countdown.vocabulary import countdown_tokenizer
from apr_jax.text.hub import load_tokenizer
from apr_jax.threads import ThreadTree, encode_tree
from apr_jax.threads.metrics import longest_context

MOST = int(np.iinfo(np.int32).max)  # the largest number that a file of problems holds
SEARCHED = 6  # numbers of the largest problem whose solutions are looked for: of seven one takes 6 s


def import_dataset(
    traces: Iterable[tuple[Problem, ThreadTree]],
    held_out: Iterable[Problem],
    folder: Path,
    *,
    window: int,
    max_number: int = 99,
    tokenizer: str = "",
) -> dict:
    """Makes a data set of trees of text made elsewhere, as the authors'; returns the manifest. In memory are the trees
    of one shard of each style, and the problems.

    Trees of held-out problems and trees that do not fit the window are dropped and counted. Of the rest the first
    `VALIDATION` problems of a style measure the validation loss, the others are trained on. No held-out problem, and no
    validation problem of a style, is among what that style is trained on; `train.npy`, which GRPO draws from, has no
    held-out problem. Stream of Search's traces are stored as the one-thread style's, as `Recipe` does.

    The folder is there when all is done; an error leaves nothing. Raises UserError where it is there already, where
    there is no held-out problem or one has no solution, where a style has too few trees, and where the problems cannot
    be one array: they have other counts of numbers, or a number past 32 bits.
    """
    if folder.exists():
        raise UserError(f"{folder} is there already: give another folder")
    if folder.parent.is_dir():
        named = (path for path in folder.parent.iterdir() if path.name.startswith(f"{folder.name}."))
        remove_left(path for path in named if path.suffix == ".part")
    with whole(folder) as part:
        return _import(traces, held_out, part, window, max_number, tokenizer)


def _import(traces, held_out, folder: Path, window: int, max_number: int, tokenizer: str) -> dict:
    words = load_tokenizer(tokenizer) if tokenizer else countdown_tokenizer(max_number)
    held = _held_out(held_out)
    folder.mkdir(parents=True)
    problems = _Rows("trace")
    pending: dict[str, list[ThreadTree]] = {}
    counts: dict[str, Counter] = {}
    shards: Counter = Counter()
    training: set = set()  # problems of `train.npy`, each once however many traces it has
    validating: dict[str, set] = {}  # a style's validation problems

    def count_of(name: str) -> Counter:
        return counts.setdefault(name, Counter(dict.fromkeys((*DROPPED, "held_out", *COUNTED), 0)))

    def write(name: str) -> None:
        own = Counter(dict.fromkeys(COUNTED, 0))
        for tree in pending[name]:
            count_tree(own, tree)
        written = write_shard(folder / name / f"{shards[name]:05d}", pending.pop(name), own)
        shards[name] += 1
        counts[name]["threads"] += written["threads"]
        longest = max(counts[name]["longest"], own.pop("longest"))
        counts[name].update(own)
        counts[name]["longest"] = longest

    for index, (problem, text) in enumerate(traces):
        style = "apr" if text.info["style"] == "apr" else "sosp"
        found = [at for at, thread in enumerate(text.threads()) if not gave_up(thread)]
        text = dataclasses.replace(text, info=text.info | {"index": index, "found": found})
        tree = encode_tree(text, words.encode, words.bos, words.eos)
        dropped = "held_out" if problem.key in held else "too_long" if longest_context(tree) > window else None
        first = validating.setdefault(style, set())
        if dropped is None and len(first) < VALIDATION:
            first.add(problem.key)
        name = f"{style}_{'validation' if problem.key in first else 'train'}"
        count = count_of(name)
        count["problems"] += 1
        count["solved_by_solver"] += text.info["solved"]
        if name.endswith("train") and dropped != "held_out" and problem.key not in training:
            training.add(problem.key)
            problems.add(problem)
        if dropped is not None:
            count[dropped] += 1
            continue
        pending.setdefault(name, []).append(tree)
        if len(pending[name]) == SHARD_PROBLEMS:
            write(name)
    for name in list(pending):
        write(name)
    if not validating:
        raise UserError("the files hold no traces")
    for style in validating:
        if not (train := count_of(f"{style}_train"))["trees"]:
            kept = counts[f"{style}_validation"]["trees"] if f"{style}_validation" in counts else 0
            raise UserError(
                f"no {style} tree to train on is left: {kept} are the {VALIDATION} problems that measure the "
                f"validation loss, {train['held_out']} are of held-out problems, {train['too_long']} do not fit the "
                f"window of {window} tokens: give more traces, or a wider --window"
            )
    for name, rows in (("train", problems.rows), ("held_out", held.values())):
        with open(folder / f"{name}.npy", "wb") as file:
            np.save(file, np.array(list(rows), np.int32))
    if not tokenizer:
        words.save(folder / "tokenizer.json")
    config = {"imported": True, "window": window, "max_number": max_number, "tokenizer": tokenizer}
    manifest = {
        "config": config,
        "train_problems": len(problems.rows),
        "held_out_problems": len(held),
        "vocabulary": len(words),
        **{name: dict(count) for name, count in counts.items()},
    }
    write_text(folder / "manifest.json", json.dumps(manifest, indent=1))
    return manifest


class _Rows:
    """Problems as rows of one int32 array."""

    def __init__(self, kind: str):
        self._kind, self.rows = kind, []

    def add(self, problem: Problem) -> tuple[int, ...]:
        """The row. Raises UserError where it does not go with the first one."""
        row = (*problem.numbers, problem.target)
        if max(row) > MOST:
            raise UserError(
                f"numbers and targets are at most {MOST}, a {self._kind} has {max(row)} (numbers "
                f"{list(problem.numbers)}, target {problem.target})"
            )
        if self.rows and len(row) != len(self.rows[0]):
            raise UserError(
                f"a data set has one count of numbers: the first {self._kind} has {len(self.rows[0]) - 1}, another "
                f"{len(row) - 1} (numbers {list(problem.numbers)}, target {problem.target}): import them apart"
            )
        self.rows.append(row)
        return row


def _held_out(given: Iterable[Problem]) -> dict[Hashable, tuple[int, ...]]:
    """The rows of held-out problems by key, each once. A solution is looked for where they have `SEARCHED` numbers at
    most. Raises UserError where there are none, and for those without a solution."""
    rows = _Rows("held-out problem")
    found, unsolvable = {}, []
    for problem in given:
        if problem.key not in found:
            found[problem.key] = rows.add(problem)
            if len(problem.numbers) <= SEARCHED and not solvable(problem):
                unsolvable.append(problem)
    if not found:
        raise UserError("there is no held-out problem: evaluation needs some, as a file given to --held_out")
    if unsolvable:
        first = unsolvable[0]
        raise UserError(
            f"{len(unsolvable)} of {len(found)} held-out problems have no solution, such as {list(first.numbers)} to "
            f"{first.target}: leave them out"
        )
    return found
