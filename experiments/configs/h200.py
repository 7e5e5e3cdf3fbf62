"""The paper's own task on one H100 or H200 in ten minutes: 25 M parameters in bfloat16, one model for both variants.

    tools/gpu_run.sh runs/h200        # data, training, GRPO, evaluation and what fits a small result folder
    python -m experiments.run --config=experiments/configs/h200.py

Problems, solvers and beams are the paper's (`paper.py`). The window holds what the paper's 4,096 Llama-2 tokens hold.
The optimiser is the workstation's, the best known recipe at that size.
"""

from experiments.configs import paper


def get_config():
    c = paper.get_config()
    c.name = "h200"
    c.devices = 1
    c.window = 2048
    c.countdown.sos_plus.shuffle = c.countdown.apr.shuffle = False
    c.countdown.apr.rank_root = True
    c.data.train, c.data.held_out = 120_000, 500

    c.model.preset, c.model.dtype, c.model.remat, c.model.scan = "small", "bfloat16", "none", False

    c.sft.models, c.sft.children = "joint", 2
    c.sft.loss_tokens = "sampled"
    c.sft.steps, c.sft.tokens = 20_000, 380_000_000
    c.sft.batch_rows, c.sft.row_length = 32, 2048
    c.sft.save_every, c.sft.log_every = 2000, 50
    for stage in (c.sft, c.grpo):
        o = stage.optimizer
        o.name, o.schedule, o.beta2, o.weight_decay = "muon", "linear", 0.99, 0.01
    o = c.sft.optimizer
    o.peak_rate, o.muon_rate, o.start_rate, o.end_rate, o.warmup_steps = 3e-3, 0.01, 0.05, 0.02, 50

    c.grpo.variants = ("apr",)
    c.grpo.steps, c.grpo.prompts, c.grpo.group, c.grpo.inner_steps = 14, 16, 8, 1
    c.grpo.batch_rows, c.grpo.row_length, c.grpo.slots = 16, 2560, 512
    c.grpo.aggregate, c.grpo.normalise, c.grpo.kl, c.grpo.importance_cap = "constant", False, 0.0, 2.0
    o = c.grpo.optimizer
    o.muon_rate, o.peak_rate, o.start_rate, o.end_rate, o.warmup_steps = 3e-3, 6e-4, 1.0, 0.2, 1

    c.evaluate.slots = 256  # beside GRPO on one device
    return c
