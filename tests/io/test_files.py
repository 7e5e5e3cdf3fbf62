"""Atomic writes of files and folders: whatever ends the writing process, a file is complete or does not change."""

import os
import subprocess
import sys
import time

import pytest

from apr_jax.io.files import LEFT_AFTER, part_of, remove_left, whole, write_text


def test_a_file_exists_when_the_block_ends(tmp_path):
    path = tmp_path / "new" / "folder" / "file"
    with whole(path) as part:
        part.write_bytes(b"1")
        assert not path.exists() and part.parent == path.parent
    assert path.read_bytes() == b"1" and list(path.parent.iterdir()) == [path]


def test_a_file_replaces_another(tmp_path):
    write_text(tmp_path / "file", "one")
    write_text(tmp_path / "file", "zwölf →")
    assert (tmp_path / "file").read_bytes() == "zwölf →".encode() and len(list(tmp_path.iterdir())) == 1


def test_a_folder_exists_when_the_block_ends(tmp_path):
    with whole(tmp_path / "folder") as part:
        part.mkdir()
        (part / "file").touch()
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["folder", "folder/file"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_after_an_error_the_earlier_file_is_unchanged(tmp_path, kind, error):
    path = tmp_path / "name"
    write_text(path, "before")
    with pytest.raises(error):
        with whole(path) as part:
            if kind == "folder":
                part.mkdir()
                part = part / "file"
            part.write_text("half")
            raise error
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


def test_a_block_that_writes_nothing_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        with whole(tmp_path / "file"):
            pass
    assert not list(tmp_path.iterdir())


def test_after_a_kill_the_earlier_file_is_unchanged_and_a_part_file_is_left(tmp_path):
    path = tmp_path / "file"
    write_text(path, "before")
    program = (
        "import os, sys; from pathlib import Path; from apr_jax.io.files import whole\n"
        "with whole(Path(sys.argv[1])) as part: part.write_text('half'); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", program, path], cwd=os.getcwd()).returncode == -9
    (left,) = set(tmp_path.iterdir()) - {path}
    assert path.read_text() == "before" and left.name.startswith("file.") and left.suffix == ".part"


def test_part_files_have_unique_names(tmp_path):
    assert part_of(tmp_path / "file") != part_of(tmp_path / "file")


def test_only_old_part_files_are_removed(tmp_path):
    old = time.time() - LEFT_AFTER - 1
    file, folder, young = (part_of(tmp_path / name) for name in ("file", "folder", "young"))
    folder.mkdir()
    for path in (file, folder / "inside", young):
        path.touch()
    for path in (file, folder):
        os.utime(path, (old, old))
    remove_left([*tmp_path.iterdir(), tmp_path / "removed by another process"])
    assert list(tmp_path.iterdir()) == [young]
