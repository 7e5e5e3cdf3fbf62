"""The command line: the files of a whole run, resuming after any stop, and wrong commands, refused in one line."""

import contextlib
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

import jax
import numpy as np
import pytest
from flax import nnx

from apr_jax.data.folder import DataFolder
from apr_jax.evaluate.records import read_records
from apr_jax.export.hf import load_transformers
from apr_jax.tasks.countdown.task import Countdown
from apr_jax.train.checkpoint import Checkpoints, load_model, newest_step
from experiments import sweep
from experiments.command import parse
from experiments.settings import STAGES
from experiments.stages import report, sft
from experiments.workspace import Workspace, at_work
from tests.experiments.conftest import ROOT, SMOKE, copy_run, finish, has, same_weights, snapshot, start

MODELS = ("sft_apr", "sft_sos_plus", "grpo_apr")
STEPS = {"sft_sos_plus": 40, "sft_apr": 40, "grpo_apr": 2}


# ---------------------------------------------------------------------- a whole run


def test_a_run_makes_all_files(whole_run):
    folder = whole_run.folder
    assert json.loads((folder / "config.json").read_text())["name"] == "smoke"
    assert {"python", "device", "jax", "orbax-checkpoint"} <= set(json.loads((folder / "versions.json").read_text()))
    data = {"train.jsonl", "held_out.jsonl", "tokenizer.json", "config.json", "manifest.json"}
    data |= {f"{variant}_{part}" for variant in ("sos_plus", "apr") for part in ("train", "validation")}
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
def test_stages_print_a_rate_and_the_remaining_time(whole_run, title):
    lines = [line for line in whole_run.err.splitlines() if line.startswith(f"{title}: ")]
    assert lines and all(re.search(r": \d+/\d+ \w+, \S+/s, \S+ left", line) for line in lines)


def test_the_same_command_again_only_makes_the_report(whole_run):
    kept = ("data/**/*", "evaluate/*", "*/metrics.jsonl", "*/checkpoints/**/*", "*.json", "report.md")
    before = snapshot(whole_run.folder, *kept)
    again = finish(start(f"--workdir={whole_run.folder}"))
    assert again.code == 0, again.err
    assert snapshot(whole_run.folder, *kept) == before
    assert again.err == "" and again.out.startswith("| model |")  # only the report stage did anything


def test_a_run_that_was_killed_and_then_had_a_full_disk_resumes_to_the_same_bits(whole_run, tmp_path):
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

    shutil.rmtree(first.with_name("40"), ignore_errors=True)  # if the kill came late
    before = snapshot(folder, "config.json", "data/**/*", "sft_apr/checkpoints/20/**/*")
    full = finish(start(*sft, most=20_000))  # less than a checkpoint's files, more than any other file
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
        assert steps == [10, 20, 30, 40, 40]  # the last row has the validation loss


@pytest.mark.slow
def test_two_processes_train_like_one_and_one_resumes_with_another_number_of_devices(whole_run, tmp_path):
    """The processes have the same command except for their number. They refuse to start with different settings."""
    together, command = tmp_path / "run", ("--stage=data,sft", "--processes=2")

    def begin(*changes):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            line = (f"--workdir={together}", *command, f"--coordinator=localhost:{free.getsockname()[1]}")
        return [finish(one) for one in [start(*line, f"--process={i}", *changes[i : i + 1]) for i in range(2)]]

    for refused in begin("--config.sft.steps=41"):
        assert refused.code == 1 and has(refused.err, "processes", "different settings")
    for done in begin():
        assert done.code == 0, done.err
    shutil.rmtree(together / "sft_apr" / "checkpoints" / "40")
    done = finish(start(f"--workdir={together}", "--stage=sft", "--config.devices=1", "--config.fsdp=1"))
    assert done.code == 0, done.err
    for name in MODELS[:2]:
        one, two = (load_model(folder / name / "checkpoints")[0] for folder in (whole_run.folder, together))
        for a, b in zip(jax.tree.leaves(nnx.state(one)), jax.tree.leaves(nnx.state(two)), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-2)  # the order of additions differs in 40 steps of Muon
        steps = [json.loads(line)["step"] for line in (together / name / "metrics.jsonl").read_text().splitlines()]
        assert steps == [10, 20, 30, 40, 40]


# ---------------------------------------------------------------------- stages alone


@pytest.fixture
def copy(whole_run, tmp_path):
    """A copy of the whole run without its checkpoints and export, to be changed."""
    return copy_run(whole_run.folder, tmp_path / "copy", "checkpoints", "export*")


