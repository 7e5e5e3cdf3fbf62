"""The command line: what a whole run leaves, that it goes on after any stop, and what it refuses in one line."""

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx

from apr_jax.data.folder import DataFolder
from apr_jax.evaluate.records import read_records
from apr_jax.export.hf import load_transformers
from apr_jax.tasks.countdown.task import Countdown
from apr_jax.train.checkpoint import Checkpoints, load_model
from experiments import stages, sweep
from experiments.settings import STAGES
from tests.experiments.conftest import ROOT, SMOKE, finish, same_weights, snapshot, start

MODELS = ("sft_apr", "sft_sos_plus", "grpo_apr")
STEPS = {"sft_sos_plus": 40, "sft_apr": 40, "grpo_apr": 2}


# ---------------------------------------------------------------------- a whole run


def test_a_run_leaves_everything(whole_run):
    folder = whole_run.folder
    assert json.loads((folder / "config.json").read_text())["name"] == "smoke"
    assert {"python", "device", "jax", "orbax-checkpoint"} <= set(json.loads((folder / "versions.json").read_text()))
    data = {"train.jsonl", "held_out.jsonl", "tokenizer.json", "config.json", "manifest.json"}
    data |= {f"{style}_{part}" for style in ("sos_plus", "apr") for part in ("train", "validation")}
    assert {path.name for path in (folder / "data").iterdir()} == data
    for name, steps in STEPS.items():
        rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
        assert rows[-1]["step"] == steps
        assert list((folder / name / "tensorboard").glob("events.out.tfevents.*"))
        assert max(int(path.name) for path in (folder / name / "checkpoints").iterdir()) == steps
        assert load_model(folder / name / "checkpoints")[1]["step"] == steps
    assert {path.name for path in (folder / "figures").iterdir()} == {
        "accuracy.png", "accuracy_window.png", "accuracy_sequential.png", "accuracy_total.png", "sft_loss.png",
        "grpo_reward.png",
    }  # fmt: skip
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (folder / "figures").iterdir())
    assert load_transformers(folder / "export").num_parameters() > 0
    check = json.loads((folder / "export" / "check.json").read_text())
    assert check["trees_equal"] == check["trees"] == 4
    assert not list(folder.rglob("*.part")) + list(folder.rglob("*.partial"))


def test_every_held_out_problem_has_one_record_in_order(whole_run):
    problems = DataFolder(whole_run.folder / "data", Countdown()).held_out()
    assert len(problems) == 12
    for name in MODELS:
        records = read_records(whole_run.folder / "evaluate" / f"{name}.jsonl")
        assert [record.index for record in records] == list(range(12))
        assert [(tuple(r.problem["numbers"]), r.problem["target"]) for r in records] == [
            (problem.numbers, problem.target) for problem in problems
        ]


@pytest.mark.parametrize("title", ["data problems train", "data trees", "sft sft_apr", "grpo grpo_apr", "export check"])
def test_stages_show_a_rate_and_the_time_left(whole_run, title):
    lines = [line for line in whole_run.err.splitlines() if line.startswith(f"{title}: ")]
    assert lines and all(re.search(r": \d+/\d+ \w+, \S+/s, \S+ left", line) for line in lines)


def test_the_same_command_again_makes_nothing_anew(whole_run):
    kept = ("data/**/*", "evaluate/*", "*/metrics.jsonl", "*/checkpoints/**/*", "*.json", "report.md")
    before = snapshot(whole_run.folder, *kept)
    again = finish(start(f"--workdir={whole_run.folder}"))
    assert again.code == 0, again.err
    assert snapshot(whole_run.folder, *kept) == before
    assert again.err == "" and again.out.startswith("| model |")  # no stage had anything to do but the report


