"""Compares our rollout engine with transformers' batched `generate`, on the same trees of the same checkpoint.

    python -m tools.benchmarks.rollout                                          # the published workstation model
    python -m tools.benchmarks.rollout --widen=2                                # same function, 3.6 M parameters
    python -m tools.benchmarks.rollout --trees=1024 --slots=1024 --torch=false  # on a GPU

Three measurements, each a ratio within this one process:

    trees      sampled tokens per second of greedy trees, medians of alternating rounds; slot occupancy (sampled tokens
               divided by slot steps, where padding of groups counts as steps); how many trees are equal
    fork       the time to begin a sequence as a fork of 512 tokens, and by a prefill of 512 tokens, 8 at once
    children   the time of a tree of a parent and C parallel children, divided by the time of one thread with the tokens
               of its longest chain
"""

import asyncio
import dataclasses
import functools
import math
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx

from apr_jax.export.hf import export_hf, load_transformers
from apr_jax.export.oracle import TransformersEngine
from apr_jax.model.family import Model, config_json, make_model, parameter_count
from apr_jax.rollout.engine import JaxEngine
from apr_jax.tasks.countdown import CountdownProtocol, ProblemRange
from apr_jax.text.tokenizer import Tokenizer
from apr_jax.threads import map_blocks
from apr_jax.threads.engine import Engine, Sampling
from apr_jax.threads.metrics import children, sampled_tokens
from apr_jax.threads.run import Budget, TreeRunner, run_all
from apr_jax.train.checkpoint import load_model
from apr_jax.train.step import data_mesh
from tools import command

