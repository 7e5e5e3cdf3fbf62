"""What all tools' command lines share: bugs and mendable errors apart, --debug, home folders, and one batch on any
machine."""

from pathlib import Path

import pytest

from apr_jax.errors import UserError
from apr_jax.model.family import config_json
from apr_jax.train.checkpoint import save_model
from tests.tiny import TOKENIZER, make_model
from tools import data, export_hf, import_hf, latency, publish, solve, view

ROOT = Path(__file__).resolve().parent.parent.parent
TOOLS = (data, export_hf, import_hf, latency, publish, solve, view)
WRONG = {  # a command that a user can mend, and one that is right as far as it looks
    data: [], export_hf: ["--out=x"], import_hf: ["--out=x"], latency: ["x"],
    publish: ["x"], solve: ["3"], view: ["nowhere.jsonl"],
}  # fmt: skip
WHOLE = {  # all that a tool's command line needs; of the others nothing
    export_hf: ["--checkpoint=x", "--out=x"], import_hf: ["--model=x", "--out=x"], publish: ["x", "y"],
    solve: ["--target=3"], view: ["x"],
}  # fmt: skip


def meta_of(model):
    return {"model": config_json(model.config), "task": "countdown", "variant": "apr", "step": 1}


@pytest.fixture(autouse=True)
def cores(monkeypatch):
    monkeypatch.setattr("tools.command.use_all_cores", lambda: None)  # the tests' own devices stay


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
def test_a_bug_is_not_taken_for_bad_input(tool, bug, monkeypatch):
    def work(values, arguments):
        raise bug

    monkeypatch.setattr(tool, "_work", work)
    with pytest.raises(type(bug)):
        tool.main(["tool", *WHOLE.get(tool, [])])


@pytest.mark.parametrize("tool", TOOLS, ids=name)
def test_what_a_command_line_lacks_or_has_too_much_of_is_named(tool, capsys, monkeypatch):
    monkeypatch.setattr(tool, "_work", lambda values, arguments: None)
    line = WHOLE.get(tool, [])
    assert tool.main(["tool", *line]) == 0
    for i, left_out in enumerate(line):
        assert tool.main(["tool", *line[:i], *line[i + 1 :]]) == 1
        assert left_out.partition("=")[0].removeprefix("x").removeprefix("y") in capsys.readouterr().err
    if tool not in (data, solve):  # they count for themselves
        assert tool.main(["tool", *line, "surplus"]) == 1
        assert capsys.readouterr().err.count("\n") == 1


def test_a_bug_inside_an_export_is_not_taken_for_bad_input(tmp_path, monkeypatch):
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
    TOKENIZER.save(home / "words.json")
    line = ["--checkpoint=~/run", "--out=~/exported", "--tokenizer=~/words.json", "--check=0"]
    assert export_hf.main(["export_hf", *line]) == 0, capsys.readouterr().err
    assert import_hf.main(["import_hf", "--model=~/exported", "--out=~/again"]) == 0, capsys.readouterr().err
    assert {path.name for path in home.iterdir()} == {"run", "words.json", "exported", "again"}
    capsys.readouterr()
    assert view.main(["view", "~/nowhere.jsonl"]) == 1
    assert f"{home}/nowhere.jsonl" in capsys.readouterr().err
    assert export_hf.main(["export_hf", "--checkpoint=~no-such-user/run", "--out=x"]) == 1
    assert "~no-such-user has no home folder" in capsys.readouterr().err
    assert not list(here.iterdir())


def test_an_import_to_where_no_checkpoint_can_be_read_is_refused(tmp_path, capsys):
    model = make_model()
    save_model(tmp_path / "run", model, meta_of(model))
    TOKENIZER.save(tmp_path / "run" / "tokenizer.json")
    line = [f"--checkpoint={tmp_path}/run", f"--out={tmp_path}/hf[1]", "--check=2", "--window=96"]
    assert export_hf.main(["export_hf", *line]) == 0, capsys.readouterr().err  # an export may lie there
    capsys.readouterr()
    assert import_hf.main(["import_hf", f"--model={tmp_path}/hf[1]", f"--out={tmp_path}/r[1]"]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "without [" in err and not (tmp_path / "r[1]").exists()


def test_a_tokenizer_in_another_language_of_expressions_is_refused(tmp_path, capsys):
    text = (TOKENIZER.backend.to_str()).replace('"Regex":"', '"Regex":"\\\\p{L}|')
    (tmp_path / "words.json").write_text(text)
    model = make_model()
    save_model(tmp_path / "run", model, meta_of(model))
    line = [f"--checkpoint={tmp_path}/run", f"--out={tmp_path}/out", f"--tokenizer={tmp_path}/words.json"]
    assert export_hf.main(["export_hf", *line]) == 1
    assert "one regular expression that Python reads" in capsys.readouterr().err


@pytest.mark.parametrize("line", [b"no object", b'{"numbers": 3}', b'{"numbers": [1, 2], "target": -1}'])
def test_a_line_that_is_no_problem_is_named(line, tmp_path, capsys):
    model = make_model()
    save_model(tmp_path / "run", model, meta_of(model))
    TOKENIZER.save(tmp_path / "tokenizer.json")
    (tmp_path / "held_out.jsonl").write_bytes(line)
    assert export_hf.main(["export_hf", f"--checkpoint={tmp_path}/run", f"--out={tmp_path}/out", "--check=1"]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "held_out.jsonl, line 1: " in err
