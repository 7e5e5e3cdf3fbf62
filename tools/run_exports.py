"""Exports the last models of a run to Hugging Face format, and again when there are newer weights."""

import os
import subprocess
import sys
from pathlib import Path

from apr_jax.errors import UserError
from apr_jax.io.files import write_text
from apr_jax.tasks.task import find_task
from apr_jax.train.checkpoint import last_model

ROOT = Path(__file__).resolve().parent.parent


def export_last_models(run: Path, spec: str) -> list[Path]:
    """Export a run's last model of each trained variant, and return the folders ``latency/exports/VARIANT``.

    `spec` is the run's task. A variant's last model is that of GRPO, or else that of SFT. The main variant comes last.
    Raises FileNotFoundError if nothing was trained.
    """
    last = {}
    for variant in reversed(find_task(spec).variants):
        if checkpoint := last_model(run, variant):
            last[variant] = checkpoint
    if not last:
        raise FileNotFoundError(f"no checkpoint under {run}: run its --stage=sft first")
    return [_exported(checkpoint, run / "latency" / "exports" / variant) for variant, checkpoint in last.items()]


def _exported(checkpoint: Path, folder: Path) -> Path:
    """Export a checkpoint to `folder`, unless `folder` has an export of it already. Return `folder`.

    Another process exports it: JAX in this one would occupy the GPU memory that the servers need.
    """
    stamp, state = folder.with_suffix(".txt"), f"{checkpoint.resolve()} {checkpoint.stat().st_mtime_ns}\n"
    if not (folder / "config.json").is_file() or not stamp.is_file() or stamp.read_text() != state:
        arguments = [f"--checkpoint={checkpoint.absolute()}", f"--out={folder.absolute()}", "--check=0"]
        made = subprocess.run(
            [sys.executable, "-m", "tools.export_hf", *arguments], cwd=ROOT, capture_output=True,
            text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"},
        )  # fmt: skip
        if made.returncode:
            _, sign, why = made.stderr.strip().rpartition("error: ")
            if not sign or "Traceback" in made.stderr:
                raise RuntimeError(f"{checkpoint} could not be exported:\n{made.stderr}")
            raise UserError(why)
        write_text(stamp, state)
    return folder
