"""What an exported folder says of itself: the family, task and variant of its model, how it is asked, its sizes."""

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

# Of its object.
FIELDS = {"family": str, "task": str, "task_settings": dict, "variant": str, "condition": str, "window": int}


@dataclasses.dataclass(frozen=True)
class Export:
    """A checkpoint in Hugging Face format, as `tools.export_hf` writes it. Lengths are tokens."""

    folder: Path
    family: str  # as `load_family` takes it
    task: Task
    variant: str
    condition: str  # first on the root's prompt, as most demonstrations had it
    window: int  # of the threads that it was trained on
    context: int  # of the model: the longest window
    vocab_size: int  # of the model
    tokenizer: Tokenizer | HubTokenizer
    weights: str  # digest of config.json and all weights


def read_export(folder: Path) -> Export:
    """Raises FileNotFoundError or UserError where the folder holds no model that we can run, or does not say of which
    task and variant it is."""
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    if not files[0].is_file() or len(files) < 2:
        raise FileNotFoundError(f"no exported model in {folder} (python -m tools.export_hf writes one)")
    said = read_json(files[0], "export it again with tools.export_hf").get(KEY)
    if not _is_whole(said):
        raise UserError(
            f"{files[0]} does not say of which family and task its model is: export it again with tools.export_hf"
        )
    config = read_hf_config(folder, said["family"])
    task = load_task(said["task"], said["task_settings"])
    return Export(
        folder, said["family"], task, task.check_variant(said["variant"]), said["condition"],
        min(said["window"], config.context), config.context, config.vocab_size,
        load_tokenizer(str(folder.absolute() / "tokenizer.json")), _digest(files),
    )  # fmt: skip


def _is_whole(said: Any) -> bool:
    return isinstance(said, dict) and all(isinstance(said.get(name), kind) for name, kind in FIELDS.items())


def _digest(files: list[Path]) -> str:
    digest = hashlib.blake2b(digest_size=6)
    for file in files:
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "blake2b").digest())
    return digest.hexdigest()
