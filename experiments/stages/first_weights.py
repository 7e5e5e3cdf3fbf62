"""The weights that supervised training begins with (`model.checkpoint`): their fingerprint, and whether their sizes and
tokens are those of the run."""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apr_jax.errors import UserError
from apr_jax.io import json_lines
from apr_jax.io.files import write_text
from apr_jax.model.family import Model, ModelConfig, config_json
from apr_jax.text.hub import find_tokenizer, load_tokenizer
from apr_jax.text.tokenizer import Tokenizer
from apr_jax.train.checkpoint import CheckpointError, fingerprint, load_model
from experiments.settings import Settings
from experiments.workspace import fingerprint_of

KNOWN = "first_weights.jsonl"  # in the store: the paths and fingerprints of checkpoints, also of deleted ones


@dataclass(frozen=True)
class FirstWeights:
    """The checkpoint that supervised training begins with."""

    path: str  # of the setting, absolute
    place: str  # the same without links: a link in a run folder may be removed
    fingerprint: str  # of weights and config


def find(settings: Settings, store: Path) -> FirstWeights | None:
    """Return the checkpoint in the setting `model.checkpoint`, or None if the setting is empty (random weights).

    The store keeps the paths and fingerprints of checkpoints, so a run can resume after its checkpoint was deleted.
    Raises UserError if the checkpoint does not exist and the store does not have its path, or if its sizes differ from
    the run's.
    """
    if not settings.checkpoint:
        return None
    path = str(Path(settings.checkpoint).absolute())
    seen = next((row for row in _rows(store) if row["path"] == path), {})
    for place in dict.fromkeys((os.path.realpath(path), seen.get("place", path))):
        if Path(place).is_dir() or not seen:
            try:
                model, _ = load_model(place)
            except CheckpointError as error:
                raise UserError(f"model.checkpoint: {error}") from None
            check_sizes(settings, settings.checkpoint, model.config)
            return FirstWeights(path, place, _fingerprint(model))
    return FirstWeights(path, path, seen["fingerprint"])


def _fingerprint(model: Model) -> str:
    """Return the fingerprint of a model's weights and config."""
    return fingerprint_of([fingerprint(model), config_json(model.config)])


def _rows(store: Path) -> list[dict[str, str]]:
    known = store / KNOWN
    return [row for _, row in json_lines.read_lines(known)] if known.exists() else []


def remember(weights: FirstWeights, store: Path) -> None:
    """Write the path and the fingerprint of a checkpoint to the store."""
    rows, mine = _rows(store), dataclasses.asdict(weights)
    if mine not in rows:
        rows = [row for row in rows if row["path"] != weights.path] + [mine]
        store.mkdir(parents=True, exist_ok=True)
        write_text(store / KNOWN, "".join(map(json_lines.to_line, rows)))


def load(
    settings: Settings, config: ModelConfig, tokenizer: Tokenizer, path: str | Path, known: FirstWeights | None = None
) -> Model:  # fmt: skip
    """Return the model of a checkpoint, with the run's settings.

    Values in its config that are not settings, such as the rotary base, stay as in training. Raises UserError if the
    model does not fit the run, or if it is no longer the model of `known`.
    """
    model, _ = load_model(path)
    if known and _fingerprint(model) != known.fingerprint:
        raise UserError(f"model.checkpoint {path} has changed since this command began: give the command again")
    check_sizes(settings, path, model.config)
    _check_vocabulary(path, model.config, tokenizer)
    known: set[str] = {"vocab_size", *settings.model}
    kept = {f.name: getattr(model.config, f.name) for f in dataclasses.fields(model.config) if f.name not in known}
    model.config = dataclasses.replace(config, **kept)
    return model


def check_sizes(settings: Settings, checkpoint: str | Path, given: ModelConfig) -> None:
    """Raise UserError if a checkpoint's sizes differ from the run's, or if its context is below the run's window."""
    run = settings.family.Config(vocab_size=given.vocab_size, **settings.model)
    names: dict[str, Any] = {"kv_heads": "kv", "feed_forward": "hidden"}  # these fields may be None, the properties not
    for name in ("family", "width", "layers", "heads", "kv_heads", "feed_forward", "tie_embeddings"):
        theirs, ours = (getattr(config, names.get(name, name)) for config in (given, run))
        if theirs != ours:
            raise UserError(
                f"model.checkpoint {checkpoint} has {name} {theirs}, the run's model {ours}: set model.{name}"
            )
    if settings.window > given.context:
        raise UserError(
            f"window is at most the context of model.checkpoint ({given.context}), was given {settings.window}"
        )


def _check_vocabulary(checkpoint: str | Path, given: ModelConfig, tokenizer: Tokenizer) -> None:
    """Raise UserError if a checkpoint's tokens differ from the run's.

    If the checkpoint has no tokenizer, only the size of the vocabulary is compared.
    """
    if given.vocab_size != len(tokenizer):
        raise UserError(
            f"model.checkpoint {checkpoint} has a vocabulary of {given.vocab_size}, the run's tokenizer has "
            f"{len(tokenizer)}: set tokenizer.name, or the settings of the task's tokenizer"
        )
    try:
        path = find_tokenizer(Path(checkpoint))
    except FileNotFoundError:
        return
    other = load_tokenizer(str(path))
    theirs, ours = other.backend.get_vocab(), tokenizer.backend.get_vocab()
    if others := sorted(theirs.items() - ours.items(), key=lambda item: item[1]):
        token, index = others[0]
        raise UserError(
            f"model.checkpoint {checkpoint} has other tokens than the run's tokenizer, such as {token!r} for the "
            f"number {index}: set tokenizer.name to {path}"
        )
    if ends := sorted(other.ends - tokenizer.ends):
        raise UserError(
            f"model.checkpoint {checkpoint} also ends a text with the token {ends[0]}, the run's tokenizer does "
            f"not: set tokenizer.name to {path}"
        )