def test_the_report_stage_alone_makes_the_same_report(copy, whole_run, main):
    shutil.rmtree(copy / "figures")
    before = (copy / "summary.json").read_bytes()
    (copy / "summary.json").unlink()
    done = main(SMOKE, f"--workdir={copy}", "--stage=report")
    assert done.code == 0 and "| APR SFT |" in done.out
    assert (copy / "summary.json").read_bytes() == before
    assert len(list((copy / "figures").glob("*.png"))) == 6


def test_versions_list_every_machine_of_a_run(copy, whole_run, main):
    here, path = json.loads((whole_run.folder / "versions.json").read_text()), copy / "versions.json"
    path.write_text(json.dumps({**here, "device": "another"}))
    for _ in range(2):
        assert main(SMOKE, f"--workdir={copy}", "--stage=report").code == 0
        assert json.loads(path.read_text()) == {**here, "earlier": [{**here, "device": "another"}]}


def test_a_variant_alone_gets_the_same_bits_as_with_the_other(whole_run, main, tmp_path):
    shutil.copytree(whole_run.folder / "data", tmp_path / "data")
    done = main(SMOKE, f"--workdir={tmp_path}", "--variants=sos_plus", "--stage=sft,grpo,evaluate,export")
    assert done.code == 0, done.err
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"data", "sft_sos_plus", "evaluate", "store"}
    assert same_weights(tmp_path / "sft_sos_plus" / "checkpoints", whole_run.folder / "sft_sos_plus" / "checkpoints")
    records = snapshot(tmp_path, "evaluate/*.jsonl")
    assert len(records) == 2 and records.items() <= snapshot(whole_run.folder, "evaluate/*.jsonl").items()


@pytest.mark.parametrize(
    "stage, parts",
    [
        ("sft", ("demonstrations", "--stage=data")),
        ("grpo", ("checkpoint", "--stage=sft")),
        ("evaluate", ("problems", "--stage=data")),
        ("export", ("apr checkpoint", "--stage=sft")),
        ("report", ("records", "--stage=evaluate")),
    ],
)
def test_a_stage_without_its_inputs_is_refused(refused, tmp_path, stage, parts):
    assert has(refused(SMOKE, f"--workdir={tmp_path}", f"--stage={stage}"), tmp_path, *parts)


@pytest.mark.parametrize(
    "file, stage, parts",
    [
        ("config.json", "report", ("config.json", "delete")),
        ("data/manifest.json", "data", ("manifest.json", "delete")),
        ("data/manifest.json", "report", ("manifest.json", "delete")),
        ("data/sos_plus_train/00000/threads/c/0/0", "sft", ("sos_plus_train/00000", "--stage=data")),
        ("data/held_out.jsonl", "evaluate", ("held_out.jsonl", "line 12", "--stage=data")),
    ],
)
def test_a_truncated_file_is_named(copy, refused, file, stage, parts):
    (copy / file).write_bytes((copy / file).read_bytes()[:-30])
    before = snapshot(copy, "**/*")
    assert has(refused(SMOKE, f"--workdir={copy}", f"--stage={stage}"), *parts)
    assert snapshot(copy, "**/*") == before


def test_a_folder_with_a_run_of_another_task_or_an_earlier_version_is_refused(copy, refused):
    line = refused(SMOKE, f"--workdir={copy}", "--config.task=factors", "--config.budget.depth=2")
    assert has(line, copy, "countdown", "factors", "--workdir")
    config = json.loads((copy / "config.json").read_text())
    del config["task"]
    (copy / "config.json").write_text(json.dumps(config))
    assert has(refused(SMOKE, f"--workdir={copy}", "--stage=report"), copy, "earlier version", "--workdir")


def test_a_broken_checkpoint_is_named(copy, whole_run, refused):
    for name in MODELS[:2]:
        shutil.copytree(whole_run.folder / name / "checkpoints", copy / name / "checkpoints")
    shutil.rmtree(copy / "sft_apr" / "checkpoints" / "20")  # else the earlier step would be used
    for path in (copy / "sft_apr" / "checkpoints" / "40" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:40])
    before = snapshot(copy, "sft_sos_plus/**/*", "evaluate/*")
    for stage in ("evaluate", "export"):
        line = refused(SMOKE, f"--workdir={copy}", f"--stage={stage}")
        assert re.search(r"\S+/sft_apr/checkpoints/40 .+", line)
    assert snapshot(copy, "sft_sos_plus/**/*", "evaluate/*") == before


def test_the_newest_readable_checkpoint_is_used_and_one_line_says_so(copy, whole_run):
    """One model has an empty folder after its last step, and one a last step whose arrays cannot be read. Training of
    the latter resumes from the step before."""
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
        assert re.fullmatch(rf".*{folder}/{broken} .+ {folder}/{used} .+", line)
    done = finish(start(f"--workdir={copy}", "--stage=sft,evaluate"))
    assert done.code == 0 and len([line for line in done.err.splitlines() if "is broken" in line]) == 2, done.err
    assert "Traceback" not in done.err
    for name in MODELS[:2]:
        assert same_weights(copy / name / "checkpoints", whole_run.folder / name / "checkpoints")
    assert snapshot(copy, "evaluate/*.jsonl") == records


