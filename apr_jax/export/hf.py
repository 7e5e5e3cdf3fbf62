"""Exports a model to a Hugging Face folder, which transformers and SGLang load, and checks the export.

    config.json, generation_config.json, model.safetensors      the model; weights above 5 GB are split into
                                                                shards, listed in model.safetensors.index.json
    tokenizer.json, tokenizer_config.json                       a PreTrainedTokenizerFast
    README.md                                                   the model card

The model's family gives the names of tensors and the keys of config.json. Only the checks need torch and transformers.
"""

import asyncio
import dataclasses
import functools
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError
from safetensors.numpy import save_file

from apr_jax.errors import UserError
from apr_jax.export.card import model_card
from apr_jax.export.oracle import TransformersEngine, import_torch
from apr_jax.io.folder import replaced, whole_path
from apr_jax.io.progress import Progress
from apr_jax.model.attention import attend_masked
from apr_jax.model.family import Family, Model, ModelConfig, family_of
from apr_jax.model.hugging_face import Change
from apr_jax.rollout.engine import JaxEngine
from apr_jax.text.hub import HubTokenizer
from apr_jax.text.tokenizer import BOS, EOS, PAD, UNKNOWN, Tokenizer
from apr_jax.threads.engine import Sampling
from apr_jax.threads.protocol import TaskProtocol
from apr_jax.threads.run import Budget, TreeRunner, run_all
from apr_jax.threads.tree import Thread, map_blocks
from apr_jax.train.optimizer import path_name
from apr_jax.train.step import data_mesh

KEY = "apr_jax"  # key of config.json: the model's family, and the task that it was trained on
SPARE_POSITIONS = 8  # added to the context: SGLang refuses prompts within 6 tokens of it, and stops 2 tokens before it
DTYPES = ("float32", "bfloat16")
SHARD_BYTES = 5 * 10**9  # most bytes of one file of weights, as in transformers
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
FILES = (
    "config.json", "generation_config.json", WEIGHTS, INDEX, "tokenizer.json", "tokenizer_config.json", "README.md",
    "check.json",
)  # fmt: skip
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


class ExportError(UserError):
    """An export that cannot be made or written. The message is one line; an earlier export stays as it was."""


def hf_name(family: Family, name: str) -> tuple[str, Change]:
    """Return a parameter's Hugging Face name, with "{}" in the place of the layer's number, and the conversion of one
    layer's array. Raises ExportError if the family has no rule for the parameter."""
    for rule in family.hugging_face.names:
        if found := re.fullmatch(rule.ours, name):
            return found.expand(rule.theirs), rule.change
    raise ExportError(f"no rule gives the parameter {name} a Hugging Face name")


def hf_arrays(model: Model, dtype: str = "float32") -> dict[str, np.ndarray]:
    """Return all parameters by their Hugging Face names, with layers unstacked. With tied embeddings there is no
    lm_head. Raises ExportError for a parameter without a rule, and for values that are not finite."""
    family, arrays = family_of(model.config), {}
    for path, value in jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(model, nnx.Param))):
        name = path_name(path)
        theirs, change = hf_name(family, name)
        if not bool(jnp.isfinite(value).all()):
            raise ExportError(f"the parameter {name} has values that are not finite")
        whole = np.asarray(value.astype(dtype))
        layers = whole if "{}" in theirs else whole[None]
        arrays |= {theirs.format(l): np.ascontiguousarray(change.theirs(layer)) for l, layer in enumerate(layers)}
    return arrays


