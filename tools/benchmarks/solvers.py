"""Our problems and solvers beside the authors', in one process and at equal settings: rates, and what they make.

    python -m tools.benchmarks.solvers --authors=FOLDER                    # a checkout of Parallel-Reasoning/APR
    python -m tools.benchmarks.solvers --authors=FOLDER --problems=2000 --out=experiments/results/data/solvers.json

Rounds alternate, so that whatever else the machine does hits both. Statistics are over the same problems; a difference
is within sampling error where it is under three of its standard errors.
"""

import os
import platform
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from absl import flags

from apr_jax.errors import UserError
from apr_jax.tasks.countdown import Problem, ProblemRange
from apr_jax.tasks.countdown.search import APR_PROMISING, SOS_PLUS_PROMISING, SolverConfig
from apr_jax.tasks.countdown.solver import SOLVERS
from apr_jax.tasks.countdown.trace import NO_SOLUTION
from apr_jax.threads import Spawn, ThreadTree
from tools import command

ROUNDS = 8
MOST_APART = 3  # standard errors


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_string(
        "authors", None, "A checkout of the authors' repository, Parallel-Reasoning/APR.", flag_values=values
    )
    flags.DEFINE_integer("problems", 2000, "Problems solved by both.", lower_bound=ROUNDS, flag_values=values)
    flags.DEFINE_string("out", None, "A JSON file for the figures.", flag_values=values)


def sequences(tree: ThreadTree) -> list[str]:
    """The texts that the authors count: a thread up to each of its calls, call included, and to its end."""
    texts = []
    for thread in tree.threads():
        before = ""
        for item in thread.blocks:
            if isinstance(item, Spawn):
                texts.append(before + "".join(block.content for block in item.call))
                item = item.join
            before += item.content
        texts.append(before)
    return texts


def authors_sequences(trace: dict) -> list[str]:
    """All texts of one of the authors' trace dictionaries."""
    below = [text for calls in trace["sub_calls"] for child in calls for text in authors_sequences(child)]
    return trace["main_calls"] + below


class Authors:
    """Their generators, called as their scripts do."""

    def __init__(self, folder: str):
        if not (Path(folder) / "src" / "data" / "search.py").is_file():
            raise UserError(f"--authors is a checkout of the authors' repository, {folder} has no src/data/search.py")
        sys.path.insert(0, folder)
        from src.countdown_utils import mult_heuristic
        from src.data.countdown import CountDown
        from src.data.search import apr, sosp

        self._generator, self._apr, self._sosp, self._heuristic = CountDown(100, 4), apr, sosp, mult_heuristic

    def problem(self) -> None:
        self._generator.generate(random.randint(10, 100))

    def sos_plus(self, problem: Problem) -> dict:
        beam = random.randint(1, 5)
        text = self._sosp(
            problem.target, list(problem.numbers), beam,
            promising_threshold=SOS_PLUS_PROMISING, heuristic=self._heuristic,
        )  # fmt: skip
        return {"main_calls": [text], "sub_calls": []}

    def apr(self, problem: Problem) -> dict:
        beam = random.randint(1, 10)
        return self._apr(
            problem.target, list(problem.numbers), beam, random.randint(beam, 15),
            promising_threshold=APR_PROMISING, heuristic=self._heuristic,
        )  # fmt: skip


def rates(ours: Callable[[int], int], theirs: Callable[[int], int]) -> dict:
    """Things per second of both, over alternating rounds; each is called with the round and returns how many."""
    made, seconds = [0, 0], [0.0, 0.0]
    for number in range(ROUNDS):
        for side, work in enumerate((ours, theirs)):
            began = time.perf_counter()
            made[side] += work(number)
            seconds[side] += time.perf_counter() - began
    one, two = (n / s for n, s in zip(made, seconds))
    return {"ours_per_second": round(one, 1), "authors_per_second": round(two, 1), "ratio": round(one / two, 2)}


def quantities(solved: bool, texts: list[str]) -> tuple[float, ...]:
    lengths = [len(text) for text in texts]
    return solved, len(texts), sum(lengths), max(lengths), sum(lengths) / len(lengths)


def compare(ours: list[ThreadTree], theirs: list[dict]) -> dict:
    """Per quantity the two means, and their difference in standard errors."""
    names = ("solved", "sequences", "characters", "longest sequence", "characters per sequence")
    one = np.array([quantities(tree.info["solved"], sequences(tree)) for tree in ours], float)
    two = np.array(
        [quantities(not trace["main_calls"][-1].endswith(NO_SOLUTION), authors_sequences(trace)) for trace in theirs],
        float,
    )
    found = {}
    for name, a, b in zip(names, one.T, two.T):
        error = np.sqrt(a.var() / len(a) + b.var() / len(b))
        found[name] = {
            "ours": round(float(a.mean()), 3),
            "authors": round(float(b.mean()), 3),
            "standard_errors": (apart := round(float(abs(a.mean() - b.mean()) / max(error, 1e-12)), 2)),
            "within_sampling_error": apart < MOST_APART,
        }
    return found


def _work(values: flags.FlagValues, arguments: Sequence[str]) -> None:
    authors, count = Authors(values["authors"].value), values["problems"].value
    random.seed(0)
    source, rng = ProblemRange(), random.Random(0)
    problems = source.draw_each([random.Random(f"bench/{i}") for i in range(count)])
    share = count // ROUNDS
    configs = {"sos_plus": SolverConfig.paper_sos_plus(), "apr": SolverConfig.paper_apr()}

    def draw(number: int) -> int:
        return len(source.draw_each([random.Random(f"{number}/{i}") for i in range(2000)]))

    def authors_draw(_: int) -> int:
        for _ in range(150):
            authors.problem()
        return 150

    found = {"rates": {"problems": rates(draw, authors_draw)}, "statistics": {}}
    for style, config in configs.items():
        made: tuple[list, list] = ([], [])

        def ours(number: int) -> int:
            mine = problems[number * share : (number + 1) * share]
            made[0].extend([SOLVERS[style](problem, config, rng) for problem in mine])
            return share

        def theirs(number: int) -> int:
            mine = problems[number * share : (number + 1) * share]
            made[1].extend([getattr(authors, style)(problem) for problem in mine])
            return share

        found["rates"][style] = rates(ours, theirs)
        found["statistics"][style] = compare(*made)
    found |= {
        "problems": ROUNDS * share,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
        "date": time.strftime("%Y-%m-%d"),
    }
    for name, row in found["rates"].items():
        ours_rate, authors_rate, ratio = row.values()
        print(f"{name:<9} ours {ours_rate:>9}/s   authors {authors_rate:>8}/s   x {ratio}")
    for style, rows in found["statistics"].items():
        for name, row in rows.items():
            sampling = "within" if row["within_sampling_error"] else "BEYOND"
            print(
                f"{style:<5} {name:<24} ours {row['ours']:>10}   authors {row['authors']:>10}   "
                f"{row['standard_errors']:>5} standard errors apart: {sampling} sampling error"
            )
    command.write_json(values["out"].value, found)


def main(argv: Sequence[str]) -> int:
    return command.run(__doc__, _define, _work, argv, required=("authors",))


if __name__ == "__main__":
    sys.exit(main(sys.argv))
