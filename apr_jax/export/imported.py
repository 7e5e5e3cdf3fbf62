"""Import of a Hugging Face folder with a LlamaForCausalLM: the way of `apr_jax.export.hf` back, by the same names.

    config.json                                                          sizes, rotary angles
    model.safetensors, or model.safetensors.index.json and its shards    weights of any float type
    tokenizer_config.json                                                of an export of ours: its context

Nothing is skipped or guessed: what the folder has too much, too little or otherwise is refused by name, before weights
are read. So is every key of config.json that is not known to leave our Llama's computation as it is. Pickled weights
(pytorch_model.bin) are never opened: to read a pickle is to run it.
"""

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open

from apr_jax.errors import UserError
from apr_jax.export.hf import INDEX, SPARE_POSITIONS, WEIGHTS, hf_name, undo
from apr_jax.model.llama import Llama, LlamaConfig
from apr_jax.train.optimizer import path_name

FLOATS = ("F16", "BF16", "F32", "F64")  # as safetensors calls them
ADAPTER = "adapter_config.json"  # transformers adds its weights to the model's
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Tables of old checkpoints that follow from the rotary base.
DERIVED = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
# config.json goes by lists of the keys that are known; any other key with a value is refused, since it may change the
# computation. Keys that have one value for our Llama, and the further values that mean the same:
FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": ("llama", None), "hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,),
    "partial_rotary_factor": (1, None), "attention_dropout": (0, None), "rope_interleaved": (False, None),
    "is_causal": (True, None), "use_sliding_window": (False, None), "pruned_heads": ({}, None),
    "chunk_size_feed_forward": (0, None), "is_encoder_decoder": (False, None), "add_cross_attention": (False, None),
    "tie_encoder_decoder": (False, None), "is_llama_config": (True, None), "quantization_config": (None,),
}  # fmt: skip
# Keys that are read.
READ = (
    "architectures", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling",
    "rope_parameters", "tie_word_embeddings", "eos_token_id",
)  # fmt: skip
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
    "use_bfloat16", "use_cache", "apr_jax",
)  # fmt: skip
POSITIONS = 2048  # of a config that does not say how many
ROPE = ("rope_type", "type", "rope_theta", "partial_rotary_factor")


class HfFolderError(UserError):
    """A folder that holds no Llama of ours; one line that names the file and the key or tensor."""


@dataclass(frozen=True)
class Stored:
    """A tensor as a file's header tells of it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Place:
    """Where a tensor goes: into one layer of a parameter of ours, or (None) all of it."""

    parameter: str
    layer: int | None
    shape: tuple[int, ...]  # ours, of one layer
    change: Callable[[np.ndarray], np.ndarray]
    expected: tuple[int, ...]  # theirs


def import_hf(folder: Path | str) -> Llama:
    """The folder's model, its weights as float32. Raises HfFolderError."""
    folder = Path(folder)
    if not folder.is_dir():
        raise HfFolderError(f"no folder at {folder}")
    config = read_config(folder)
    if (folder / ADAPTER).is_file():
        raise HfFolderError(f"{folder / ADAPTER}: the model has an adapter, merge it into the weights first")
    graphdef, weights = nnx.split(nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0))))
    abstract = nnx.to_pure_dict(weights)
    shapes = {path_name(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(abstract)}
    stored = _stored_tensors(folder)
    # Below, the tensors that are missing are named; of a wrong number there could be more than memory holds.
    if config.layers > max(len(stored), 1000):
        raise HfFolderError(
            f"{folder / 'config.json'}: num_hidden_layers is {config.layers}, the files hold fewer tensors"
        )
    places = _places(shapes)
    _check(folder, config, stored, places)
    arrays = {name: np.empty(shape, np.float32) for name, shape in shapes.items()}
    for name, array in _read(stored, places.keys()):
        place = places[name]
        whole = arrays[place.parameter]
        whole[... if place.layer is None else place.layer] = undo(place.change, array, place.shape)
    if config.tie_embeddings and HEAD in stored:
        ((_, head),) = _read(stored, {HEAD})
        if not np.array_equal(head, arrays["embed_VxD"]):
            raise HfFolderError(
                f"{stored[HEAD].file}: {HEAD} is not {EMBEDDING}, with which config.json ties it (tie_word_embeddings)"
            )
    filled = jax.tree.map_with_path(lambda path, _: jnp.asarray(arrays.pop(path_name(path))), abstract)
    nnx.replace_by_pure_dict(weights, filled)
    return nnx.merge(graphdef, weights)


# ---------------------------------------------------------------------- config.json


def read_config(folder: Path) -> LlamaConfig:
    """The sizes in config.json; keys that it may leave out mean what they mean to transformers. Raises
    HfFolderError."""
    path = folder / "config.json"
    content = _read_json(path)
    if content.get("architectures") != ["LlamaForCausalLM"]:
        raise _wrong(path, "architectures", content.get("architectures"), ["LlamaForCausalLM"])
    for key, values in FIXED.items():
        if content.get(key, values[0]) not in values:
            raise _wrong(path, key, content[key], values[0])
    for key, value in content.items():
        if value is not None and key not in (*READ, *FIXED, *FREE):
            raise _unknown(path, key, value)

    def number(key: str, kind: type = int, default: Any = None) -> Any:
        value = content.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, (int, kind)) or not 0 < value < 2**40:
            raise _wrong(path, key, value, "a positive integer" if kind is int else "a positive number")
        return kind(value)

    width, heads = number("hidden_size"), number("num_attention_heads")
    kv_heads, feed_forward = number("num_key_value_heads", default=heads), number("intermediate_size")
    if content.get("head_dim") not in (None, width / heads):
        raise _wrong(path, "head_dim", content["head_dim"], f"hidden_size / num_attention_heads, {width / heads:g}")
    tied = content.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        raise _wrong(path, "tie_word_embeddings", tied, "true or false")
    sizes = {
        "vocab_size": number("vocab_size"),
        "width": width,
        "layers": number("num_hidden_layers"),
        "heads": heads,
        "kv_heads": None if kv_heads == heads else kv_heads,
        "context": _context(folder, number("max_position_embeddings", default=POSITIONS)),
        "rope_theta": _rope_theta(path, content),
        "norm_epsilon": number("rms_norm_eps", float, 1e-6),
        "tie_embeddings": tied,
    }
    try:
        by_width = LlamaConfig(**sizes)
        # Left to the width where it says the same, so that an exported config comes back as it was.
        return by_width if by_width.hidden == feed_forward else LlamaConfig(**sizes, feed_forward=feed_forward)
    except UserError as error:
        raise HfFolderError(f"{path}: {error}") from None


