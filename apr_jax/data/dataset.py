"""Makes data sets: the problems of a task, and demonstrations of them for each of the task's variants.

The bytes of a data set are a function of its config alone. Candidate problem i is drawn from (seed, split, i), and the
tree of problem i from (seed, split, variant, i). The work is divided into shards, which are fixed ranges of problems.
So the number of processes and machines, and kills, change no byte: complete files in the folder are kept, and only the
missing ones are made.

    manifest.json                        written last: the config, counts of kept and dropped trees, a content hash
    config.json                          written first; an imported data set has none
    tokenizer.json                       only if the tokenizer is the task's
    train.jsonl held_out.jsonl           problems, one JSON object per line
    VARIANT_train/ VARIANT_validation/   stores of trees (data/store.py)
"""

import dataclasses
import hashlib
import itertools
import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from apr_jax.checks import SEED, FieldError, at_least, check_fields
from apr_jax.data.demonstrations import (
    NO_DEMONSTRATION,
    TOO_LONG,
    add_counts,
    count_tree,
    encode_demonstration,
    fits,
    no_counts,
)
from apr_jax.data.problems import MIN_CANDIDATES, ProblemFile, choose_problems, write_problems
from apr_jax.data.store import read_counts, write_shard
from apr_jax.errors import UserError
from apr_jax.io.files import remove_left, whole, write_text
from apr_jax.io.paths import read_json
from apr_jax.settings import from_json, shared
from apr_jax.tasks.task import Task, find_task, load_task
from apr_jax.text.hub import load_tokenizer
from apr_jax.text.tokenizer import Tokenizer
from apr_jax.threads import ThreadTree

SHARD_PROBLEMS = 2000  # problems per shard: some seconds of work, and a few MB
CANDIDATES = MIN_CANDIDATES  # candidates per job of a worker
VALIDATION = 64  # problems per variant whose trees measure the validation loss
PROBLEM_FILES = ("train.jsonl", "held_out.jsonl")
FORMAT = 3


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The config of a data set, which determines its bytes.

    `task` is a task's name or ``package.module:Class``; `settings` is an instance of its `Settings`. Trees are left out
    if the context of a thread has more than `window` tokens, or if a thread with its calls and inheriting children has
    more than `row_length` (0: no bound).
    """

    task: str = shared("task")
    settings: Any = shared("task settings")
    window: int = shared("window")
    train: int = 6000  # number of training problems
    held_out: int = 200  # number of distinct held-out problems, never in training
    row_length: int = shared("sft.row_length", 0)
    tokenizer: str = shared("tokenizer.name", "")  # folder or name of a Hugging Face tokenizer; "": the task's own
    repeats: bool = False  # whether a training problem may occur twice
    validation: int = shared("validation", VALIDATION)  # held-out problems whose trees measure the validation loss
    seed: int = shared("seed", 0)

    BOUNDS = (at_least(1, "train", "held_out", "window"), at_least(0, "validation", "row_length"), *SEED)

    def __post_init__(self):
        check_fields(self)
        if not isinstance(self.settings, kind := find_task(self.task).Settings):
            raise FieldError("settings", f"is {kind.__name__}, the task's, was given {str(self.settings)[:80]}")

    def described(self) -> dict[str, Any]:
        """Return the config as a JSON object, with the number of the data format and, for a task with files, their
        digests."""
        described = json.loads(json.dumps({"format": FORMAT, **dataclasses.asdict(self)}))
        files = {str(path): _digest(path) for path in self.load_task().files()}
        return described | ({"files": files} if files else {})

    def load_task(self) -> Task:
        """Return the task with its settings."""
        return load_task(self.task, self.settings)

    def make_tokenizer(self) -> Tokenizer:
        """Return the named Hugging Face tokenizer, or else the task's."""
        return load_tokenizer(self.tokenizer) if self.tokenizer else self.load_task().tokenizer()


# ---------------------------------------------------------------------- the data set


