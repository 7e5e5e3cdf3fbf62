"""Settings: dataclass fields that each declare a name, a default, bounds and a comment, once.

    @dataclasses.dataclass(frozen=True)
    class TrainConfig:
        steps: int = 100                                   # a setting
        save_every: int = execution(20)                    # a setting that changes no result
        seed: int = shared("seed")                         # the value of the experiment's setting "seed"
        optimizer: OptimizerConfig = OptimizerConfig()     # a section of settings

A tree of settings is a nested dictionary. `defaults` makes the tree of a dataclass, and `build` makes the dataclass
from a tree. A setting's full name has the names of its sections, such as ``optimizer.peak_lr``.
"""

import dataclasses
import functools
import json
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from apr_jax.checks import FieldError
from apr_jax.errors import UserError

LEAVES = (bool, int, float, str)  # a setting has one of these types, a tuple of them, or None in addition


def execution(default: Any) -> Any:
    """Return a field for a setting that says how a result is computed, logged or saved, but does not change it."""
    return dataclasses.field(default=default, metadata={"execution": True})


def shared(name: str, default: Any = dataclasses.MISSING) -> Any:
    """Return a field that is not a setting of its own: its value is that of the experiment's setting `name`."""
    return dataclasses.field(default=default, metadata={"shared": name})


def setting_fields(kind: type) -> list[dataclasses.Field]:
    """Return the fields of a dataclass that are settings or sections of settings."""
    return [field for field in dataclasses.fields(kind) if field.init and "shared" not in field.metadata]


def defaults(kind: type) -> dict[str, Any]:
    """Return the tree of a dataclass's default values. Raises ValueError if a setting has no default."""
    return {field.name: _as_tree(_default(kind, field)) for field in setting_fields(kind)}


def _as_tree(value: Any) -> Any:
    """Return a section's instance as a tree, and any other value unchanged."""
    if not dataclasses.is_dataclass(value):
        return value
    return {field.name: _as_tree(getattr(value, field.name)) for field in setting_fields(type(value))}


def types(kind: type, prefix: str = "") -> dict[str, Any]:
    """Return the type annotation of every setting by its full name, such as ``optimizer.peak_lr``.

    Raises UserError for a type whose values cannot be given on a command line.
    """
    annotations, found = annotations_of(kind), {}
    for field in setting_fields(kind):
        annotation = annotations[field.name]
        if dataclasses.is_dataclass(annotation):
            found |= types(annotation, f"{prefix}{field.name}.")
            continue
        if not all(one in LEAVES for one in _parts(annotation)):
            raise UserError(
                f"{kind.__name__}.{field.name}: a setting is true or false, an integer, a number, a text or a tuple of "
                f"one of these, its type is {annotation}"
            )
        found[prefix + field.name] = annotation
    return found


def build(kind: type, tree: Mapping[str, Any], prefix: str = "", given: Mapping[str, Any] = {}) -> Any:
    """Return the dataclass `kind` with the values of a tree of settings. Sections are built first.

    `prefix` is the section's full name with a dot at its end. `given` has the values of `shared` fields, by the names
    of the experiment's settings.

    Raises UserError, in one line with the setting's full name, if the dataclass refuses a value.
    """
    annotations = annotations_of(kind)
    values: dict[str, Any] = {}
    names: dict[str, str] = {}  # the fields' full names in the experiment, for messages
    for field in dataclasses.fields(kind):
        name = field.metadata.get("shared")
        names[field.name] = name or prefix + field.name
        if name:
            if name in given:
                values[field.name] = given[name]
        elif field.init and field.name in tree:
            value = tree[field.name]
            section = dataclasses.is_dataclass(annotations[field.name]) and isinstance(value, Mapping)
            values[field.name] = build(annotations[field.name], value, f"{prefix}{field.name}.") if section else value
    try:
        return kind(**values)
    except FieldError as error:
        raise UserError(f"{names[error.field]} {error.says}") from None
    except UserError as error:
        raise UserError(f"{prefix.rstrip('.')}: {error}" if prefix else str(error)) from None


def from_json(kind: type, values: Mapping[str, Any]) -> Any:
    """Return the dataclass of nested mappings as JSON has them. Lists become tuples, and missing settings get their
    defaults. Raises UserError for a wrong value or an unknown name."""
    annotations, tree = annotations_of(kind), {}
    if unknown := sorted(values.keys() - {field.name for field in dataclasses.fields(kind)}):
        raise UserError(f"{kind.__name__} has no {unknown[0]!r}, but {', '.join(f.name for f in setting_fields(kind))}")
    for name, value in values.items():
        if dataclasses.is_dataclass(annotations[name]) and isinstance(value, Mapping):
            value = from_json(annotations[name], value)
        tree[name] = tuple(value) if isinstance(value, list) else value
    return build(kind, tree)


def shaping(config: Any) -> dict[str, Any]:
    """Return the tree of a dataclass's settings that shape its results, with values as read from JSON (lists, not
    tuples).

    Fields made by `execution` or `shared` are left out.
    """
    return json.loads(json.dumps(_shaping(config)))


def _shaping(config: Any) -> Any:
    if not dataclasses.is_dataclass(config):
        return config
    fields = [field for field in setting_fields(type(config)) if "execution" not in field.metadata]
    return {field.name: _shaping(getattr(config, field.name)) for field in fields}


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (full name, value) of every setting of a tree. An empty section counts as a value."""
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


@functools.cache
def annotations_of(kind: type) -> dict[str, Any]:
    """Return the types of a dataclass's fields by name."""
    return typing.get_type_hints(kind)


def _parts(annotation: Any) -> list[Any]:
    """Return the types in an annotation, without None: float for ``tuple[float, ...]``, int for ``int | None``."""
    parts = typing.get_args(annotation) or (annotation,)
    return [one for one in parts if one not in (..., type(None))]


def _default(kind: type, field: dataclasses.Field) -> Any:
    """Return a field's default. Raises ValueError if it has none."""
    factory: Callable[[], Any] | Any = field.default_factory
    if field.default is dataclasses.MISSING and factory is dataclasses.MISSING:
        raise ValueError(f"the setting {kind.__name__}.{field.name} needs a default")
    return factory() if field.default is dataclasses.MISSING else field.default
