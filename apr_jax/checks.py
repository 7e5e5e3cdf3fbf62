"""Checks of settings, for the dataclasses that hold them: types by their annotations, numbers by their bounds.

    @dataclasses.dataclass(frozen=True)
    class Config:
        steps: int
        rate: float = 0.1
        BOUNDS = (at_least(0, "steps"), between(0, 1, "rate"))

        def __post_init__(self):
            check_fields(self)

A dataclass is built with values of any kind (from Python, a file, a command line), so each one checks its own.
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
    """A wrong value of one field: the message is the field's name and `says`."""

    def __init__(self, field: str, says: str):
        super().__init__(f"{field} {says}")
        self.field, self.says = field, says


class Bound(NamedTuple):
    """What the numbers of these fields must be. None is not compared."""

    fields: tuple[str, ...]
    says: str  # "at least 1"
    holds: Callable[[Any], bool]


def at_least(least: float, *fields: str) -> Bound:
    return Bound(fields, f"at least {least}", lambda value: value >= least)


def above(limit: float, *fields: str) -> Bound:
    return Bound(fields, f"above {limit}", lambda value: value > limit)


def less_than(limit: float, *fields: str) -> Bound:
    return Bound(fields, f"less than {limit}", lambda value: value < limit)


def between(least: float, most: float, *fields: str) -> Bound:
    return Bound(fields, f"from {least} to {most}", lambda value: least <= value <= most)


def from_to_below(least: float, limit: float, *fields: str) -> Bound:
    return Bound(fields, f"from {least} to less than {limit}", lambda value: least <= value < limit)


LARGEST = 2**63  # no integer is as large: arrays and files hold no larger ones
SEED = (at_least(0, "seed"), less_than(2**31, "seed"))  # of every config that has one


def check_fields(config: Any) -> None:
    """Raises FieldError for the first field of a dataclass instance whose type or number is wrong."""
    check_values(type(config), **{field.name: getattr(config, field.name) for field in dataclasses.fields(config)})


def check_values(kind: type, **values: Any) -> None:
    """As `check_fields`, of some fields of a dataclass `kind` that is not built yet."""
    annotations = _annotations(kind)
    for name, value in values.items():
        check_type(name, value, annotations[name])
    for bound in getattr(kind, "BOUNDS", ()):
        for name in bound.fields:
            if name in values and values[name] is not None and not bound.holds(values[name]):
                raise FieldError(name, f"is {bound.says}, was given {values[name]}")


def check_type(name: str, value: Any, annotation: Any) -> None:
    """Raises FieldError where a value is not what an annotation says; annotations other than those of `describe` are
    not looked at."""
    if not _fits(value, annotation):
        large = isinstance(value, int) and abs(value) >= LARGEST
        raise FieldError(name, f"is {describe(annotation)}{' of 64 bits' if large else ''}, was given {_short(value)}")


def describe(annotation: Any) -> str:
    """An annotation in words: "an integer", "a tuple of numbers"."""
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
    except OverflowError:  # an integer that no float holds
        return False


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:80]}..."
