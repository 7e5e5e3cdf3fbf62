"""Shows a trained model solving one Countdown problem: its threads while they decode, and the answer, checked.

    python -m tools.solve 3 5 7 8 --target=24
    python -m tools.solve 3 5 7 8 --target=24 --temperature=1 --seed=2
    python -m tools.solve 3 5 7 8 --target=24 --checkpoint=runs/laptop/grpo_apr
    python -m tools.solve 3 5 7 8 --target=24 --checkpoint=exported --engine=sglang --servers=http://127.0.0.1:30000
    python -m tools.solve 3 5 7 8 --target=24 --teacher --solver=sos_plus --beam=5
    python -m tools.solve --suggest=runs/laptop

Countdown: reach the target with + - * / and every number exactly once; intermediate results are integers of at least 0.
The default model ships with the repository: 4 numbers up to 10, targets from 10 to 30, 64.8 % of held-out problems
right (experiments/results/workstation/report.md). In a terminal each thread has a panel; elsewhere the threads are
printed at the end. Exit code: 0 for a right answer, 3 for a wrong answer or none, 1 for a problem that is refused.

--teacher shows a symbolic solver instead, whose traces models are trained on. The solver apr spawns threads that search
in parallel. The solver sos_plus searches in one thread; sos does, too, with one strategy, depth first or breadth first.
All keep only the best few states, so they may miss a solution; another seed or a larger beam may find it.

--suggest prints the command for the last model of a run, with a held-out problem that the run's evaluation has solved.
"""

import asyncio
import contextlib
import random
import re
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags
from rich.console import Console
from rich.live import Live

from apr_jax.errors import UserError, fail
from apr_jax.io.files import write_text
from apr_jax.tasks.countdown import CountdownProtocol, Problem, ProblemRange, check_solution, trace
from apr_jax.tasks.countdown.problem import solvable
from apr_jax.tasks.countdown.solver import SOLVERS, SolverConfig
from apr_jax.tasks.countdown.task import Countdown
from apr_jax.threads import ThreadTree, decode_tree
from apr_jax.threads.engine import Sampling
from tools import command
from tools.draw import Drawing
from tools.live import FRAMES, Frames, View, printable

if TYPE_CHECKING:
    from apr_jax.trained import Description

BEGIN = time.perf_counter()  # of the command, but for the start of Python
PUBLISHED = command.ROOT / "experiments" / "results" / "workstation" / "checkpoints"
MAX_NUMBER = 99_999  # the largest number and target
COUNTS = (2, 6)  # fewest and most numbers
SEEDS = range(20)  # seeds that the symbolic solver tries if none is given
RIGHT, WRONG = 0, 3  # exit codes


def _define(values: flags.FlagValues) -> None:
    def text(name: str, help: str) -> None:
        flags.DEFINE_string(name, None, help, flag_values=values)

    flags.DEFINE_integer("target", None, "The number to reach.", flag_values=values)
    text("checkpoint", "Folder of a checkpoint, of a training stage or of an export. Default: the published model.")
    text("tokenizer", "The tokenizer.json. Default: in the checkpoint's folder, a folder above, or its data/.")
    text("variant", "The variant that the model must be of. Default: the model's own.")
    flags.DEFINE_float("temperature", 0.0, "Of sampling; 0 is greedy.", lower_bound=0.0, flag_values=values)
    flags.DEFINE_enum("engine", "jax", ["jax", "sglang"], "jax, or sglang with --servers.", flag_values=values)
    text("servers", "URL,URL of running SGLang servers of the model, such as http://127.0.0.1:30000.")
    text("svg", "Image (SVG) to write: the view when the first thread ends.")
    teacher = "Show a symbolic solver instead of a model."
    flags.DEFINE_boolean("teacher", False, teacher, flag_values=values)
    flags.DEFINE_enum("solver", None, sorted(SOLVERS), "apr (default), sos_plus or sos.", flag_values=values)
    beam = "States that each expansion of a solver keeps. Default: drawn by the seed from the paper's range."
    flags.DEFINE_integer("beam", None, beam, lower_bound=1, flag_values=values)
    seed = f"Seed of sampling (default 0), or of a solver (default: the first of 0 to {len(SEEDS) - 1} that succeeds)."
    flags.DEFINE_integer("seed", None, seed, flag_values=values)
    flags.DEFINE_boolean("tree", False, "Print all threads, with children below their call.", flag_values=values)
    text("suggest", "Folder of a run. Print the command for its last model, and stop.")


