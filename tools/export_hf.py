"""Exports a checkpoint to a Hugging Face folder, which transformers and SGLang load, and checks it.

    python -m tools.export_hf --checkpoint=runs/laptop/sft_apr/checkpoints --out=exported

--checkpoint is the folder of one saved step (.../checkpoints/1000) or of all steps (.../checkpoints: the newest is
exported). Only --checkpoint and --out are needed. The check loads the export with transformers, compares logits, and
solves problems of the model's task greedily with transformers and with our own engine. The thread trees must be equal,
token for token. The problems are the run's held-out problems if their file is beside the tokenizer, else the task's
first problems. Only logits are compared for a model that was trained on no task, and for a tokenizer without the task's
tokens.
"""

import functools
import random
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from apr_jax.errors import UserError
from tools import command

RANDOM_IDS = 64  # tokens in each sequence whose logits are compared
LOGIT_TOLERANCE = 1e-3


def _define(values: flags.FlagValues) -> None:
    text = functools.partial(flags.DEFINE_string, default=None, flag_values=values)
    number = functools.partial(flags.DEFINE_integer, flag_values=values)
    text("checkpoint", help="Folder of a saved step, or the folder of all steps of a stage.")
    text("out", help="Folder to write. An earlier export there is replaced; any other folder is refused.")
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Type of the stored weights.", flag_values=values)
    text("tokenizer", help="The tokenizer.json. Default: in the checkpoint's folder, a folder above, or its data/.")
    number("check", 20, "Trees and sequences to compare after the export; 0: no check.", lower_bound=0)
    number("window", None, "Most tokens of a thread in the check. Default: as in training.", lower_bound=32)


def run(checkpoint: str, out: str, dtype: str, tokenizer: str | None, check: int, window: int | None) -> None:
    """Export and check a checkpoint. The arguments are the flags of this tool. Raises UserError or OSError."""
    folder = Path(checkpoint).absolute()
    if not folder.is_dir():
        raise FileNotFoundError(f"no checkpoint at {folder}")
    if Path(out).exists() and not Path(out).is_dir():
        raise NotADirectoryError(f"{out} is a file, the export needs a folder")
    # Imported here, so that --help does not wait for JAX.
    from apr_jax.export.hf import check_export, check_trees, export_hf, trained_on
    from apr_jax.tasks.task import load_task
    from apr_jax.text.hub import find_tokenizer, load_tokenizer
    from apr_jax.train.checkpoint import load_model

    path = find_tokenizer(folder, tokenizer)
    encoder = load_tokenizer(str(path))
    model, meta = load_model(folder)
    export_hf(model, encoder, out, meta, dtype)
    print(f"written to {out}")
    if not check:
        return
    from apr_jax.threads.run import Budget

    rng, rows = random.Random(0), model.config.vocab_size
    sequences = [[rng.randrange(rows) for _ in range(min(RANDOM_IDS, model.config.context))] for _ in range(check)]
    difference = check_export(model, encoder, out, sequences)["max_logit_difference"]
    print(f"largest difference of a logit from transformers', {len(sequences)} sequences: {difference:.2e}")
    if not difference <= LOGIT_TOLERANCE:  # a NaN fails, too
        raise UserError(f"{out} does not compute the same as the checkpoint: logits differ by {difference:.2e}")
    if "task" not in meta:
        print("the check of trees does not apply: the model was trained on no task")
        return
    task, variant = load_task(meta["task"], meta.get("task_settings")), meta["variant"]
    protocol = task.protocol(variant)
    if missing := _missing_token(encoder, protocol):
        print(f"the check of trees does not apply: {missing!r} is not one token of this tokenizer")
        return
    window = window or trained_on(meta, model.config)["window"]
    budget = Budget(min(window, model.config.context), depth=max(1, task.levels(variant)))
    equal, total = check_trees(
        model,
        encoder,
        out,
        protocol,
        _problems(task, path.parent / "held_out.jsonl", check),
        budget,
        condition=meta.get("condition", ""),
    )
    print(f"greedy trees equal token for token: {equal} of {total}")


def _missing_token(tokenizer, protocol) -> str | None:
    """Return the first tag of the task that is not a single token of the tokenizer, or None.

    Without these tokens no thread can spawn.
    """
    for text in (protocol.spawn_open, protocol.spawn_close, protocol.join_open):
        try:
            tokenizer.token(text)
        except UserError:
            return text
    return None


def _problems(task, path: Path, count: int) -> list:
    """Return `count` problems from the file at `path`, or the first held-out ones of the task if there is no file."""
    from apr_jax.data.problems import ProblemFile
    from apr_jax.tasks.task import HELD_OUT, first_problems

    if path.is_file():
        return ProblemFile(task, path)[:count]
    problems, _ = first_problems(task, HELD_OUT, count)
    return problems


def _work(values: flags.FlagValues, arguments: Sequence[str]) -> None:
    run(**{name: values[name].value for name in ("checkpoint", "out", "dtype", "tokenizer", "check", "window")})


def main(argv: Sequence[str]) -> int:
    return command.run(__doc__, _define, _work, argv, required=("checkpoint", "out"))


if __name__ == "__main__":
    sys.exit(main(sys.argv))
