"""The measurements of `test_devices`, in a process with eight virtual CPU devices: python -m tests.train.eight_devices

It prints one JSON line: the result of each of its functions, by the function's name.
"""

import asyncio
import dataclasses
import functools
import json
import random
import shutil
import tempfile
from pathlib import Path

import jax

from apr_jax.devices import start_devices

start_devices(8, cache=False)  # no compilation cache but that of the tests
jax.config.update("jax_numpy_rank_promotion", "raise")

import numpy as np  # noqa: E402
import optax  # noqa: E402
from flax import nnx  # noqa: E402

from apr_jax.data.packing import flatten_thread, flatten_tree, pack_rows  # noqa: E402
from apr_jax.data.store import SAMPLED_ROLES  # noqa: E402
from apr_jax.model.llama import RULES, Llama, LlamaConfig  # noqa: E402
from apr_jax.rollout.engine import JaxEngine  # noqa: E402
from apr_jax.tasks.task import TRAIN  # noqa: E402
from apr_jax.threads import ThreadTree, TreeOutcome, encode_tree  # noqa: E402
from apr_jax.threads.engine import Sampling  # noqa: E402
from apr_jax.threads.run import Budget, TreeRunner, run_all  # noqa: E402
from apr_jax.train.grpo import GrpoTrainer, RolloutSpec  # noqa: E402
from apr_jax.train.loss import supervised_loss  # noqa: E402
from apr_jax.train.optimizer import OptimizerConfig, make_optimizer  # noqa: E402
from apr_jax.train.sft import SftConfig, SftJob, run_sft  # noqa: E402
from apr_jax.train.step import Trainer, data_mesh  # noqa: E402
from experiments.configs import paper  # noqa: E402
from experiments.settings import read_settings  # noqa: E402
from tests.tiny import TOKENIZER, NonsenseProtocol, make_model, random_thread, spawning_model, without_logprobs  # noqa: E402
from tests.train.objectives import make_config  # noqa: E402


def distance(a, b):
    """The largest absolute difference between two pytrees of arrays."""
    return max(
        float(np.abs(np.asarray(x) - np.asarray(y)).max()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b))
    )


def step():
    """One step of gradient descent on 8 devices, on 1, and by `jax.grad` alone. The rows have very different numbers of
    tokens; one is empty, so that one device has no token."""
    rng = random.Random(0)
    sizes = (0, 1, 1, 2, 3, 5, 9, 12)
    segments = [[flatten_thread(random_thread(rng, depth=0, longest=4)) for _ in range(size)] for size in sizes]
    rows = pack_rows(segments, 256)
    loss = functools.partial(supervised_loss, mode="sampled")
    model = make_model(0)
    weights, norms = [], []
    for devices in (8, 1):
        trainer = Trainer(model, loss, optax.sgd(0.5), data_mesh(devices))
        state, sums = trainer.step(trainer.init(model), [rows])
        weights.append(jax.device_get(state.weights))
        norms.append(float(sums["gradient_norm"]))
    halves = [jax.tree.map(lambda x: x[at], rows) for at in (np.arange(0, 8), np.arange(8) * 0)]
    trainer = Trainer(model, loss, optax.sgd(0.5), data_mesh(8))
    twice, sums_twice = trainer.step(trainer.init(model), halves)  # the second batch is the empty row eight times
    graphdef, before = nnx.split(model)

    def mean(weights):
        total, sums = loss(nnx.merge(graphdef, weights), rows)
        return total / sums["weight"]

    plain = jax.tree.map(lambda w, g: w - 0.5 * g, before, jax.jit(jax.grad(mean))(before))
    plain = nnx.to_pure_dict(plain)
    return {
        "per_row": np.isin(rows.role, SAMPLED_ROLES).sum(axis=1).tolist(),
        "moved": distance(weights[0], nnx.to_pure_dict(before)),
        "one_device": distance(weights[0], weights[1]), "plain": distance(weights[0], plain),
        "microbatches": distance(jax.device_get(twice.weights), weights[1]),
        "norm": abs(norms[0] - norms[1]) / norms[1],
        "weight": [float(sums["weight"]), float(sums_twice["weight"])],
    }  # fmt: skip


