"""The laptop's task trained to be good: at most 3 hours on two cores, in parts if need be.

    python -m experiments.run --config=experiments/configs/workstation.py

Not run yet: the laptop's recipe must learn the task first (WORKSPACE_NOTES.md).
"""

from experiments.configs import laptop


def get_config():
    c = laptop.get_config()
    c.name = "workstation"
    c.problems.train, c.problems.held_out = 24_000, 1000
    c.sft.steps, c.sft.batch_rows, c.sft.save_every = 4000, 4, 200
    c.grpo.steps, c.grpo.prompts, c.grpo.group = 40, 16, 8
    c.export.check_trees = 20
    return c
