"""Whether a model adapts its parallelism to what is paid for: GRPO with two prices on one task.

    python -m tools.adaptive                         # about ten minutes on two cores

The task is the sum over 42 to 60 numbers of `apr_jax.tasks.tagged`, of which none can be skipped. The teacher adds up
alone or shares the range out to 2 or 4 threads: more threads are fewer tokens one after the other, and more in all. The
pupil knows all of these ways, and GRPO goes two ways from it: with a price on sequential tokens, and with one on all
tokens. Prints a
table of problems that were held out, and writes it with every step's means to --out, with a figure beside it.
"""

import random
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
from absl import flags
from matplotlib.axes import Axes

from apr_jax.errors import UserError
from apr_jax.evaluate.run import evaluate
from apr_jax.evaluate.statistics import summarise
from apr_jax.rollout.engine import JaxEngine
from apr_jax.tasks.stand_in import StandIn
from apr_jax.tasks.tagged import SUM_WORDS, SumTask, TagProtocol, range_sums, solve_sum, tag_tokenizer
from apr_jax.tasks.tagged.sums import CUTS
from apr_jax.threads.engine import Sampling
from apr_jax.threads.run import Budget, TreeRunner
from apr_jax.train.checkpoint import fingerprint
from apr_jax.train.grpo import GrpoJob, RolloutSpec, run_grpo
from apr_jax.train.objective import GrpoConfig
from apr_jax.train.optimizer import OptimizerConfig
from apr_jax.train.reward import Prices
from experiments.figures import style
from tools import command
from tools.factors import BATCH_ROWS, SLOTS, batch_mesh, train_pupil

HELD_OUT = 200  # problems of 1,000
BUDGET = Budget(384)
PRICES = {"sequential tokens": Prices(sequential_token=0.002), "all tokens": Prices(token=0.002)}
QUANTITIES = {
    "children": "children per tree", "sequential_tokens": "sequential tokens", "total_tokens": "tokens of all threads",
    "correct": "right",
}  # fmt: skip


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", "runs/adaptive", "Folder of the runs; goes on where it stopped.", flag_values=values)
    flags.DEFINE_integer("sft_steps", 2000, "Of supervised training.", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("steps", 30, "Of GRPO.", lower_bound=1, flag_values=values)
    flags.DEFINE_string("out", None, "JSON file to write; the figure stands beside it.", flag_values=values)


def _work(values: flags.FlagValues, arguments: Sequence[str]) -> None:
    if arguments:
        raise UserError(f"only flags are taken, was given {arguments[0]!r}")
    sft_steps, steps, out = (values[name].value for name in ("sft_steps", "steps", "out"))
    workdir = Path(values["workdir"].value) / f"{sft_steps}_{steps}"
    protocol, tokenizer = TagProtocol(SumTask()), tag_tokenizer(SUM_WORDS, 99)
    problems = range_sums()
    random.Random(0).shuffle(problems)
    train, held_out = problems[HELD_OUT:], problems[:HELD_OUT]
    trees = [solve_sum(problem, parts) for problem in train for parts in CUTS]
    mesh = batch_mesh()
    models = {"before": train_pupil(trees, tokenizer, mesh, sft_steps, workdir / "sft", {}, row=BUDGET.context)}
    slots = 2 * SLOTS
    rollouts = RolloutSpec(protocol, tokenizer, BUDGET, slots)
    for name, prices in PRICES.items():
        config = GrpoConfig(
            steps=steps, prompts=12, group=8, batch_rows=BATCH_ROWS, row_length=BUDGET.context, inner_steps=1,
            prices=prices, aggregate="constant", normalise=False, save_every=10,
            optimizer=OptimizerConfig(name="muon", peak_rate=1e-3, muon_rate=5e-3, warmup_steps=1, schedule="constant"),
        )  # fmt: skip
        models[name] = run_grpo(GrpoJob(models["before"], config, rollouts, train, mesh, _folder(workdir, name)))
    found = {"device": jax.devices()[0].device_kind, "sft_steps": sft_steps, "held_out": {}, "steps": {}}
    for name, model in models.items():
        engine = JaxEngine(model, mesh, slots=slots, context=BUDGET.context)
        runner = TreeRunner(engine, protocol, tokenizer, BUDGET, Sampling(1.0))
        path = _folder(workdir, name) / "evaluate.jsonl"
        records = evaluate(
            runner, held_out, path, task=StandIn("sums"), variant="apr", name=name, weights=fingerprint(model)
        )
        summary = summarise(records)
        found["held_out"][name] = {key: summary[key if key != "correct" else "accuracy"] for key in QUANTITIES}
        if name in PRICES:
            lines = style.read_metrics(_folder(workdir, name) / "metrics.jsonl")
            found["steps"][name] = {key: [line[f"rollout/{key}"] for line in lines] for key in QUANTITIES}
    print(table(found))
    command.write_json(out, found)
    if out:
        draw(found, Path(out).with_suffix(".png"))


def _folder(workdir: Path, name: str) -> Path:
    return workdir / name.replace(" ", "_")


def table(found: dict) -> str:
    """The held-out problems' means, before GRPO and after each price."""
    lines = [f"{'':<26}" + "".join(f"{title:>24}" for title in QUANTITIES.values())]
    for name, row in found["held_out"].items():
        title = name if name == "before" else f"price on {name}"
        shown = (f"{row[key]:.0%}" if key == "correct" else f"{row[key]:.1f}" for key in QUANTITIES)
        lines.append(f"{title:<26}" + "".join(f"{value:>24}" for value in shown))
    return "\n".join(lines)


def draw(found: dict, path: Path) -> None:
    """Children per tree of every step's rollouts, one line a price."""

    def lines(axes: Axes) -> None:
        for i, (name, rows) in enumerate(found["steps"].items()):
            values = rows["children"]
            axes.plot(range(1, len(values) + 1), values, lw=2.2, marker=style.MARKERS[i], label=f"price on {name}",
                      color=style.COLOURS[i], ls=style.LINES[i])  # fmt: skip
        axes.set_ylim(bottom=0)
        axes.set_xlabel("GRPO step")
        axes.set_ylabel("children per tree")
        axes.legend(loc="upper left", frameon=True, framealpha=0.85, edgecolor="none")

    style.save_figure(path, "What is paid for decides how parallel the model works", lines)


def main(argv: Sequence[str]) -> int:
    command.use_all_cores()
    return command.run(__doc__, _define, _work, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
