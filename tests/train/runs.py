"""Tiny runs for the tests of resuming; as a command, a run that kills itself:

python -m tests.train.runs KIND FOLDER POINT

KIND is sft or grpo. POINT is where the run kills itself, see `kill_at`; or "long", a longer run that the caller kills.
"""

import dataclasses
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

from apr_jax.data.packing import flatten_thread
from apr_jax.threads.run import Budget, TreeRunner
from apr_jax.train.grpo import GrpoJob, GrpoTrainer, RolloutSpec, run_grpo
from apr_jax.train.metrics import MetricsLog
from apr_jax.train.objective import GrpoConfig
from apr_jax.train.optimizer import OptimizerConfig
from apr_jax.train.sft import SftConfig, SftJob, run_sft
from apr_jax.train.step import data_mesh
from tests.tiny import TOKENIZER, NonsenseProtocol, make_model, random_thread, spawning_model

KINDS = {"sft": 6, "grpo": 3}  # steps of a run
OPTIMIZER = OptimizerConfig(peak_lr=1e-2, warmup_steps=2)


def sft(folder, steps=6, validation=True, **changes):
    rng = random.Random(0)
    segments = [flatten_thread(random_thread(rng, depth=0)) for _ in range(40)]
    values = {"steps": steps, "batch_rows": 2, "row_length": 64, "optimizer": OPTIMIZER, "save_every": 2}
    config, held_out = SftConfig(**values | {"log_every": 1} | changes), segments[:6] if validation else []
    return run_sft(SftJob(make_model(0), config, segments, data_mesh(2), Path(folder), held_out))


def grpo(folder, steps=3, **changes):
    values = {"steps": steps, "prompts": 2, "group": 6, "inner_steps": 2, "kl": 0.01, "save_every": 1}
    values |= {"tis_clip": 2.0, "dynamic_sampling_rounds": 1, "validate_every": 1, "validation": 3}
    values |= {"batch_rows": 2, "row_length": 64, "optimizer": OPTIMIZER} | changes
    rollouts = RolloutSpec(NonsenseProtocol(2), TOKENIZER, Budget(40, 6, 1), slots=8)
    model = spawning_model(0, opens=3.0, closes=2.0, ends=4.0)
    return run_grpo(GrpoJob(model, GrpoConfig(**values), rollouts, range(9), data_mesh(2), Path(folder)))


def long_sft(folder):
    """Half a minute on two cores. It saves and validates often, and logs every fifth step."""
    optimizer = dataclasses.replace(OPTIMIZER, name="muon")
    return sft(folder, 1200, batch_rows=4, microbatches=2, save_every=30, validate_every=50, log_every=5,
               optimizer=optimizer)  # fmt: skip


LONG = {"sft": long_sft}


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at(point, kind, folder):
    """Make this process kill itself at a point of the run.

    "log": as the last step but one is logged. "save": while an earlier step is being saved. "best": while GRPO saves
    its best weights. Other points are phases of GRPO's last step, see `kill_in`.
    """
    last = KINDS[kind]
    if point == "log":
        write = MetricsLog.write

        def log(self, step, values):
            write(self, step, values)
            if step == last - 1:
                kill()

        MetricsLog.write = log
    elif point == "save":
        saved = last - 2 if kind == "sft" else last - 1
        kill_when(lambda: any(path.name.startswith(f"{saved}.") for path in (folder / "checkpoints").glob("*")))
    elif point == "best":  # at step 0: whether a later step is better is chance
        kill_when(lambda: any(path.name.startswith("0.") for path in (folder / "best").glob("*")))
    else:
        kill_in(point, last)


def kill_when(condition):
    """Kill this process as soon as `condition()` is true; a thread polls it."""

    def watch():
        while not condition():
            time.sleep(0.0005)
        kill()

    threading.Thread(target=watch, daemon=True).start()


def kill_in(phase, last):
    """Kill this process in a phase of GRPO's last step: "sample" and "validate", after two trees; "update", before it;
    "inner", between two inner steps."""
    sample, update, validate, run = GrpoTrainer.sample, GrpoTrainer.update, GrpoTrainer.validate, TreeRunner.run
    reached = {"step": 0, "trees": 0}

    async def run_tree(self, *arguments):
        tree = await run(self, *arguments)
        reached["trees"] += 1
        if reached["step"] == last and phase == reached.get("phase") and reached["trees"] == 2:
            kill()
        return tree

    def sampling(self, state, step, problems):
        reached.update(step=step, trees=0, phase="sample")
        return sample(self, state, step, problems)

    def updating(self, state, groups):
        if reached["step"] == last and phase == "update":
            kill()
        after_inner_step = lambda _: kill() if reached["step"] == last and phase == "inner" else None  # noqa: E731
        return update(self, state, groups, after_inner_step)

    def validating(self, *arguments):
        reached.update(trees=0, phase="validate")
        return validate(self, *arguments)

    GrpoTrainer.sample, GrpoTrainer.update, GrpoTrainer.validate = sampling, updating, validating
    TreeRunner.run = run_tree


if __name__ == "__main__":
    import jax

    jax.config.update("jax_num_cpu_devices", 2)
    kind, folder, point = sys.argv[1:]
    if point == "long":
        LONG[kind](folder)
    else:
        kill_at(point, kind, Path(folder))
        {"sft": sft, "grpo": grpo}[kind](folder)
