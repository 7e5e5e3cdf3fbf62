"""Compares the speed of our SFT with the authors' scheme of rows and with transformers under torch, in one process.

    python -m tools.benchmarks.training                                           # the laptop preset's task
    python -m tools.benchmarks.training --config=experiments/configs/paper.py --trees=24 --rows=2
    python -m tools.benchmarks.training --model=base --dtype=bfloat16 --rows=64 --out=training.json    # on a GPU

Three methods train the same model on the same APR trees, with all weights, AdamW and loss on all tokens:

    packed     ours: a tree's threads packed into rows, with each shared prefix stored once
    repeated   the authors' rows, in our trainer: each call of a thread, and its end, is a row with the whole context
               before it, padded to the window
    torch      transformers' model under torch, on the same rows as `packed`, with the attention as a mask [B, 1, T, T]

Rounds alternate, and each is a pass over all trees; ratios are of medians. First, the loss of one batch is compared
between ours and torch: the same model on the same rows must have the same loss.
"""

import itertools
import math
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np
from absl import flags

from apr_jax.data.demonstrations import encode_demonstration, fits
from apr_jax.data.packing import PackedBatch, Segment, first_fit, flatten_thread, flatten_tree, pack_rows
from apr_jax.export.hf import export_hf, load_transformers
from apr_jax.export.oracle import import_torch
from apr_jax.model.family import DEFAULT, Model, config_json, load_family, make_model
from apr_jax.model.flops import peak_flops, training_flops
from apr_jax.tasks.task import TRAIN
from apr_jax.text.tokenizer import Tokenizer
from apr_jax.threads import Block, Spawn, Thread, ThreadTree
from apr_jax.train.loss import supervised_loss
from apr_jax.train.optimizer import OptimizerConfig, make_optimizer
from apr_jax.train.step import Trainer, data_mesh
from experiments.command import load_config
from experiments.settings import Settings, read_settings
from tools import command