def _work(values: flags.FlagValues, arguments: Sequence[str]) -> int:
    if values["suggest"].value:
        command.check_arguments(arguments, ())
        return _suggest(Path(values["suggest"].value))
    command.need(values, "target")
    problem = read_problem(arguments, values["target"].value)
    if not solvable(problem):
        raise UserError(f"no solution exists: {_numbers(problem)} cannot make {problem.target}")
    teacher = values["teacher"].value
    model_flags, teacher_flags = ("checkpoint", "tokenizer", "variant", "servers", "svg"), ("solver", "beam")
    if wrong := [name for name in (model_flags if teacher else teacher_flags) if values[name].value is not None]:
        raise UserError(
            f"--{wrong[0]} is for a {'model, not for --teacher' if teacher else 'solver: give --teacher too'}"
        )
    return _teach(problem, values) if teacher else _solve(problem, values)


# ---------------------------------------------------------------------- a model


def _solve(problem: Problem, values: flags.FlagValues) -> int:
    """Run a model on a problem and return the exit code."""
    servers = [url for url in (values["servers"].value or "").split(",") if url]
    if (values["engine"].value == "sglang") != bool(servers):
        raise UserError("--engine=sglang and --servers=http://HOST:PORT are given together, or neither")
    console = Console()
    live = console.is_terminal and not console.is_dumb_terminal
    with console.status("starting JAX") if live else contextlib.nullcontext():
        from apr_jax.devices import start_devices  # here, so that --help and most refusals do not wait for JAX
        from apr_jax.trained import describe

        start_devices(1)
    found = describe(values["checkpoint"].value or PUBLISHED, values["variant"].value, values["tokenizer"].value)
    if found.task.spec != Countdown.name:
        raise UserError(f"{found.folder} was trained on {found.task.spec}, tools.solve has {Countdown.name} problems")
    if strange := unfamiliar(problem, found.task.settings.problems):
        print(f"note: {strange}", file=sys.stderr)
    title = f"{found.task.title(found.variant)}, {found.task.describe(problem)}"
    decode, result = found.tokenizer.decode, found.task.protocol(found.variant).result
    view = View(title, decode, result, BEGIN, keep_picture=values["svg"].value is not None)
    with Live(Frames(view), console=console, refresh_per_second=FRAMES) if live else contextlib.nullcontext():
        tree, begin = _decoded(found, problem, values, servers, view)
        view.end = time.perf_counter()
    if values["svg"].value:
        write_text(Path(values["svg"].value), view.svg)
    drawing = Drawing(tree, decode, result)
    if not live or values["tree"].value:
        print(f"{title}\n{printable(drawing.terminal(lines=0))}")
    print(answer_line(problem, decode_tree(tree, decode)))
    print(drawing.costs())
    print(f"{view.end - BEGIN:.1f} s, {view.end - begin:.1f} s of them from the problem to the answer")
    return RIGHT if tree.outcome.correct else WRONG


def _decoded(
    found: "Description", problem: Problem, values: flags.FlagValues, servers: Sequence[str], view: View
) -> tuple[ThreadTree, float]:
    """Decode the tree of a problem. Returns it and the time when decoding began."""
    from apr_jax.trained import TrainedModel, load_weights

    temperature, seed = values["temperature"].value, values["seed"].value or 0
    if servers:
        begin = time.perf_counter()
        return asyncio.run(_on_servers(found, problem, servers, Sampling(temperature), seed, view)), begin
    model = TrainedModel(found, load_weights(found))
    begin = time.perf_counter()
    return model.solve(problem, temperature=temperature, seed=seed, observer=view), begin


async def _on_servers(
    found: "Description", problem: Problem, servers: Sequence[str], sampling: Sampling, seed: int, view: View
) -> ThreadTree:
    """Decode the tree of a problem on SGLang servers of the model. Raises UserError if their context is too short."""
    from apr_jax.rollout.client import context_of_servers
    from apr_jax.rollout.sglang import SglangEngine

    context = await context_of_servers(servers)
    if context < found.window:
        raise UserError(f"the servers hold {context} tokens, the model's window is {found.window}")
    engine = SglangEngine(servers, context=context, vocab_size=found.vocab_size, logprobs="none")
    try:
        return await found.runner(engine, sampling, view).run(problem, (seed,), found.condition)
    finally:
        await engine.close()


