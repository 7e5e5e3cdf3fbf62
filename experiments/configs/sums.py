"""Whether a model adapts its parallelism to what is paid for: GRPO with a penalty on tokens, of two kinds.

    python -m experiments.run --config=experiments/configs/sums.py:sequential    # on sequential tokens
    python -m experiments.run --config=experiments/configs/sums.py:total         # on the tokens of all threads

The task is a sum over 42 to 60 numbers, of which none can be skipped. The demonstrations add up alone or share the
range out to 2 or 4 threads: more threads are fewer tokens one after the other, and more in all. The model knows all of
these ways, and GRPO goes one way or the other. About five minutes each on two cores.
"""

from apr_jax.errors import UserError
from experiments.settings import default_config


def get_config(paid: str = "sequential"):
    if paid not in ("sequential", "total"):
        raise UserError(f"sums.py:sequential or sums.py:total, was given {paid!r}")
    c = default_config("sums")
    c.name = f"sums_{paid}"
    c.window = 384
    c.data.train, c.data.held_out, c.data.repeats = 2400, 200, True  # 800 problems, three times each
    c.model.width, c.model.layers, c.model.heads = 64, 2, 4

    c.sft.steps, c.sft.batch_rows, c.sft.row_length = 2000, 8, 384
    c.sft.save_every, c.sft.log_every = 500, 100
    o = c.sft.optimizer
    o.name, o.schedule, o.warmup_steps = "muon", "linear", 20
    o.peak_lr, o.muon_lr, o.final_lr_fraction = 3e-3, 0.02, 0.02

    c.grpo.steps, c.grpo.prompts, c.grpo.group = 30, 12, 8
    c.grpo.row_length, c.grpo.save_every, c.grpo.slots = 384, 10, 128
    c.grpo.aggregate, c.grpo.normalise = "constant", False
    c.grpo.penalties["sequential_token" if paid == "sequential" else "token"] = 0.002
    o = c.grpo.optimizer
    o.name, o.schedule, o.peak_lr, o.muon_lr, o.warmup_steps = "muon", "constant", 1e-3, 5e-3, 1
    c.evaluate.temperature, c.evaluate.slots = 1.0, 128
    c.export.check_trees = 5
    return c
