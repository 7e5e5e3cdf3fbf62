"""Imports a model from a Hugging Face folder. It undoes `apr_jax.export.hf`, with the same names of tensors.

    config.json                                                          the family and the model's sizes
    model.safetensors, or model.safetensors.index.json and its shards    weights of any float type
    tokenizer_config.json                                                the context, if apr_jax exported the folder

Nothing is skipped or guessed. A tensor that is missing, unknown or misshapen is refused by name before any weights are
read. So is every key of config.json that might change the family's computation. Pickled weights (pytorch_model.bin) are
never opened: reading a pickle can run any code.
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

FLOATS = ("F16", "BF16", "F32", "F64")  # dtypes by their names in safetensors
ADAPTER = "adapter_config.json"  # transformers adds an adapter's weights to the model's
# The keys of config.json are checked against three lists: a family's own keys, READ, which are read for every family,
# and FREE. Any other key with a value is refused, since it may change the computation.
READ = ("architectures", "model_type", "max_position_embeddings", "eos_token_id")
# Keys that do not change the logits: a model's origin, its storage, and how it is run and sampled from.
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
    """A folder that cannot be imported. The message is one line that names the file and the key or tensor."""


@dataclasses.dataclass(frozen=True)
class Stored:
    """A stored tensor, as the header of its file describes it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a stored tensor goes: into one layer of a parameter, or into the whole parameter if `layer` is None."""

    parameter: str  # our name
    layer: int | None
    shape: tuple[int, ...]  # our shape, of one layer
    change: Change
    expected: tuple[int, ...]  # the stored tensor's shape


def import_hf(folder: Path | str, family: str | None = None) -> Model:
    """Return the model of a folder, with its weights as float32. `family` is a name that `load_family` takes; None: the
    built-in family that config.json names. Raises HfFolderError if the folder cannot be imported, and UserError if
    there is no such family."""
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
    # A wrong number of layers could make more names of missing tensors below than fit into memory.
    if config.layers > max(len(stored), 1000):
        raise HfFolderError(
            f"{folder / 'config.json'}: the number of layers is {config.layers}, but the files hold fewer tensors"
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
                f"{stored[head].file}: {head} differs from {embedding}, but config.json says tie_word_embeddings"
            )
    filled = jax.tree.map_with_path(lambda path, _: jnp.asarray(arrays.pop(path_name(path))), abstract)
    nnx.replace_by_pure_dict(weights, filled)
    return nnx.merge(graphdef, weights)


# ---------------------------------------------------------------------- config.json


def read_hf_config(folder: Path, family: str | None = None) -> ModelConfig:
    """Read the model's config from config.json. A missing key has the default of transformers. `family` and the errors
    are those of `import_hf`."""
    path = folder / "config.json"
    content = _read_json(path)
    own = load_family(family) if family else None
    try:
        kind = own or _named_family(content)
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


def _named_family(content: dict) -> Family:
    """Return the built-in family that a config.json names. Raises UserError if there is none."""
    families = [load_family(name) for name in BUILT_IN]
    model_type, architectures = content.get("model_type"), content.get("architectures")
    for family in families:
        form = family.hugging_face
        if model_type == form.model_type or (model_type is None and architectures == [form.architecture]):
            return family
    key, given = ("architectures", architectures) if model_type is None else ("model_type", model_type)
    known = [f.hugging_face.model_type if key == "model_type" else [f.hugging_face.architecture] for f in families]
    raise UserError(
        f"{key} is {json.dumps(given)}, must be {' or '.join(map(json.dumps, known))}, or name the model's own family"
    )


def read_positions(folder: Path, family: Family) -> int:
    """Return `max_position_embeddings` of a folder's config.json, or the family's default. Unlike the context, it
    includes the spare positions of an export of ours. `read_hf_config` must have accepted the file."""
    return _read_json(folder / "config.json").get("max_position_embeddings") or family.hugging_face.positions


def _context(folder: Path, positions: int) -> int:
    """Return the model's context. It is `positions`, less the spare positions if apr_jax exported the folder, which
    shows in the tokenizer's length."""
    path = folder / "tokenizer_config.json"
    longest = _read_json(path).get("model_max_length") if path.is_file() else None
    return longest if longest == positions - SPARE_POSITIONS else positions


def _read_json(path: Path) -> dict:
    if not path.is_file():
        raise HfFolderError(f"no {path.name} in {path.parent}")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise HfFolderError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise HfFolderError(f"{path} is not a JSON object")
    return content


# ---------------------------------------------------------------------- weights


def _places(family: Family, shapes: dict[str, tuple[int, ...]]) -> dict[str, Place]:
    """Return the place of each tensor that a folder must have, by Hugging Face name, in our parameters' order."""
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
    """Return all tensors of the folder by name. A file with all weights takes precedence over an index, as in
    transformers. Raises HfFolderError if there are no weights, or if index and files disagree."""
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
                raise HfFolderError(f"{folder / file} holds {name}, {INDEX} puts it in {files.get(name, 'no file')}")
            stored[name] = tensor
    if missing := files.keys() - stored.keys():
        raise HfFolderError(f"{folder / files[min(missing)]} does not hold {min(missing)}, which {INDEX} puts there")
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
    """Raise HfFolderError for the first tensor that is missing, unknown, of another shape or not of floats."""
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
                f"{one.file}: {name} has the shape {_shape(one.shape)}, config.json asks for {_shape(shape)}"
            )
        if one.dtype not in FLOATS:
            raise HfFolderError(f"{one.file}: {name} is of type {one.dtype}, must be one of {', '.join(FLOATS)}")


def _shape(shape: Sequence[int]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _read(stored: dict[str, Stored], names: Sequence[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the named tensors as float32, file by file. Raises HfFolderError for values that are not finite."""
    for file in dict.fromkeys(stored[name].file for name in names):
        with _opened(file) as tensors:
            for name in (name for name in names if stored[name].file == file):
                with np.errstate(over="ignore"):  # a float64 too large for float32 becomes inf, which is refused below
                    array = tensors.get_tensor(name).astype(np.float32)
                if count := array.size - int(np.isfinite(array).sum()):
                    raise HfFolderError(f"{file}: {name} holds {count} values that are not finite in float32")
                yield name, array
