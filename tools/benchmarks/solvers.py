"""Compares our problem generator and solvers with the authors': rates, and statistics of the traces.

    python -m tools.benchmarks.solvers --authors=FOLDER                    # a checkout of Parallel-Reasoning/APR
    python -m tools.benchmarks.solvers --authors=FOLDER --problems=2000 --out=experiments/results/data/solvers.json

Both run in one process with equal settings. Rounds alternate, so that other load on the machine affects both. The
statistics are over the same problems. A difference is within sampling error if it is below three standard errors.
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
MAX_APART = 3  # in standard errors, within sampling error


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_string(
        "authors", None, "A checkout of the authors' repository, Parallel-Reasoning/APR.", flag_values=values
    )
    flags.DEFINE_integer("problems", 2000, "Problems that both solve.", lower_bound=ROUNDS, flag_values=values)
    flags.DEFINE_string("out", None, "JSON file to write the measurements to.", flag_values=values)


def sequences(tree: ThreadTree) -> list[str]:
    """Return the texts that the authors count: each thread's text up to each call, with the call, and to its end."""
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
    """Return all texts of a `trace_dict` of the authors."""
    below = [text for calls in trace["sub_calls"] for child in calls for text in authors_sequences(child)]
    return trace["main_calls"] + below


class Authors:
    """The authors' generators of problems and traces, called with the arguments of their scripts."""

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
    """Return the items per second of both functions, over alternating rounds.

    Each function is called with the number of the round and returns how many items it made.
    """
    made, seconds = [0, 0], [0.0, 0.0]
    for number in range(ROUNDS):
        for side, work in enumerate((ours, theirs)):
            began = time.perf_counter()
            made[side] += work(number)
            seconds[side] += time.perf_counter() - began
    one, two = (n / s for n, s in zip(made, seconds))
    return {"ours_per_second": round(one, 1), "authors_per_second": round(two, 1), "ratio": round(one / two, 2)}


def quantities(solved: bool, texts: list[str]) -> tuple[float, ...]:
    """Return the quantities of a tree that `compare` compares, in its order."""
    lengths = [len(text) for text in texts]
    return solved, len(texts), sum(lengths), max(lengths), sum(lengths) / len(lengths)


def compare(ours: list[ThreadTree], theirs: list[dict]) -> dict:
    """Compare our trees with the authors' traces.

    Returns both means of each quantity, and their difference in standard errors.
    """
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
            "within_sampling_error": apart < MAX_APART,
        }
    return found


def _work(values: flags.FlagValues, arguments: Sequence[str]) -> None:
    authors, count = Authors(values["authors"].value), values["problems"].value
    random.seed(0)
    source, rng = ProblemRange(), random.Random(0)
    problems = source.draw_each([random.Random(f"bench/{i}") for i in range(count)])
    per_round = count // ROUNDS
    configs = {"sos_plus": SolverConfig.paper_sos_plus(), "apr": SolverConfig.paper_apr()}

    def draw(number: int) -> int:
        return len(source.draw_each([random.Random(f"{number}/{i}") for i in range(2000)]))

    def authors_draw(_: int) -> int:
        for _ in range(150):
            authors.problem()
        return 150

    found = {"rates": {"problems": rates(draw, authors_draw)}, "statistics": {}}
    for solver, config in configs.items():
        made: tuple[list, list] = ([], [])

        def ours(number: int) -> int:
            mine = problems[number * per_round : (number + 1) * per_round]
            made[0].extend([SOLVERS[solver](problem, config, rng) for problem in mine])
            return per_round

        def theirs(number: int) -> int:
            mine = problems[number * per_round : (number + 1) * per_round]
            made[1].extend([getattr(authors, solver)(problem) for problem in mine])
            return per_round

        found["rates"][solver] = rates(ours, theirs)
        found["statistics"][solver] = compare(*made)
    found |= {
        "problems": ROUNDS * per_round,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
        "date": time.strftime("%Y-%m-%d"),
    }
    for name, row in found["rates"].items():
        ours_rate, authors_rate, ratio = row.values()
        print(f"{name:<9} ours {ours_rate:>9}/s   authors {authors_rate:>8}/s   x {ratio}")
    for solver, rows in found["statistics"].items():
        for name, row in rows.items():
            sampling = "within" if row["within_sampling_error"] else "BEYOND"
            print(
                f"{solver:<5} {name:<24} ours {row['ours']:>10}   authors {row['authors']:>10}   "
                f"{row['standard_errors']:>5} standard errors apart: {sampling} sampling error"
            )
    command.write_json(values["out"].value, found)


def main(argv: Sequence[str]) -> int:
    return command.run(__doc__, _define, _work, argv, required=("authors",))


if __name__ == "__main__":
    sys.exit(main(sys.argv))
