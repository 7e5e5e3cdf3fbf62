"""Solves one Countdown problem with a symbolic solver and prints its trace, such as models are trained on.

    python -m tools.solve 3 5 7 8 --target=24
    python -m tools.solve 3 5 7 8 --target=24 --solver=sos_plus --seed=1 --beam=5
    python -m tools.solve 3 5 7 8 --target=24 --tree

Countdown: reach the target with + - * / and every number exactly once; intermediate results are integers of at least 0.
The solver apr spawns threads that search in parallel. The solver sos_plus searches in one thread; sos does, too, with
one strategy, depth first or breadth first. All keep only the best few states, so they may miss a solution; another seed
or a larger beam may find it.
"""

import random
import re
import sys
from collections.abc import Sequence

from absl import flags

from apr_jax.errors import UserError, fail
from apr_jax.tasks.countdown import CountdownProtocol, Problem, check_solution, trace
from apr_jax.tasks.countdown.problem import solvable
from apr_jax.tasks.countdown.solver import SOLVERS, SolverConfig
from tools import command
from tools.draw import Drawing

MAX_NUMBER = 99_999  # the largest number and target
COUNTS = (2, 6)  # fewest and most numbers
SEEDS = range(20)  # seeds that are tried if none is given


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_integer("target", None, "The number to reach.", flag_values=values)
    flags.DEFINE_enum("solver", "apr", sorted(SOLVERS), "apr, sos_plus or sos.", flag_values=values)
    beam = "States that each expansion keeps. Default: drawn by the seed from the paper's range."
    flags.DEFINE_integer("beam", None, beam, lower_bound=1, flag_values=values)
    seed = f"Seed of the search. Default: the first of 0 to {len(SEEDS) - 1} that finds a solution."
    flags.DEFINE_integer("seed", None, seed, flag_values=values)
    flags.DEFINE_boolean("tree", False, "Draw all threads, with children below their call.", flag_values=values)


def _work(values: flags.FlagValues, arguments: Sequence[str]) -> None:
    problem = read_problem(arguments, values["target"].value)
    numbers = " ".join(map(str, problem.numbers))
    if not solvable(problem):
        raise UserError(f"no solution exists: {numbers} cannot make {problem.target}")
    solver, beam = values["solver"].value, values["beam"].value
    changes = {} if beam is None else {"beam": (beam, beam)}
    config = getattr(SolverConfig, f"paper_{solver}")(**changes)
    for seed in SEEDS if values["seed"].value is None else [values["seed"].value]:
        tree = SOLVERS[solver](problem, config, random.Random(seed))
        if tree.info["solved"]:
            break
    drawing = Drawing(tree, None, CountdownProtocol("apr" if solver == "apr" else "sos_plus").result)
    print(drawing.terminal(lines=0) if values["tree"].value else tree.root.text)
    print(f"{solver}, seed {seed}, beam {tree.info['beam']}: {drawing.costs()}")
    text = tree.root.text
    verdict = check_solution(problem, text)
    if verdict:
        steps = filter(None, map(trace.read_exploring, trace.read_result(text).split("\n")))
        print("right: " + ", ".join("{}{}{}={}".format(*operation) for operation, _ in steps))
    elif tree.info["solved"]:
        print(f"wrong: {verdict.reason}")
    else:
        print("not found, though a solution exists: try another --seed or a larger --beam")


def read_problem(arguments: Sequence[str], target: int) -> Problem:
    """Return the Countdown problem of the given numbers. Raises UserError for wrong numbers or a wrong target."""
    if not COUNTS[0] <= len(arguments) <= COUNTS[1]:
        raise UserError(f"{COUNTS[0]} to {COUNTS[1]} numbers are needed, {len(arguments)} were given")
    for given in arguments:
        if not re.fullmatch(r"[0-9]{1,9}", given) or not 1 <= int(given) <= MAX_NUMBER:
            raise UserError(f"numbers are integers from 1 to {MAX_NUMBER}, was given {given[:40]!r}")
    if not 2 <= target <= MAX_NUMBER:
        raise UserError(f"the target is an integer from 2 to {MAX_NUMBER}, was given {target}")
    return Problem(tuple(map(int, arguments)), target)


def main(argv: Sequence[str]) -> int:
    for before, given in zip(argv, argv[1:]):
        # Without this check a negative number would be an unknown flag, and the message about flags.
        if re.fullmatch(r"-[0-9.]+", given) and not (before.startswith("--") and "=" not in before):
            return fail(f"numbers are integers from 1 to {MAX_NUMBER}, was given {given!r}")
    return command.run(__doc__, _define, _work, argv, takes=None, required=("target",))


if __name__ == "__main__":
    sys.exit(main(sys.argv))