def sharded():
    """Three steps in two microbatches, of Muon, and of AdamW with frozen parameters and a scan over layers. Each runs
    on one device, and on eight devices, of which one, two or eight share a copy of the weights. Returns the distances
    of weights and moments from those of one device, and the fraction of a parameter that a device has."""
    rng = random.Random(1)
    batches = [
        pack_rows([[flatten_thread(random_thread(rng, depth=1, longest=4))] for _ in range(16)], 192) for _ in range(3)
    ]
    model = make_model(2, width=64, layers=4, heads=8, kv_heads=8, feed_forward=96, remat="full")
    found = {}
    for name, frozen, meshes in (("muon", "", ((8, 1), (8, 2))), ("adamw", "embed_|q_", ((8, 8),))):
        config = OptimizerConfig(name, 1e-2, 0.02, warmup_steps=1, schedule="constant", frozen=frozen)
        states = {}
        for devices, fsdp in ((1, 1), *meshes):
            trainer = Trainer(
                Llama(dataclasses.replace(model.config, scan=fsdp == 8), rngs=nnx.Rngs(2)),
                functools.partial(supervised_loss, mode="all"), make_optimizer(config, 3, RULES),
                data_mesh(devices, fsdp), whole_layers=name == "muon",
            )  # fmt: skip
            state = trainer.init(model)
            for rows in batches:
                halves = [jax.tree.map(lambda x: x[at::2], rows) for at in range(2)]
                state, sums = trainer.step(state, halves)
            q = state.weights["layers"]["q_LxDxNxH"]
            states[f"{devices}/{fsdp}"] = jax.device_get((state.weights, state.optimizer, sums["gradient_norm"]))
            found[f"{name} {devices}/{fsdp} shard"] = q.addressable_shards[0].data.size / q.size
        one_device = states.pop("1/1")
        found |= {f"{name} {key}": distance(one_device, other) for key, other in states.items()}
        found[f"{name} moved"] = distance(one_device[0], nnx.to_pure_dict(nnx.state(model)))
        found[f"{name} q moved"] = distance(one_device[0]["layers"]["q_LxDxNxH"], model.layers["q_LxDxNxH"][...])
    return found


def resumed():
    """A run of four steps on eight devices, and the same run resumed after two steps on four devices: the distance of
    their final weights, which differ by the order of additions alone."""
    segments = [flatten_thread(random_thread(random.Random(3), depth=0)) for _ in range(40)]
    config = SftConfig(4, 8, 64, OptimizerConfig(peak_lr=1e-2), save_every=2)
    with tempfile.TemporaryDirectory() as folder:
        whole = run_sft(SftJob(make_model(0), config, segments, data_mesh(8), Path(folder) / "whole"))
        half = Path(folder) / "half"
        shutil.copytree(Path(folder) / "whole", half)
        shutil.rmtree(half / "checkpoints" / "4")
        resumed = run_sft(SftJob(make_model(0), config, segments, data_mesh(4, 2), half))
    return distance(nnx.state(whole), nnx.state(resumed))


def tokens():
    """The same trees sampled on 8 devices with a slot each and on 1 device with 5 slots."""
    found = []
    for devices, slots in ((8, 8), (1, 5)):
        engine = JaxEngine(spawning_model(1), data_mesh(devices), slots=slots, context=96, seed=3)
        runner = TreeRunner(engine, NonsenseProtocol(), TOKENIZER, Budget(96, 40, 3), Sampling(1.0))
        jobs = [lambda i=i: runner.run(i, (7, i)) for i in range(10)]
        found.append(asyncio.run(run_all(jobs)))
    threads = sum(1 for tree in found[0] for _ in tree.threads())
    return {"threads": threads, "equal": [without_logprobs(a) == without_logprobs(b) for a, b in zip(*found)]}


