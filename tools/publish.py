"""Copies the results of a run into a small folder: its report and figures, and with --model its last model.

    python -m tools.publish runs/workstation experiments/results/workstation --model

The folder then has report.md, summary.json, config.json, versions.json, manifest.json (of the data set), check.json (of
the export) and figures/. With --model it also has tokenizer.json and checkpoints/STEP: the weights without the
optimizer's state, a third of the size, for tools.export_hf and `load_model`.
"""

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from apr_jax.errors import UserError
from apr_jax.io.paths import read_json
from tools import command

FILES = ("report.md", "summary.json", "config.json", "versions.json", "data/manifest.json", "export/check.json")


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_boolean("model", False, "Publish the last model of the task's first variant, too.", flag_values=values)


def _work(values: flags.FlagValues, arguments: Sequence[str]) -> None:
    run, out = map(Path, arguments)
    if missing := [name for name in (*FILES, "figures") if not (run / name).exists()]:
        raise FileNotFoundError(f"{run} is not a finished run: it has no {missing[0]}")
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"{out} is a file, a folder is needed")
    if run.resolve() in (out.resolve(), *out.resolve().parents) or any(
        (out / n).exists() for n in ("data", "metrics.jsonl")
    ):
        raise UserError(f"{out} is a run's own folder, whose checkpoints would be replaced: give another folder")
    if values["model"].value:
        from apr_jax.tasks.task import find_task
        from apr_jax.train.checkpoint import last_model  # here, so that --help does not wait for JAX

        spec = read_json(run / "config.json", "publish another run").get("task")
        if not isinstance(spec, str):
            raise UserError(f"{run} is a run of an earlier version: its config.json names no task")
        variant = find_task(spec).variants[0]
        model = last_model(run, variant)
        if model is None:
            raise FileNotFoundError(f"{run} has no {variant} checkpoint")
        _check_weights(run, model)
    out.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        shutil.copyfile(run / name, out / Path(name).name)
    shutil.copytree(run / "figures", out / "figures", dirs_exist_ok=True)
    if values["model"].value:
        _publish_model(model, run / "data" / "tokenizer.json", out)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"written to {out}: {size / 1e6:.1f} MB")


def _check_weights(run: Path, checkpoint: Path) -> None:
    """Raise UserError if the run's export is of other weights than `checkpoint`: its report may be, too."""
    from apr_jax.train.checkpoint import CheckpointError, fingerprint, load_model

    try:
        exported = json.loads((run / "export" / "check.json").read_text())
    except ValueError:
        return
    exported = exported.get("weights") if isinstance(exported, dict) else None
    try:
        present = fingerprint(load_model(checkpoint)[0])
    except CheckpointError as error:
        raise UserError(error) from None
    if exported not in (None, present):  # exports of earlier versions have no fingerprint
        raise UserError(f"{run / 'export'} is of other weights than {checkpoint}: run the later stages again")


def _publish_model(checkpoint: Path, tokenizer: Path, out: Path) -> None:
    from apr_jax.train.checkpoint import load_model, save_model

    model, meta = load_model(checkpoint)
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    save_model(out / "checkpoints", model, meta)
    shutil.copyfile(tokenizer, out / "tokenizer.json")


def main(argv: Sequence[str]) -> int:
    return command.run(__doc__, _define, _work, argv, takes=["RUN", "OUT"])


if __name__ == "__main__":
    sys.exit(main(sys.argv))
