"""Import of modules by name."""

import sys

import pytest

from apr_jax.errors import UserError
from apr_jax.io.module import load_module


def test_a_module_is_found_among_packages_and_in_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "a_module_of_mine.py").write_text("VALUE = 7\n")
    monkeypatch.setattr("sys.path", [place for place in sys.path if place])
    monkeypatch.chdir(tmp_path)
    assert load_module("apr_jax.io.module").load_module is load_module
    assert load_module("a_module_of_mine").VALUE == 7


def test_a_missing_module_is_named_and_an_error_inside_a_module_is_raised_unchanged(tmp_path, monkeypatch):
    (tmp_path / "a_broken_module.py").write_text("import no_such_package\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, missing in (("none", "none"), ("apr_jax.none", "apr_jax.none"), ("none.further", "none")):
        with pytest.raises(UserError, match=f"{missing}$"):
            load_module(name)
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        load_module("a_broken_module")