def test_killed_and_then_out_of_disk_it_ends_in_the_same_bits(whole_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole_run.folder / "data", folder / "data")
    sft = (f"--workdir={folder}", "--stage=sft,evaluate")
    first = folder / "sft_apr" / "checkpoints" / "20"

    process = start(*sft, stderr=subprocess.DEVNULL)
    while not first.exists() and process.poll() is None:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert first.exists() and not (folder / "sft_sos_plus" / "checkpoints" / "40").exists()

    shutil.rmtree(first.with_name("40"), ignore_errors=True)  # where the kill came late
    before = snapshot(folder, "config.json", "data/**/*", "sft_apr/checkpoints/20/**/*")
    full = finish(start(*sft, most=20_000))  # less than a checkpoint's files, more than all others
    assert full.code == 1
    errors = [line for line in full.err.splitlines() if not re.match(r"(sft|evaluate) .* left", line)]
    assert len(errors) == 1, full.err
    assert re.fullmatch(r"error: step 40 could not be saved under \S+sft_apr/checkpoints: .+", errors[0])
    assert snapshot(folder, "config.json", "data/**/*", "sft_apr/checkpoints/20/**/*") == before

    done = finish(start(*sft))
    assert done.code == 0, done.err
    for name in MODELS[:2]:
        assert same_weights(folder / name / "checkpoints", whole_run.folder / name / "checkpoints")
        kept = (folder / "evaluate" / f"{name}.jsonl").read_bytes()
        assert kept == (whole_run.folder / "evaluate" / f"{name}.jsonl").read_bytes()
        steps = [json.loads(line)["step"] for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
        assert steps == [10, 20, 30, 40, 40]  # the last is the validation's


@pytest.mark.slow
def test_two_processes_train_as_one_and_one_goes_on_with_another_number_of_devices(whole_run, tmp_path):
    """All processes run the same command but for their own number; other settings in one of them are refused."""
    together, command = tmp_path / "run", ("--stage=data,sft", "--processes=2")

    def begin(*changes):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            line = (f"--workdir={together}", *command, f"--coordinator=localhost:{free.getsockname()[1]}")
        return [finish(one) for one in [start(*line, f"--process={i}", *changes[i : i + 1]) for i in range(2)]]

    for refused in begin("--config.sft.steps=41"):
        assert refused.code == 1 and "the processes were given different settings" in refused.err
    for done in begin():
        assert done.code == 0, done.err
    shutil.rmtree(together / "sft_apr" / "checkpoints" / "40")
    done = finish(start(f"--workdir={together}", "--stage=sft", "--config.devices=1", "--config.fsdp=1"))
    assert done.code == 0, done.err
    for name in MODELS[:2]:
        one, two = (load_model(folder / name / "checkpoints")[0] for folder in (whole_run.folder, together))
        for a, b in zip(jax.tree.leaves(nnx.state(one)), jax.tree.leaves(nnx.state(two)), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-2)  # 40 steps of Muon apart by orders of addition
        steps = [json.loads(line)["step"] for line in (together / name / "metrics.jsonl").read_text().splitlines()]
        assert steps == [10, 20, 30, 40, 40]


# ---------------------------------------------------------------------- stages alone


@pytest.fixture
def copy(whole_run, tmp_path):
    """The whole run without its checkpoints, to be changed."""
    folder = tmp_path / "copy"
    shutil.copytree(whole_run.folder, folder, ignore=shutil.ignore_patterns("checkpoints", "export"))
    return folder


def test_the_report_alone(copy, whole_run, main):
    shutil.rmtree(copy / "figures")
    before = (copy / "summary.json").read_bytes()
    (copy / "summary.json").unlink()
    done = main(SMOKE, f"--workdir={copy}", "--stage=report")
    assert done.code == 0 and "| APR SFT |" in done.out
    assert (copy / "summary.json").read_bytes() == before
    assert len(list((copy / "figures").glob("*.png"))) == 6


def test_versions_tell_of_every_machine_that_a_run_was_on(copy, whole_run, main):
    here, path = json.loads((whole_run.folder / "versions.json").read_text()), copy / "versions.json"
    path.write_text(json.dumps({**here, "device": "another"}))
    for _ in range(2):
        assert main(SMOKE, f"--workdir={copy}", "--stage=report").code == 0
        assert json.loads(path.read_text()) == {**here, "earlier": [{**here, "device": "another"}]}


def test_a_variant_alone_is_what_it_is_beside_the_other(whole_run, main, tmp_path):
    shutil.copytree(whole_run.folder / "data", tmp_path / "data")
    done = main(SMOKE, f"--workdir={tmp_path}", "--variants=sos_plus", "--stage=sft,grpo,evaluate,export")
    assert done.code == 0, done.err
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"data", "sft_sos_plus", "evaluate"}
    assert same_weights(tmp_path / "sft_sos_plus" / "checkpoints", whole_run.folder / "sft_sos_plus" / "checkpoints")
    records = snapshot(tmp_path, "evaluate/*.jsonl")
    assert len(records) == 2 and records.items() <= snapshot(whole_run.folder, "evaluate/*.jsonl").items()


@pytest.mark.parametrize(
    "stage, says",
    [
        ("sft", "no demonstrations at .*: run --stage=data first"),
        ("grpo", "no checkpoint at .*: run --stage=sft first"),
        ("evaluate", "no problems at .*: run --stage=data first"),
        ("export", "no apr checkpoint under .*: run --stage=sft first"),
        ("report", "no records under .*: run --stage=evaluate first"),
    ],
)
def test_a_stage_before_what_it_needs(refused, tmp_path, stage, says):
    assert re.match(says, refused(SMOKE, f"--workdir={tmp_path}", f"--stage={stage}"))