def unfamiliar(problem: Problem, known: ProblemRange) -> str:
    """Return a sentence on what the model's training problems never had, "" if it knows such problems."""
    new = [f"{number} as a number" for number in sorted(set(problem.numbers)) if number > known.max_number]
    if len(problem.numbers) != known.count:
        new.insert(0, f"{len(problem.numbers)} numbers")
    if not known.min_target <= problem.target <= known.max_target:
        new.append(f"{problem.target} as a target")
    if not new:
        return ""
    trained = (
        f"{known.count} numbers from 1 to {known.max_number}, targets from {known.min_target} to {known.max_target}"
    )
    return f"the model was trained on {trained}; it has never seen {', '.join(new)}, so a wrong answer is likely"


def answer_line(problem: Problem, tree: ThreadTree) -> str:
    """Return the checked answer of a tree of text as one line."""
    text = tree.root.text
    verdict, path = check_solution(problem, text), trace.read_result(text)
    if tree.root.failure:
        return f"no answer: the root thread was ended ({tree.root.failure})"
    if not verdict and path is None:
        return "no answer: none was found, though a solution exists"
    if not verdict:
        return printable(f"wrong: {verdict.reason}")
    steps = filter(None, map(trace.read_exploring, (text if path is None else path).split("\n")))
    return "right: " + ", ".join("{}{}{}={}".format(*operation) for operation, _ in steps)


def _suggest(run: Path) -> int:
    """Print the command that shows the last model of a run on a held-out problem, and return the exit code."""
    from apr_jax.evaluate.records import read_records

    for name in (f"{stage}_{variant}" for variant in Countdown.variants for stage in ("grpo", "sft")):
        path = run / "evaluate" / f"{name}.jsonl"
        if path.is_file() and (run / name).is_dir():
            break
    else:
        raise FileNotFoundError(f"no evaluated {Countdown.name} model in {run}: run experiments.run first")
    records = read_records(path)
    if not records:
        raise UserError(f"{path} holds no record: run --stage=evaluate again")
    record = next((record for record in records if record.correct), records[0])
    if record.task != Countdown.name:
        raise UserError(f"{path} has problems of {record.task}, tools.solve has {Countdown.name} problems")
    problem = Countdown().read_problem(record.problem)
    print(f"{name} at work on a held-out problem{' that it solved in the evaluation' if record.correct else ''}:")
    python = Path(sys.executable)
    python = python.relative_to(Path.cwd()) if python.is_relative_to(Path.cwd()) else python.name
    checkpoint = shlex.quote(str(run / name))
    print(f"    {python} -m tools.solve {_numbers(problem)} --target={problem.target} --checkpoint={checkpoint}")
    return 0


# ---------------------------------------------------------------------- a symbolic solver


def _teach(problem: Problem, values: flags.FlagValues) -> int:
    """Run a symbolic solver on a problem and return the exit code."""
    solver, beam = values["solver"].value or "apr", values["beam"].value
    changes = {} if beam is None else {"beam": (beam, beam)}
    config = getattr(SolverConfig, f"paper_{solver}")(**changes)
    for seed in SEEDS if values["seed"].value is None else [values["seed"].value]:
        tree = SOLVERS[solver](problem, config, random.Random(seed))
        if tree.info["solved"]:
            break
    drawing = Drawing(tree, None, CountdownProtocol("apr" if solver == "apr" else "sos_plus").result)
    print(drawing.terminal(lines=0) if values["tree"].value else tree.root.text)
    print(f"{solver}, seed {seed}, beam {tree.info['beam']}: {drawing.costs()}")
    print(answer_line(problem, tree))
    if not tree.info["solved"]:
        print("another --seed or a larger --beam may find it")
    return RIGHT if check_solution(problem, tree.root.text) else WRONG


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


def _numbers(problem: Problem) -> str:
    return " ".join(map(str, problem.numbers))


def main(argv: Sequence[str]) -> int:
    for before, given in zip(argv, argv[1:]):
        # Without this check a negative number would be an unknown flag, and the message about flags.
        if re.fullmatch(r"-[0-9.]+", given) and not (before.startswith("--") and "=" not in before):
            return fail(f"numbers are integers from 1 to {MAX_NUMBER}, was given {given!r}")
    try:
        return command.run(__doc__, _define, _work, argv, takes=None)
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv))
