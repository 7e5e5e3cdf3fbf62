"""Tests of the command line that all tools share: user errors and bugs, --debug, renamed flags and home folders."""

from pathlib import Path

import pytest

from apr_jax.errors import UserError
from apr_jax.model.family import config_json
from apr_jax.train.checkpoint import save_model
from tests.tiny import TOKENIZER, make_model
from tools import data, export_hf, import_hf, latency, publish, solve, view

ROOT = Path(__file__).resolve().parent.parent.parent
TOOLS = (data, export_hf, import_hf, latency, publish, solve, view)
WRONG = {  # flags that end in a user error
    data: [], export_hf: ["--out=x"], import_hf: ["--out=x"], latency: ["x"],
    publish: ["x"], solve: ["3"], view: ["nowhere.jsonl"],
}  # fmt: skip
COMPLETE = {  # the arguments that a tool needs; the others need none
    export_hf: ["--checkpoint=x", "--out=x"], import_hf: ["--model=x", "--out=x"], publish: ["x", "y"],
    view: ["x"],
}  # fmt: skip


def meta_of(model):
    return {"model": config_json(model.config), "task": "countdown", "variant": "apr", "step": 1}


@pytest.fixture(autouse=True)
def cores(monkeypatch):
    monkeypatch.setattr("tools.command.use_all_cores", lambda: None)  # tests have started their own devices


def name(tool):
    return tool.__name__


@pytest.mark.parametrize("tool", TOOLS, ids=name)
def test_debug_keeps_the_traceback_of_any_error(tool, capsys):
    assert tool.main(["tool", *WRONG[tool]]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
    with pytest.raises((UserError, OSError)):
        tool.main(["tool", *WRONG[tool], "--debug"])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("tool", TOOLS, ids=name)
def test_help_names_debug(tool, capsys):
    for flag in ("--help", "-h"):
        assert tool.main(["tool", flag]) == 0
        assert "  --debug " in capsys.readouterr().out


@pytest.mark.parametrize("bug", [KeyError("x"), RuntimeError("x"), ValueError("x"), TypeError("x")], ids=repr)
@pytest.mark.parametrize("tool", TOOLS, ids=name)
def test_a_bug_is_not_reported_as_a_user_error(tool, bug, monkeypatch):
    def work(values, arguments):
        raise bug

    monkeypatch.setattr(tool, "_work", work)
    with pytest.raises(type(bug)):
        tool.main(["tool", *COMPLETE.get(tool, [])])


@pytest.mark.parametrize("tool", TOOLS, ids=name)
def test_missing_and_surplus_arguments_are_named(tool, capsys, monkeypatch):
    monkeypatch.setattr(tool, "_work", lambda values, arguments: None)
    line = COMPLETE.get(tool, [])
    assert tool.main(["tool", *line]) == 0
    for i, left_out in enumerate(line):
        assert tool.main(["tool", *line[:i], *line[i + 1 :]]) == 1
        assert left_out.partition("=")[0].removeprefix("x").removeprefix("y") in capsys.readouterr().err
    if tool not in (data, solve):  # these check the number of arguments themselves
        assert tool.main(["tool", *line, "surplus"]) == 1
        assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    "tool, old, new",
    [(latency, "least_children", "min_children"), (import_hf, "style", "variant"), (solve, "style", "variant")],
)
def test_a_renamed_flag_is_answered_with_its_new_name(tool, old, new, capsys):
    for flag in (f"--{old}=2", f"--{old}"):
        assert tool.main(["tool", flag]) == 1
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and f"--{old} " in err and f"--{new}\n" in err


def test_an_old_name_is_an_unknown_flag_for_a_tool_without_the_new_one(capsys):
    assert view.main(["tool", "--least_children=2"]) == 1
    err = capsys.readouterr().err
    assert "least_children" in err and "min_children" not in err


def test_a_bug_inside_an_export_is_not_reported_as_a_user_error(tmp_path, monkeypatch):
    def load(folder):
        return {}["a bug"]

    monkeypatch.setattr("apr_jax.train.checkpoint.load_model", load)
    TOKENIZER.save(tmp_path / "tokenizer.json")
    with pytest.raises(KeyError):
        export_hf.main(["export_hf", f"--checkpoint={tmp_path}", f"--out={tmp_path}/out"])


def test_files_in_a_home_folder(tmp_path, monkeypatch, capsys):
    home, here = tmp_path / "home", tmp_path / "here"
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    model = make_model()
    save_model(home / "run", model, meta_of(model))
    TOKENIZER.save(home / "own.json")
    line = ["--checkpoint=~/run", "--out=~/exported", "--tokenizer=~/own.json", "--check=0"]
    assert export_hf.main(["export_hf", *line]) == 0, capsys.readouterr().err
    assert import_hf.main(["import_hf", "--model=~/exported", "--out=~/again"]) == 0, capsys.readouterr().err
    assert {path.name for path in home.iterdir()} == {"run", "own.json", "exported", "again"}
    capsys.readouterr()
    assert view.main(["view", "~/nowhere.jsonl"]) == 1
    assert f"{home}/nowhere.jsonl" in capsys.readouterr().err
    assert export_hf.main(["export_hf", "--checkpoint=~no-such-user/run", "--out=x"]) == 1
    assert "~no-such-user " in capsys.readouterr().err
    assert not list(here.iterdir())


def test_an_import_to_a_path_that_orbax_cannot_read_is_refused(tmp_path, capsys):
    model = make_model()
    save_model(tmp_path / "run", model, meta_of(model))
    TOKENIZER.save(tmp_path / "run" / "tokenizer.json")
    line = [f"--checkpoint={tmp_path}/run", f"--out={tmp_path}/hf[1]", "--check=2", "--window=96"]
    assert export_hf.main(["export_hf", *line]) == 0, capsys.readouterr().err  # an export may have such a path
    capsys.readouterr()
    assert import_hf.main(["import_hf", f"--model={tmp_path}/hf[1]", f"--out={tmp_path}/r[1]"]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "r[1]" in err and not (tmp_path / "r[1]").exists()


def test_a_tokenizer_with_a_regular_expression_that_python_lacks_is_refused(tmp_path, capsys):
    text = (TOKENIZER.backend.to_str()).replace('"Regex":"', '"Regex":"\\\\p{L}|')
    (tmp_path / "own.json").write_text(text)
    model = make_model()
    save_model(tmp_path / "run", model, meta_of(model))
    line = [f"--checkpoint={tmp_path}/run", f"--out={tmp_path}/out", f"--tokenizer={tmp_path}/own.json"]
    assert export_hf.main(["export_hf", *line]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "regular expression" in err


@pytest.mark.parametrize("line", [b"no object", b'{"numbers": 3}', b'{"numbers": [1, 2], "target": -1}'])
def test_a_line_without_a_problem_is_named(line, tmp_path, capsys):
    model = make_model()
    save_model(tmp_path / "run", model, meta_of(model))
    TOKENIZER.save(tmp_path / "tokenizer.json")
    (tmp_path / "held_out.jsonl").write_bytes(line)
    assert export_hf.main(["export_hf", f"--checkpoint={tmp_path}/run", f"--out={tmp_path}/out", "--check=1"]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "held_out.jsonl, line 1: " in err
