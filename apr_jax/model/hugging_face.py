"""How a model family stands in a Hugging Face folder: the names and forms of its tensors, and its config.json.

What a family writes here is what is its own; `apr_jax.export` does what is the same for all.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from apr_jax.errors import UserError

ROPE = ("rope_type", "type", "rope_theta", "partial_rotary_factor")  # keys of rotary angles that are not scaled


class Change(NamedTuple):
    """Between one layer's array of ours and the tensor of theirs."""

    theirs: Callable[[np.ndarray], np.ndarray]
    ours: Callable[[np.ndarray, Sequence[int]], np.ndarray]  # (theirs, the shape of ours) -> ours


SAME = Change(lambda x: x, lambda x, shape: x.reshape(shape))
# [D, ...] that reads the residual, as their [outputs, D]; heads go one behind the other.
INTO = Change(lambda x: x.reshape(x.shape[0], -1).T, lambda x, shape: x.T.reshape(shape))
# [..., D] that writes the residual, as their [D, inputs].
OUT = Change(lambda x: x.reshape(-1, x.shape[-1]).T, lambda x, shape: x.T.reshape(shape))


class TensorName(NamedTuple):
    """A rule that names tensors: a full match of `ours`, a regular expression, gives `theirs`, in which ``{}`` is the
    number of the layer and ``\\1`` a group of the match."""

    ours: str
    theirs: str
    change: Change


@dataclasses.dataclass(frozen=True)
class HuggingFace:
    """A family's form there. In config.json every key with a value is one that is known: the family's or free ones."""

    model_type: str  # "llama"
    architecture: str  # "LlamaForCausalLM"
    names: tuple[TensorName, ...]  # of every parameter; the first match wins; also of head_DxV
    # A config -> the keys of config.json that describe it; tokens, positions and dtype are not the family's.
    write_config: Callable[[Any], dict[str, Any]]
    # (config.json, the longest position) -> a config. Raises UserError by `ConfigReader.wrong`.
    read_config: Callable[["ConfigReader", int], Any]
    read: tuple[str, ...]  # keys that `read_config` reads
    # Keys that have one value, and the further values that mean the same; None stands for a null.
    fixed: Mapping[str, tuple[Any, ...]]
    positions: int  # the longest one, tokens, of a config.json that does not say it
    derived: str = ""  # a regular expression: tensors of old checkpoints that are made anew, and so are not read


@dataclasses.dataclass(frozen=True)
class ConfigReader:
    """A config.json. What is wrong in it raises UserError with the key, its value and what is allowed."""

    content: Mapping[str, Any]
    title: str  # of the family

    def get(self, key: str, default: Any = None) -> Any:
        """A value; the default where the key is left out or null."""
        value = self.content.get(key)
        return default if value is None else value

    def number(self, key: str, kind: type = int, default: Any = None) -> Any:
        """A positive number."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, kind)) or not 0 < value < 2**40:
            raise self.wrong(key, "a positive integer" if kind is int else "a positive number", value)
        return kind(value)

    def flag(self, key: str) -> bool:
        """True or false; false where it is left out."""
        value = self.content.get(key, False)
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def rope_theta(self, default: float = 10_000.0) -> float:
        """The rotary base, of today's key or the older one. Angles that are scaled are refused."""
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
            if rope and given and rope != given:  # transformers reads the first and not the second
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
        """`allowed`: a value, or several words; `given`: the value, where it is not the key's."""
        value = given[0] if given else self.content.get(key)
        words = allowed if isinstance(allowed, str) and " " in allowed else json.dumps(allowed)
        return UserError(f"{key} is {json.dumps(value)}, must be {words}")

    def unknown(self, key: str, given: Any) -> UserError:
        return UserError(
            f"{key} is {json.dumps(given)}, which our {self.title} does not have: take it out if no logit depends on it"
        )