def test_a_full_disk_at_a_checkpoint_ends_in_one_line(tmp_path, monkeypatch, main):
    """The error of the operating system comes up through the real save."""

    def train(run):
        checkpoints = Checkpoints(run.workdir / "sft_apr" / "checkpoints")
        monkeypatch.setattr(checkpoints._manager, "save", full)
        checkpoints.save(20, {"x": np.zeros(3)}, {})

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sft, "run", train)
    done = main(SMOKE, f"--workdir={tmp_path}", "--stage=sft")
    assert done.code == 1
    assert has(done.err, "error", "step 20", tmp_path / "sft_apr", "full") and done.err.count("\n") == 1


def test_a_run_folder_that_cannot_be_written_is_refused(refused):
    assert re.match(r"/proc/apr\S*: ", refused(SMOKE, "--workdir=/proc/apr", "--stage=data"))


# ---------------------------------------------------------------------- bugs and interrupts


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
def test_a_bug_keeps_its_traceback(bug, tmp_path, monkeypatch, main):
    monkeypatch.setattr(report, "run", lambda run: bug())
    with pytest.raises((IndexError, ValueError, AttributeError, KeyError)):
        main(SMOKE, f"--workdir={tmp_path}", "--stage=report")


def test_an_interrupt_says_how_to_resume(tmp_path, monkeypatch, main):
    def interrupted(run):
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "run", interrupted)
    done = main(SMOKE, f"--workdir={tmp_path}", "--stage=report")
    assert done.code == 130 and done.err == "\nstopped; the same command continues from here\n"


@pytest.mark.parametrize("interrupts", [3, pytest.param(12, marks=pytest.mark.slow)])
def test_an_interrupt_at_any_time_ends_the_run_with_130(tmp_path, interrupts):
    """Most interrupts come while JAX traces or compiles, where JAX loses exceptions. Outputs are kept: each run resumes
    the interrupted one."""
    rng, made = random.Random(interrupts), 0
    for _ in range(interrupts):
        process = start(f"--workdir={tmp_path}", "--stage=data,sft,evaluate")
        deadline = time.monotonic() + 200
        while not (tmp_path / "config.json").exists() and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(rng.uniform(0, 8))
        assert process.poll() is None, "the run ended before the interrupt"
        process.send_signal(signal.SIGINT)
        done = finish(process)
        assert done.code == 130 and "Traceback" not in done.err, done.err
        assert done.err.endswith("\nstopped; the same command continues from here\n")
        kept = len(list(tmp_path.glob("data/*.jsonl"))) + len(list(tmp_path.glob("*/checkpoints/*/meta")))
        assert kept >= min(made, 2)
        made = kept


# ---------------------------------------------------------------------- the command line


def test_help_names_every_flag_and_stage(main):
    done = main("--help")
    assert done.code == 0 and not done.err
    for word in (
        "--config=",
        "--config.A.B=",
        "--stage=",
        "--variants=",
        "--workdir=",
        "--store=",
        "--sweep=",
        "--help",
        *STAGES,
    ):
        assert word in done.out


TWO = ("--coordinator=localhost:1", "--processes=2")


