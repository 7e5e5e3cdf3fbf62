"""Import of a Hugging Face folder: the way of `apr_jax.export.hf` back, by the same names.

    config.json                                                          the family, its sizes
    model.safetensors, or model.safetensors.index.json and its shards    weights of any float type
    tokenizer_config.json                                                of an export of ours: its context

Nothing is skipped or guessed: what the folder has too much, too little or otherwise is refused by name, before weights
are read. So is every key of config.json that is not known to leave the family's computation as it is. Pickled weights
(pytorch_model.bin) are never opened: to read a pickle is to run it.
"""

import contextlib
import dataclasses
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open

from apr_jax.errors import UserError
from apr_jax.export.hf import INDEX, KEY, SPARE_POSITIONS, WEIGHTS, hf_name
from apr_jax.model.family import BUILT_IN, Family, Model, ModelConfig, abstract_model, family_of, load_family
from apr_jax.model.hugging_face import Change, ConfigReader
from apr_jax.train.optimizer import path_name

FLOATS = ("F16", "BF16", "F32", "F64")  # as safetensors calls them
ADAPTER = "adapter_config.json"  # transformers adds its weights to the model's
# config.json goes by lists of the keys that are known: a family's own, these that are read for every family, and those
# below. Any other key with a value is refused, since it may change the computation.
READ = ("architectures", "model_type", "max_position_embeddings", "eos_token_id")
# Keys that leave the logits as they are: where a model comes from, how it is stored, run and sampled from.
FREE = (
    "_name_or_path", "_commit_hash", "_attn_implementation", "_attn_implementation_autoset", "_flash_attn_2_enabled",
    "attn_implementation", "begin_suppress_tokens", "bad_words_ids", "bos_token_id", "decoder_start_token_id",
    "diversity_penalty", "do_sample", "dtype", "early_stopping", "encoder_no_repeat_ngram_size", "epsilon_cutoff",
    "eta_cutoff", "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id", "forced_eos_token_id",
    "gradient_checkpointing", "id2label", "initializer_range", "is_decoder", "label2id", "length_penalty",
    "max_length", "max_new_tokens", "max_sequence_length", "min_length", "name_or_path", "no_repeat_ngram_size",
    "num_beam_groups", "num_beams", "num_labels", "num_return_sequences", "output_attentions", "output_hidden_states",
    "output_scores", "pad_token_id", "prefix", "pretraining_tp", "problem_type", "remove_invalid_values",
    "repetition_penalty", "return_dict", "return_dict_in_generate", "sep_token_id", "suppress_tokens",
    "task_specific_params", "temperature", "tf_legacy_loss", "tokenizer_class", "top_k", "top_p", "torch_dtype",
    "torchscript", "transformers.js_config", "transformers_version", "typical_p", "unsloth_fixed", "unsloth_version",
    "use_bfloat16", "use_cache", KEY,
)  # fmt: skip


class HfFolderError(UserError):
    """A folder that holds no model of ours; one line that names the file and the key or tensor."""


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor as a file's header tells of it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a tensor goes: into one layer of a parameter of ours, or (None) all of it."""

    parameter: str
    layer: int | None
    shape: tuple[int, ...]  # ours, of one layer
    change: Change
    expected: tuple[int, ...]  # theirs


