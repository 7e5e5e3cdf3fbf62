"""Imports a Hugging Face model, a folder or a model of the hub, as a checkpoint that everything here starts from.

    python -m tools.import_hf --model=exported --out=imported
    python -m tools.export_hf --checkpoint=imported --out=exported_again
    python -m experiments.run --config=... --config.model.checkpoint=imported --config.sft.steps=0

The model is of a built-in family, or of your own (--family), with its weights as safetensors, in one file or several.
OUT gets the checkpoint, 0, the tokenizer beside it, and generation_config.json where several tokens end a text. A
config or a tensor that the family does not have is named and refused, never skipped.
"""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from apr_jax.errors import UserError, first_line
from tools import command

WANTED = ("*.safetensors", "*.json")  # of a model of the hub; a pickle is not even fetched
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
    "generation_config.json",
)  # fmt: skip


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("model", None, "Folder, or OWNER/NAME of the hub, of the model to read.", flag_values=values)
    flags.DEFINE_string(
        "out", None, "Folder to write. An earlier import there is replaced; anything else is refused.",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_string(
        "tokenizer", None, "A tokenizer.json, or another tokenizer's folder. Default: the model's own.",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_string(
        "task", None, "The task that the model was trained on. Default: as its config.json says.", flag_values=values
    )
    flags.DEFINE_string(
        "family", None, "The model's family, a package.module of your own. Default: the built-in one that its "
        "config.json tells.", flag_values=values,
    )  # fmt: skip
    flags.DEFINE_string("variant", None, "The variant of that task. Default: its first.", flag_values=values)


def _work(values: flags.FlagValues, arguments: Sequence[str]) -> None:
    from apr_jax.export.imported import import_hf, read_positions
    from apr_jax.io.folder import replaced  # here: --help and a refusal need not wait for JAX
    from apr_jax.model.family import config_json, family_of, parameter_count
    from apr_jax.text.hub import GENERATION, HubTokenizer, load_tokenizer, with_ends
    from apr_jax.train.checkpoint import save_model

    with replaced(values["out"].value, _foreign, "import") as part:
        folder = _model_folder(values["model"].value)
        words = values["tokenizer"].value or str(folder / "tokenizer.json")
        if not values["tokenizer"].value and not Path(words).is_file():
            raise FileNotFoundError(f"no tokenizer.json in {folder}: name one with --tokenizer=FILE")
        tokenizer = with_ends(load_tokenizer(words), folder)
        model = import_hf(folder, values["family"].value)
        if len(tokenizer) > model.config.vocab_size:
            raise UserError(f"the tokenizer has {len(tokenizer)} tokens, the model {model.config.vocab_size}")
        total, inner = parameter_count(model)
        trained = _trained_on(folder, values["task"].value, values["variant"].value)
        meta = {
            "model": config_json(model.config), **trained, "stage": "imported", "step": 0,
            "source": _source(values["model"].value), "parameters": total, "parameters_without_embeddings": inner,
            "max_position_embeddings": read_positions(folder, family_of(model.config)),
        }  # fmt: skip
        save_model(part, model, meta)
        if isinstance(tokenizer, HubTokenizer):
            tokenizer.backend.save_pretrained(part)
        else:
            tokenizer.save(part / "tokenizer.json")
        if len(tokenizer.ends) > 1:
            (part / GENERATION).write_text(json.dumps({"eos_token_id": sorted(tokenizer.ends)}) + "\n")
    print(f"written to {values['out'].value}: {total:,} parameters, {model.config.vocab_size:,} words")


def _model_folder(name: str) -> Path:
    """The folder itself, or a model of the hub brought onto this machine. Raises OSError."""
    if Path(name).is_dir():
        return Path(name)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        raise FileNotFoundError(f"no folder at {name}, and a model of the hub is OWNER/NAME")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(WANTED)))
    except Exception as error:  # of many kinds: no network, no such model, no leave to read it, a full disk
        raise OSError(
            f"no folder at {name}, and the hub did not give a model of that name: {first_line(error)}"
        ) from None


def _trained_on(folder: Path, spec: str | None, variant: str | None) -> dict:
    """The task and variant that were given, else those that an export of ours tells. Raises UserError."""
    from apr_jax.export.hf import KEY
    from apr_jax.io.paths import read_json
    from apr_jax.tasks.task import load_task

    if spec is None:
        if variant:
            raise UserError(f"--variant goes with --task, was given {variant!r} alone")
        told = read_json(folder / "config.json", "give another model").get(KEY, {})
        return {key: value for key, value in told.items() if key != "family"}  # stands with the sizes
    task = load_task(spec)
    return {"task": spec, "variant": task.check_variant(variant or task.variants[0])}


def _source(name: str) -> str:
    """A model of the hub by its name; of a folder its own name, for where it lies is this machine's affair."""
    return Path(name).resolve().name if Path(name).is_dir() else name


def _foreign(folder: Path) -> str | None:
    """A file of a folder that no import writes, or a checkpoint that was trained."""
    from apr_jax.train.checkpoint import CheckpointError, load_meta

    if others := {path.name for path in folder.iterdir()} - {"0", *TOKENIZER_FILES}:
        return min(others)
    try:
        imported = not (folder / "0").exists() or load_meta(folder / "0")[1].get("stage") == "imported"
    except CheckpointError:
        imported = False
    return None if imported else "0"


def main(argv: Sequence[str]) -> int:
    return command.run(__doc__, _define, _work, argv, required=("model", "out"))


if __name__ == "__main__":
    sys.exit(main(sys.argv))
