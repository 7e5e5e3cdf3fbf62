"""Data sets of trees that were made elsewhere, as the authors' published ones."""

import dataclasses
import json
import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from apr_jax.countdown.dataset import SHARD_PROBLEMS, VALIDATION, write_text
from apr_jax.countdown.problem import Problem
from apr_jax.countdown.recipe import COUNTED, DROPPED, count_tree, gave_up
from apr_jax.countdown.vocabulary import countdown_tokenizer
from apr_jax.errors import UserError
from apr_jax.text.hub import load_tokenizer
from apr_jax.threads import ThreadTree, encode_tree
from apr_jax.threads.metrics import longest_context
from apr_jax.threads.store import write_shard


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

    The first `VALIDATION` trees of a style measure the validation loss, the others are trained on; trees of held-out
    problems and trees that do not fit the window are dropped and counted. The folder is there when all is done. Raises
    ValueError where it is there already, or no tree to train on is left.
    """
    if folder.exists():
        raise UserError(f"{folder} is there already: give another folder")
    whole, folder = folder, folder.with_name(f"{folder.name}.part")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    words = load_tokenizer(tokenizer) if tokenizer else countdown_tokenizer(max_number)
    held = {problem.key: problem for problem in held_out}
    problems: dict[str, list[tuple[int, ...]]] = {"train": [], "held_out": _rows(held.values())}
    pending: dict[str, list[ThreadTree]] = {}
    counts: dict[str, Counter] = {}
    shards: Counter = Counter()

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
        found = [at for at, thread in enumerate(text.threads()) if not gave_up(thread)]
        text = dataclasses.replace(text, info=text.info | {"index": index, "found": found})
        tree = encode_tree(text, words.encode, words.bos, words.eos)
        style = text.info["style"]
        part = "validation" if counts.get(f"{style}_validation", Counter())["problems"] < VALIDATION else "train"
        count = counts.setdefault(name := f"{style}_{part}", Counter(dict.fromkeys((*DROPPED, "held_out"), 0)))
        count["problems"] += 1
        count["solved_by_solver"] += text.info["solved"]
        if part == "train":
            problems["train"] += _rows([problem])
        if problem.key in held:
            count["held_out"] += 1
        elif longest_context(tree) > window:
            count["too_long"] += 1
        else:
            pending.setdefault(name, []).append(tree)
            if len(pending[name]) == SHARD_PROBLEMS:
                write(name)
    for name in list(pending):
        write(name)
    if not any(count["trees"] for name, count in counts.items() if name.endswith("_train")):
        told = "; ".join(f"{name}: {dict(count)}" for name, count in counts.items()) or "there are none"
        raise UserError(f"no tree to train on is left ({told})")
    for name, rows in problems.items():
        with open(folder / f"{name}.npy", "wb") as file:
            np.save(file, np.array(rows, np.int32))
    if not tokenizer:
        words.save(folder / "tokenizer.json")
    config = {"imported": True, "window": window, "max_number": max_number, "tokenizer": tokenizer}
    manifest = {
        "config": config,
        "train_problems": len(problems["train"]),
        "held_out_problems": len(held),
        "vocabulary": len(words),
        **{name: dict(count) for name, count in counts.items()},
    }
    write_text(folder / "manifest.json", json.dumps(manifest, indent=1))
    folder.replace(whole)
    return manifest


def _rows(problems: Iterable[Problem]) -> list[tuple[int, ...]]:
    return [(*problem.numbers, problem.target) for problem in problems]