FAMILY = load_family(DEFAULT)
OPTIMIZER = OptimizerConfig(peak_lr=1e-4, schedule="constant")


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_string(
        "config", "experiments/configs/laptop.py", "Preset of problems, solver and window.", flag_values=values
    )
    flags.DEFINE_enum("model", "tiny", list(FAMILY.presets), "Preset of the model's sizes.", flag_values=values)
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Data type of the computation.", flag_values=values)
    flags.DEFINE_integer("trees", 48, "Trees per pass.", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("rows", 4, "Rows per batch.", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("rounds", 3, "Passes per method.", lower_bound=1, flag_values=values)
    flags.DEFINE_boolean("torch", True, "Run torch, too.", flag_values=values)
    flags.DEFINE_string("out", None, "JSON file to write the measurements to.", flag_values=values)


def draw_trees(settings: Settings, count: int, tokenizer: Tokenizer) -> list[ThreadTree]:
    """Return `count` demonstrations of the task's first variant that fit the window."""
    task, seed, trees = settings.task, settings.seed, []
    variant = task.variants[0]
    for index in itertools.count():
        (problem,) = task.problems(seed, TRAIN, [index])
        text = problem and task.demonstration(problem, variant, seed, TRAIN, index)
        if text:
            tree = encode_demonstration(task, problem, variant, index, text, tokenizer)
            trees += [tree] * fits(tree, settings.window)
        if len(trees) == count:
            return trees


def repeated_segments(tree: ThreadTree) -> list[Segment]:
    """Return the authors' sequences: each thread's tokens up to each call, with the call, and to its end."""
    segments = []
    for thread in tree.threads():
        before: tuple[Block, ...] = ()
        for item in thread.blocks:
            if isinstance(item, Spawn):
                segments.append(flatten_thread(Thread((*before, *item.call))))
                item = item.join
            before += (item,)
        segments.append(flatten_thread(Thread(before)))
    return segments


def batches_of(rows: Sequence[Sequence[Segment]], length: int, count: int) -> list[PackedBatch]:
    """Pack rows of `length` tokens into batches of `count` rows."""
    return [pack_rows(rows[at : at + count], length, count) for at in range(0, len(rows), count)]


class TorchLoop:
    """Trains transformers' model, with the weights of an export, on packed rows."""

    def __init__(self, folder: str, dtype: str):
        torch = import_torch()

        self._torch = torch
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = load_transformers(folder).train().to(self._device)
        self._dtype = getattr(torch, dtype)
        self._optimizer = torch.optim.AdamW(
            self.model.parameters(), OPTIMIZER.peak_lr, (0.9, OPTIMIZER.beta2), weight_decay=OPTIMIZER.weight_decay
        )

    def loss(self, batch: PackedBatch):
        """Return the summed cross-entropy of all tokens that have a predecessor, and the number of these tokens."""
        torch, on = self._torch, self._device
        tensor = {name: torch.from_numpy(getattr(batch, name).astype(np.int64)).to(on) for name in NEEDED}
        enter, exit_ = tensor["enter"], tensor["exit"]
        T = enter.shape[1]
        sees = (enter[:, None, :] <= enter[:, :, None]) & (enter[:, :, None] < exit_[:, None, :])
        mask = sees & torch.tril(torch.ones(T, T, dtype=torch.bool, device=on))
        mask |= torch.eye(T, dtype=torch.bool, device=on)  # padding attends to itself: a softmax over nothing is NaN
        with torch.autocast(on, self._dtype, enabled=self._dtype != torch.float32):
            hidden = self.model.model(
                input_ids=tensor["tokens"], position_ids=tensor["positions"], attention_mask=mask[:, None],
                use_cache=False,
            ).last_hidden_state  # fmt: skip
            before = tensor["predecessors"].clamp(min=0)
            hidden = hidden.gather(1, before[:, :, None].expand(-1, -1, hidden.shape[2]))
            logits = self.model.lm_head(hidden).float()
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), tensor["tokens"].flatten(), reduction="none"
        ).reshape(enter.shape)
        trained = tensor["predecessors"] >= 0
        return (losses * trained).sum(), trained.sum()

    def run(self, batches: Sequence[PackedBatch]) -> None:
        """Take one step per batch."""
        for batch in batches:
            self._optimizer.zero_grad()
            loss, weight = self.loss(batch)
            (loss / weight).backward()
            self._torch.nn.utils.clip_grad_norm_(self.model.parameters(), OPTIMIZER.max_grad_norm)
            self._optimizer.step()
        if self._device == "cuda":
            self._torch.cuda.synchronize()


NEEDED = ("tokens", "positions", "predecessors", "enter", "exit")


class OurLoop:
    """Trains with our trainer. Like `run_sft`, it waits for the step before the latest one."""

    def __init__(self, model: Model, devices: int):
        optimizer = make_optimizer(OPTIMIZER, 10**6, FAMILY.rules)
        self.trainer = Trainer(
            model, lambda model, batch: supervised_loss(model, batch, "all"), optimizer, data_mesh(devices),
            whole_layers=False,
        )  # fmt: skip
        self.state = self.trainer.init(model)

    def run(self, batches: Sequence[PackedBatch]) -> float:
        """Take one step per batch, and return the loss per token of the first batch."""
        late, first = None, None
        for batch in batches:
            self.state, sums = self.trainer.step(self.state, [batch])
            if late is not None:
                jax.block_until_ready(late)
            late = sums
            first = sums if first is None else first
        jax.block_until_ready(late)
        return float(first["loss"] / first["weight"])


