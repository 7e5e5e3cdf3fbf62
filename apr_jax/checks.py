"""Checks for dataclasses of settings: types by the fields' annotations, numbers by the class's `BOUNDS`.

    @dataclasses.dataclass(frozen=True)
    class Config:
        steps: int
        rate: float = 0.1
        BOUNDS = (at_least(0, "steps"), between(0, 1, "rate"))

        def __post_init__(self):
            check_fields(self)

Python does not check annotations, and values come from Python code, files and command lines. So each dataclass checks
its own values.
"""

import dataclasses
import functools
import math
import numbers
import types
import typing
from collections.abc import Callable
from typing import Any, NamedTuple

from apr_jax.errors import UserError


class FieldError(UserError):
    """A wrong value of one field. The message is the field's name and then `says`, such as "is at least 1, was given
    0"."""

    def __init__(self, field: str, says: str):
        super().__init__(f"{field} {says}")
        self.field, self.says = field, says


class Bound(NamedTuple):
    """A condition on the numbers of some fields. A value of None always passes."""

    fields: tuple[str, ...]
    says: str  # the condition in words, "at least 1"
    holds: Callable[[Any], bool]


def at_least(least: float, *fields: str) -> Bound:
    """Return the bound that the fields are at least `least`."""
    return Bound(fields, f"at least {least}", lambda value: value >= least)


def above(limit: float, *fields: str) -> Bound:
    """Return the bound that the fields are above `limit`."""
    return Bound(fields, f"above {limit}", lambda value: value > limit)


def less_than(limit: float, *fields: str) -> Bound:
    """Return the bound that the fields are below `limit`."""
    return Bound(fields, f"less than {limit}", lambda value: value < limit)


def between(least: float, most: float, *fields: str) -> Bound:
    """Return the bound that the fields are from `least` to `most`, both included."""
    return Bound(fields, f"from {least} to {most}", lambda value: least <= value <= most)


def from_to_below(least: float, limit: float, *fields: str) -> Bound:
    """Return the bound that the fields are at least `least` and below `limit`."""
    return Bound(fields, f"from {least} to less than {limit}", lambda value: least <= value < limit)


LARGEST = 2**63  # every integer is below it in size, so that it fits an int64 in arrays and files
SEED = (at_least(0, "seed"), less_than(2**31, "seed"))  # the bounds of a field `seed`, for every config with one


def check_fields(config: Any) -> None:
    """Check all fields of a dataclass instance. Raises FieldError for the first one with a wrong type or number."""
    check_values(type(config), **{field.name: getattr(config, field.name) for field in dataclasses.fields(config)})


def check_values(kind: type, **values: Any) -> None:
    """Check values for some fields of the dataclass `kind` before an instance exists. Raises FieldError as
    `check_fields` does."""
    annotations = _annotations(kind)
    for name, value in values.items():
        check_type(name, value, annotations[name])
    for bound in getattr(kind, "BOUNDS", ()):
        for name in bound.fields:
            if name in values and values[name] is not None and not bound.holds(values[name]):
                raise FieldError(name, f"is {bound.says}, was given {values[name]}")


def check_type(name: str, value: Any, annotation: Any) -> None:
    """Raise FieldError where a value of the field `name` does not fit its annotation. `Any`, and generic types other
    than tuples and unions, allow every value."""
    if not _fits(value, annotation):
        large = isinstance(value, int) and abs(value) >= LARGEST
        raise FieldError(name, f"is {describe(annotation)}{' of 64 bits' if large else ''}, was given {_short(value)}")


def describe(annotation: Any) -> str:
    """Return an annotation in words: "an integer", "a tuple of numbers"."""
    if annotation in _KINDS:
        return _KINDS[annotation][0]
    if isinstance(annotation, types.UnionType):
        return " or ".join("None" if one is types.NoneType else describe(one) for one in typing.get_args(annotation))
    if typing.get_origin(annotation) is tuple:
        of = typing.get_args(annotation)
        count = "" if of[1:] == (...,) else f"{len(of)} "
        return f"a tuple of {count}{_KINDS[of[0]][1] if of[0] in _KINDS else f'{of[0].__name__}s'}"
    return f"a {annotation.__name__}"


_KINDS = {
    bool: ("true or false", "truth values"),
    int: ("an integer", "integers"),
    float: ("a number", "numbers"),
    str: ("a text", "texts"),
}


@functools.cache
def _annotations(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _fits(value: Any, annotation: Any) -> bool:
    if annotation is Any:
        return True
    if annotation is int:
        return isinstance(value, numbers.Integral) and not isinstance(value, bool) and abs(value) < LARGEST
    if annotation is float:
        return isinstance(value, numbers.Real) and not isinstance(value, bool) and _finite(value)
    if isinstance(annotation, types.UnionType):
        return any(_fits(value, one) for one in typing.get_args(annotation))
    if typing.get_origin(annotation) is tuple:
        of = typing.get_args(annotation)
        if not isinstance(value, tuple):
            return False
        if of[1:] == (...,):
            return all(_fits(one, of[0]) for one in value)
        return len(value) == len(of) and all(map(_fits, value, of))
    return isinstance(value, annotation) if isinstance(annotation, type) else True


def _finite(value: numbers.Real) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer too large for a float
        return False


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:80]}..."