@pytest.mark.parametrize(
    "file, stage, says",
    [
        ("config.json", "report", r"\S+config.json is broken: delete it"),
        ("data/manifest.json", "data", r"\S+manifest.json is broken: delete it, and it is made again"),
        ("data/manifest.json", "report", r"\S+manifest.json is broken: delete it, and it is made again"),
        ("data/sos_plus_train/00000/threads/c/0/0", "sft", r"\S+sos_plus_train/00000 is broken: .+ --stage=data again"),
        ("data/held_out.jsonl", "evaluate", r"\S+held_out.jsonl, line 12: .+ --stage=data again"),
    ],
)
def test_a_file_cut_short_is_named(copy, refused, file, stage, says):
    (copy / file).write_bytes((copy / file).read_bytes()[:-30])
    before = snapshot(copy, "**/*")
    assert re.match(says, refused(SMOKE, f"--workdir={copy}", f"--stage={stage}"))
    assert snapshot(copy, "**/*") == before


def test_a_run_of_another_task_or_of_an_earlier_version_is_left_alone(copy, refused):
    line = refused(SMOKE, f"--workdir={copy}", "--config.task=factors", "--config.budget.depth=2")
    assert "holds a run of the task countdown, the task is factors: give another --workdir" in line
    config = json.loads((copy / "config.json").read_text())
    del config["task"]
    (copy / "config.json").write_text(json.dumps(config))
    assert "holds a run of an earlier version of this code" in refused(SMOKE, f"--workdir={copy}", "--stage=report")


def test_a_run_of_another_config_is_left_alone(copy, refused):
    before = snapshot(copy, "**/*")
    line = refused(SMOKE, f"--workdir={copy}", "--config.sft.steps=41")
    assert "holds a run of another config (sft.steps was 40, is 41)" in line and "--workdir" in line
    assert snapshot(copy, "**/*") == before


def test_settings_of_stages_not_begun_may_change(copy, refused):
    other = (SMOKE, f"--workdir={copy}", "--config.grpo.steps=3", "--config.evaluate.temperature=0.5")
    for folder in ("grpo_apr", "evaluate"):
        (copy / folder).mkdir(exist_ok=True)
    line = refused(*other, "--stage=report")
    assert "evaluate.temperature was 0.0, is 0.5; grpo.steps was" in line
    for folder in copy.glob("grpo_*"):
        shutil.rmtree(folder)
    line = refused(*other, "--stage=report")
    assert "evaluate.temperature" in line and "grpo" not in line
    shutil.rmtree(copy / "evaluate")
    (copy / "grpo_apr" / "best").mkdir(parents=True)  # what it validated best it found by that temperature
    assert "evaluate.temperature was 0.0" in refused(*other, "--stage=report")
    shutil.rmtree(copy / "grpo_apr")
    assert "another config" not in refused(*other, "--stage=report")  # there is nothing to report on
    assert json.loads((copy / "config.json").read_text())["grpo"]["steps"] == 3


def test_a_broken_checkpoint_is_named(copy, whole_run, refused):
    for name in MODELS[:2]:
        shutil.copytree(whole_run.folder / name / "checkpoints", copy / name / "checkpoints")
    shutil.rmtree(copy / "sft_apr" / "checkpoints" / "20")  # else it would be used
    for path in (copy / "sft_apr" / "checkpoints" / "40" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:40])
    before = snapshot(copy, "sft_sos_plus/**/*", "evaluate/*")
    for stage in ("evaluate", "export"):
        line = refused(SMOKE, f"--workdir={copy}", f"--stage={stage}")
        assert re.search(r"checkpoint at \S+sft_apr/checkpoints/40 cannot be read: .+", line)
    assert snapshot(copy, "sft_sos_plus/**/*", "evaluate/*") == before


