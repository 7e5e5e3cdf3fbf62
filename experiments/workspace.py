"""Where the outputs of stages are: in a store, with links to them in a run folder.

An output is a folder or a file that one stage made. Its fingerprint is a hash of everything that shaped it: the stage,
the edition of the stage's code, the settings that the stage read, and the fingerprints of its inputs, which are outputs
of other stages. So two runs that differ only in GRPO settings share data and supervised models, and nothing is made
twice.

    RUN/store/sft-3f9a12c4d5e6/sft_apr/         an output
    RUN/store/sft-3f9a12c4d5e6/made_of.json     the values that its fingerprint is the hash of
    RUN/sft_apr                                 a link to the output for the run's settings

Outputs for other settings stay in the store. Only `data` may be a real folder in the run folder: an imported data set,
or one that tools.data made.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import shutil
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from apr_jax import interrupt
from apr_jax.errors import UserError
from apr_jax.io.files import write_text
from apr_jax.io.paths import read_json
from apr_jax.settings import leaves
from experiments.settings import Settings, setting_types

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "tokenizers", "transformers", "torch")
NOTE = "made_of.json"  # file beside an output: the values that its fingerprint is the hash of
POLL_SECONDS = 0.2  # between two attempts to take a lock
CLAIM_SECONDS = 2.0  # to wait for another process that is claiming the same folder


@dataclass(frozen=True)
class Output:
    """The output that a stage makes from certain settings and inputs. It may not exist yet."""

    name: str  # path in the run folder: "sft_apr", "evaluate/sft_apr@1.jsonl"
    stage: str
    made_of: Mapping[str, Any]  # stage, edition, settings by full name, fingerprints of inputs by name
    path: Path  # in the store; in the run folder if that has a real folder
    link: Path  # in the run folder

    @property
    def fingerprint(self) -> str:
        """The hash of `made_of`, 12 hexadecimal digits."""
        return fingerprint_of(self.made_of)

    def fits(self, note: Mapping[str, Any]) -> bool:
        """Return whether a note is that of this output. A note may have more entries than `made_of`."""
        return self.made_of.items() <= note.items()

    @property
    def note(self) -> Path:
        """The path of the JSON file that has `made_of`."""
        return self.path.parent / NOTE

    @property
    def own(self) -> bool:
        """Whether the output is in the run folder itself, not in the store."""
        return self.path == self.link


def fingerprint_of(made_of: Any) -> str:
    """Return the hash of a JSON value, 12 hexadecimal digits."""
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:12]


def describe(stage: str, edition: int, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> dict[str, Any]:
    """Return the description whose hash is an output's fingerprint, with the settings by full name."""
    flat = json.loads(json.dumps(dict(leaves(settings))))
    return {"stage": stage, "edition": edition, "settings": flat, "inputs": dict(inputs)}


