"""Another task through the same code: factor search in tags, from a solver's trees to a model that spawns.

    python -m tools.factors               # children are told the number again
    python -m tools.factors --inherit     # children begin with their parent's context

Where a task of one's own differs from this file is its protocol, its tokenizer's words and where its trees come from;
data on disk, GRPO and the rest take them the same way (README, "Another task").
"""

import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
from absl import flags
from flax import nnx
from jax.sharding import Mesh

from apr_jax.data.packing import flatten_tree
from apr_jax.errors import UserError
from apr_jax.evaluate.run import evaluate
from apr_jax.evaluate.statistics import summarise
from apr_jax.model.llama import Llama, LlamaConfig
from apr_jax.rollout.engine import JaxEngine
from apr_jax.tasks.stand_in import StandIn
from apr_jax.tasks.tagged import WORDS, FactorTask, TagProtocol, solve, spans, tag_tokenizer
from apr_jax.text.tokenizer import Tokenizer
from apr_jax.threads import ThreadTree, encode_tree
from apr_jax.threads.engine import Sampling
from apr_jax.threads.run import Budget, TreeRunner
from apr_jax.train.optimizer import OptimizerConfig
from apr_jax.train.sft import SftConfig, SftJob, run_sft
from apr_jax.train.step import data_mesh
from tools import command

LARGEST = 60  # number
HELD_OUT = 100  # problems
WINDOW = 128  # tokens
BATCH_ROWS = 8  # of one update, on any number of devices: what is learned must not depend on the machine
SLOTS = 64


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", "runs/factors", "Folder of all such runs.", flag_values=values)
    flags.DEFINE_integer("steps", 500, "Of supervised training.", lower_bound=1, flag_values=values)
    flags.DEFINE_boolean("inherit", False, "Children inherit their parent's context.", flag_values=values)


def _work(values: flags.FlagValues, arguments: Sequence[str]) -> None:
    if arguments:
        raise UserError(f"only flags are taken, was given {arguments[0]!r}")
    inherit, steps = values["inherit"].value, values["steps"].value
    workdir = Path(values["workdir"].value) / f"{'inherit' if inherit else 'fresh'}_{steps}"
    protocol, tokenizer = TagProtocol(FactorTask(), inherit), tag_tokenizer(WORDS, LARGEST)
    problems = spans(LARGEST)
    random.Random(0).shuffle(problems)
    train, held_out = problems[HELD_OUT:], problems[:HELD_OUT]
    trees = [solve(one, inherit) for one in train]
    mesh = batch_mesh()
    model = train_pupil(trees, tokenizer, mesh, steps, workdir / "sft", {"inherit": inherit})

    engine = JaxEngine(model, mesh, slots=SLOTS, context=WINDOW)
    runner = TreeRunner(engine, protocol, tokenizer, Budget(WINDOW, depth=3), Sampling(0.0))
    path = workdir / "evaluate.jsonl"
    records = evaluate(runner, held_out, path, task=StandIn("factors"), variant="apr", name="factors")
    summary = summarise(records)
    print(json.dumps(summary))


def batch_mesh() -> Mesh:
    """As many of the devices as divide `BATCH_ROWS`."""
    return data_mesh(max(devices for devices in range(1, jax.device_count() + 1) if BATCH_ROWS % devices == 0))


def train_pupil(
    trees: Sequence[ThreadTree], tokenizer: Tokenizer, mesh: Mesh, steps: int, folder: Path, meta: dict, row: int = 256
) -> Llama:
    """A small model trained on all threads of trees of text, in rows of so many tokens, or what is left to train."""
    encoded = [encode_tree(tree, tokenizer.encode, tokenizer.bos, tokenizer.eos) for tree in trees]
    segments = [segment for tree in encoded for segment in flatten_tree(tree)]
    model = Llama(LlamaConfig(len(tokenizer), width=64, layers=2, heads=4, context=row), rngs=nnx.Rngs(0))
    optimizer = OptimizerConfig(
        name="muon", peak_rate=3e-3, muon_rate=0.02, warmup_steps=20, schedule="linear", end_rate=0.02
    )
    config = SftConfig(steps=steps, batch_rows=BATCH_ROWS, row_length=row, optimizer=optimizer, log_every=100)
    return run_sft(SftJob(model, config, segments, mesh, folder, segments[:64], {"stage": "sft", **meta}))


def main(argv: Sequence[str]) -> int:
    command.use_all_cores()
    return command.run(__doc__, _define, _work, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