NOWHERE: frozenset[int] = frozenset()  # no stop tokens


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_string(
        "checkpoint", "experiments/results/workstation", "A folder with checkpoints/ and tokenizer.json.",
        flag_values=values,
    )  # fmt: skip
    widen = "Factor of the model's width. It still computes the same function."
    flags.DEFINE_integer("widen", 1, widen, lower_bound=1, flag_values=values)
    flags.DEFINE_integer("trees", 64, "Trees per round.", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("slots", 128, "Slots of the engine.", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("rounds", 3, "Rounds per engine.", lower_bound=1, flag_values=values)
    flags.DEFINE_boolean("torch", True, "Run transformers, too.", flag_values=values)
    flags.DEFINE_string("out", None, "JSON file to write the measurements to.", flag_values=values)


def widened(model: Model, times: int) -> Model:
    """Return a model that is `times` as wide and computes the same function.

    Heads, width and feed-forward are padded with zeros.
    """
    old = model.config
    config = dataclasses.replace(
        old, width=old.width * times, heads=old.heads * times, kv_heads=old.kv * times, feed_forward=old.hidden * times
    )
    wide = make_model(config, 0)

    def padded(path, target, value):
        # The zeros reduce the mean square that a norm divides by, so its gain is scaled to compensate.
        scale = times**-0.5 if "norm" in jax.tree_util.keystr(path) else 1.0
        return jnp.zeros_like(target).at[tuple(map(slice, value.shape))].set(scale * value)

    graphdef, state = nnx.split(wide)
    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(padded, state, nnx.state(model)))


def run_trees(engine: Engine, tokenizer: Tokenizer, problems: Sequence, budget: Budget) -> tuple[list, float]:
    """Return (greedy trees of the problems, seconds)."""
    runner = TreeRunner(engine, CountdownProtocol("apr"), tokenizer, budget, Sampling(0.0))
    began = time.perf_counter()
    trees = asyncio.run(
        run_all([functools.partial(runner.run, problem, (index,)) for index, problem in enumerate(problems)])
    )
    return trees, time.perf_counter() - began


async def chain(engine: Engine, ids: Sequence[int], name: tuple[int, ...], tokens: int) -> None:
    """Decode `tokens` tokens of one sequence."""
    sequence = engine.open(ids, name)
    await engine.decode(sequence, NOWHERE, tokens, Sampling(0.0))
    engine.free(sequence)


def timed(work) -> float:
    """Run a coroutine, and return its seconds."""
    began = time.perf_counter()
    asyncio.run(work)
    return time.perf_counter() - began


async def tree(engine: Engine, count: int, before: int, each: int, after: int) -> None:
    """Decode `before` tokens of a parent, `each` tokens of `count` parallel children, and `after` tokens after a join.

    The join has 20 tokens.
    """
    prompt = tuple(range(4, 24))
    parent = engine.open(prompt, (0,))
    await engine.decode(parent, NOWHERE, before, Sampling(0.0))
    await asyncio.gather(*(chain(engine, (*prompt, 30 + child), (0, child), each) for child in range(count)))
    joined = engine.fork(parent, len(parent.ids), (0, -1))
    engine.free(parent)
    engine.extend(joined, prompt)
    await engine.decode(joined, NOWHERE, after, Sampling(0.0))
    engine.free(joined)


def _children(engine: JaxEngine, rounds: int) -> dict[str, float]:
    """Return, for each number of children, the time of a tree divided by that of one thread.

    The thread has as many sequential tokens as the tree.
    """
    before, each, after = 150, 300, 60
    prompt = tuple(range(4, 24))
    times: dict[str, list[float]] = {}
    for _ in range(rounds):
        found = {"chain": timed(chain(engine, prompt, (0,), before + each + after))}
        found |= {str(count): timed(tree(engine, count, before, each, after)) for count in (1, 2, 5, 10, 20)}
        for name, seconds in found.items():
            times.setdefault(name, []).append(seconds)
    alone = statistics.median(times.pop("chain"))
    return {name: round(statistics.median(seconds) / alone, 2) for name, seconds in times.items()}


def _fork(engine: JaxEngine, rounds: int, vocabulary: int, tokens: int = 512) -> dict[str, float]:
    """Return the milliseconds to begin a sequence, including its first token, when 8 begin at once.

    "prefill": each prompt is new. "fork": each is a fork of a sequence that is in a slot.
    """
    rng = np.random.default_rng(0)
    times: dict[str, list[float]] = {"prefill": [], "fork": []}

    async def begin(sequences: list) -> float:
        began = time.perf_counter()
        await asyncio.gather(*(engine.decode(sequence, NOWHERE, 1, Sampling(0.0)) for sequence in sequences))
        return (time.perf_counter() - began) / len(sequences)

    async def both(number: int) -> tuple[float, float]:
        fresh = [engine.open(rng.integers(4, vocabulary, tokens).tolist(), (number, i)) for i in range(8)]
        prefill = await begin(fresh)
        forks = [engine.fork(fresh[0], tokens, (number, 8 + i)) for i in range(8)]
        fork = await begin(forks)
        for sequence in (*forks, *fresh):
            engine.free(sequence)
        return prefill, fork

    for number in range(rounds * 3):
        for name, seconds in zip(times, asyncio.run(both(number))):
            times[name].append(seconds * 1e3)
    return {name: round(statistics.median(found), 3) for name, found in times.items()}


def _work(values: flags.FlagValues, arguments: Sequence[str]) -> None:
    jax.config.update("jax_enable_compilation_cache", False)  # since compilation is measured
    published = Path(values["checkpoint"].value)
    model, meta = load_model(published / "checkpoints")
    model = widened(model, values["widen"].value)
    tokenizer = Tokenizer.load(published / "tokenizer.json")
    trained = meta["config"]
    window = trained["window"]
    budget = Budget(window, trained["budget"]["threads"], trained["budget"]["depth"])
    limits = (trained["problems"][name] for name in ("count", "max_number", "min_target", "max_target"))
    drawn, rng = ProblemRange(*limits), random.Random("rollout")
    problems = [drawn.draw(rng) for _ in range(values["trees"].value)]
    devices = math.gcd(jax.device_count(), values["slots"].value)
    slots, rounds = values["slots"].value, values["rounds"].value
    engine = JaxEngine(model, data_mesh(devices), slots=slots, context=window)
    engines: dict[str, Engine] = {"ours": engine}
    with tempfile.TemporaryDirectory() as folder:
        if values["torch"].value:
            export_hf(model, tokenizer, folder, {}, "float32")
            engines["transformers"] = TransformersEngine(load_transformers(folder), window)
    began = time.perf_counter()
    shapes = engine.compile(Sampling(0.0))
    compiled = time.perf_counter() - began
    trees: dict[str, list] = {}
    times: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(rounds):
        engine.load(nnx.state(model))  # clears the slots of the previous round
        for name, one in engines.items():
            trees[name], seconds = run_trees(one, tokenizer, problems, budget)
            times[name].append(seconds)
    tokens = sum(map(sampled_tokens, trees["ours"]))
    rates = {name: round(tokens / statistics.median(seconds)) for name, seconds in times.items()}
    found = {
        "trees": len(problems),
        "tokens": tokens,
        "children": round(sum(map(children, trees["ours"])) / len(problems), 2),
        "tokens_per_second": rates,
        "occupancy": round(engine.sampled / engine.slot_steps, 3),
        "compiled": {"shapes": shapes, "seconds": round(compiled, 1)},
        "seconds": {name: [round(time, 2) for time in seconds] for name, seconds in times.items()},
    }
    if "transformers" in trees:
        plain = {
            name: [map_blocks(tree.root, lambda block: dataclasses.replace(block, logprobs=None)) for tree in made]
            for name, made in trees.items()
        }
        found["equal_trees"] = sum(a == b for a, b in zip(plain["ours"], plain["transformers"]))
        found["ours_over_transformers"] = round(rates["ours"] / rates["transformers"], 2)
    found["milliseconds_to_begin_512_tokens"] = _fork(engine, rounds, len(tokenizer))
    found["tree_over_chain_by_children"] = _children(engine, rounds)
    found |= {
        "slots": slots,
        "parameters": parameter_count(model)[0],
        "model": config_json(model.config),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {devices} x {jax.devices()[0].device_kind}",
        "date": time.strftime("%Y-%m-%d"),
    }
    for name, value in found.items():
        print(f"{name}: {value}")
    command.write_json(values["out"].value, found)


def main(argv: Sequence[str]) -> int:
    return command.run(__doc__, _define, _work, argv, devices=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
