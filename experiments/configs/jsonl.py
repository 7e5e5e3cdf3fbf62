"""A task from files, without Python of one's own: the last digit of a sum of four digits, halves given to children.

    python -m experiments.run --config=experiments/configs/jsonl.py              # 200 problems, the files of the tests
    python -m tests.tasks.jsonl.make runs/digits 4500 500                        # 4500 problems, 500 of them held out
    python -m experiments.run --config=experiments/configs/jsonl.py:runs/digits

FILE:FOLDER takes train.jsonl, held_out.jsonl and demonstrations.jsonl of a folder, whole. For files of your own change
`window`, the model's size and the steps, on the command line or in a copy of this file.
"""

from pathlib import Path

from apr_jax.errors import UserError
from apr_jax.io.json_lines import JsonLines
from apr_jax.io.paths import user_path
from experiments.settings import default_config

TESTS = Path(__file__).resolve().parents[2] / "tests" / "tasks" / "jsonl"


def get_config(folder: str = ""):
    c = default_config("jsonl")
    c.name = "jsonl"
    place = user_path(folder) if folder else TESTS
    for name in ("train", "held_out", "demonstrations"):
        path = place / f"{name}.jsonl"
        if not path.is_file():
            raise UserError(f"jsonl.py:FOLDER has train.jsonl, held_out.jsonl and demonstrations.jsonl, no file {path}")
        c.jsonl[name] = str(path)
        if name in c.data:
            c.data[name] = len(JsonLines(path))
    c.window = 64
    c.model.width, c.model.layers, c.model.heads = 64, 2, 4

    c.sft.steps, c.sft.batch_rows, c.sft.row_length = 150, 8, 256
    c.grpo.steps, c.grpo.prompts, c.grpo.group, c.grpo.row_length = 40, 16, 8, 256
    for stage in (c.sft, c.grpo):
        o = stage.optimizer
        o.name, o.schedule, o.warmup_steps, o.peak_lr, o.muon_lr = "muon", "linear", 20, 3e-3, 0.02
    c.grpo.optimizer.peak_lr, c.grpo.optimizer.muon_lr, c.grpo.optimizer.warmup_steps = 2e-4, 1e-3, 1
    c.evaluate.extra_temperatures = (1.0,)  # what GRPO samples at
    c.export.check_trees = 5
    return c
