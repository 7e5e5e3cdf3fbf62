"""Countdown data sets: problems, and each recipe's trees of them, made in streams by any number of processes.

A data set's bytes are a function of its config alone. Candidate problem i is drawn from (seed, i), the trees of
problem i from (seed, style, i), and work is cut into shards of fixed ranges of problems. So processes, machines
(`shard`) and kills change nothing: what stands whole in the folder is kept, the rest is made.

    manifest.json            written last: the config, what was kept, what was dropped and why, a content hash
    tokenizer.json           where the tokenizer is ours
    train.npy held_out.npy   int32 [problems, numbers + 1], the target last
    STYLE_train/ STYLE_validation/   stores of trees (apr_jax.data.store)
"""

import dataclasses
import hashlib
import itertools
import json
import multiprocessing
import os
import random
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np

from apr_jax.checks import SEED, at_least, check_fields, from_to_below
from apr_jax.data.store import read_counts, write_shard
from apr_jax.errors import UserError
from apr_jax.io.files import remove_left, whole, write_text
from apr_jax.io.paths import read_json
from apr_jax.tasks.countdown.problem import Problem, ProblemRange
from apr_jax.tasks.countdown.recipe import COUNTED, DROPPED, Recipe, count_tree
from apr_jax.tasks.countdown.search import SolverConfig
from apr_jax.tasks.countdown.vocabulary import SMALLEST_MAX_NUMBER, countdown_tokenizer
from apr_jax.text.hub import load_tokenizer
from apr_jax.text.tokenizer import Tokenizer
from apr_jax.threads import ThreadTree

SHARD_PROBLEMS = 2000  # problems of one shard: some seconds of work, and a few MB
CANDIDATES = 500  # problems drawn by one task
MOST_REFUSED = 50  # candidates in a row of that many times the rest wanted, before the range counts as used up
VALIDATION = 64  # trees of a style that measure the validation loss
FORMAT = 1
SOS_FORMAT = 2  # where a recipe searches as Stream of Search does: format 1 had its traces in another form


@dataclasses.dataclass(frozen=True)
class DatasetConfig:
    """What a data set is made of. `unseen_targets` is the share of targets that only held-out problems have, as in
    Stream of Search (0: held-out problems differ by numbers alone, the paper's)."""

    problems: ProblemRange
    train: int
    held_out: int
    recipes: tuple[Recipe, ...]
    max_number: int = 99  # of our tokenizer
    tokenizer: str = ""  # a Hugging Face tokenizer by folder or name; "": ours
    repeats: bool = False  # whether a training problem may come twice
    unseen_targets: float = 0.0
    validation: int = VALIDATION  # held-out problems whose trees measure the validation loss
    seed: int = 0

    BOUNDS = (
        at_least(1, "train", "held_out"), at_least(0, "validation"), at_least(SMALLEST_MAX_NUMBER, "max_number"),
        from_to_below(0, 1, "unseen_targets"), *SEED,
    )  # fmt: skip

    def __post_init__(self):
        check_fields(self)

    def described(self) -> dict[str, Any]:
        """As JSON gives it back."""
        form = SOS_FORMAT if any(recipe.search == "sos" for recipe in self.recipes) else FORMAT
        return json.loads(json.dumps({"format": form, **dataclasses.asdict(self)}))

    def make_tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.tokenizer) if self.tokenizer else countdown_tokenizer(self.max_number)

    def targets(self) -> tuple[list[int], list[int]]:
        """(targets of training, targets of held-out problems)."""
        every = list(range(self.problems.min_target, self.problems.max_target + 1))
        if not self.unseen_targets:
            return every, every
        count = min(max(1, round(self.unseen_targets * len(every))), len(every) - 1)
        unseen = set(random.Random(f"{self.seed}/targets").sample(every, count))
        return [target for target in every if target not in unseen], sorted(unseen)


class ProblemFile(Sequence[Problem]):
    """The problems of a .npy file, read where they lie: memory does not grow with their number. Raises UserError where
    the file holds none."""

    def __init__(self, path: Path):
        try:
            self._rows = np.load(path, mmap_mode="r")
        except (ValueError, EOFError):  # no .npy, or one cut short
            raise UserError(f"{path} is no whole .npy file of problems") from None
        if not isinstance(self._rows, np.ndarray) or self._rows.ndim != 2 or self._rows.shape[1] < 2:
            raise UserError(f"{path} holds no problems")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int | slice):
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        *numbers, target = self._rows[index].tolist()
        return Problem(tuple(numbers), target)


# ---------------------------------------------------------------------- making