def _rope_theta(path: Path, content: dict) -> float:
    """The rotary base, of today's key or the older one. Raises HfFolderError for angles that are scaled."""
    rope = {}
    for key in ("rope_scaling", "rope_parameters"):
        given = content.get(key) or {}
        if not isinstance(given, dict):
            raise _wrong(path, key, given, "of the type default")
        kinds = given.get("rope_type"), given.get("type")
        if any(kind not in ("default", None) for kind in kinds) or given.get("partial_rotary_factor", 1) != 1:
            raise _wrong(path, key, given, "of the type default")
        if unknown := [name for name, value in given.items() if value is not None and name not in ROPE]:
            raise _unknown(path, f"{key}.{unknown[0]}", given[unknown[0]])
        if rope and given and rope != given:  # transformers reads the first and not the second
            raise HfFolderError(f"{path}: rope_scaling is {json.dumps(rope)}, but rope_parameters {json.dumps(given)}")
        rope = rope or given
    found = [value for value in (rope.get("rope_theta"), content.get("rope_theta")) if value is not None]
    if len(found) == 2 and found[0] != found[1]:
        raise HfFolderError(f"{path}: rope_theta is {found[1]}, but {found[0]} in rope_parameters")
    theta = found[0] if found else 10_000.0
    if isinstance(theta, bool) or not isinstance(theta, (int, float)) or not 0 < theta < 1e308:
        raise _wrong(path, "rope_theta", theta, "a positive number")
    return float(theta)


def read_positions(folder: Path) -> int:
    """The longest position of a config.json that `read_config` accepts, as it stands there."""
    return _read_json(folder / "config.json").get("max_position_embeddings") or POSITIONS


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


def _wrong(path: Path, key: str, given: Any, allowed: Any) -> HfFolderError:
    return HfFolderError(f"{path}: {key} is {json.dumps(given)}, must be {_words(allowed)}")


def _unknown(path: Path, key: str, given: Any) -> HfFolderError:
    return HfFolderError(
        f"{path}: {key} is {json.dumps(given)}, which our Llama does not have: take it out if no logit depends on it"
    )


def _words(allowed: Any) -> str:
    return allowed if isinstance(allowed, str) and " " in allowed else json.dumps(allowed)


# ---------------------------------------------------------------------- weights


def _places(shapes: dict[str, tuple[int, ...]]) -> dict[str, Place]:
    """Every tensor that a folder must have, by its Hugging Face name, in the order of our parameters."""
    places = {}
    for parameter, shape in shapes.items():
        theirs, change = hf_name(parameter)
        stacked = "{}" in theirs
        own = shape[1:] if stacked else shape
        expected = jax.eval_shape(change, jax.ShapeDtypeStruct(own, jnp.float32)).shape
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
        raise _wrong(path, "a file of weight_map", bad[0], "the name of a file beside it")
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


def _check(folder: Path, config: LlamaConfig, stored: dict[str, Stored], places: dict[str, Place]) -> None:
    """Raises HfFolderError for the first tensor that is missing, unknown, of another shape or no floats."""
    expected = {name: place.expected for name, place in places.items()}
    if config.tie_embeddings and HEAD in stored:
        expected[HEAD] = expected[EMBEDDING]
    if missing := [name for name in expected if name not in stored]:
        raise HfFolderError(
            f"the weights in {folder} have no {missing[0]} (shape {_shape(expected[missing[0]])}), "
            f"{len(missing)} of {len(expected)} tensors are missing"
        )
    if unknown := [name for name in stored if name not in expected and not DERIVED.fullmatch(name)]:
        one = stored[unknown[0]]
        raise HfFolderError(
            f"{one.file} holds {unknown[0]} (shape {_shape(one.shape)}), which a Llama of {config.layers} layers "
            f"without biases does not have, {len(unknown)} such tensors in all"
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
