"""The command line with unusual input: paths, sweeps, config files, diverged training, --debug, and what an export
loads."""

import json
import re
import shutil
from pathlib import Path

import jax
import pytest

from apr_jax.errors import UserError
from experiments.command import parse
from experiments.stages import models
from experiments.sweep import expand
from tests.experiments.conftest import ROOT, SMOKE, copy_run, finish, has, start

START = "from experiments.configs import laptop\n\ndef get_config():\n    c = laptop.get_config()\n"
LAPTOP = SMOKE.replace("smoke", "laptop")
PAPER = SMOKE.replace("smoke", "paper")


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder. The current folder is another one, and empty."""
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "home"


@pytest.fixture
def normals(monkeypatch):
    """The arguments of each random array that is made, not only traced."""
    made, normal = [], jax.random.normal

    def counted(key, *arguments, **options):
        if not isinstance(key, jax.core.Tracer):
            made.append(arguments)
        return normal(key, *arguments, **options)

    monkeypatch.setattr(jax.random, "normal", counted)
    return made


# ---------------------------------------------------------------------- paths


@pytest.mark.parametrize("name", ["r[1]", "a\\b", "x*", "what?", "[!x]", "sub[1]/run"])
@pytest.mark.parametrize("stage", ["data", "all"])
def test_a_workdir_that_cannot_hold_checkpoints_is_refused(refused, tmp_path, name, stage):
    line = refused(SMOKE, f"--workdir={tmp_path / name}", f"--stage={stage}")
    assert name.split("/")[0] in line and not list(tmp_path.iterdir())


def test_a_point_of_a_sweep_that_cannot_hold_checkpoints_is_refused(refused, tmp_path):
    assert "name=r[1]" in refused(SMOKE, f"--workdir={tmp_path}", "--sweep=name=r[1],r2")
    assert not list(tmp_path.iterdir())


def test_a_workdir_with_unusual_characters_can_be_written_and_read(whole_run, main, tmp_path):
    folder = tmp_path / "a b{c}$d;ü~%41'q"
    shutil.copytree(whole_run.folder / "data", folder / "data")
    command = (SMOKE, f"--workdir={folder}", "--variants=sos_plus", "--config.sft.steps=2")
    for stage in ("sft", "evaluate"):
        done = main(*command, f"--stage={stage}")
        assert done.code == 0, done.err


def test_a_workdir_in_a_home_folder(home, main, refused):
    small = (f"--config={ROOT}/experiments/configs/smoke.py", "--config.data.train=20", "--config.grpo.prompts=2")
    assert main(*small, "--workdir=~/runs/x", "--stage=data").code == 0
    assert (home / "runs" / "x" / "data" / "manifest.json").is_file() and not list(Path.cwd().iterdir())
    assert "~no-such-user" in refused(*small, "--workdir=~no-such-user/x")


def test_a_config_file_and_a_checkpoint_in_a_home_folder(home, refused):
    (home / "mine.py").write_text(START + "    c.model.checkpoint = '~/given'\n    return c\n")
    assert f"{home}/given" in refused("--config=~/mine.py", "--stage=sft")


# ---------------------------------------------------------------------- settings


def test_extra_temperatures_and_beam_weights_are_numbers(refused, tmp_path):
    """Where the settings are valid, the command fails later, for lack of records."""
    where = (f"--workdir={tmp_path}", "--stage=report")
    assert "no records under" in refused(LAPTOP, *where, "--config.evaluate.extra_temperatures=0.5,1")
    ten = ",".join("1" * 10)
    assert json.loads((tmp_path / "config.json").read_text())["evaluate"]["extra_temperatures"] == [0.5, 1.0]
    line = refused(PAPER, f"--workdir={tmp_path}/paper", "--config.countdown.apr.beam_weights=1,2")
    assert has(line, "countdown.apr", "beam_weights", 10, "(1.0, 2.0)")
    line = refused(PAPER, f"--workdir={tmp_path}/paper", "--config.countdown.apr.beam_weights=1,x")
    assert has(line, "countdown.apr.beam_weights", "'1,x'")
    assert "budget.depth" in refused(
        PAPER, *where, f"--config.countdown.apr.beam_weights={ten}", "--config.countdown.apr.depth=2"
    )


@pytest.mark.parametrize(
    "line, parts",
    [
        ("c.sft.optimizer.peak_lr = float('nan')", ("sft.optimizer.peak_lr", "number", "nan")),
        ("c.evaluate.temperature = float('inf')", ("evaluate.temperature", "number", "inf")),
        ("c.sft.steps = None", ("sft.steps", "integer", "None")),
        ("c.model.scan = None", ("model.scan", "true", "false", "None")),
        ("c.evaluate.extra_temperatures = (1, 'x')", ("evaluate.extra_temperatures", "numbers", "(1, 'x')")),
        ("c.grpo.variants = (3,)", ("grpo.variants", "texts", "(3,)")),
        ("c.sft = None", ("sft", "section")),
        ("c.sft.steps = 10**30", ("sft.steps", "integer", 64)),
    ],
)
def test_a_config_file_with_wrong_values_is_refused(refused, tmp_path, line, parts):
    (tmp_path / "mine.py").write_text(f"{START}    {line}\n    return c\n")
    assert has(refused(f"--config={tmp_path}/mine.py", f"--workdir={tmp_path}/run"), *parts)
    assert not (tmp_path / "run").exists()


def test_a_sweep_over_tasks_uses_the_variants_of_each(tmp_path):
    points = expand(
        parse(["run", SMOKE, f"--workdir={tmp_path}", "--config.budget.depth=2", "--sweep=task=factors,sums"])
    )
    commands = [parse(["run", *line]) for _, line in points]
    assert [command.variants for command in commands] == [("fresh", "inherit"), ("shared",)]
    chosen = expand(parse(["run", SMOKE, "--variants=sos_plus", f"--workdir={tmp_path}", "--sweep=seed=0,1"]))
    assert {parse(["run", *line]).variants for _, line in chosen} == {("sos_plus",)}


@pytest.mark.parametrize(
    "sweep", ["grpo.kl=0.001,1e-3", "seed=1,2,01", "countdown.sos_plus.beam=(2,3),(2, 3)", "fsdp=1,+1"]
)
def test_a_sweep_with_one_value_written_in_two_ways_is_refused(refused, tmp_path, sweep):
    assert "twice" in refused(SMOKE, f"--workdir={tmp_path}", f"--sweep={sweep}", "--stage=report")


@pytest.mark.parametrize(
    "text, says",
    [
        ("import sys\nsys.exit(0)\n", "line 2: SystemExit: 0"),  # else the run would end with code 0
        ("def get_config():\n    raise SystemExit\n", "line 2: SystemExit"),
        (f"{START}    c.sft.whole = c\n    return c\n", "contains itself"),
    ],
)
def test_a_config_file_that_exits_or_contains_itself_is_refused(refused, tmp_path, text, says):
    (tmp_path / "mine.py").write_text(text)
    assert says in refused(f"--config={tmp_path}/mine.py", f"--workdir={tmp_path}/run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/../../x", "/tmp/x", "a\nb", "a\0b"])
def test_a_name_outside_the_folder_runs_is_refused(refused, home, name):
    smoke = SMOKE.replace("=", f"={ROOT}/")
    assert has(refused(smoke, f"--config.name={name}", "--stage=report"), "name", repr(name))
    assert not list(Path.cwd().iterdir())
    assert "no records under runs/group/x-1" in refused(smoke, "--config.name=group/x-1", "--stage=report")


def test_temperatures_that_would_share_a_file_of_records_are_refused(refused, tmp_path):
    where = (SMOKE, f"--workdir={tmp_path}", "--stage=report")
    assert "0.5000001" in refused(*where, "--config.evaluate.extra_temperatures=0.5,0.5000001")
    assert "0.1234567" in refused(*where, "--config.evaluate.extra_temperatures=0.1234567")
    assert "no records" in refused(*where, "--config.evaluate.extra_temperatures=0.5,0.123456,1e-05")


# ---------------------------------------------------------------------- errors


def test_diverged_training_ends_in_one_line(whole_run, main, tmp_path):
    shutil.copytree(whole_run.folder / "data", tmp_path / "data")
    rates = ("--config.sft.optimizer.peak_lr=1e38", "--config.sft.optimizer.muon_lr=1e38")
    done = main(
        SMOKE, f"--workdir={tmp_path}", "--stage=sft", "--variants=sos_plus", "--config.sft.max_skipped_steps=0", *rates
    )
    assert done.code == 1 and "Traceback" not in done.err
    assert re.fullmatch(r"error: .* not finite .*lower rates or another seed", done.err.splitlines()[-1])


@pytest.mark.parametrize("arguments", [["--config.sft.stepz=3"], ["--stagee=x"], ["--workdir=r[1]"], ["--sweep=seed"]])
def test_debug_keeps_the_traceback_of_a_user_error(main, arguments):
    with pytest.raises(UserError):
        main(SMOKE, *arguments, "--debug")
    assert main(SMOKE, *arguments).code == 1


def test_debug_prints_the_tracebacks_of_an_error_and_its_cause(tmp_path):
    (tmp_path / "wrong.py").write_text("def get_config():\n    return {}['x']\n")
    done = finish(start(f"--config={tmp_path}/wrong.py", "--debug"))
    assert done.code == 1 and "Traceback" in done.err and "KeyError: 'x'" in done.err and "UserError" in done.err
    plain = finish(start(f"--config={tmp_path}/wrong.py"))
    assert plain.code == 1 and plain.err.count("\n") == 1


@pytest.mark.parametrize("file", ["export/check.json", "data/config.json"])
@pytest.mark.parametrize("text", ["[]", '{"a": '])
def test_a_broken_file_of_a_run_is_named(whole_run, refused, tmp_path, file, text):
    folder = copy_run(whole_run.folder, tmp_path / "copy", "checkpoints", "tensorboard", "figures")
    (folder / file).write_text(text)
    if file == "data/config.json":
        (folder / "data" / "manifest.json").unlink()  # without a manifest the data set counts as unfinished
    stage = "data" if file == "data/config.json" else "report"
    assert has(refused(SMOKE, f"--workdir={folder}", f"--stage={stage}"), file, "delete")


def test_a_missing_tokenizer_leaves_no_run_folder(refused, tmp_path):
    """A corrected command can then start in the same folder."""
    assert "no tokenizer" in refused(
        SMOKE, f"--workdir={tmp_path}/run", "--config.tokenizer.name=/no/such", "--stage=data"
    )
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------- what is loaded


def test_an_export_only_loads_the_model_that_it_exports(whole_run, main, monkeypatch, normals, tmp_path):
    loaded, load = [], models.load_model
    monkeypatch.setattr(models, "load_model", lambda step: loaded.append(Path(step)) or load(step))
    folder = copy_run(whole_run.folder, tmp_path / "run", "export*", "tensorboard")
    for path in (folder / "sft_sos_plus" / "checkpoints" / "40" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    for _ in range(2):  # the second call finds the export of these weights
        done = main(SMOKE, f"--workdir={folder}", "--stage=export", "--config.export.check_trees=0")
        assert done.code == 0, done.err
    assert loaded == [(folder / "grpo_apr" / "checkpoints").resolve()] * 2
    assert json.loads((folder / "export" / "check.json").read_text())["model"] == "grpo_apr"
    assert not normals  # makes no random weights, which the loaded ones would replace
