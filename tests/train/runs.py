"""The tiny runs that the tests of resuming start, stop and start again, also as a process that kills itself:

python -m tests.train.runs KIND FOLDER MOMENT    (sft or grpo; a moment of `kill_on`, or "long": a longer run that
                                                  somebody else kills)
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

KINDS = {"sft": 6, "grpo": 3}  # their steps
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
    """Half a minute on two cores; saves and validates often, logs now and then."""
    optimizer = dataclasses.replace(OPTIMIZER, name="muon")
    return sft(folder, 1200, batch_rows=4, microbatches=2, save_every=30, validate_every=50, log_every=5,
               optimizer=optimizer)  # fmt: skip


LONG = {"sft": long_sft}


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def kill_on(moment, kind, folder):
    """SIGKILL in the last step but one (of GRPO's phases in the last): as it is logged, in the middle of a save of the
    one before, in the middle of a rollout, before and between the inner steps, in a validation, as the best weights are
    saved."""
    last = KINDS[kind]
    if moment == "log":
        write = MetricsLog.write

        def log(self, step, values):
            write(self, step, values)
            if step == last - 1:
                kill()

        MetricsLog.write = log
    elif moment == "save":
        saved = last - 2 if kind == "sft" else last - 1
        kill_when(lambda: any(path.name.startswith(f"{saved}.") for path in (folder / "checkpoints").glob("*")))
    elif moment == "best":  # the first: which steps improve on it is chance
        kill_when(lambda: any(path.name.startswith("0.") for path in (folder / "best").glob("*")))
    else:
        kill_in(moment, last)


def kill_when(told):
    def watch():
        while not told():
            time.sleep(0.0005)
        kill()

    threading.Thread(target=watch, daemon=True).start()


def kill_in(phase, last):
    """In a phase of GRPO's last step: "sample", "update", "inner" (between two inner steps) or "validate"."""
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
        between = lambda inner: kill() if reached["step"] == last and phase == "inner" else None  # noqa: E731
        return update(self, state, groups, between)

    def validating(self, *arguments):
        reached.update(trees=0, phase="validate")
        return validate(self, *arguments)

    GrpoTrainer.sample, GrpoTrainer.update, GrpoTrainer.validate = sampling, updating, validating
    TreeRunner.run = run_tree


if __name__ == "__main__":
    import jax

    jax.config.update("jax_num_cpu_devices", 2)
    kind, folder, moment = sys.argv[1:]
    if moment == "long":
        LONG[kind](folder)
    else:
        kill_on(moment, kind, Path(folder))
        {"sft": sft, "grpo": grpo}[kind](folder)