def hf_config(
    model: Model, tokenizer: Tokenizer | HubTokenizer, dtype: str = "float32", positions: int | None = None
) -> dict[str, Any]:
    """Return the contents of config.json. The dtype is stored under two keys, the current one and that of older
    versions of transformers. `positions` is the longest position; default: the context and the spare positions."""
    config, ends = model.config, sorted(tokenizer.ends)
    form = family_of(config).hugging_face
    return {
        "architectures": [form.architecture],
        "model_type": form.model_type,
        **form.write_config(config),
        # Exactly the rows of the embedding: an id at or past vocab_size kills an SGLang server.
        "vocab_size": int(model.embed_VxD[...].shape[0]),
        "max_position_embeddings": positions or config.context + SPARE_POSITIONS,
        "bos_token_id": tokenizer.bos,
        "eos_token_id": ends if len(ends) > 1 else tokenizer.eos,
        "pad_token_id": tokenizer.pad,
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def export_hf(
    model: Model, tokenizer: Tokenizer | HubTokenizer, folder: Path | str, meta: dict | None = None,
    dtype: str = "float32", shard_bytes: int = SHARD_BYTES,
) -> None:  # fmt: skip
    """Write the export to `folder`, in place of an earlier one. Weights are stored as `dtype`, in files of at most
    `shard_bytes`, except for a single array that is larger.

    `meta` is a checkpoint's metadata. It goes on the model card. Its task, settings, variant and condition go into
    config.json as the object "apr_jax", together with the model's family, for the programs here that run the export;
    others ignore that object. An imported model's `max_position_embeddings` in `meta` goes into config.json, too.

    All files are written to a folder beside `folder`, which is then renamed, so that a failure leaves an earlier export
    as it was. Raises ExportError, also if `folder` contains files that no export writes.
    """
    if dtype not in DTYPES:
        raise ExportError(f"dtype must be float32 or bfloat16, was given {dtype!r}")
    if len(tokenizer) > model.config.vocab_size:
        raise ExportError(f"the tokenizer has {len(tokenizer)} tokens, the model {model.config.vocab_size}")
    positions = (meta or {}).get("max_position_embeddings")
    arrays, config = hf_arrays(model, dtype), hf_config(model, tokenizer, dtype, positions)
    if "task" in (meta or {}):
        config[KEY] = trained_on(meta, model.config)
    generation = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    try:
        folder = whole_path(folder)
        with replaced(folder, _foreign, "export") as part:
            _write_json(part / "config.json", config)
            _write_json(part / "generation_config.json", {"do_sample": False, **generation})
            _write_tokenizer(part, model, tokenizer, imported=positions is not None)
            (part / "README.md").write_text(model_card(model, folder.name, meta or {}, dtype))
            _write_weights(part, arrays, shard_bytes)
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
        raise ExportError(f"the export to {folder} could not be written: {why}") from None


def trained_on(meta: dict, config: ModelConfig) -> dict[str, Any]:
    """Return what config.json stores under `KEY`: the model's family, and the task, its settings, variant, condition
    and window from a checkpoint's meta. Without a window in `meta` it is the model's context."""
    return {
        "family": config.family,
        "task": meta["task"],
        "task_settings": meta.get("task_settings", {}),
        "variant": meta["variant"],
        "condition": meta.get("condition", ""),
        "window": meta.get("window") or (meta.get("config") or {}).get("window", config.context),
    }


def _foreign(folder: Path) -> str | None:
    """Return the name of a file in a folder that no export writes, or None."""
    names = {path.name for path in folder.iterdir()} - set(FILES)
    return min((name for name in names if not SHARD.fullmatch(name)), default=None)


def _write_weights(folder: Path, arrays: dict[str, np.ndarray], shard_bytes: int) -> None:
    shards = list(_shards(arrays, shard_bytes))
    if len(shards) == 1:
        save_file(arrays, folder / WEIGHTS, metadata={"format": "pt"})
        return
    places = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file({name: arrays[name] for name in names}, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(names, file)
    total = sum(array.nbytes for array in arrays.values())
    _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": places})


def _shards(arrays: dict[str, np.ndarray], max_bytes: int) -> Iterator[list[str]]:
    """Yield the arrays' names in groups of at most `max_bytes`, in their order. A larger array is a group alone."""
    names, size = [], 0
    for name, array in arrays.items():
        if names and size + array.nbytes > max_bytes:
            yield names
            names, size = [], 0
        names.append(name)
        size += array.nbytes
    yield names


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _write_tokenizer(folder: Path, model: Model, tokenizer: Tokenizer | HubTokenizer, imported: bool) -> None:
    if isinstance(tokenizer, HubTokenizer):
        tokenizer.backend.save_pretrained(folder)
        if imported:  # its tokenizer_config.json stays as it was
            return
        path = folder / "tokenizer_config.json"
        _write_json(path, json.loads(path.read_text()) | {"model_max_length": model.config.context})
        return
    (folder / "tokenizer.json").write_text(tokenizer.backend.to_str(pretty=True))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "unk_token": UNKNOWN,
        "clean_up_tokenization_spaces": False,  # else decoding removes the space of " ." and changes the trace
        "split_special_tokens": True,  # as in our tokenizer, a "<s>" in a text is text
        "model_max_length": model.config.context,
    }
    _write_json(folder / "tokenizer_config.json", config)


# ---------------------------------------------------------------------- checks of an export


def check_export(model: Model, tokenizer: Tokenizer, folder: Path | str, sequences: Sequence[Sequence[int]]) -> dict:
    """Compare the logits of transformers with those of this model, rounded to the export's dtype. Both compute in
    float32, transformers on the CPU and ours on JAX's default device, one sequence at a time.

    Returns {"max_logit_difference": the largest absolute difference over all sequences, positions and tokens,
    "sequences": their number}.
    """
    torch = import_torch()

    theirs, ours = load_transformers(folder), _as_exported(model, folder)
    graphdef, weights = nnx.split(ours)
    worst = 0.0
    for ids in (list(map(int, sequence)) for sequence in sequences):
        # Padding leaves few shapes to compile. At the end of a sequence it changes no logit, since attention is causal.
        padded = ids + [tokenizer.pad] * (-len(ids) % 64)
        a_TxV = _logits(graphdef, weights, jnp.asarray([padded]))[0, : len(ids)]
        with torch.inference_mode():
            b_TxV = theirs(torch.tensor([ids])).logits[0].numpy()
        worst = float(np.maximum(worst, np.abs(np.asarray(a_TxV) - b_TxV).max()))  # np.maximum keeps a NaN
    return {"max_logit_difference": worst, "sequences": len(sequences)}


@functools.partial(jax.jit, static_argnums=0)
def _logits(graphdef, weights, tokens_BxT: jax.Array) -> jax.Array:
    """Return the logits [B, T, V] of whole sequences under causal attention."""
    B, T = tokens_BxT.shape
    mask_BxTxT = jnp.broadcast_to(jnp.tri(T, dtype=bool), (B, T, T))
    model = nnx.merge(graphdef, weights)
    positions_BxT = jnp.broadcast_to(jnp.arange(T), (B, T))
    hidden, _ = model.hidden(tokens_BxT, positions_BxT, lambda q, k, v, _: (attend_masked(q, k, v, mask_BxTxT), None))
    return model.logits(hidden)


def greedy_agreement(model: Model, folder: Path | str, prompts: Sequence[Sequence[int]], new_tokens: int) -> int:
    """Return for how many prompts transformers' `generate` and the JAX engine decode the same tokens greedily, up to an
    end token or `new_tokens`. Raises UserError if a prompt and `new_tokens` are longer than the model's context."""
    torch = import_torch()

    longest = max(map(len, prompts), default=0) + new_tokens
    if longest > model.config.context:
        raise UserError(f"a prompt and {new_tokens} new tokens are {longest}, the context is {model.config.context}")
    theirs = load_transformers(folder)
    engine = _engine(_as_exported(model, folder), slots=min(len(prompts), 8) or 1, context=model.config.context)
    ends = theirs.config.eos_token_id
    stop = frozenset(ends if isinstance(ends, list) else [ends])

    async def ours() -> list[tuple[int, ...]]:
        async def one(index: int, ids: Sequence[int]) -> tuple[int, ...]:
            sequence = engine.open(ids, (index,))
            try:
                return (await engine.decode(sequence, stop, new_tokens, Sampling(temperature=0.0))).ids
            finally:
                engine.free(sequence)

        return await asyncio.gather(*(one(index, ids) for index, ids in enumerate(prompts)))

    equal = 0
    for ids, mine in zip(prompts, asyncio.run(ours())):
        prompt = torch.tensor([list(map(int, ids))])
        seen = torch.ones_like(prompt)
        whole = theirs.generate(prompt, attention_mask=seen, max_new_tokens=new_tokens, do_sample=False)
        equal += tuple(whole[0, len(ids) :].tolist()) == mine
    return equal


def check_trees(
    model: Model, tokenizer: Tokenizer, folder: Path | str, protocol: TaskProtocol, problems: Sequence, budget: Budget,
    progress_title: str = "check trees", condition: str = "",
) -> tuple[int, int]:  # fmt: skip
    """Compare the greedy trees of the JAX engine with those of transformers. Returns (number of problems whose trees
    have the same threads and tokens, number of problems). `condition` begins the root's prompt."""
    engines = (
        _engine(_as_exported(model, folder), slots=16, context=budget.context),
        TransformersEngine(load_transformers(folder), budget.context),
    )
    progress = Progress(progress_title, len(engines) * len(problems), "trees")
    arguments = (tokenizer, protocol, problems, budget, progress, condition)
    ours, theirs = (_greedy_trees(engine, *arguments) for engine in engines)
    return sum(a == b for a, b in zip(ours, theirs)), len(problems)


def _greedy_trees(engine, tokenizer, protocol, problems, budget, progress: Progress, condition: str) -> list[Thread]:
    """Return the roots of the problems' greedy trees, without log-probabilities: their last digits differ by engine."""
    runner = TreeRunner(engine, protocol, tokenizer, budget, Sampling(temperature=0.0))

    async def one(index: int, problem):
        tree = await runner.run(problem, (index,), condition)
        progress.update(progress.done + 1)
        return tree

    trees = asyncio.run(run_all([functools.partial(one, *item) for item in enumerate(problems)]))
    return [map_blocks(tree.root, lambda block: dataclasses.replace(block, logprobs=None)) for tree in trees]


def _engine(model: Model, slots: int, context: int) -> JaxEngine:
    return JaxEngine(model, data_mesh(1), slots=slots, context=context)


def _as_exported(model: Model, folder: Path | str) -> Model:
    """Return a copy of the model that computes in float32, with its weights rounded to the dtype of the export."""
    stored = json.loads((Path(folder) / "config.json").read_text())["dtype"]
    graphdef, weights = nnx.split(model)
    copy = nnx.merge(graphdef, jax.tree.map(lambda value: value.astype(stored).astype(jnp.float32), weights))
    copy.config = dataclasses.replace(model.config, dtype="float32")
    return copy


def load_transformers(folder: Path | str):
    """Load the export as a transformers model in float32 on the CPU. Raises ExportError if it cannot be read, or if its
    tensors are not exactly those that the model has."""
    torch = import_torch()
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            os.fspath(folder), dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ExportError(f"transformers cannot read {folder}: {str(error).splitlines()[0]}") from None
    finally:
        if shown:
            logging.enable_progress_bar()
    if wrong := [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]:
        raise ExportError(f"transformers finds a missing, unknown or misshapen tensor in {folder}: {wrong[0]}")
    return model.eval()