def import_hf(folder: Path | str, family: str | None = None) -> Model:
    """The folder's model, its weights as float32. `family` as `load_family` takes it; None: the built-in one that
    config.json tells. Raises HfFolderError; UserError for a family that is none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise HfFolderError(f"no folder at {folder}")
    config = read_hf_config(folder, family)
    kind = family_of(config)
    if (folder / ADAPTER).is_file():
        raise HfFolderError(f"{folder / ADAPTER}: the model has an adapter, merge it into the weights first")
    graphdef, weights = nnx.split(abstract_model(config))
    abstract = nnx.to_pure_dict(weights)
    shapes = {path_name(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(abstract)}
    stored = _stored_tensors(folder)
    # Below, the tensors that are missing are named; of a wrong number there could be more than memory holds.
    if config.layers > max(len(stored), 1000):
        raise HfFolderError(
            f"{folder / 'config.json'}: the number of layers is {config.layers}, the files hold fewer tensors"
        )
    places = _places(kind, shapes)
    embedding, head = (hf_name(kind, name)[0] for name in ("embed_VxD", "head_DxV"))
    tied = {head: places[embedding]} if config.tie_embeddings and head in stored else {}
    _check(folder, kind, config, stored, places | tied)
    arrays = {name: np.empty(shape, np.float32) for name, shape in shapes.items()}
    for name, array in _read(stored, places.keys()):
        place = places[name]
        whole = arrays[place.parameter]
        whole[... if place.layer is None else place.layer] = place.change.ours(array, place.shape)
    if tied:
        ((_, table),) = _read(stored, {head})
        if not np.array_equal(table, arrays["embed_VxD"]):
            raise HfFolderError(
                f"{stored[head].file}: {head} is not {embedding}, with which config.json ties it (tie_word_embeddings)"
            )
    filled = jax.tree.map_with_path(lambda path, _: jnp.asarray(arrays.pop(path_name(path))), abstract)
    nnx.replace_by_pure_dict(weights, filled)
    return nnx.merge(graphdef, weights)


# ---------------------------------------------------------------------- config.json


def read_hf_config(folder: Path, family: str | None = None) -> ModelConfig:
    """The sizes in config.json; keys that it may leave out mean what they mean to transformers. `family` and errors as
    `import_hf`."""
    path = folder / "config.json"
    content = _read_json(path)
    own = load_family(family) if family else None
    try:
        kind = own or _told_family(content)
        form, reader = kind.hugging_face, ConfigReader(content, kind.title)
        if content.get("architectures") != [form.architecture]:
            raise reader.wrong("architectures", [form.architecture])
        for key, values in {"model_type": (form.model_type, None), **form.fixed}.items():
            if content.get(key, values[0]) not in values:
                raise reader.wrong(key, values[0])
        for key, value in content.items():
            if value is not None and key not in (*READ, *form.read, *form.fixed, *FREE):
                raise reader.unknown(key, value)
        positions = reader.number("max_position_embeddings", default=form.positions)
        return form.read_config(reader, _context(folder, positions))
    except UserError as error:
        raise HfFolderError(f"{path}: {error}") from None


def _told_family(content: dict) -> Family:
    """The built-in family of a config.json. Raises UserError."""
    families = [load_family(name) for name in BUILT_IN]
    told, architectures = content.get("model_type"), content.get("architectures")
    for family in families:
        form = family.hugging_face
        if told == form.model_type or (told is None and architectures == [form.architecture]):
            return family
    key, given = ("architectures", architectures) if told is None else ("model_type", told)
    known = [f.hugging_face.model_type if key == "model_type" else [f.hugging_face.architecture] for f in families]
    raise UserError(
        f"{key} is {json.dumps(given)}, must be {' or '.join(map(json.dumps, known))}, or give the model's family"
    )


def read_positions(folder: Path, family: Family) -> int:
    """The longest position of a config.json that `read_hf_config` accepts, as it stands there."""
    return _read_json(folder / "config.json").get("max_position_embeddings") or family.hugging_face.positions


def _context(folder: Path, positions: int) -> int:
    """The longest position: of an export of ours without the spare ones, which its tokenizer does not count."""
    path = folder / "tokenizer_config.json"
    longest = _read_json(path).get("model_max_length") if path.is_file() else None
    return longest if longest == positions - SPARE_POSITIONS else positions


def _read_json(path: Path) -> dict:
    if not path.is_file():
        raise HfFolderError(f"no {path.name} in {path.parent}")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise HfFolderError(f"{path} is no JSON: {error}") from None
    if not isinstance(content, dict):
        raise HfFolderError(f"{path} is no JSON object")
    return content


# ---------------------------------------------------------------------- weights


def _places(family: Family, shapes: dict[str, tuple[int, ...]]) -> dict[str, Place]:
    """Every tensor that a folder must have, by its Hugging Face name, in the order of our parameters."""
    places = {}
    for parameter, shape in shapes.items():
        theirs, change = hf_name(family, parameter)
        stacked = "{}" in theirs
        own = shape[1:] if stacked else shape
        expected = jax.eval_shape(change.theirs, jax.ShapeDtypeStruct(own, jnp.float32)).shape
        for l in range(shape[0] if stacked else 1):
            places[theirs.format(l)] = Place(parameter, l if stacked else None, own, change, expected)
    return places


def _stored_tensors(folder: Path) -> dict[str, Stored]:
    """All tensors of the folder by name. A file of all weights goes before an index, as in transformers."""
    if (folder / WEIGHTS).is_file():
        return _header(folder / WEIGHTS)
    if not (folder / INDEX).is_file():
        if pickled := sorted(path.name for kind in ("*.bin", "*.pt", "*.pth") for path in folder.glob(kind)):
            raise HfFolderError(f"{folder} has its weights as a pickle, {pickled[0]}: only safetensors are read")
        raise HfFolderError(f"no {WEIGHTS} and no {INDEX} in {folder}: only safetensors are read")
    path = folder / INDEX
    files = _read_json(path).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise HfFolderError(f"{path} has no weight_map")
    if bad := [file for file in files.values() if not isinstance(file, str) or Path(file).name != file]:
        raise HfFolderError(
            f"{path}: a file of weight_map is {json.dumps(bad[0])}, must be the name of a file beside it"
        )
    stored = {}
    for file in dict.fromkeys(files.values()):
        for name, tensor in _header(folder / file).items():
            if files.get(name) != file:
                raise HfFolderError(f"{folder / file} holds {name}, {INDEX} says {files.get(name, 'nothing of it')}")
            stored[name] = tensor
    if missing := files.keys() - stored.keys():
        raise HfFolderError(f"{folder / files[min(missing)]} does not hold {min(missing)}, which {INDEX} says it does")
    return stored


def _header(file: Path) -> dict[str, Stored]:
    with _opened(file) as tensors:
        slices = {name: tensors.get_slice(name) for name in tensors.keys()}
        return {name: Stored(file, one.get_dtype(), tuple(one.get_shape())) for name, one in slices.items()}


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, "numpy") as tensors:
            yield tensors
    except FileNotFoundError:
        raise HfFolderError(f"no {file.name} in {file.parent}") from None
    except (SafetensorError, OSError) as error:
        raise HfFolderError(f"{file} cannot be read: {(str(error).splitlines() or ['broken'])[0]}") from None


def _check(
    folder: Path, family: Family, config: ModelConfig, stored: dict[str, Stored], places: dict[str, Place]
) -> None:
    """Raises HfFolderError for the first tensor that is missing, unknown, of another shape or no floats."""
    expected = {name: place.expected for name, place in places.items()}
    if missing := [name for name in expected if name not in stored]:
        raise HfFolderError(
            f"the weights in {folder} have no {missing[0]} (shape {_shape(expected[missing[0]])}), "
            f"{len(missing)} of {len(expected)} tensors are missing"
        )
    derived = family.hugging_face.derived
    if unknown := [name for name in stored if name not in expected and not re.fullmatch(derived, name)]:
        one = stored[unknown[0]]
        raise HfFolderError(
            f"{one.file} holds {unknown[0]} (shape {_shape(one.shape)}), which a {family.title} of {config.layers} "
            f"layers does not have, {len(unknown)} such tensors in all"
        )
    for name, shape in expected.items():
        one = stored[name]
        if one.shape != shape:
            raise HfFolderError(
                f"{one.file}: {name} has the shape {_shape(one.shape)}, by config.json it must be {_shape(shape)}"
            )
        if one.dtype not in FLOATS:
            raise HfFolderError(f"{one.file}: {name} is of type {one.dtype}, must be one of {', '.join(FLOATS)}")


def _shape(shape: Sequence[int]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _read(stored: dict[str, Stored], names: Sequence[str]) -> Iterator[tuple[str, np.ndarray]]:
    """The named tensors as float32, file by file."""
    for file in dict.fromkeys(stored[name].file for name in names):
        with _opened(file) as tensors:
            for name in (name for name in names if stored[name].file == file):
                with np.errstate(over="ignore"):  # a float64 may be too large: told with those that are not finite
                    array = tensors.get_tensor(name).astype(np.float32)
                if count := array.size - int(np.isfinite(array).sum()):
                    raise HfFolderError(f"{file}: {name} holds {count} values that are no finite float32 numbers")
                yield name, array