def policy():
    """Two inner steps of GRPO with a reference and importance weights on the same trees: on 8 devices, where two share
    each copy of the weights, and on 1."""
    model, rng = spawning_model(1, kv_heads=4), random.Random(5)
    outcomes = [TreeOutcome(correct=bool(i % 2), answered=True) for i in range(4)]
    groups = [
        [ThreadTree(random_thread(rng, depth=1, logprobs=True), outcome=outcome) for outcome in outcomes]
        for _ in range(3)
    ]
    rollouts = RolloutSpec(NonsenseProtocol(2), TOKENIZER, Budget(64), slots=8)
    weights = []
    for devices, fsdp in ((8, 2), (1, 1)):
        config = make_config(inner_steps=2, kl=0.1, tis_clip=2.0, aggregate="paper", batch_rows=8)
        trainer = GrpoTrainer(model, config, rollouts, data_mesh(devices, fsdp))
        state, metrics = trainer.update(trainer.trainer.init(model), groups)
        weights.append((jax.device_get(state.weights), metrics))
    (eight, ours), (one, other) = weights
    return {
        "distance": distance(eight, one), "moved": distance(one, nnx.to_pure_dict(nnx.state(model))),
        "metrics": {name: [ours[name], other[name]] for name in ours if "seconds" not in name},
    }  # fmt: skip


def preset():
    """One SFT step and one GRPO step of the paper's preset on 8 devices, with a narrow model, short rows and a small
    window."""
    c = paper.get_config()
    c.model.width, c.model.layers, c.model.heads, c.model.feed_forward = 32, 2, 4, 64
    c.window = 256
    c.countdown.apr.beam = c.countdown.apr.sub_beam = (1, 2)
    c.sft.steps, c.sft.batch_rows, c.sft.row_length = 1, 8, 512
    c.grpo.steps, c.grpo.prompts, c.grpo.group, c.grpo.batch_rows, c.grpo.row_length, c.grpo.slots = 1, 2, 3, 8, 320, 16
    c.fsdp = 2
    settings = read_settings(c)
    task, mesh = settings.task, data_mesh(settings.devices, settings.fsdp)
    tokenizer = task.tokenizer()
    config = LlamaConfig(vocab_size=len(tokenizer), **settings.model)
    model = Llama(config, rngs=nnx.Rngs(settings.seed))
    problems = task.problems(settings.seed, TRAIN, range(30))
    segments = []
    for index, problem in enumerate(problems):
        tree = task.demonstration(problem, "apr", settings.seed, TRAIN, index)
        segments += flatten_tree(encode_tree(tree, tokenizer.encode, tokenizer.bos, tokenizer.eos))
    with tempfile.TemporaryDirectory() as folder:
        trained = run_sft(SftJob(model, settings.sft, segments, mesh, Path(folder)))
        (line,) = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    weights = [leaf for leaf in jax.tree.leaves(nnx.state(trained)) if leaf.ndim]
    rollouts = RolloutSpec(task.protocol("apr"), tokenizer, settings.budget, settings.grpo.slots)
    trainer = GrpoTrainer(trained, settings.grpo, rollouts, mesh)
    state = trainer.trainer.init(trained)
    groups, _ = trainer.sample(state, 1, problems[:2])
    # An untrained model solves nothing. Without made-up rewards there would be no update.
    groups = [
        [
            dataclasses.replace(tree, outcome=dataclasses.replace(tree.outcome, correct=i == 0))
            for i, tree in enumerate(group)
        ]
        for group in groups
    ]
    state, metrics = trainer.update(state, groups)
    return {
        "devices": [len(leaf.sharding.device_set) for leaf in weights], "sft": json.loads(line)["loss"],
        "sft_moved": distance(nnx.state(model), nnx.state(trained)), "vocabulary": len(tokenizer),
        "slots": sorted({shard.data.shape[0] for shard in trainer.engine._cache[0].k_PxKxWxH.addressable_shards}),
        "grpo_moved": distance(nnx.to_pure_dict(nnx.state(trained)), jax.device_get(state.weights)),
        "updates": int(state.step), "grpo": metrics,
    }  # fmt: skip


if __name__ == "__main__":
    assert jax.device_count() == 8
    parts = (step, sharded, resumed, tokens, policy, preset)
    print(json.dumps({part.__name__: part() for part in parts}))
