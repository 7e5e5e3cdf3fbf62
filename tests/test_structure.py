"""The structure of the code: imports between packages, the contents of the wheel, and the files in which a task's or a
model family's name may occur."""

import ast
import tomllib
from pathlib import Path

from setuptools import find_packages

from tools.benchmarks.structure import (
    FLOORS,
    by_room,
    circles,
    implied,
    levels_of,
    main,
    module_links,
    read_modules,
    room_links,
    upward,
)

ROOT = Path(__file__).resolve().parent.parent
MODULES = read_modules(ROOT)
OURS = [module for module in MODULES if module.name.partition(".")[0] == "apr_jax" and module.name != "apr_jax"]
TASK = ("countdown", "sosp", "sos_plus", "sub call", "token budget")  # names and phrases of the task Countdown
TASK_FILES = ("apr_jax/tasks/", "experiments/configs/", "tools/solve.py", "tools/benchmarks/", "tests/")
FAMILY = ("llama",)  # the name of a model family
FAMILY_FILES = ("apr_jax/model/", "tests/")


def test_every_room_is_on_one_floor():
    names = [name for floor in FLOORS for name in floor]
    assert len(set(names)) == len(names)
    assert {module.room for module in OURS} <= set(names)


def test_no_room_imports_from_a_higher_floor():
    pairs = room_links(module for module in MODULES if module.name.partition(".")[0] != "tests")
    assert upward(pair for pair in pairs if "apr_jax" not in pair) == []


def test_no_circles_of_rooms():
    assert circles(by_room(room_links(OURS))) == []


def test_no_circles_of_modules():
    assert circles(module_links(OURS)) == []


def test_apr_jax_imports_none_of_our_code_outside_its_wheel():
    outside = {"experiments", "tools", "tests"}
    assert {(module.name, name) for module in OURS for name in module.imports if name.split(".")[0] in outside} == set()


def test_the_wheel_has_all_of_apr_jax_and_nothing_else():
    chosen = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]
    packed = set(find_packages(str(ROOT), **chosen))
    assert "apr_jax.io" in packed and {name.partition(".")[0] for name in packed} == {"apr_jax"}
    # A folder without __init__.py would be left out of the wheel.
    assert packed == {".".join(module.path.parent.parts) for module in OURS}


def test_circles_are_found():
    links = {"a": {"b"}, "b": {"c", "d"}, "c": {"a"}, "d": {"e"}, "e": {"d", "f"}, "g": {"a"}}
    assert circles(links) == [["a", "b", "c"], ["d", "e"]]


def names_of(path: Path, words: tuple[str, ...]) -> set[str]:
    """Return the strings and names in a file's code that contain one of the words. Docstrings and comments may contain
    them."""
    tree = ast.parse(path.read_text())
    free = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in free:
            found.add(node.value)
        for field in ("id", "attr", "name", "asname", "arg", "module"):
            if isinstance(value := getattr(node, field, None), str):
                found.add(value)
    return {name for name in found if any(word in name.lower() for word in words)}


def elsewhere(allowed: tuple[str, ...], words: tuple[str, ...]) -> dict[str, set[str]]:
    """Return, by file, the strings and names that contain one of the words, for all files whose path does not begin
    with one of `allowed`."""
    paths = [module.path for module in MODULES if not module.path.as_posix().startswith(allowed)]
    return {path.as_posix(): found for path in paths if (found := names_of(ROOT / path, words))}


def test_names_of_a_task_are_found(tmp_path):
    path = tmp_path / "file.py"
    path.write_text(
        '"""countdown"""\nfrom a.countdown import b as sosp_b  # sosp\nc = f"of {b} sos_plus"\nd.sosp(sosp=1)'
    )
    assert names_of(path, TASK) == {"a.countdown", "sosp_b", " sos_plus", "sosp"}


def test_only_a_tasks_own_files_contain_its_names():
    assert elsewhere(TASK_FILES, TASK) == {}


def test_only_the_models_files_contain_a_familys_name():
    assert elsewhere(FAMILY_FILES, FAMILY) == {}
    assert {"llama", "apr_jax.model.llama"} <= names_of(ROOT / "apr_jax" / "model" / "family.py", FAMILY)


def test_the_structure_of_a_checkout_is_printed_and_drawn(tmp_path, capsys):
    files = {
        "apr_jax/__init__.py": "", "apr_jax/errors.py": "class A:\n    pass\n", "apr_jax/train/a.py": "",
        "apr_jax/model/a.py": "from apr_jax.train import a\nimport apr_jax.errors\n",
        "apr_jax/attic/a.py": "from ..train import a\n", "experiments/run.py": "from apr_jax import attic, errors\n",
    }  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "apr_jax" / "attic" / "__init__.py").write_text("from apr_jax.attic.a import a\n")
    modules = read_modules(tmp_path)
    assert {module.name: module.statements for module in modules if module.room == "model"} == {"apr_jax.model.a": 2}
    pairs = room_links(modules)
    assert set(pairs) == {
        ("model", "train"), ("model", "errors"), ("attic", "train"),
        ("experiments", "attic"), ("experiments", "errors"),
    }  # fmt: skip
    rooms = {"model", "train", "errors", "attic", "experiments"}
    assert levels_of(pairs, rooms) == {"model": 0, "train": 3, "errors": 0, "attic": 3, "experiments": 5}
    assert implied({*pairs, ("attic", "errors")}) == {("experiments", "errors")}
    assert main(["structure", f"--root={tmp_path}", f"--out={tmp_path}/a.png"]) == 0
    out = capsys.readouterr().out
    assert "model -> train" in out and "on no floor: attic" in out
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert main(["structure", f"--root={tmp_path}/nowhere"]) == 1