def test_the_newest_good_checkpoint_is_used_and_one_line_says_so(copy, whole_run):
    """An empty folder behind the last step, and a last step whose arrays cannot be read: training goes on from the one
    before it."""
    for name in MODELS:
        shutil.copytree(whole_run.folder / name / "checkpoints", copy / name / "checkpoints")
    (copy / "sft_sos_plus" / "checkpoints" / "60").mkdir()
    for path in (copy / "sft_apr" / "checkpoints" / "40" / "state").rglob("d/*"):
        path.write_bytes(path.read_bytes()[:40])
    records = snapshot(copy, "evaluate/*.jsonl")
    done = finish(start(f"--workdir={copy}", "--stage=evaluate,export"))
    assert done.code == 0, done.err
    said = [line for line in done.err.splitlines() if not re.match(r"(evaluate|export|sft) .* left", line)]
    expected = [("sft_sos_plus", 60, 40), ("sft_apr", 40, 20)]
    for line, (name, broken, used) in zip(said, expected, strict=True):
        folder = rf"\S+{name}/checkpoints"
        assert re.fullmatch(rf"the checkpoint at {folder}/{broken} is broken \(.+\): {folder}/{used} is used", line)
    done = finish(start(f"--workdir={copy}", "--stage=sft,evaluate"))
    assert done.code == 0 and len([line for line in done.err.splitlines() if "is broken" in line]) == 2, done.err
    assert "Traceback" not in done.err
    for name in MODELS[:2]:
        assert same_weights(copy / name / "checkpoints", whole_run.folder / name / "checkpoints")
    assert snapshot(copy, "evaluate/*.jsonl") == records


def test_a_full_disk_at_a_checkpoint(tmp_path, monkeypatch, main):
    """Through the real save: what the operating system says reaches the user in one line."""

    def sft(self):
        checkpoints = Checkpoints(self.workdir / "sft_apr" / "checkpoints")
        monkeypatch.setattr(checkpoints._manager, "save", full)
        checkpoints.save(20, {"x": np.zeros(3)}, {})

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stages.Run, "sft", sft)
    done = main(SMOKE, f"--workdir={tmp_path}", "--stage=sft")
    assert done.code == 1
    assert re.fullmatch(r"error: step 20 could not be saved under \S+: the disk is full\n", done.err)


def test_a_folder_that_cannot_be_written(refused):
    assert re.match(r"/proc/apr\S*: ", refused(SMOKE, "--workdir=/proc/apr", "--stage=data"))


# ---------------------------------------------------------------------- what is ours keeps its traceback


@pytest.mark.parametrize(
    "bug",
    [
        lambda: [][1],
        lambda: np.zeros(3).reshape(2),
        lambda: int("x"),
        lambda: None.x,
        lambda: (_ for _ in ()).throw(KeyError("x")),
    ],
    ids=["index", "numpy", "int", "attribute", "key"],
)
def test_a_bug_is_not_taken_for_bad_input(bug, tmp_path, monkeypatch, main):
    monkeypatch.setattr(stages.Run, "report", lambda self: bug())
    with pytest.raises((IndexError, ValueError, AttributeError, KeyError)):
        main(SMOKE, f"--workdir={tmp_path}", "--stage=report")


