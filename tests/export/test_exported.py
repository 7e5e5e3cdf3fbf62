"""What an exported folder says of itself."""

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
SAID = {
    "family": "llama", "task": SPEC, "task_settings": {"width": 3}, "variant": "serial", "condition": "Budget: 2 ",
    "window": 128,
}  # fmt: skip


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "model"
    export_hf(make_model(), TOKENIZER, folder, META)
    return folder


def change(folder, said):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"apr_jax": said}))


def test_an_export_says_its_task_and_how_it_is_asked(exported):
    found = read_export(exported)
    assert json.loads((exported / "config.json").read_text())["apr_jax"] == SAID
    assert found.family == "llama"
    assert found.task.spec == SPEC and found.task.settings.width == 3
    assert (found.variant, found.condition, found.window) == ("serial", "Budget: 2 ", 128)
    assert (found.context, found.vocab_size) == (SIZES["context"], len(TOKENIZER))
    assert found.tokenizer.encode("Exploring") == TOKENIZER.encode("Exploring")


def test_other_weights_have_another_digest_and_a_window_is_no_longer_than_the_context(exported, tmp_path):
    export_hf(make_model(1), TOKENIZER, tmp_path / "other", META | {"config": {"window": 10_000}})
    other = read_export(tmp_path / "other")
    assert other.window == other.context and other.weights != read_export(exported).weights


def test_an_export_that_does_not_say_its_task_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no exported model in"):
        read_export(tmp_path)
    export_hf(make_model(), TOKENIZER, tmp_path / "plain")
    with pytest.raises(UserError, match="export it again with tools.export_hf"):
        read_export(tmp_path / "plain")
    for wrong in ({}, {**SAID, "window": "x"}, [], {name: SAID[name] for name in SAID if name != "condition"}):
        change(tmp_path / "plain", wrong)
        with pytest.raises(UserError, match="export it again with tools.export_hf"):
            read_export(tmp_path / "plain")
    change(tmp_path / "plain", SAID | {"variant": "other"})
    with pytest.raises(UserError, match="threads, serial, was given 'other'"):
        read_export(tmp_path / "plain")