@pytest.mark.parametrize(
    "arguments, parts",
    [
        ([], ("--config=FILE", "experiments/configs/factors.py")),
        (["--config=nowhere.py"], ("'nowhere.py'", "experiments/configs/factors.py")),
        ([f"--config={ROOT}/pyproject.toml"], ("--config", "FILE.py", f"'{ROOT}/pyproject.toml'")),
        ([SMOKE, "--stagee=sft"], ("--stagee", "--stage", "--config", "--variants", "--sweep")),
        ([SMOKE, "--steps=3"], ("--steps", "--config.a.b=value")),
        ([SMOKE, "--stage=sftt"], ("--stage", "'sftt'", "sft")),
        ([SMOKE, "--stage="], ("--stage", "data", "sft", "grpo", "evaluate", "export", "report", "nothing")),
        ([SMOKE, "--stage"], ("--stage",)),
        ([SMOKE, "--variants=abr"], ("--variants", "apr", "sos_plus", "'abr'")),
        ([SMOKE, "sft"], ("'sft'", "--config.a.b=value")),
        ([SMOKE, f"--workdir={__file__}"], ("--workdir", __file__, "file")),
        ([SMOKE, f"--workdir={__file__}/x/y"], ("--workdir", f"{__file__}/x/y", "file")),
        ([SMOKE, "--sweep=seed"], ("--sweep", "KEY=VALUE,VALUE", "'seed'")),
        ([SMOKE, "--sweep=sead=1,2"], ("sead", "seed")),
        ([SMOKE, "--sweep=seed=0,x"], ("seed", "integer", "'x'")),
        ([SMOKE, "--sweep=seed=0,0"], ("--sweep=seed=0,0", 0, "twice")),
        ([SMOKE, "--sweep=seed=0", "--sweep=seed=1"], ("--sweep", "seed", "twice")),
        ([SMOKE, "--sweep=devices=1,3"], ("sft.batch_rows", "devices", 3, 4)),
        ([SMOKE, "--sweep=name=../x"], ("--sweep=name=../x", "'/'")),
        ([SMOKE, "--processes=2"], ("--coordinator=HOST:PORT", "--processes=2", "None", 2)),
        ([SMOKE, "--processes=0"], ("--processes", 1, 0)),
        ([SMOKE, "--processes=2", "--coordinator=here"], ("--coordinator", "HOST:PORT", "'here'")),
        ([SMOKE, "--process=1"], ("--process", 0, 1)),
        ([SMOKE, *TWO], ("--stage=data,sft", "'grpo'")),
        ([SMOKE, *TWO, "--stage=sft", "--sweep=seed=1,2"], ("--sweep", "--processes")),
        ([SMOKE, *TWO, "--stage=sft", "--config.devices=1"], ("--processes", "devices", 1, 2)),
    ],
)
def test_a_wrong_command_is_refused(refused, arguments, parts):
    assert has(refused(*arguments), *parts)


# ---------------------------------------------------------------------- sweeps


def test_a_sweep_runs_every_combination_in_its_own_folder(monkeypatch, refused, tmp_path):
    lines = []

    def fake(line):
        lines.append(line)
        return int("--config.seed=0" in line)

    monkeypatch.setattr(sweep, "run_point", fake)
    arguments = ("--config.sft.steps=7", "--stage=data,sft", "--variants=apr", f"--workdir={tmp_path}")
    line = refused(SMOKE, *arguments, "--sweep=seed=0,1", "--sweep", "countdown.sos_plus.beam=(1,2),(3,4)")
    failed = [f"seed=0,countdown.sos_plus.beam={beam}" for beam in ("(1,2)", "(3,4)")]
    assert has(line, "2 of 4", *failed) and "seed=1" not in line
    assert [line[-2:] for line in lines] == [
        [f"--workdir={tmp_path}/seed={seed},countdown.sos_plus.beam={beam}", f"--store={tmp_path}/store"]
        for seed in (0, 1)
        for beam in ("(1,2)", "(3,4)")
    ]
    changes = ["--config.sft.steps=7", "--config.seed=1", "--config.countdown.sos_plus.beam=(3,4)"]
    assert lines[-1][:-2] == [SMOKE, *changes, "--stage=data,sft", "--variants=apr"]


def test_a_point_on_which_another_process_works_comes_last(monkeypatch, tmp_path, main):
    ran = []
    monkeypatch.setattr(sweep, "run_point", lambda line: ran.append(line[-2]))
    settings = parse(["run", SMOKE]).settings
    (tmp_path / "seed=0").mkdir()
    with contextlib.closing(Workspace(tmp_path / "seed=0", tmp_path / "store")) as other:
        other.claim(settings)
        assert main(SMOKE, f"--workdir={tmp_path}", "--sweep=seed=0,1,2").code == 0
    assert ran == [f"--workdir={tmp_path}/seed={seed}" for seed in (1, 2, 0)]


def test_a_sigterm_to_a_sweep_ends_its_point_with_a_save(tmp_path):
    process = start(f"--workdir={tmp_path}", "--sweep=seed=0,1", "--config.sft.steps=4000", "--stage=data,sft")
    steps = tmp_path / "seed=0" / "sft_apr" / "checkpoints"
    while newest_step(steps) is None and process.poll() is None:
        time.sleep(0.05)
    process.terminate()
    done = finish(process)
    assert done.code == 143 and "stopped by SIGTERM" in done.err, done.err
    assert not at_work(tmp_path / "seed=0") and not (tmp_path / "seed=1").exists()


def test_a_point_that_fails_does_not_stop_the_others(tmp_path):
    small = ("--config.data.train=20", "--config.data.held_out=4", "--stage=data")
    done = finish(start(*small, f"--workdir={tmp_path}", "--sweep=window=32,256"))
    assert done.code == 1
    assert has(done.err.splitlines()[-1], "error", "1 of 2", "window=32")
    assert has(done.err, "window", "32 tokens") and sys.executable not in done.err
    assert (tmp_path / "window=256" / "data" / "manifest.json").exists()