def _work(values: flags.FlagValues, arguments: Sequence[str]) -> None:
    settings = read_settings(load_config(values["config"].value))
    tokenizer, window, count = settings.task.tokenizer(), settings.window, values["rows"].value
    trees = draw_trees(settings, values["trees"].value, tokenizer)
    packed = [segment for tree in trees for segment in flatten_tree(tree)]
    length = max(settings.sft.row_length, max(map(len, packed)))
    length = -(-length // 64) * 64
    random.Random(0).shuffle(packed)
    rows = [[packed[i] for i in row] for row in first_fit(list(map(len, packed)), length)]
    repeated = [segment for tree in trees for segment in repeated_segments(tree)]
    batches = {
        "packed": batches_of(rows, length, count),
        "repeated": batches_of([[segment] for segment in repeated], window, count),
    }
    useful = sum(map(len, packed))

    sizes = FAMILY.presets[values["model"].value]
    config = FAMILY.Config(
        vocab_size=len(tokenizer), **sizes, context=-(-length // 128) * 128, dtype=values["dtype"].value
    )
    model = make_model(config, 0)
    devices = math.gcd(jax.device_count(), count)
    loops: dict[str, Callable[[], object]] = {}
    ours = {name: OurLoop(model, devices) for name in batches}
    for name, loop in ours.items():
        loops[name] = lambda loop=loop, name=name: loop.run(batches[name])
    found: dict = {}
    with tempfile.TemporaryDirectory() as folder:
        if values["torch"].value:
            export_hf(model, tokenizer, folder, {}, "float32")
            other = TorchLoop(folder, config.dtype)
            loss, weight = other.loss(batches["packed"][0])
            theirs, mine = float((loss / weight).detach()), ours["packed"].run(batches["packed"][:1])
            found["first_loss"] = {"ours": mine, "torch": theirs}
            if abs(mine - theirs) > (1e-4 if config.dtype == "float32" else 2e-2):
                raise ValueError(f"ours and torch differ on the same model and rows: losses of {mine} and {theirs}")
            loops["torch"] = lambda: other.run(batches["packed"])
    for loop in loops.values():
        loop()  # compiles, and fills caches that depend on shapes
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(values["rounds"].value):
        for name, loop in loops.items():
            began = time.perf_counter()
            loop()
            seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    flops = training_flops(config, useful, sum(int(segment.positions.sum()) + len(segment) for segment in packed))
    peak = peak_flops(jax.devices()[0], config.dtype)
    found |= {
        "trees": len(trees),
        "tokens": useful,
        "rows": {"packed": len(rows), "repeated": len(repeated)},
        "row_length": {"packed": length, "repeated": window},
        "row_tokens_ratio": round(len(repeated) * window / (len(rows) * length), 2),
        "filled": round(useful / (len(rows) * length), 3),
        "trees_per_second": {name: round(len(trees) / time, 2) for name, time in medians.items()},
        "tokens_per_second": {name: round(useful / medians[name]) for name in medians if name != "repeated"},
        "packed_over_repeated": round(medians["repeated"] / medians["packed"], 2),
        "seconds": {name: [round(time, 2) for time in times] for name, times in seconds.items()},
        "model_flops_per_second": {name: round(flops / time / 1e9, 1) * 1e9 for name, time in medians.items()},
        "model": config_json(config),
        "config": values["config"].value,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {devices} x {jax.devices()[0].device_kind}",
        "date": time.strftime("%Y-%m-%d"),
    }
    if peak is not None:
        found["model_flops_utilisation"] = round(flops / medians["packed"] / (peak * devices), 3)
    if "torch" in medians:
        found["packed_over_torch"] = round(medians["torch"] / medians["packed"], 2)
    for name, rate in found["trees_per_second"].items():
        print(f"{name:<9} {rate:>9} trees/s   {found['tokens_per_second'].get(name, '-'):>9} useful tokens/s")
    for name in ("packed_over_repeated", "packed_over_torch", "row_tokens_ratio", "filled", "model_flops_utilisation"):
        if name in found:
            print(f"{name}: {found[name]}")
    command.write_json(values["out"].value, found)


def main(argv: Sequence[str]) -> int:
    return command.run(__doc__, _define, _work, argv, devices=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