def make_dataset(
    config: DatasetConfig,
    folder: Path,
    *,
    processes: int = 1,
    shard: tuple[int, int] = (0, 1),
    progress: Callable[[str, int, str], Any] = lambda title, total, unit: _Silent(),
) -> dict | None:
    """Makes what is missing under `folder` of share `shard` = (i, n); returns the manifest, None while other shares
    are missing. Raises UserError where the folder holds a data set of another config."""
    if (manifest := read_manifest(folder)) is not None:
        if manifest["config"].get("imported"):
            return manifest  # made elsewhere: what it was made of is not ours to compare
        _check_same(manifest["config"], config.described(), folder)
        return manifest
    folder.mkdir(parents=True, exist_ok=True)
    begun = folder / "config.json"
    if begun.exists():
        theirs = read_json(begun, "delete it, if the data set was begun with these settings")
        _check_same(theirs, config.described(), folder)
    elif any((folder / name).exists() for name in ("train.npy", "held_out.npy")):  # made behind a config.json
        raise UserError(f"{folder} holds data of an import whose manifest.json is gone: import it again, elsewhere")
    else:
        write_text(begun, json.dumps(config.described(), indent=1))
    if not config.tokenizer and not (folder / "tokenizer.json").exists():
        with whole(folder / "tokenizer.json") as part:
            config.make_tokenizer().save(part)
    with _workers(processes, config) as run:
        _make_problems(config, folder, run, progress)
        jobs = [
            _Job(str(folder), part, style, number)
            for style, recipe in enumerate(config.recipes)
            for part, count in (("validation", min(config.validation, config.held_out)), ("train", config.train))
            for number in range(-(-count // SHARD_PROBLEMS))
        ]
        mine = [job for index, job in enumerate(jobs) if index % shard[1] == shard[0]]
        missing = [job for job in mine if read_counts(job.shard_folder(config)) is None]
        bar = progress("data trees", sum(job.size(config) for job in mine), "trees")
        done = sum(job.size(config) for job in mine) - sum(job.size(config) for job in missing)
        for size in run(_make_shard, missing, ordered=False):
            done += size
            bar.update(done)
    return _finish(config, folder, jobs)


def read_manifest(folder: Path) -> dict | None:
    """None where the data set is not finished. Raises UserError where the file is broken."""
    path = folder / "manifest.json"
    if not path.exists():
        return None
    made = (folder / "config.json").exists()  # an import has none
    mend = "delete it, and it is made again from what lies beside it" if made else "import the data set again"
    found = read_json(path, mend)
    if not isinstance(found.get("config"), dict) or not isinstance(found.get("held_out_problems"), int):
        raise UserError(f"{path} is broken: {mend}")
    return found


def _check_same(theirs: dict, mine: dict, folder: Path) -> None:
    """Raises UserError where a data set was made with another config. Solver settings that its config
    does not name yet had their defaults then."""
    defaults = json.loads(json.dumps(dataclasses.asdict(SolverConfig(beam=(1, 1)))))
    recipes = [{**one, "solver": defaults | one["solver"]} for one in theirs.get("recipes", ())]
    theirs = {**theirs, "recipes": recipes}
    if different := [name for name in mine if mine[name] != theirs.get(name)]:
        raise UserError(
            f"{folder} holds a data set of another config (another {', '.join(different)}): give another folder"
        )


def _make_problems(config: DatasetConfig, folder: Path, run, progress) -> None:
    """Held-out problems are distinct; training problems are the first candidates, in their order, that are not held
    out and, unless repeats are asked for, not there before."""
    paths = {name: folder / f"{name}.npy" for name in ("train", "held_out")}
    if all(path.exists() for path in paths.values()):
        return
    seen_targets, unseen_targets = config.targets()

    def collect(name: str, count: int, targets: Sequence[int], keep: Callable[[Problem], bool]) -> None:
        with whole(paths[name]) as part:
            rows = np.lib.format.open_memmap(part, "w+", np.int32, (count, config.problems.count + 1))
            fill(rows, name, set(targets), keep)
            rows.flush()

    def fill(rows: np.ndarray, name: str, allowed: set[int], keep: Callable[[Problem], bool]) -> None:
        count = len(rows)
        bar, have, tried = progress(f"data problems {name}", count, "problems"), 0, 0
        for problems in run(_draw, ((name, start) for start in itertools.count(0, CANDIDATES)), ordered=True):
            for problem in problems:
                if have < count and problem.target in allowed and keep(problem):
                    rows[have] = (*problem.numbers, problem.target)
                    have += 1
            bar.update(have)
            if have == count:
                return
            tried += len(problems)
            if tried > MOST_REFUSED * (have + CANDIDATES):
                raise UserError(
                    f"{count} {name.replace('_', '-')} problems were asked for, this range gives about {have}: "
                    "widen problems, ask for fewer, or allow repeats"
                )

    held: set = set()
    seen: set = set()
    collect("held_out", config.held_out, unseen_targets, lambda p: p.key not in held and not held.add(p.key))
    if config.repeats:
        collect("train", config.train, seen_targets, lambda p: p.key not in held)
    else:

        def new(problem: Problem) -> bool:
            key = hash(problem.key)  # of integers alone: the same in every process
            return problem.key not in held and key not in seen and not seen.add(key)

        collect("train", config.train, seen_targets, new)


def _finish(config: DatasetConfig, folder: Path, jobs: Sequence["_Job"]) -> dict | None:
    """The manifest, where every shard of every share is there."""
    counts: dict[str, Counter] = {}
    content = hashlib.sha256()
    for job in jobs:
        own = read_counts(job.shard_folder(config))
        if own is None:
            return None
        content.update(own.pop("sha256").encode())
        total = counts.setdefault(f"{config.recipes[job.recipe].style}_{job.part}", Counter())
        longest = max(total["longest"], own["longest"])
        total.update(own)
        total["longest"] = longest
    for name, count in counts.items():
        if name.endswith("_train") and not count["trees"]:
            recipe = next(recipe for recipe in config.recipes if name.startswith(recipe.style))
            raise UserError(
                f"none of {config.train} {recipe.style} trees fits a window of {recipe.window} tokens"
                + (" and is right" if recipe.correct_only else "")
            )
    for name in ("train.npy", "held_out.npy"):
        with open(folder / name, "rb") as file:
            while chunk := file.read(1 << 20):
                content.update(chunk)
    manifest = {
        "config": config.described(),
        "train_problems": config.train,
        "held_out_problems": config.held_out,
        "vocabulary": len(config.make_tokenizer()),
        **{name: dict(count) for name, count in counts.items()},
        "sha256": content.hexdigest(),
    }
    write_text(folder / "manifest.json", json.dumps(manifest, indent=1))
    remove_left(Path(at) / name for at, *names in os.walk(folder) for name in sum(names, []) if name.endswith(".part"))
    return manifest


# ---------------------------------------------------------------------- what workers do


@dataclasses.dataclass(frozen=True)
class _Job:
    folder: str
    part: str  # "train" or "validation"
    recipe: int
    number: int  # of the shard

    def range(self, config: DatasetConfig) -> range:
        count = config.train if self.part == "train" else min(config.validation, config.held_out)
        start = self.number * SHARD_PROBLEMS
        return range(start, min(start + SHARD_PROBLEMS, count))

    def size(self, config: DatasetConfig) -> int:
        return len(self.range(config))

    def shard_folder(self, config: DatasetConfig) -> Path:
        return Path(self.folder) / f"{config.recipes[self.recipe].style}_{self.part}" / f"{self.number:05d}"


_CONFIG: DatasetConfig  # a worker's own, set when it starts
_TOKENIZER: Tokenizer


def _start_process(config: DatasetConfig) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is the parent's to tell of
    _start_worker(config)


def _start_worker(config: DatasetConfig) -> None:
    global _CONFIG, _TOKENIZER
    _CONFIG, _TOKENIZER = config, config.make_tokenizer()


def _draw(task: tuple[str, int]) -> list[Problem]:
    name, start = task
    source, seed = _CONFIG.problems, _CONFIG.seed
    return source.draw_each([random.Random(f"{seed}/{name}/{index}") for index in range(start, start + CANDIDATES)])


def _make_shard(job: _Job) -> int:
    """Makes one shard; returns how many problems it went through."""
    recipe = _CONFIG.recipes[job.recipe]
    problems = ProblemFile(Path(job.folder) / f"{'train' if job.part == 'train' else 'held_out'}.npy")
    seed = f"{job.part}/{_CONFIG.seed}"
    recipe = dataclasses.replace(recipe, seed=seed)
    counts = Counter(dict.fromkeys(("problems", "solved_by_solver", *DROPPED, *COUNTED), 0))

    def kept() -> Iterator[ThreadTree]:
        for index in job.range(_CONFIG):
            tree, why = recipe.make(problems[index], index, _TOKENIZER)
            counts["problems"] += 1
            counts["solved_by_solver"] += tree.info["solved"]
            if why is None:
                count_tree(counts, tree)
                yield tree
            else:
                counts[why] += 1

    write_shard(job.shard_folder(_CONFIG), kept(), counts)
    return job.size(_CONFIG)


class _Silent:
    def update(self, done: int) -> None:
        pass


class _workers:
    """``with _workers(n, config) as run``: run(function, tasks, ordered) yields results, in n processes or, where n
    is 1, in this one. At most a few results wait, however many tasks there are."""

    def __init__(self, processes: int, config: DatasetConfig):
        self._processes, self._config, self._pool = processes, config, None

    def __enter__(self):
        if self._processes == 1:
            _start_worker(self._config)
        return self._run

    def _run(self, function, tasks: Iterable, ordered: bool) -> Iterator:
        if self._processes == 1:
            yield from map(function, tasks)
            return
        if self._pool is None:  # not forked: the caller may have threads of JAX
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
            raise OSError("a worker process was ended, perhaps for want of memory; start again to go on") from None

    def __exit__(self, *_):
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
