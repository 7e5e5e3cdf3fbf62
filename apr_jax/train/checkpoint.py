"""Orbax checkpoints: what a stage saves along the way and finds again when it is started again.

A save returns when the state is copied; the files are written beside the training that goes on, and a finished step is
renamed into place. An error of that writing is told at the next call.

A folder of steps may hold a broken one: a copy that broke off, a disk that failed. The newest good step is used then,
and one line on stderr says so. Readers leave a broken step where it is; a stage that goes on renames it, since its own
new step may need the name.
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

from apr_jax.errors import UserError
from apr_jax.model.family import Model, ModelConfig, abstract_model, read_config


class CheckpointError(UserError):
    """A checkpoint that is missing, broken or of another shape; the message names the folder."""


def check_folder(folder: Path | str) -> Path:
    """The whole path of a folder to save in. Raises CheckpointError where Orbax would save there what it cannot read
    again: it takes * ? [ in a path for a pattern, and its files' library takes no backslash."""
    folder = Path(folder).absolute()
    if wrong := sorted(set("*?[\\") & set(str(folder))):
        raise CheckpointError(f"checkpoints need a path without {' '.join(wrong)}, was given {folder}: take another")
    return folder


class Checkpoints:
    """The checkpoints of one stage: `state`, any pytree of arrays, and `meta`, a JSON dictionary. Raises
    CheckpointError where the folder's path is one that `check_folder` refuses."""

    def __init__(self, folder: Path, keep: int = 2):
        self.folder = check_folder(folder)
        self._saving: int | None = None  # the step whose files may still be on their way
        self._hopeless: CheckpointError | None = None  # where all steps are broken
        self._leave_out_broken()
        options = ocp.CheckpointManagerOptions(preservation_policy=ocp.checkpoint_managers.LatestN(keep))
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=options,
            item_handlers={"state": ocp.StandardCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()},
        )

    @property
    def latest(self) -> int | None:
        """The newest step that is whole, None where none was saved. Raises CheckpointError where all are broken."""
        if self._hopeless is not None:
            raise self._hopeless
        return self._manager.latest_step()

    def set_aside(self, step: int, why: str) -> None:
        """Renames a broken step, so that the one before it is the latest. Raises CheckpointError where there is none,
        and of several processes, which would have to agree."""
        older = [other for other in self._manager.all_steps() if other < step]
        if not older or jax.process_count() > 1:
            raise CheckpointError(f"step {step} under {self.folder} cannot be read: {why}")
        _tell(self.folder / str(step), why, self.folder / str(max(older)))
        _rename(self.folder / str(step))
        self._manager.reload()

    def _leave_out_broken(self) -> None:
        """Renames the steps that lack a part and are newer than the newest whole one."""
        broken, whole = _newest_whole(self.folder)
        if broken and whole is None:
            step, why = broken[0]
            self._hopeless = CheckpointError(
                f"the checkpoint at {step} is broken ({why}) and there is no other: delete it to begin anew"
            )
        elif jax.process_index() == 0:
            for step, _ in broken:
                _rename(step)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("checkpoints")

    def save(self, step: int, state: Any, meta: dict) -> None:
        """Begins to save, after the save before has ended. Raises CheckpointError where the disk is full or the folder
        cannot be written, this time or the last; what was saved before stays whole."""
        self.wait()
        self._saving = step
        self._told(
            self._manager.save,
            step,
            args=ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)),
        )

    def wait(self) -> None:
        """Returns when everything is on disk. Raises CheckpointError as `save` does."""
        self._told(self._manager.wait_until_finished)
        self._saving = None

    def _told(self, call, *args, **kwargs) -> None:
        try:
            call(*args, **kwargs)
        except Exception as error:  # Orbax wraps the operating system's errors in its own
            step, self._saving = self._saving, None
            full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
            why = "the disk is full" if full else f"{type(error).__name__}: {_first_line(error)}"
            raise CheckpointError(f"step {step} could not be saved under {self.folder}: {why}") from None

    def restore(self, like: Any, step: int | None = None) -> tuple[int, Any]:
        """(step, state) of a saved step, the newest readable one by default, on the devices of `like`. Raises
        CheckpointError."""
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
                why = _first_line(error)
            if _readable(self.folder / str(step)):  # so it is whole, and of another shape than `like`
                raise CheckpointError(
                    f"step {step} under {self.folder} is of another model or optimizer, or of an earlier version's: "
                    f"begin in a new folder ({why})"
                )
            if wanted is not None:
                raise CheckpointError(f"step {step} under {self.folder} cannot be read: {why}")
            self.set_aside(step, why)

    def meta(self, step: int) -> dict:
        """What was saved beside a step."""
        return self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]

    def close(self) -> None:
        """Waits for what is being written. Raises CheckpointError as `save` does."""
        try:
            self.wait()
        finally:
            self._manager.close()


