"""Checkpoints of training stages, written with Orbax: one folder per saved step.

A save returns as soon as the state is copied. Files are written in the background while training continues, and a
finished step is renamed into place. An error in the background is raised by the next call.

A saved step may be broken, for example by an interrupted copy or a failed disk. Then the newest readable step is used,
and one line on stderr says so. Reading leaves a broken step in place. A stage that resumes renames it, since it may
save a new step of the same number.
"""

import errno
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax.experimental import multihost_utils

from apr_jax.errors import UserError, first_line
from apr_jax.model.family import Model, ModelConfig, abstract_model, read_config


class CheckpointError(UserError):
    """Raised for a checkpoint that is missing, broken or of another shape, or that cannot be saved. The message names
    its folder."""


def check_folder(folder: Path | str) -> Path:
    """The absolute path of a folder to save in.

    Raises CheckpointError if the path contains * ? [ or a backslash. Orbax reads the first three as patterns, and would
    save what it cannot restore; TensorStore, its library for files, refuses a backslash.
    """
    folder = Path(folder).absolute()
    if wrong := sorted(set("*?[\\") & set(str(folder))):
        raise CheckpointError(f"checkpoints need a path without {' '.join(wrong)}, was given {folder}: take another")
    return folder


class Checkpoints:
    """The checkpoints of one stage, of which the newest `keep` are kept. A saved step has a `state`, any pytree of
    arrays, and `meta`, a JSON dictionary.

    Raises CheckpointError if the folder's path is one that `check_folder` refuses.
    """

    def __init__(self, folder: Path, keep: int = 2):
        self.folder = check_folder(folder)
        self._saving: int | None = None  # the step whose files may still be being written
        self._all_broken: CheckpointError | None = None  # raised by `latest` if no step can be read
        self._rename_broken()
        options = ocp.CheckpointManagerOptions(preservation_policy=ocp.checkpoint_managers.LatestN(keep))
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=options,
            item_handlers={"state": ocp.StandardCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()},
        )

    @property
    def latest(self) -> int | None:
        """The newest step that has all its parts; None if none was saved. Raises CheckpointError if all are broken."""
        if self._all_broken is not None:
            raise self._all_broken
        return self._manager.latest_step()

    def set_aside(self, step: int, why: str) -> None:
        """Rename a broken step, so that the step before it is the latest; report it and `why` on stderr. Raises
        CheckpointError if no step is older, or if there are several processes: all would have to agree."""
        older = [other for other in self._manager.all_steps() if other < step]
        if not older or jax.process_count() > 1:
            raise CheckpointError(f"step {step} under {self.folder} cannot be read: {why}")
        _report_broken(self.folder / str(step), why, self.folder / str(max(older)))
        _rename(self.folder / str(step))
        self._manager.reload()

    def _rename_broken(self) -> None:
        """Rename the steps that lack a part, if an older step has all its parts; else keep the error for `latest`."""
        broken, whole = _newest_whole(self.folder)
        if broken and whole is None:
            step, why = broken[0]
            self._all_broken = CheckpointError(
                f"the checkpoint at {step} is broken ({why}) and there is no other: delete it to begin anew"
            )
        elif jax.process_index() == 0:
            for step, _ in broken:
                _rename(step)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("checkpoints")

    def save(self, step: int, state: Any, meta: dict) -> None:
        """Begin to save a step, after waiting for the save before it. Raises CheckpointError if this save or the one
        before fails, as on a full disk. Steps that were saved earlier stay intact."""
        self.wait()
        self._saving = step
        self._call_orbax(
            self._manager.save,
            step,
            args=ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)),
        )

    def wait(self) -> None:
        """Wait until everything is on disk. Raises CheckpointError if the save in progress fails."""
        self._call_orbax(self._manager.wait_until_finished)
        self._saving = None

    def _call_orbax(self, call, *args, **kwargs) -> None:
        """Call a method of Orbax that saves, and raise any error as a CheckpointError."""
        try:
            call(*args, **kwargs)
        except Exception as error:  # Orbax wraps the operating system's errors in its own
            step, self._saving = self._saving, None
            full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
            why = "the disk is full" if full else f"{type(error).__name__}: {first_line(error)}"
            raise CheckpointError(f"step {step} could not be saved under {self.folder}: {why}") from None

    def restore(self, like: Any, step: int | None = None) -> tuple[int, Any]:
        """(step, state) of a saved step, by default the newest readable one, which makes broken newer ones renamed.

        `like` is a state of the same structure; the restored arrays get its shapes, types and devices. Raises
        CheckpointError if there is no step, if it cannot be read, or if it has another structure than `like`.
        """
        wanted = step
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        while True:
            step = self.latest if wanted is None else wanted
            if step is None:
                raise CheckpointError(f"no checkpoint under {self.folder}")
            try:
                found = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(shapes)))
                return step, found["state"]
            except Exception as error:
                why = first_line(error)
            if _readable(self.folder / str(step)):  # so it is intact, and has another structure than `like`
                raise CheckpointError(
                    f"step {step} under {self.folder} is of another model or optimizer, or of an earlier version's: "
                    f"begin in a new folder ({why})"
                )
            if wanted is not None:
                raise CheckpointError(f"step {step} under {self.folder} cannot be read: {why}")
            self.set_aside(step, why)

    def meta(self, step: int) -> dict:
        """The meta that was saved with a step."""
        return self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]

    def close(self) -> None:
        """Wait for the save in progress and release Orbax's threads. Raises CheckpointError if the save fails."""
        try:
            self.wait()
        finally:
            self._manager.close()


