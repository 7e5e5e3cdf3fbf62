"""Tests of reading what an exported folder says about its model."""

import json

import pytest

from apr_jax.errors import UserError
from apr_jax.export.exported import read_export
from apr_jax.export.hf import export_hf
from tests.evaluate.nonsense import SPEC
from tests.tiny import SIZES, TOKENIZER, make_model

META = {
    "task": SPEC, "task_settings": {"width": 3}, "variant": "serial", "condition": "Budget: 2 ", "step": 1,
    "config": {"window": 128},
}  # fmt: skip
STORED = {
    "family": "llama", "task": SPEC, "task_settings": {"width": 3}, "variant": "serial", "condition": "Budget: 2 ",
    "window": 128,
}  # fmt: skip


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "model"
    export_hf(make_model(), TOKENIZER, folder, META)
    return folder


def change(folder, stored):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"apr_jax": stored}))


def test_an_export_stores_its_task_variant_condition_and_window(exported):
    found = read_export(exported)
    assert json.loads((exported / "config.json").read_text())["apr_jax"] == STORED
    assert found.family == "llama"
    assert found.task.spec == SPEC and found.task.settings.width == 3
    assert (found.variant, found.condition, found.window) == ("serial", "Budget: 2 ", 128)
    assert (found.context, found.vocab_size) == (SIZES["context"], len(TOKENIZER))
    assert found.tokenizer.encode("Exploring") == TOKENIZER.encode("Exploring")


def test_the_digest_depends_on_the_weights_and_the_window_is_at_most_the_context(exported, tmp_path):
    export_hf(make_model(1), TOKENIZER, tmp_path / "other", META | {"config": {"window": 10_000}})
    other = read_export(tmp_path / "other")
    assert other.window == other.context and other.weights != read_export(exported).weights


def test_an_export_without_its_task_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=tmp_path.name):
        read_export(tmp_path)
    export_hf(make_model(), TOKENIZER, tmp_path / "plain")
    with pytest.raises(UserError, match="tools.export_hf"):
        read_export(tmp_path / "plain")
    for wrong in ({}, {**STORED, "window": "x"}, [], {name: STORED[name] for name in STORED if name != "condition"}):
        change(tmp_path / "plain", wrong)
        with pytest.raises(UserError, match="tools.export_hf"):
            read_export(tmp_path / "plain")
    change(tmp_path / "plain", STORED | {"variant": "other"})
    with pytest.raises(UserError, match="threads, serial.*'other'"):
        read_export(tmp_path / "plain")
