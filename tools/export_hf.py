"""Exports a checkpoint to a Hugging Face folder, which transformers and SGLang load, and checks it.

    python -m tools.export_hf --checkpoint=runs/laptop/sft_apr/checkpoints --out=exported

--checkpoint is the folder of one saved step (.../checkpoints/1000) or of all of them (.../checkpoints: the
newest is taken). Nothing but --checkpoint and --out is needed. The check loads the folder with
transformers, compares logits, and decodes problems of the model's task greedily with transformers and with our own
engine: the trees of threads must be the same token for token. Problems are the run's held-out ones where
they are found beside the tokenizer, else the task's first ones. Of a model that was trained on no task, and with a
tokenizer that lacks the task's tokens, only logits are compared.
"""

import functools
import random
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from apr_jax.errors import UserError
from tools import command

RANDOM_IDS = 64  # tokens of the sequences whose logits are compared
LOGIT_TOLERANCE = 1e-3


def _define(values: flags.FlagValues) -> None:
    text = functools.partial(flags.DEFINE_string, default=None, flag_values=values)
    number = functools.partial(flags.DEFINE_integer, flag_values=values)
    text("checkpoint", help="Folder of a saved step, or the folder of all steps of a stage.")
    text("out", help="Folder to write. An earlier export there is replaced; a folder of anything else is refused.")
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Type of the stored weights.", flag_values=values)
    text("tokenizer", help="The tokenizer.json. Default: looked for from the checkpoint's folder up, and in data/.")
    number("check", 20, "Trees to compare after the export; 0: no check.", lower_bound=0)
    number("window", None, "Tokens of one thread in the check. Default: the run's, else 768.", lower_bound=32)


def run(checkpoint: str, out: str, dtype: str, tokenizer: str | None, check: int, window: int | None) -> None:
    """Raises UserError or OSError, each with a line that says what to do."""
    folder = Path(checkpoint).absolute()
    if not folder.is_dir():
        raise FileNotFoundError(f"no checkpoint at {folder}")
    if Path(out).exists() and not Path(out).is_dir():
        raise NotADirectoryError(f"{out} is a file, the export needs a folder")
    from apr_jax.export.hf import check_export, check_trees, export_hf, trained_on  # here: --help need not wait for JAX
    from apr_jax.tasks.task import load_task
    from apr_jax.text.hub import find_tokenizer, load_tokenizer
    from apr_jax.train.checkpoint import load_model

    path = find_tokenizer(folder, tokenizer)
    words = load_tokenizer(str(path))
    model, meta = load_model(folder)
    export_hf(model, words, out, meta, dtype)
    print(f"written to {out}")
    if not check:
        return
    from apr_jax.threads.run import Budget

    rng, rows = random.Random(0), model.config.vocab_size
    sequences = [[rng.randrange(rows) for _ in range(min(RANDOM_IDS, model.config.context))] for _ in range(check)]
    difference = check_export(model, words, out, sequences)["max_logit_difference"]
    print(f"largest difference of a logit from transformers', {len(sequences)} sequences: {difference:.2e}")
    if not difference <= LOGIT_TOLERANCE:  # so that a NaN fails too
        raise UserError(f"{out} does not compute what the checkpoint does: logits differ by {difference:.2e}")
    if "task" not in meta:
        print("the check of trees does not apply: the model was trained on no task")
        return
    task, variant = load_task(meta["task"], meta.get("task_settings")), meta["variant"]
    protocol = task.protocol(variant)
    if missing := _missing_token(words, protocol):
        print(f"the check of trees does not apply: {missing!r} is not one token of this tokenizer")
        return
    window = window or trained_on(meta, model.config)["window"]
    budget = Budget(min(window, model.config.context), depth=max(1, task.levels(variant)))
    equal, total = check_trees(
        model,
        words,
        out,
        protocol,
        _problems(task, path.parent / "held_out.jsonl", check),
        budget,
        condition=meta.get("condition", ""),
    )
    print(f"greedy trees equal token for token: {equal} of {total}")


def _missing_token(words, protocol) -> str | None:
    """The first of the task's tokens that the tokenizer has no single token for; without them no thread spawns."""
    for text in (protocol.spawn_open, protocol.spawn_close, protocol.join_open):
        try:
            words.token(text)
        except UserError:
            return text
    return None


def _problems(task, path: Path, count: int) -> list:
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