def save_model(folder: Path | str, model: Model, meta: dict) -> None:
    """Save a model's weights, without optimizer state, as ``folder/STEP``, where STEP is ``meta["step"]``. Raises
    CheckpointError if they cannot be saved."""
    checkpoints = Checkpoints(Path(folder))
    checkpoints.save(meta["step"], {"weights": nnx.to_pure_dict(nnx.state(model))}, meta)
    checkpoints.close()
    for mark in Path(folder).rglob("commit_success.txt"):
        mark.write_text("Checkpoint commit was successful\n")  # Orbax writes the absolute path of the folder into it


def newest_step(folder: Path | str) -> Path | None:
    """The folder of the newest step in a folder of steps that has all its parts; None if there is no such step."""
    return _newest_whole(Path(folder))[1]


def _newest_whole(folder: Path) -> tuple[list[tuple[Path, str]], Path | None]:
    """(broken, whole): the folder of the newest step that has all its parts, or None, and the newer steps that do not,
    each with what is missing. If there is a whole step, the broken ones are reported on stderr."""
    broken = []
    for step in _steps(folder):
        if (why := _missing(step)) is None:
            for other, what in broken:
                _report_broken(other, what, step)
            return broken, step
        broken.append((step, why))
    return broken, None


def _steps(folder: Path) -> Iterator[Path]:
    """The folders of steps in a folder, the newest first. Remains of interrupted saves are no steps."""
    steps = [path for path in folder.glob("*") if path.name.isdigit() and path.is_dir()]
    return iter(sorted(steps, key=lambda path: int(path.name), reverse=True))


def _missing(step: Path) -> str | None:
    """What the folder of a step lacks: the metadata of its state, or a meta that is valid JSON. None if it has both.
    Files of arrays are not looked at; see `_readable`."""
    try:
        if not (step / "state" / "_METADATA").stat().st_size:
            return "state/_METADATA is empty"
        json.loads((step / "meta" / "metadata").read_text())
    except OSError as error:
        name = Path(error.filename).relative_to(step) if error.filename else "a file"
        return f"{name}: {error.strerror}"
    except ValueError:
        return "meta/metadata is no JSON"
    return None


def _readable(step: Path) -> bool:
    """Whether all arrays of a step can be read, in the shapes in which they were saved."""
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            saved = reader.metadata(step / "state").item_metadata
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), dict(saved.tree))
            reader.restore(step / "state", args=ocp.args.PyTreeRestore(restore_args=as_numpy))
        return True
    except Exception:
        return False


_reported: set[tuple[Path, Path]] = set()  # (broken step, step used instead): each pair is reported once


def _report_broken(broken: Path, why: str, instead: Path) -> None:
    if (broken, instead) not in _reported:
        _reported.add((broken, instead))
        print(f"the checkpoint at {broken} is broken ({why}): {instead} is used", file=sys.stderr, flush=True)


