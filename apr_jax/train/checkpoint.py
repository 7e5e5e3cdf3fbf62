"""Orbax checkpoints: what a stage saves along the way and finds again when it is started again.

A save returns when the state is copied; the files are written beside the training that goes on, and a finished step is
renamed into place. An error of that writing is told at the next call.
"""

import errno
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import nnx

from apr_jax.errors import UserError
from apr_jax.model.llama import Llama, LlamaConfig, abstract_llama


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
        options = ocp.CheckpointManagerOptions(preservation_policy=ocp.checkpoint_managers.LatestN(keep))
        self._saving: int | None = None  # the step whose files may still be on their way
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=options,
            item_handlers={"state": ocp.StandardCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()},
        )

    @property
    def latest(self) -> int | None:
        return self._manager.latest_step()

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
        """(step, state) of a saved step, the newest by default, on the devices of `like`."""
        step = self.latest if step is None else step
        if step is None:
            raise CheckpointError(f"no checkpoint under {self.folder}")
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        try:
            found = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(shapes)))
        except Exception as error:
            raise CheckpointError(f"step {step} under {self.folder} cannot be read: {_first_line(error)}") from None
        return step, found["state"]

    def meta(self, step: int) -> dict:
        """What was saved beside a step."""
        return self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]

    def close(self) -> None:
        """Waits for what is being written. Raises CheckpointError as `save` does."""
        try:
            self.wait()
        finally:
            self._manager.close()


def save_model(folder: Path | str, model: Llama, meta: dict) -> None:
    """Saves a model's weights alone, as ``folder/STEP`` by the step in `meta`. Raises CheckpointError."""
    checkpoints = Checkpoints(Path(folder))
    checkpoints.save(meta["step"], {"weights": nnx.to_pure_dict(nnx.state(model))}, meta)
    checkpoints.close()
    for mark in Path(folder).rglob("commit_success.txt"):
        mark.write_text("Checkpoint commit was successful\n")  # Orbax names the folder of this machine there


def newest_step(folder: Path | str) -> Path | None:
    """The folder of the newest step in a folder of steps; None where there is none, or only what a save left behind."""
    steps = [path for path in Path(folder).glob("*") if path.name.isdigit()]
    return max(steps, key=lambda path: int(path.name), default=None)


def last_step(stage: Path | str) -> Path | None:
    """The folder of the step that a stage of a run ends with: of GRPO with validation what validated best, else the
    newest; None where none is saved."""
    return newest_step(Path(stage) / "best") or newest_step(Path(stage) / "checkpoints")


def load_meta(folder: Path | str) -> tuple[LlamaConfig, dict]:
    """The sizes of a saved step's model, and all of its meta; `folder` as in `load_model`. Raises CheckpointError."""
    return _read_meta(_step_folder(folder))


def _step_folder(folder: Path | str) -> Path:
    folder = Path(folder).absolute()
    if "\\" in str(folder):
        raise CheckpointError(f"checkpoints cannot be read from a path with a backslash, was given {folder}: rename it")
    if not folder.is_dir():
        raise CheckpointError(f"no checkpoint at {folder}")
    if (folder / "state").is_dir():
        return folder
    if (step := newest_step(folder)) is None:
        raise CheckpointError(f"no checkpoint at {folder}: it holds no saved step")
    return step


def _read_meta(folder: Path) -> tuple[LlamaConfig, dict]:
    try:
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
            meta = reader.restore(folder / "meta")
        sizes = dict(meta["model"])
        if isinstance(sizes.get("remat"), bool):  # checkpoints made before remat had choices
            del sizes["remat"]
        return LlamaConfig(**sizes), meta
    except Exception as error:
        raise CheckpointError(f"the checkpoint at {folder} cannot be read: {_first_line(error)}") from None


def load_model(folder: Path | str) -> tuple[Llama, dict]:
    """The model of a saved step ``.../checkpoints/STEP`` (its newest step for ``.../checkpoints``) and its
    meta, which holds the model's sizes. Raises CheckpointError."""
    folder = _step_folder(folder)
    config, meta = _read_meta(folder)
    try:
        graphdef, weights = nnx.split(abstract_llama(config))
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
        raise CheckpointError(f"the checkpoint at {folder} cannot be read: {_first_line(error)}") from None
    nnx.replace_by_pure_dict(weights, restored["weights"])
    return nnx.merge(graphdef, weights), meta


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
