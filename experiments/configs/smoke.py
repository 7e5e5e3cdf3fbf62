"""Every part of the laptop's experiment in under two minutes on two cores. The model learns nothing. The tests run it.

python -m experiments.run --config=experiments/configs/smoke.py
"""

from experiments.configs import laptop


def get_config():
    c = laptop.get_config()
    c.name = "smoke"
    c.window = 256
    c.countdown.problems.count, c.data.train, c.data.held_out = 3, 200, 12
    c.model.width, c.model.layers, c.model.heads = 32, 2, 2
    c.sft.steps, c.sft.tokens, c.sft.batch_rows, c.sft.row_length = 40, 0, 4, 256
    c.sft.save_every, c.sft.log_every = 20, 10
    c.grpo.steps, c.grpo.prompts, c.grpo.group, c.grpo.save_every = 2, 2, 3, 1
    c.grpo.batch_rows, c.grpo.row_length, c.grpo.slots = 4, 384, 8
    c.evaluate.slots, c.evaluate.extra_temperatures = 8, (1.0,)
    c.export.check_trees = 4
    return c