class Workspace:
    """A run folder and its store.

    `writes` says whether this process claims the run folder and writes links and notes (made_of.json). If several
    processes train together, only the first one does.
    """

    def __init__(self, folder: Path, store: Path, writes: bool = True):
        self.folder, self.store, self.writes = folder, store, writes
        self._lock: int | None = None

    # ------------------------------------------------------------------ the run folder

    def claim(self, settings: Settings) -> None:
        """Lock the run folder for the run's settings, and write config.json and versions.json.

        Processes with the same settings share the folder. Raises UserError if the folder has a run of another task or
        of an earlier version of this code, or if a process with other settings is working on it.
        """
        path = self.folder / "config.json"
        mine = json.loads(json.dumps(settings.config))
        _check_run(self.folder, _read_config(path), settings)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.folder, os.O_RDONLY)
        until = time.monotonic() + CLAIM_SECONDS
        while not self._locked_for(mine, path, settings):
            if time.monotonic() > until:
                self.close()
                differences = "; ".join(_differences(_read_config(path), mine))
                raise UserError(
                    f"another process is at work on {self.folder} with other settings ({differences}): give another "
                    "--workdir, or wait for its end"
                )
            time.sleep(POLL_SECONDS)
        _note_versions(self.folder / "versions.json")

    def _locked_for(self, mine: Mapping[str, Any], path: Path, settings: Settings) -> bool:
        """Return whether this process got the shared lock with its settings in config.json."""
        if _flock(self._lock, fcntl.LOCK_EX):
            if (theirs := _read_config(path)) != mine:
                _check_run(self.folder, theirs, settings)
                write_text(path, json.dumps(mine, indent=1))
        if _flock(self._lock, fcntl.LOCK_SH) and _read_config(path) == mine:
            return True
        fcntl.flock(self._lock, fcntl.LOCK_UN)
        return False

    def close(self) -> None:
        """Release the lock of the run folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def unlink(self, fits: Callable[[str, Mapping[str, Any]], bool], reports: Sequence[str]) -> None:
        """Remove the links for which `fits(name, note)` is false, and then `reports`, the files made from all links.

        `name` is a link's path in the run folder, and `note` is the note of its output. The outputs stay in the store.
        """
        if not self.writes or not self.folder.is_dir():
            return
        links = [path for path in (*self.folder.iterdir(), *(self.folder / "evaluate").glob("*")) if self.is_link(path)]
        stale = []
        for path in links:
            folder = path.resolve().parent
            note = read_json(folder / NOTE, f"delete {folder}") if (folder / NOTE).exists() else {}
            if not fits(str(path.relative_to(self.folder)), note):
                stale.append(path)
        for path in (*stale, *(self.folder / name for name in reports if stale)):
            path.unlink(missing_ok=True)

    def is_link(self, path: Path) -> bool:
        """Return whether a path is a link into the store."""
        return path.is_symlink() and self.store.resolve() in path.resolve().parents

    # ------------------------------------------------------------------ outputs

    def output(
        self,
        name: str,
        stage: str,
        edition: int,
        settings: Mapping[str, Any],
        inputs: Mapping[str, str],
        file: str = "",
    ) -> Output:
        """Return the output that `stage` makes from `settings` and `inputs`.

        `name` is the path of its link in the run folder. `inputs` has the fingerprints of the inputs by name. `file` is
        the output's name in the store, by default the last part of `name`. Raises UserError if a real folder is at the
        link's path.
        """
        made_of = describe(stage, edition, settings, inputs)
        link = self.folder / name
        if link.is_dir() and not self.is_link(link):
            if link.is_symlink() and (link.resolve().parent / NOTE).exists():
                raise UserError(f"{link} is a link into another store: give --store={link.resolve().parent.parent}")
            raise UserError(
                f"{link} is no link into {self.store}: move it away. A run is copied with its links, as by cp -a"
            )
        place = self.store / f"{stage}-{fingerprint_of(made_of)}" / (file or Path(name).name)
        return Output(name, stage, made_of, place, link)

    def connect(self, output: Output) -> None:
        """Make the link to an output in the run folder, if the output exists.

        Raises UserError if another file is at the link's path.
        """
        if not self.writes or output.own or not output.path.exists():
            return
        target, link = os.path.relpath(output.path.resolve(), output.link.parent.resolve()), output.link
        if link.is_symlink() and os.readlink(link) == target:
            return
        if link.exists() and not link.is_symlink() and link.read_bytes() != output.path.read_bytes():
            raise UserError(f"{link} was not made by this run: move it away, or give another --workdir")
        link.parent.mkdir(parents=True, exist_ok=True)
        new = link.with_name(f".{link.name}.{os.getpid()}")
        new.unlink(missing_ok=True)
        new.symlink_to(target)
        os.replace(new, link)

    @contextlib.contextmanager
    def making(self, output: Output, extra: Mapping[str, Any] = {}) -> Iterator[Path]:
        """A context manager that locks an output while a stage makes it, and yields the output's path.

        A second process that makes the same output waits until the first one has ended, and then finds the output made.
        The note has `made_of` and `extra`. A folder in which nothing was made is removed.
        """
        if not self.writes:
            yield output.path
            return
        with _locked(output.path if output.own else output.path.parent, output.name):
            if not output.own and read_note(output.note) != (noted := {**output.made_of, **extra}):
                write_text(output.note, json.dumps(noted, indent=1))
            if not output.path.suffix:
                output.path.mkdir(exist_ok=True)
                self.connect(output)  # now, so that a user can watch the folder grow
            try:
                yield output.path
            finally:
                self._remove_empty(output)
                self.connect(output)

    def _remove_empty(self, output: Output) -> None:
        """Remove the folder of an output, and its link, if nothing was made in it."""
        if output.own:
            return
        with contextlib.suppress(OSError):
            output.path.rmdir()
        if {path.name for path in output.path.parent.iterdir()} == {NOTE}:
            shutil.rmtree(output.path.parent)
            if self.is_link(output.link) and not output.link.exists():
                output.link.unlink()


def at_work(folder: Path) -> bool:
    """Return whether a process is working on a run folder."""
    try:
        lock = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        return not _flock(lock, fcntl.LOCK_EX)
    finally:
        os.close(lock)


def agree(settings: Settings, variants: Sequence[str]) -> int:
    """Return a random number that all processes of a run share. It differs each time that the run is started.

    Raises UserError if the processes were given different settings or variants.
    """
    mine = zlib.crc32(json.dumps([settings.config, list(variants)], sort_keys=True).encode())
    drawn = int.from_bytes(os.urandom(4), "little")
    given, numbers = multihost_utils.process_allgather(np.array([mine, drawn], np.uint32)).T.tolist()
    if len(set(given)) > 1:
        raise UserError(
            "the processes were given different settings: all need the same --config, --variants and changes"
        )
    return numbers[0]


@contextlib.contextmanager
def _locked(folder: Path, name: str) -> Iterator[None]:
    """A context manager that makes a folder and holds its lock.

    It waits for a process that has the lock, and prints once that it waits.
    """
    said = False
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:  # another process has just removed it
            continue
        try:
            while not _flock(lock, fcntl.LOCK_EX):
                if not said:
                    print(f"{name}: another process is making it, waiting for its end", file=sys.stderr)
                said = True
                interrupt.check()
                time.sleep(POLL_SECONDS)
            if _is_at(lock, folder):
                yield
                return
        finally:
            os.close(lock)


def _is_at(opened: int, folder: Path) -> bool:
    """Return whether an opened folder is still at its path. Another process may have removed it."""
    try:
        return os.path.samestat(os.fstat(opened), folder.stat())
    except FileNotFoundError:
        return False


def _flock(lock: int, kind: int) -> bool:
    """Return whether a lock was taken, without waiting for it. A file system without locks gives every lock."""
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def _read_config(path: Path) -> dict | None:
    """Return the config in config.json, or None if there is no such file. Raises UserError if it is broken."""
    return read_json(path, "delete it, and the run goes on") if path.exists() else None


def _check_run(folder: Path, theirs: Mapping[str, Any] | None, settings: Settings) -> None:
    """Raise UserError if a run folder has a run of another task, or of an earlier version of this code."""
    if theirs is None:
        return
    task, mine = theirs.get("task"), settings.task.spec
    if isinstance(task, str) and task != mine:
        raise UserError(f"{folder} holds a run of the task {task}, the task is {mine}: give another --workdir")
    model = theirs.get("model")
    family = model.get("family") if isinstance(model, dict) else None
    try:
        known = setting_types(task, family).keys() if task and family else set()
    except (UserError, TypeError):
        known = set()
    if not known or {name for name, _ in leaves(theirs)} - known:
        raise UserError(f"{folder} holds a run of an earlier version of this code: give another --workdir")


def _differences(old: Mapping[str, Any] | None, new: Mapping[str, Any]) -> list[str]:
    """Return the first three settings that differ between two trees, such as "sft.steps was 40, is 41"."""
    one, two = (dict(leaves(tree or {})) for tree in (old, new))
    short = lambda name: name.removeprefix("settings.").replace("inputs.", "the input ")  # noqa: E731
    return [
        f"{short(name)} was {one.get(name)!r}, is {two.get(name)!r}"
        for name in sorted(one.keys() | two.keys())
        if one.get(name) != two.get(name)
    ][:3]


def _note_versions(path: Path) -> None:
    """Write the device and the versions of packages to a file.

    If the run was on another machine or with other versions before, the file has these under `earlier`.
    """
    versions = {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "device": jax.devices()[0].device_kind,
    }
    versions |= {name: _version(name) for name in PACKAGES}
    noted = read_note(path)
    before = noted.pop("earlier", [])
    known = [*(before if isinstance(before, list) else []), noted] if noted else []
    if earlier := [one for one in known if one != versions]:
        versions["earlier"] = earlier
    write_text(path, json.dumps(versions, indent=1))


def read_note(path: Path) -> dict:
    """Return the JSON object in a file, or {} if the file is missing or broken."""
    try:
        return read_json(path, "")
    except (FileNotFoundError, UserError):
        return {}


def _version(package: str) -> str | None:
    """Return the version of a package, or None if it is not installed. torch is optional."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