def _rename(step: Path) -> None:
    """Rename a broken step to ``STEP.broken`` (``STEP.broken1``, ...), so that a new step can have its name."""
    names = (step.with_name(f"{step.name}.broken{number or ''}") for number in range(10**6))
    step.rename(next(name for name in names if not name.exists()))


def last_step(stage: Path | str) -> Path | None:
    """The folder of the step that is the result of a stage: in `best` for GRPO with validation, else the newest
    checkpoint. None if no step is saved."""
    return newest_step(Path(stage) / "best") or newest_step(Path(stage) / "checkpoints")


def last_model(run: Path | str, variant: str) -> Path | None:
    """The folder of the step that is the result of a run's training of a variant: GRPO's `last_step`, or SFT's if there
    was no GRPO. None if no step is saved."""
    steps = (last_step(Path(run) / f"{stage}_{variant}") for stage in ("grpo", "sft"))
    return next(filter(None, steps), None)


def load_meta(folder: Path | str) -> tuple[ModelConfig, dict]:
    """The config of a saved step's model, and the whole meta of the step; `folder` as in `load_model`. Raises
    CheckpointError if there is no step or its meta cannot be read."""
    return _read_meta(_step_folders(folder)[0])


def _step_folders(folder: Path | str) -> list[Path]:
    """The folders of steps to try: `folder` itself if it is a step, else the steps in it that have all their parts, the
    newest first. Raises CheckpointError if there are none."""
    folder = Path(folder).absolute()
    if "\\" in str(folder):
        raise CheckpointError(f"checkpoints cannot be read from a path with a backslash, was given {folder}: rename it")
    if not folder.is_dir():
        raise CheckpointError(f"no checkpoint at {folder}")
    if (folder / "state").is_dir():
        return [folder]
    broken, newest = _newest_whole(folder)
    if newest is None:
        why = f"the newest, {broken[0][0].name}, is broken ({broken[0][1]})" if broken else "it holds no saved step"
        raise CheckpointError(f"no checkpoint at {folder}: {why}")
    return [newest, *(step for step in _steps(folder) if int(step.name) < int(newest.name) and _missing(step) is None)]


def _read_meta(folder: Path) -> tuple[ModelConfig, dict]:
    try:
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
            meta = reader.restore(folder / "meta")
        return read_config(meta["model"]), meta
    except Exception as error:
        raise CheckpointError(f"the checkpoint at {folder} cannot be read: {first_line(error)}") from error


def load_model(folder: Path | str) -> tuple[Model, dict]:
    """The model of a saved step, on one device, and the meta of the step.

    `folder` is a step, ``.../checkpoints/STEP``, or a folder of steps, ``.../checkpoints``: then the newest readable
    step is loaded. Raises CheckpointError if there is no step or none can be read.
    """
    failed: dict[Path, CheckpointError] = {}
    for step in _step_folders(folder):
        try:
            found = _load_step(step)
        except CheckpointError as error:
            failed[step] = error
            continue
        for broken, error in failed.items():
            _report_broken(broken, first_line(error.__cause__ or error), step)
        return found
    raise next(iter(failed.values()))


def _load_step(folder: Path) -> tuple[Model, dict]:
    config, meta = _read_meta(folder)
    try:
        graphdef, weights = nnx.split(abstract_model(config))
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])  # not the devices it was saved from
            like = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
                {"weights": nnx.to_pure_dict(weights)},
            )
            restored = reader.restore(
                folder / "state",
                args=ocp.args.PyTreeRestore(
                    item=like, restore_args=ocp.checkpoint_utils.construct_restore_args(like), partial_restore=True
                ),
            )
    except Exception as error:
        raise CheckpointError(f"the checkpoint at {folder} cannot be read: {first_line(error)}") from error
    nnx.replace_by_pure_dict(weights, restored["weights"])
    return nnx.merge(graphdef, weights), meta


def fingerprint(model: Model) -> str:
    """A hash of a model's weights as 16 hexadecimal digits: of the names, shapes, types and contents of its parameters,
    and of nothing else. Results are stored with it, to identify the weights that they belong to."""
    digest = hashlib.blake2b(digest_size=8)
    for path, leaf in jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(model))):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
