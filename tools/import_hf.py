"""Imports a Hugging Face model, from a folder or the hub, as a checkpoint that training and all tools can use.

    python -m tools.import_hf --model=exported --out=imported
    python -m tools.export_hf --checkpoint=imported --out=exported_again
    python -m experiments.run --config=... --config.model.checkpoint=imported --config.sft.steps=0

The model is of a built-in family or of your own (--family). Its weights are safetensors, in one file or several. OUT
gets the checkpoint as the folder 0, the tokenizer, and a generation_config.json if several tokens end a text. A config
key or a tensor that the family does not have is an error, never skipped.
"""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from apr_jax.errors import UserError, first_line
from tools import command

WANTED = ("*.safetensors", "*.json")  # files of a hub model that are downloaded; pickles are not
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
    "generation_config.json",
)  # fmt: skip


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("model", None, "Folder of the model, or its OWNER/NAME on the hub.", flag_values=values)
    flags.DEFINE_string(
        "out", None, "Folder to write. An earlier import there is replaced; anything else is refused.",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_string(
        "tokenizer", None, "A tokenizer.json, or another tokenizer's folder. Default: the model's own.",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_string(
        "task", None, "Task that the model was trained on. Default: that of its config.json.", flag_values=values
    )
    flags.DEFINE_string(
        "family", None, "The model's family, a package.module of your own. Default: the built-in family that "
        "its config.json names.", flag_values=values,
    )  # fmt: skip
    flags.DEFINE_string("variant", None, "The variant of that task. Default: its first.", flag_values=values)


def _work(values: flags.FlagValues, arguments: Sequence[str]) -> None:
    from apr_jax.export.imported import import_hf, read_positions
    from apr_jax.io.folder import replaced  # here, so that --help and errors do not wait for JAX
    from apr_jax.model.family import config_json, family_of, parameter_count
    from apr_jax.text.hub import GENERATION, HubTokenizer, load_tokenizer, with_ends
    from apr_jax.train.checkpoint import save_model

    with replaced(values["out"].value, _foreign, "import") as part:
        folder = _model_folder(values["model"].value)
        name = values["tokenizer"].value or str(folder / "tokenizer.json")
        if not values["tokenizer"].value and not Path(name).is_file():
            raise FileNotFoundError(f"no tokenizer.json in {folder}: name one with --tokenizer=FILE")
        tokenizer = with_ends(load_tokenizer(name), folder)
        model = import_hf(folder, values["family"].value)
        if len(tokenizer) > model.config.vocab_size:
            raise UserError(f"the tokenizer has {len(tokenizer)} tokens, the model {model.config.vocab_size}")
        total, inner = parameter_count(model)
        trained_on = _trained_on(folder, values["task"].value, values["variant"].value)
        meta = {
            "model": config_json(model.config), **trained_on, "stage": "imported", "step": 0,
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
    print(f"written to {values['out'].value}: {total:,} parameters, vocabulary {model.config.vocab_size:,}")


def _model_folder(name: str) -> Path:
    """Return the folder of a model. A model of the hub is downloaded. Raises OSError."""
    if Path(name).is_dir():
        return Path(name)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        raise FileNotFoundError(f"no folder at {name}, and a model of the hub is OWNER/NAME")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(WANTED)))
    except Exception as error:  # of many kinds: no network, no such model, no permission, a full disk
        raise OSError(
            f"no folder at {name}, and the hub did not give a model of that name: {first_line(error)}"
        ) from None


def _trained_on(folder: Path, spec: str | None, variant: str | None) -> dict:
    """Return the checkpoint metadata about the training task: as given, or else from an export of ours.

    It is empty if there is neither. Raises UserError for a wrong task or variant.
    """
    from apr_jax.export.hf import KEY
    from apr_jax.io.paths import read_json
    from apr_jax.tasks.task import load_task

    if spec is None:
        if variant:
            raise UserError(f"--variant needs --task, was given {variant!r} alone")
        stored = read_json(folder / "config.json", "give another model").get(KEY, {})
        return {key: value for key, value in stored.items() if key != "family"}  # the model's config has the family
    task = load_task(spec)
    return {"task": spec, "variant": task.check_variant(variant or task.variants[0])}


def _source(name: str) -> str:
    """Return the source of a model for its metadata: its name on the hub, or its folder's name without the path."""
    return Path(name).resolve().name if Path(name).is_dir() else name


def _foreign(folder: Path) -> str | None:
    """Return the name of a file in a folder that no import writes, or "0" for a trained checkpoint; None if neither."""
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
