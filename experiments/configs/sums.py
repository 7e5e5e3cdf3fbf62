"""Sums: whether GRPO with a penalty on tokens teaches a model to use more or fewer threads.

    python -m experiments.run --config=experiments/configs/sums.py:sequential    # penalty on sequential tokens
    python -m experiments.run --config=experiments/configs/sums.py:total         # penalty on the tokens of all threads

A problem is a sum over 42 to 60 numbers, and every number is needed. A demonstration adds them up in one thread, or
splits the range among 2 or 4 threads. More threads have fewer sequential tokens and more tokens in total. The
supervised model can do all of these, and GRPO moves it towards one. Each takes about five minutes on two cores.
"""

from apr_jax.errors import UserError
from experiments.settings import default_config


def get_config(penalised: str = "sequential"):
    if penalised not in ("sequential", "total"):
        raise UserError(f"sums.py:sequential or sums.py:total, was given {penalised!r}")
    c = default_config("sums")
    c.name = f"sums_{penalised}"
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
    c.grpo.penalties["sequential_token" if penalised == "sequential" else "token"] = 0.002
    o = c.grpo.optimizer
    o.name, o.schedule, o.peak_lr, o.muon_lr, o.warmup_steps = "muon", "constant", 1e-3, 5e-3, 1
    c.evaluate.temperature, c.evaluate.slots = 1.0, 128
    c.export.check_trees = 5
    return c