def test_an_interrupt_says_how_to_go_on(tmp_path, monkeypatch, main):
    def report(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(stages.Run, "report", report)
    done = main(SMOKE, f"--workdir={tmp_path}", "--stage=report")
    assert done.code == 130 and done.err == "\nstopped; the same command goes on from here\n"


@pytest.mark.parametrize("moments", [3, pytest.param(12, marks=pytest.mark.slow)])
def test_an_interrupt_at_any_moment_ends_the_run_with_130(tmp_path, moments):
    """Most of the time it traces and compiles, and JAX loses an exception that is raised meanwhile. What was made is
    kept: each run goes on where the one before it was interrupted."""
    rng, made = random.Random(moments), 0
    for _ in range(moments):
        process = start(f"--workdir={tmp_path}", "--stage=data,sft,evaluate")
        deadline = time.monotonic() + 200
        while not (tmp_path / "config.json").exists() and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(rng.uniform(0, 8))
        assert process.poll() is None, "it ended before it was interrupted"
        process.send_signal(signal.SIGINT)
        done = finish(process)
        assert done.code == 130 and "Traceback" not in done.err, done.err
        assert done.err.endswith("\nstopped; the same command goes on from here\n")
        kept = len(list(tmp_path.glob("data/*.jsonl"))) + len(list(tmp_path.glob("*/checkpoints/*/meta")))
        assert kept >= min(made, 2)
        made = kept


# ---------------------------------------------------------------------- the command line


def test_help_names_every_flag_and_stage(main):
    done = main("--help")
    assert done.code == 0 and not done.err
    for word in ("--config=", "--config.A.B=", "--stage=", "--variants=", "--workdir=", "--sweep=", "--help", *STAGES):
        assert word in done.out


TWO = ("--coordinator=localhost:1", "--processes=2")


@pytest.mark.parametrize(
    "arguments, says",
    [
        ([], "--config=FILE is needed: one of experiments/configs/factors.py, "),
        (["--config=nowhere.py"], "no config file 'nowhere.py': give one of "),
        ([f"--config={ROOT}/pyproject.toml"], "--config is a Python file, FILE.py, was given "),
        ([SMOKE, "--stagee=sft"], "no such flag: --stagee (did you mean --stage?); flags are --config, --stage, "),
        ([SMOKE, "--steps=3"], "settings are given as --config.a.b=value"),
        ([SMOKE, "--stage=sftt"], "was given 'sftt' (did you mean sft?)"),
        ([SMOKE, "--stage="], "--stage is all or some of data, sft, grpo, evaluate, export, report, was given nothing"),
        ([SMOKE, "--stage"], "--stage"),
        ([SMOKE, "--variants=abr"], "--variants is all or some of apr, sos_plus, was given 'abr' (did you mean apr?)"),
        ([SMOKE, "sft"], "no such argument: 'sft'"),
        ([SMOKE, f"--workdir={__file__}"], "is a file"),
        ([SMOKE, f"--workdir={__file__}/x/y"], "is a file"),
        ([SMOKE, "--sweep=seed"], "--sweep is KEY=VALUE,VALUE,..., was given 'seed'"),
        ([SMOKE, "--sweep=sead=1,2"], "no setting sead (did you mean seed?)"),
        ([SMOKE, "--sweep=seed=0,x"], "seed is an integer, was given 'x'"),
        ([SMOKE, "--sweep=seed=0,0"], "has the value 0 twice"),
        ([SMOKE, "--sweep=seed=0", "--sweep=seed=1"], "--sweep has seed twice"),
        ([SMOKE, "--sweep=devices=1,3"], "sft.batch_rows is a multiple of devices (3), was given 4"),
        ([SMOKE, "--sweep=name=../x"], "holds no '/'"),
        ([SMOKE, "--processes=2"], "--coordinator=HOST:PORT goes with --processes=2 or more, was given None and 2"),
        ([SMOKE, "--processes=0"], "--processes is at least 1, was given 0"),
        ([SMOKE, "--processes=2", "--coordinator=here"], "--coordinator is HOST:PORT, was given 'here'"),
        ([SMOKE, "--process=1"], "--process is from 0 to 0, was given 1"),
        ([SMOKE, *TWO], "several processes run --stage=data,sft, was given 'grpo': run it with one process"),
        ([SMOKE, *TWO, "--stage=sft", "--sweep=seed=1,2"], "--sweep starts runs of its own: not with --processes"),
        ([SMOKE, *TWO, "--stage=sft", "--config.devices=1"], "--processes divides devices (1), was given 2"),
    ],
)
def test_a_wrong_command_is_refused(refused, arguments, says):
    assert says in refused(*arguments)


# ---------------------------------------------------------------------- sweeps


def test_a_sweep_is_the_product_with_a_folder_each(monkeypatch, refused, tmp_path):
    lines = []

    def fake(line):
        lines.append(line[3:])
        return SimpleNamespace(returncode=int("--config.seed=0" in line))

    monkeypatch.setattr(sweep.subprocess, "run", fake)
    arguments = ("--config.sft.steps=7", "--stage=data,sft", "--variants=apr", f"--workdir={tmp_path}")
    line = refused(SMOKE, *arguments, "--sweep=seed=0,1", "--sweep", "countdown.sos_plus.beam=(1,2),(3,4)")
    assert line == "2 of 4 runs failed: seed=0,countdown.sos_plus.beam=(1,2); seed=0,countdown.sos_plus.beam=(3,4)"
    assert [line[-1] for line in lines] == [
        f"--workdir={tmp_path}/seed={seed},countdown.sos_plus.beam={beam}"
        for seed in (0, 1)
        for beam in ("(1,2)", "(3,4)")
    ]
    changes = ["--config.sft.steps=7", "--config.seed=1", "--config.countdown.sos_plus.beam=(3,4)"]
    assert lines[-1][:-1] == [SMOKE, *changes, "--stage=data,sft", "--variants=apr"]


def test_a_point_that_fails_does_not_stop_the_others(tmp_path):
    small = ("--config.data.train=20", "--config.data.held_out=4", "--stage=data")
    done = finish(start(*small, f"--workdir={tmp_path}", "--sweep=window=32,256"))
    assert done.code == 1
    assert done.err.splitlines()[-1] == "error: 1 of 2 runs failed: window=32"
    assert "fit a window of 32 tokens" in done.err and sys.executable not in done.err
    assert (tmp_path / "window=256" / "data" / "manifest.json").exists()
