"""Makes data sets of demonstrations that another program wrote, such as those that the paper's authors published."""

import hashlib
import json
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Any

from apr_jax.data.dataset import SHARD_PROBLEMS, VALIDATION
from apr_jax.data.demonstrations import TOO_LONG, add_counts, count_tree, encode_demonstration, fits, no_counts
from apr_jax.data.problems import write_problems
from apr_jax.data.store import write_shard
from apr_jax.errors import UserError
from apr_jax.io.files import remove_left, whole, write_text
from apr_jax.tasks.task import Task, settings_json
from apr_jax.text.hub import load_tokenizer
from apr_jax.threads import ThreadTree


def import_dataset(
    task: Task,
    demonstrations: Iterable[tuple[Any, str, ThreadTree]],
    held_out: Iterable[Any],
    folder: Path,
    *,
    window: int,
    tokenizer: str = "",
) -> dict:
    """Make a data set of demonstrations (problem, variant, tree of text), and return its manifest.

    Trees of held-out problems, and trees that do not fit the window, are dropped and counted. Among the other trees of
    a variant, those of its first `VALIDATION` problems measure the validation loss, and the rest are trained on. So a
    variant's training trees contain no held-out problem and none of its validation problems. `train.jsonl`, from which
    GRPO draws problems, contains no held-out problem.

    Memory holds all problems, and the trees of one shard of each variant.

    The folder is created when everything is done; an error leaves nothing. Raises UserError where the folder exists,
    where there is no held-out problem, and where a variant has no tree left to train on.
    """
    if folder.exists():
        raise UserError(f"{folder} is there already: give another folder")
    if folder.parent.is_dir():
        named = (path for path in folder.parent.iterdir() if path.name.startswith(f"{folder.name}."))
        remove_left(path for path in named if path.suffix == ".part")
    with whole(folder) as part:
        return _import(task, demonstrations, held_out, part, window, tokenizer)


def _import(task: Task, demonstrations, held_out, folder: Path, window: int, tokenizer: str) -> dict:
    encoder = load_tokenizer(tokenizer) if tokenizer else task.tokenizer()
    held = _distinct(task, held_out)
    if not held:
        raise UserError("there is no held-out problem: evaluation needs some, as a file given to --held_out")
    folder.mkdir(parents=True)
    pending: dict[str, list[ThreadTree]] = {}
    counts: dict[str, dict[str, Any]] = {}
    shards: dict[str, int] = {}
    training: dict[Hashable, Any] = {}  # the problems of train.jsonl; each once, however many trees it has
    validating: dict[str, set[Hashable]] = {}  # by variant, its validation problems
    content = hashlib.sha256()

    def count_of(name: str) -> dict[str, Any]:
        return counts.setdefault(name, no_counts() | {"held_out": 0})

    def write(name: str) -> None:
        own = no_counts()
        for tree in pending[name]:
            count_tree(own, tree)
        number = shards[name] = shards.get(name, -1) + 1
        written = write_shard(folder / name / f"{number:05d}", pending.pop(name), own)
        content.update(written["sha256"].encode())
        add_counts(counts[name], own | {"threads": written["threads"]})

    for index, (problem, variant, text) in enumerate(demonstrations):
        key = task.key(problem)
        tree = encode_demonstration(task, problem, variant, index, text, encoder)
        dropped = "held_out" if key in held else None if fits(tree, window) else TOO_LONG
        first = validating.setdefault(variant, set())
        if dropped is None and len(first) < VALIDATION:
            first.add(key)
        name = f"{variant}_{'validation' if key in first else 'train'}"
        count = count_of(name)
        count["problems"] += 1
        count["solved_by_solver"] += tree.info["solved"]
        if name.endswith("train") and dropped != "held_out":
            training.setdefault(key, problem)
        if dropped is not None:
            count[dropped] += 1
            continue
        pending.setdefault(name, []).append(tree)
        if len(pending[name]) == SHARD_PROBLEMS:
            write(name)
    for name in list(pending):
        write(name)
    if not validating:
        raise UserError("the files hold no demonstrations")
    for variant in validating:
        if not (train := count_of(f"{variant}_train"))["trees"]:
            kept = counts[f"{variant}_validation"]["trees"] if f"{variant}_validation" in counts else 0
            raise UserError(
                f"no {variant} tree to train on is left: {kept} are the {VALIDATION} problems that measure the "
                f"validation loss, {train['held_out']} are of held-out problems, {train[TOO_LONG]} do not fit the "
                f"window of {window} tokens: give more demonstrations, or a wider --window"
            )
    write_problems(folder / "train.jsonl", task, training.values())
    write_problems(folder / "held_out.jsonl", task, held.values())
    if not tokenizer:
        encoder.save(folder / "tokenizer.json")
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        content.update(path.read_bytes())
    config = {
        "imported": True, "task": task.spec, "settings": settings_json(task), "window": window, "tokenizer": tokenizer,
    }  # fmt: skip
    manifest = {
        "config": config,
        "train_problems": len(training),
        "held_out_problems": len(held),
        "vocabulary": len(encoder),
        **counts,
        "sha256": content.hexdigest(),
    }
    write_text(folder / "manifest.json", json.dumps(manifest, indent=1))
    return manifest


def _distinct(task: Task, problems: Iterable[Any]) -> dict[Hashable, Any]:
    """Return distinct problems by `Task.key`."""
    found: dict[Hashable, Any] = {}
    for problem in problems:
        found.setdefault(task.key(problem), problem)
    return found
