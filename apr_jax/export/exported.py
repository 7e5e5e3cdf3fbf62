"""Reads what an exported folder says about its model: family, task, variant, condition, sizes and tokenizer."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

from apr_jax.errors import UserError
from apr_jax.export.hf import KEY
from apr_jax.export.imported import read_hf_config
from apr_jax.io.paths import read_json
from apr_jax.tasks.task import Task, load_task
from apr_jax.text.hub import HubTokenizer, load_tokenizer
from apr_jax.text.tokenizer import Tokenizer

# Of the object `KEY` in config.json.
FIELDS = {"family": str, "task": str, "task_settings": dict, "variant": str, "condition": str, "window": int}


@dataclasses.dataclass(frozen=True)
class Export:
    """A checkpoint in Hugging Face format, as `tools.export_hf` writes it. Lengths are in tokens."""

    folder: Path
    family: str  # as `load_family` takes it
    task: Task
    variant: str
    condition: str  # text at the start of the root's prompt, the one that most demonstrations had
    window: int  # longest thread in training
    context: int  # longest sequence that the model takes
    vocab_size: int  # the model's; the tokenizer may have fewer tokens
    tokenizer: Tokenizer | HubTokenizer
    weights: str  # digest of config.json and of all weights


def read_export(folder: Path) -> Export:
    """Read an exported folder. Raises FileNotFoundError if it holds no exported model. Raises UserError if its
    config.json does not say the model's task and variant, or describes a model that cannot be run here."""
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    if not files[0].is_file() or len(files) < 2:
        raise FileNotFoundError(f"no exported model in {folder} (python -m tools.export_hf writes one)")
    stored = read_json(files[0], "export the model again with tools.export_hf").get(KEY)
    if not _is_complete(stored):
        raise UserError(
            f"{files[0]} does not say the model's family and task: export the model again with tools.export_hf"
        )
    config = read_hf_config(folder, stored["family"])
    task = load_task(stored["task"], stored["task_settings"])
    return Export(
        folder, stored["family"], task, task.check_variant(stored["variant"]), stored["condition"],
        min(stored["window"], config.context), config.context, config.vocab_size,
        load_tokenizer(str(folder.absolute() / "tokenizer.json")), _digest(files),
    )  # fmt: skip


def _is_complete(stored: Any) -> bool:
    return isinstance(stored, dict) and all(isinstance(stored.get(name), kind) for name, kind in FIELDS.items())


def _digest(files: list[Path]) -> str:
    digest = hashlib.blake2b(digest_size=6)
    for file in files:
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "blake2b").digest())
    return digest.hexdigest()