def make_dataset(
    config: DataConfig,
    folder: Path,
    *,
    processes: int = 1,
    shard: tuple[int, int] = (0, 1),
    progress: Callable[[str, int, str], Any] = lambda title, total, unit: _Silent(),
) -> dict | None:
    """Make the missing files of a data set in `folder`, and return its manifest.

    With `shard` = (i, n) this call makes every n-th shard, from number i on, and returns None while shards of other
    calls are missing. `progress(title, total, unit)` returns an object whose `update(done)` is called as work is done.

    Raises UserError where the folder holds a data set of another config, and OSError where the operating system ends a
    worker process.
    """
    if (manifest := read_manifest(folder)) is not None:
        if not manifest["config"].get("imported"):  # an import has no config to compare with
            _check_same(manifest["config"], config, folder)
        return manifest
    config.load_task().check(config.make_tokenizer())
    folder.mkdir(parents=True, exist_ok=True)
    begun = folder / "config.json"
    if begun.exists():
        theirs = read_json(begun, "delete it, if the data set was begun with these settings")
        _check_same(theirs, config, folder)
    elif any((folder / name).exists() for name in PROBLEM_FILES):  # only imports have problems but no config.json
        raise UserError(f"{folder} holds data of an import whose manifest.json is gone: import it again, elsewhere")
    else:
        write_text(begun, json.dumps(config.described(), indent=1))
    if not config.tokenizer and not (folder / "tokenizer.json").exists():
        with whole(folder / "tokenizer.json") as part:
            config.make_tokenizer().save(part)
    with _workers(processes, config) as run:
        _make_problems(config, folder, run, progress)
        jobs = [
            _Job(str(folder), part, variant, number)
            for variant in config.load_task().variants
            for part, count in (("validation", min(config.validation, config.held_out)), ("train", config.train))
            for number in range(-(-count // SHARD_PROBLEMS))
        ]
        mine = [job for index, job in enumerate(jobs) if index % shard[1] == shard[0]]
        missing = [job for job in mine if read_counts(job.shard_folder) is None]
        bar = progress("data trees", sum(job.size(config) for job in mine), "trees")
        done = sum(job.size(config) for job in mine) - sum(job.size(config) for job in missing)
        for size in run(_make_shard, missing, ordered=False):
            done += size
            bar.update(done)
    return _finish(config, folder, jobs)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(folder: Path) -> dict | None:
    """Return the manifest of a data set, or None where the data set is not finished.

    Raises UserError where the manifest is broken or of an earlier version.
    """
    path = folder / "manifest.json"
    if not path.exists():
        return None
    made = (folder / "config.json").exists()  # false for an import
    remedy = "delete it, and it is made again from the other files" if made else "import the data set again"
    found = read_json(path, remedy)
    if not isinstance(found.get("config"), dict) or not isinstance(found.get("held_out_problems"), int):
        raise UserError(f"{path} is broken: {remedy}")
    if "task" not in found["config"]:
        raise UserError(f"{folder} holds a data set of an earlier version: give another folder")
    return found


def _check_same(theirs: dict, config: DataConfig, folder: Path) -> None:
    """Raise UserError where a data set was made with another config.

    `theirs` is the JSON form of the data set's config. A setting of the task that it does not contain is taken to have
    its default: the setting was added after the data set was made.
    """
    if theirs.get("format") != FORMAT:
        raise UserError(f"{folder} holds a data set of an earlier version: give another folder")
    mine = config.described()
    if theirs.get("task") == config.task:
        try:
            settings = from_json(find_task(config.task).Settings, theirs["settings"])
            theirs = {**theirs, "settings": json.loads(json.dumps(dataclasses.asdict(settings)))}
        except (UserError, KeyError, TypeError):  # not readable as settings, so compared as it is
            pass
    if different := [name for name in mine if mine[name] != theirs.get(name)]:
        raise UserError(
            f"{folder} holds a data set of another config (another {', '.join(different)}): give another folder"
        )


def _make_problems(config: DataConfig, folder: Path, run, progress) -> None:
    """Choose and write the problems of both splits, unless both files exist."""
    if all((folder / name).exists() for name in PROBLEM_FILES):
        return
    task = config.load_task()

    def candidates(split: str) -> Iterator[Sequence[Any]]:
        return run(_draw, ((split, start) for start in itertools.count(0, CANDIDATES)), ordered=True)

    def counted(split: str, problems: Iterable[Any]) -> Iterator[Any]:
        bar = progress(f"data problems {split}", getattr(config, split), "problems")
        for have, problem in enumerate(problems, 1):
            yield problem
            if have % CANDIDATES == 0 or have == getattr(config, split):
                bar.update(have)

    for split, problems in choose_problems(task, config.train, config.held_out, config.repeats, candidates):
        write_problems(folder / f"{split}.jsonl", task, counted(split, problems))


def _finish(config: DataConfig, folder: Path, jobs: Sequence["_Job"]) -> dict | None:
    """Write and return the manifest, or return None where a shard is missing."""
    counts: dict[str, dict[str, Any]] = {}
    content = hashlib.sha256()
    for job in jobs:
        own = read_counts(job.shard_folder)
        if own is None:
            return None
        content.update(own.pop("sha256").encode())
        add_counts(counts.setdefault(f"{job.variant}_{job.part}", {}), own)
    for name, count in counts.items():
        if name.endswith("_train") and not count["trees"] and count[TOO_LONG]:  # GRPO alone needs none
            raise UserError(
                f"none of {config.train} {name.removesuffix('_train')} demonstrations is left to train on: "
                f"{count[TOO_LONG]} do not fit a window of {config.window} tokens, {count[NO_DEMONSTRATION]} "
                "problems have none"
            )
    for name in PROBLEM_FILES:
        with open(folder / name, "rb") as file:
            while chunk := file.read(1 << 20):
                content.update(chunk)
    manifest = {
        "config": config.described(),
        "train_problems": config.train,
        "held_out_problems": config.held_out,
        "vocabulary": len(config.make_tokenizer()),
        **counts,
        "sha256": content.hexdigest(),
    }
    write_text(folder / "manifest.json", json.dumps(manifest, indent=1))
    remove_left(Path(at) / name for at, *names in os.walk(folder) for name in sum(names, []) if name.endswith(".part"))
    return manifest


# ---------------------------------------------------------------------- worker processes


@dataclasses.dataclass(frozen=True)
class _Job:
    """The work of making one shard of a variant's demonstrations."""

    folder: str
    part: str  # "train" or "validation"
    variant: str
    number: int

    def range(self, config: DataConfig) -> range:
        count = config.train if self.part == "train" else min(config.validation, config.held_out)
        start = self.number * SHARD_PROBLEMS
        return range(start, min(start + SHARD_PROBLEMS, count))

    def size(self, config: DataConfig) -> int:
        return len(self.range(config))

    @property
    def shard_folder(self) -> Path:
        return Path(self.folder) / f"{self.variant}_{self.part}" / f"{self.number:05d}"


_CONFIG: DataConfig  # set in each worker process when it starts, as the next two
_TASK: Task
_TOKENIZER: Tokenizer


def _start_process(config: DataConfig) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process handles an interrupt
    _start_worker(config)


def _start_worker(config: DataConfig) -> None:
    global _CONFIG, _TASK, _TOKENIZER
    _CONFIG, _TASK, _TOKENIZER = config, config.load_task(), config.make_tokenizer()


def _draw(job: tuple[str, int]) -> list[Any]:
    split, start = job
    return _TASK.problems(_CONFIG.seed, split, range(start, start + CANDIDATES))


def _make_shard(job: _Job) -> int:
    """Make one shard, and return its number of problems."""
    problems = ProblemFile(_TASK, Path(job.folder) / f"{'train' if job.part == 'train' else 'held_out'}.jsonl")
    counts = no_counts()

    def kept() -> Iterator[ThreadTree]:
        for index in job.range(_CONFIG):
            problem = problems[index]
            counts["problems"] += 1
            text = _TASK.demonstration(problem, job.variant, _CONFIG.seed, job.part, index)
            if text is None:
                counts[NO_DEMONSTRATION] += 1
                continue
            tree = encode_demonstration(_TASK, problem, job.variant, index, text, _TOKENIZER)
            counts["solved_by_solver"] += tree.info["solved"]
            if fits(tree, _CONFIG.window, _CONFIG.row_length):
                count_tree(counts, tree)
                yield tree
            else:
                counts[TOO_LONG] += 1

    write_shard(job.shard_folder, kept(), counts)
    return job.size(_CONFIG)


class _Silent:
    """A progress bar that shows nothing."""

    def update(self, done: int) -> None:
        pass


class _workers:
    """A context manager for worker processes: ``with _workers(n, config) as run``.

    ``run(function, tasks, ordered)`` yields the result of each task, in n processes or, if n is 1, in this one. If
    `ordered`, results have the order of the tasks. At most 2 n tasks are pending, so `tasks` may be infinite. Raises
    OSError where the operating system ends a worker.
    """

    def __init__(self, processes: int, config: DataConfig):
        self._processes, self._config, self._pool = processes, config, None

    def __enter__(self):
        if self._processes == 1:
            _start_worker(self._config)
        return self._run

    def _run(self, function, tasks: Iterable, ordered: bool) -> Iterator:
        if self._processes == 1:
            yield from map(function, tasks)
            return
        if self._pool is None:  # "spawn", since forking is unsafe while threads of JAX run in this process
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self._processes, context, _start_process, (self._config,))
        tasks = iter(tasks)
        try:
            waiting = [self._pool.submit(function, task) for task in itertools.islice(tasks, 2 * self._processes)]
            while waiting:
                if not ordered:
                    wait(waiting, return_when=FIRST_COMPLETED)
                at = 0 if ordered else next(i for i, future in enumerate(waiting) if future.done())
                yield waiting.pop(at).result()
                waiting += [self._pool.submit(function, task) for task in itertools.islice(tasks, 1)]
        except BrokenProcessPool:
            raise OSError("a worker process was ended, perhaps for lack of memory: start again to resume") from None

    def __exit__(self, *_):
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
