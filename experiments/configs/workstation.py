"""The laptop's task trained to be good: about two hours on two cores, in parts if need be.

    python -m experiments.run --config=experiments/configs/workstation.py

Both teachers always search with the same beams, those that solve most in the window (of 500 problems: APR 72 %, where
the laptop's solves 62 %; SoS+ 39 %), so that a greedy pupil never has to guess where a list of operations ends.
"""

from experiments.configs import laptop


def get_config():
    c = laptop.get_config()
    c.name = "workstation"
    c.problems.train, c.problems.held_out = 20_000, 500
    c.apr.beam, c.apr.sub_beam = (5, 5), (7, 7)
    c.sosp.beam, c.sosp.promising = (3, 3), 1.0
    c.model.kv_heads = 0
    c.sft.steps, c.sft.save_every = 10_000, 500
    c.grpo.steps, c.grpo.prompts, c.grpo.group, c.grpo.inner_steps = 20, 16, 8, 2
    c.export.check_trees = 20
    return c
