"""The last models of a run in Hugging Face format, exported anew where there are newer weights."""

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
    """Folders ``latency/exports/VARIANT`` of a run on a task: for each variant that was trained the last model of GRPO,
    of SFT where it had none; the main variant comes last. Raises FileNotFoundError where nothing was trained."""
    last = {}
    for variant in reversed(find_task(spec).variants):
        if checkpoint := last_model(run, variant):
            last[variant] = checkpoint
    if not last:
        raise FileNotFoundError(f"no checkpoint under {run}: run --stage=sft of it first")
    return [_exported(checkpoint, run / "latency" / "exports" / variant) for variant, checkpoint in last.items()]


def _exported(checkpoint: Path, folder: Path) -> Path:
    """The checkpoint in Hugging Face format. By another process: JAX would keep a GPU's memory from the servers."""
    stamp, of = folder.with_suffix(".txt"), f"{checkpoint.absolute()} {checkpoint.stat().st_mtime_ns}\n"
    if not (folder / "config.json").is_file() or not stamp.is_file() or stamp.read_text() != of:
        words = [f"--checkpoint={checkpoint.absolute()}", f"--out={folder.absolute()}", "--check=0"]
        made = subprocess.run(
            [sys.executable, "-m", "tools.export_hf", *words], cwd=ROOT, capture_output=True,
            text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"},
        )  # fmt: skip
        if made.returncode:
            _, sign, why = made.stderr.strip().rpartition("error: ")
            if not sign or "Traceback" in made.stderr:
                raise RuntimeError(f"{checkpoint} could not be exported:\n{made.stderr}")
            raise UserError(why)
        write_text(stamp, of)
    return folder