def save_model(folder: Path | str, model: Model, meta: dict) -> None:
    """Saves a model's weights alone, as ``folder/STEP`` by the step in `meta`. Raises CheckpointError."""
    checkpoints = Checkpoints(Path(folder))
    checkpoints.save(meta["step"], {"weights": nnx.to_pure_dict(nnx.state(model))}, meta)
    checkpoints.close()
    for mark in Path(folder).rglob("commit_success.txt"):
        mark.write_text("Checkpoint commit was successful\n")  # Orbax names the folder of this machine there


def newest_step(folder: Path | str) -> Path | None:
    """The folder of the newest step in a folder of steps that has all its parts; None where there is none."""
    return _newest_whole(Path(folder))[1]


def _newest_whole(folder: Path) -> tuple[list[tuple[Path, str]], Path | None]:
    """The newest step that has all its parts, and before it the newer ones that lack some, each with what it lacks.
    Tells of those."""
    broken = []
    for step in _steps(folder):
        if (why := _missing(step)) is None:
            for other, what in broken:
                _tell(other, what, step)
            return broken, step
        broken.append((step, why))
    return broken, None


def _steps(folder: Path) -> Iterator[Path]:
    """The steps in a folder, the newest first, without what a save left behind."""
    steps = [path for path in folder.glob("*") if path.name.isdigit() and path.is_dir()]
    return iter(sorted(steps, key=lambda path: int(path.name), reverse=True))


def _missing(step: Path) -> str | None:
    """What a step lacks of what every save writes; None where nothing is missing. Files are not read to their end."""
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
    """Whether all arrays of a step can be read as they were saved."""
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            saved = reader.metadata(step / "state").item_metadata
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), dict(saved.tree))
            reader.restore(step / "state", args=ocp.args.PyTreeRestore(restore_args=as_numpy))
        return True
    except Exception:
        return False


_told: set[tuple[Path, Path]] = set()  # each is said once


def _tell(broken: Path, why: str, instead: Path) -> None:
    if (broken, instead) not in _told:
        _told.add((broken, instead))
        print(f"the checkpoint at {broken} is broken ({why}): {instead} is used", file=sys.stderr, flush=True)


def _rename(step: Path) -> None:
    """Out of the way of steps to come, beside them."""
    names = (step.with_name(f"{step.name}.broken{number or ''}") for number in range(10**6))
    step.rename(next(name for name in names if not name.exists()))


def last_step(stage: Path | str) -> Path | None:
    """The folder of the step that a stage of a run ends with: of GRPO with validation what validated best, else the
    newest; None where none is saved."""
    return newest_step(Path(stage) / "best") or newest_step(Path(stage) / "checkpoints")


def last_model(run: Path | str, variant: str) -> Path | None:
    """The folder of the step that a run's training of a variant ends with: GRPO's `last_step`, SFT's where there was no
    GRPO; None where none is saved."""
    steps = (last_step(Path(run) / f"{stage}_{variant}") for stage in ("grpo", "sft"))
    return next(filter(None, steps), None)


def load_meta(folder: Path | str) -> tuple[ModelConfig, dict]:
    """The sizes of a saved step's model, and all of its meta; `folder` as in `load_model`. Raises CheckpointError."""
    return _read_meta(_step_folders(folder)[0])


def _step_folders(folder: Path | str) -> list[Path]:
    """A step's folder itself; of a folder of steps the whole ones, the newest first. Raises CheckpointError."""
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
        raise CheckpointError(f"the checkpoint at {folder} cannot be read: {_first_line(error)}") from error


def load_model(folder: Path | str) -> tuple[Model, dict]:
    """The model of a saved step ``.../checkpoints/STEP`` (of its newest readable step for ``.../checkpoints``) and its
    meta, which holds the model's sizes. Raises CheckpointError."""
    failed: dict[Path, CheckpointError] = {}
    for step in _step_folders(folder):
        try:
            found = _load_step(step)
        except CheckpointError as error:
            failed[step] = error
            continue
        for broken, error in failed.items():
            _tell(broken, _first_line(error.__cause__ or error), step)
        return found
    raise next(iter(failed.values()))


def _load_step(folder: Path) -> tuple[Model, dict]:
    config, meta = _read_meta(folder)
    try:
        graphdef, weights = nnx.split(abstract_model(config))
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])  # whatever devices it was saved from
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
        raise CheckpointError(f"the checkpoint at {folder} cannot be read: {_first_line(error)}") from error
    nnx.replace_by_pure_dict(weights, restored["weights"])
    return nnx.merge(graphdef, weights), meta


def fingerprint(model: Model) -> str:
    """16 hexadecimal digits of a model's weights: of their names, shapes, types and contents, and of nothing else. What
    was computed from a model and is kept in a file says by it which weights it belongs to."""
    digest = hashlib.blake2b(digest_size=8)
    for path, leaf in jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(model))):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
