"""Factor search, where child threads spawn children. A small model learns it in about two minutes on two cores.

    python -m experiments.run --config=experiments/configs/factors.py         # 500 supervised steps
    python -m experiments.run --config=experiments/configs/factors.py:grpo    # fewer, then GRPO on nested trees

A thread looks for a divisor of a number in a range. If the range is long, the thread gives each half to a child. A
child of the variant "fresh" gets the number again in its prompt. A child of "inherit" begins with its parent's context.
"""

from apr_jax.errors import UserError
from experiments.settings import default_config


def get_config(kind: str = ""):
    if kind not in ("", "grpo"):
        raise UserError(f"factors.py alone or factors.py:grpo, was given {kind!r}")
    c = default_config("factors")
    c.name = f"factors_{kind}" if kind else "factors"
    c.window = 128
    c.budget.depth = 3
    c.data.train, c.data.held_out = 962, 100  # all problems of numbers up to 60
    c.model.width, c.model.layers, c.model.heads = 64, 2, 4

    c.sft.steps, c.sft.batch_rows, c.sft.row_length = 500, 8, 256
    c.sft.save_every, c.sft.log_every = 100, 50
    o = c.sft.optimizer
    o.name, o.schedule, o.warmup_steps = "muon", "linear", 20
    o.peak_lr, o.muon_lr, o.final_lr_fraction = 3e-3, 0.02, 0.02

    c.grpo.steps = 0
    if kind == "grpo":
        c.sft.steps = 140  # so that there is something left to learn
        c.grpo.variants = ("fresh", "inherit")
        c.grpo.steps, c.grpo.prompts, c.grpo.group = 30, 16, 6
        c.grpo.row_length = 384
        c.grpo.aggregate = "constant"
        o = c.grpo.optimizer
        o.name, o.schedule, o.peak_lr, o.muon_lr, o.warmup_steps = "muon", "constant", 5e-4, 2.5e-3, 1
        c.evaluate.extra_temperatures = (1.0,)  # what GRPO samples at
    c.export.check_trees = 5
    return c
