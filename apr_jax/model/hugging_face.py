"""The Hugging Face form of a model family: names and layouts of its tensors, and its config.json.

A family declares its own part with these classes. `apr_jax.export` has the code that all families share.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from apr_jax.errors import UserError

# The keys that a "rope_parameters" object may have where rotary angles are not scaled.
ROPE = ("rope_type", "type", "rope_theta", "partial_rotary_factor")


class Change(NamedTuple):
    """The conversion between our array of one layer and the tensor of Hugging Face, in both directions."""

    theirs: Callable[[np.ndarray], np.ndarray]  # our array -> their tensor
    ours: Callable[[np.ndarray, Sequence[int]], np.ndarray]  # (their tensor, the shape of our array) -> our array


SAME = Change(lambda x: x, lambda x, shape: x.reshape(shape))
# Our [D, ...], which is multiplied with the residual stream, is their [outputs, D]. Heads are consecutive outputs.
INTO = Change(lambda x: x.reshape(x.shape[0], -1).T, lambda x, shape: x.T.reshape(shape))
# Our [..., D], whose product is added to the residual stream, is their [D, inputs].
OUT = Change(lambda x: x.reshape(-1, x.shape[-1]).T, lambda x, shape: x.T.reshape(shape))


class TensorName(NamedTuple):
    """A rule that maps names of our parameters to names of Hugging Face tensors. Where the regular expression `ours`
    matches a whole name, the tensor is called `theirs`, with the layer's number for ``{}`` and a group of the match for
    ``\\1``. `change` converts the values."""

    ours: str
    theirs: str
    change: Change


@dataclasses.dataclass(frozen=True)
class HuggingFace:
    """A family's tensor names and config.json in Hugging Face's format.

    The import refuses a config.json with an unknown key, unless its value is null, since the key may change the logits.
    Known keys are the keys in `read` and `fixed`, and a list for all families in apr_jax.export.imported of keys that
    no logit depends on.
    """

    model_type: str  # "llama"
    architecture: str  # "LlamaForCausalLM"
    names: tuple[TensorName, ...]  # for every parameter, head_DxV included; the first match applies
    # (config) -> the keys of config.json for its sizes; the export adds the keys for tokens, positions and dtype.
    write_config: Callable[[Any], dict[str, Any]]
    # (reader of config.json, the longest sequence in tokens) -> config. Raises `ConfigReader.wrong` for a wrong value.
    read_config: Callable[["ConfigReader", int], Any]
    read: tuple[str, ...]  # the keys that `read_config` reads
    # The keys that must have one value: (this value, further values with the same meaning). None stands for null.
    fixed: Mapping[str, tuple[Any, ...]]
    positions: int  # the longest sequence in tokens, where config.json does not say it
    derived: str = ""  # a regular expression for tensors in old checkpoints that are computed, so they are not read


@dataclasses.dataclass(frozen=True)
class ConfigReader:
    """Typed access to the values of a config.json. A wrong value raises UserError with its key and the allowed
    values."""

    content: Mapping[str, Any]
    title: str  # the family's title

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of a key, or the default where the key is missing or null."""
        value = self.content.get(key)
        return default if value is None else value

    def number(self, key: str, kind: type = int, default: Any = None) -> Any:
        """Return the value of a key, a positive number below 2**40, converted to the type `kind`, int or float. A
        missing key or null has the value `default`. Raises UserError for any other value."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, kind)) or not 0 < value < 2**40:
            raise self.wrong(key, "a positive integer" if kind is int else "a positive number", value)
        return kind(value)

    def flag(self, key: str) -> bool:
        """Return the truth value of a key, false where the key is missing. Raises UserError for any other value."""
        value = self.content.get(key, False)
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def rope_theta(self, default: float = 10_000.0) -> float:
        """Return the base of the rotary angles, from "rope_parameters" or from the older keys "rope_scaling" and
        "rope_theta". Raises UserError for scaled angles and for keys that contradict each other."""
        rope = {}
        for key in ("rope_scaling", "rope_parameters"):
            given = self.content.get(key) or {}
            if not isinstance(given, dict):
                raise self.wrong(key, "of the type default", given)
            kinds = given.get("rope_type"), given.get("type")
            if any(kind not in ("default", None) for kind in kinds) or given.get("partial_rotary_factor", 1) != 1:
                raise self.wrong(key, "of the type default", given)
            if unknown := [name for name, value in given.items() if value is not None and name not in ROPE]:
                raise self.unknown(f"{key}.{unknown[0]}", given[unknown[0]])
            if rope and given and rope != given:  # transformers reads rope_scaling and ignores rope_parameters
                raise UserError(f"rope_scaling is {json.dumps(rope)}, but rope_parameters {json.dumps(given)}")
            rope = rope or given
        found = [value for value in (rope.get("rope_theta"), self.content.get("rope_theta")) if value is not None]
        if len(found) == 2 and found[0] != found[1]:
            raise UserError(f"rope_theta is {found[1]}, but {found[0]} in rope_parameters")
        theta = found[0] if found else default
        if isinstance(theta, bool) or not isinstance(theta, (int, float)) or not 0 < theta < 1e308:
            raise self.wrong("rope_theta", "a positive number", theta)
        return float(theta)

    def wrong(self, key: str, allowed: Any, *given: Any) -> UserError:
        """Return the error for a wrong value of a key. `allowed` is the one allowed value, or a text of several words
        that describes the allowed values. `given` is the wrong value where it is not the value of `key` itself."""
        value = given[0] if given else self.content.get(key)
        words = allowed if isinstance(allowed, str) and " " in allowed else json.dumps(allowed)
        return UserError(f"{key} is {json.dumps(value)}, must be {words}")

    def unknown(self, key: str, given: Any) -> UserError:
        """Return the error for a key that the family does not have."""
        return UserError(
            f"{key} is {json.dumps(given)}, which our {self.title} does not have: take it out if no logit depends on it"
        )
