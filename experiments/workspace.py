"""The folder of a run: who may fill it, and with what it was begun."""

import json
import os
import platform
import zlib
from collections.abc import Iterator, Sequence, Set
from importlib import metadata
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from apr_jax.errors import UserError
from apr_jax.io.files import write_text
from apr_jax.io.paths import read_json
from experiments.settings import Settings, default_config

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "tokenizers", "transformers", "torch")

# How the same run is computed, logged and saved: a run may go on with other values of these.
EXECUTION = {
    "devices", "fsdp", "model.attention", "model.remat", "model.scan", "sft.microbatches", "sft.save_every",
    "sft.log_every", "sft.max_skipped_steps", "grpo.batch_rows", "grpo.slots", "grpo.save_every", "evaluate.slots",
    "evaluate.extra_temperatures", "evaluate.budgets",
}  # fmt: skip
# Settings that a run may still change as long as these folders, of the stages that read them, are not there.
UNTIL = {"grpo": ("grpo_*",), "evaluate": ("evaluate", "grpo_*/best"), "export": ("export",)}


def agree(settings: Settings, variants: Sequence[str]) -> int:
    """A number that the processes of this start share, and no other start. Raises UserError where one of them was
    given other settings."""
    mine = zlib.crc32(json.dumps([settings.config, list(variants)], sort_keys=True).encode())
    drawn = int.from_bytes(os.urandom(4), "little")
    given, numbers = multihost_utils.process_allgather(np.array([mine, drawn], np.uint32)).T.tolist()
    if len(set(given)) > 1:
        raise UserError(
            "the processes were given different settings: all need the same --config, --variants and changes"
        )
    return numbers[0]


def claim(workdir: Path, settings: Settings) -> None:
    """Writes config and versions; refuses a folder that holds a run of another config."""
    path = workdir / "config.json"
    mine = json.loads(json.dumps(settings.config))
    if path.exists():
        theirs = read_json(path, "delete it, if the config is the one it was begun with")
        if (task := theirs.get("task")) != settings.task.spec:
            what = f"the task {task}" if task else "an earlier version of this code"
            raise UserError(
                f"{workdir} holds a run of {what}, the task is {settings.task.spec}: give another --workdir"
            )
        theirs = _completed(theirs, json.loads(json.dumps(default_config(settings.task.spec).to_dict())))
        begun = {name for name, folders in UNTIL.items() if any(any(workdir.glob(f)) for f in folders)}
        if differences := list(_differences(theirs, mine, free=UNTIL.keys() - begun)):
            raise UserError(
                f"{workdir} holds a run of another config ({'; '.join(differences[:3])}): "
                "give another --workdir, or the config it was begun with"
            )
    write_text(path, json.dumps(mine, indent=1))
    versions = {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "device": jax.devices()[0].device_kind,
    }
    versions |= {name: _version(name) for name in PACKAGES}
    noted = read_note(workdir / "versions.json")
    before = noted.pop("earlier", [])
    known = [*(before if isinstance(before, list) else []), noted] if noted else []
    if earlier := [one for one in known if one != versions]:
        versions["earlier"] = earlier
    write_text(workdir / "versions.json", json.dumps(versions, indent=1))


def read_note(path: Path) -> dict:
    """What a stage noted of its work; nothing where it noted none or the file is broken."""
    try:
        return read_json(path, "")
    except (FileNotFoundError, UserError):
        return {}


def _version(package: str) -> str | None:
    """None where it is not installed, as torch need not be."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _completed(config: dict, default: dict) -> dict:
    """A config with the default of every setting that there was not yet when it was written."""
    completed = dict(config)
    for key, value in default.items():
        theirs = config.get(key, value)
        completed[key] = _completed(theirs, value) if isinstance(value, dict) and isinstance(theirs, dict) else theirs
    return completed


def _differences(old: dict, new: dict, prefix: str = "", free: Set[str] = frozenset()) -> Iterator[str]:
    """What would make another run; `free` are sections that may differ."""
    for key in sorted(set(old) | set(new)):
        if f"{prefix}{key}" in EXECUTION | free:
            continue
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            yield f"{prefix}{key} was {a!r}, is {b!r}"
