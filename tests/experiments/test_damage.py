"""Run folders with edited, empty, mixed up or missing files: the run ends in one line, or makes right results."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from apr_jax.tasks.countdown.vocabulary import countdown_tokenizer
from tests.experiments.conftest import ROOT, SMOKE, copy_run, finish, has, start


@pytest.fixture
def light(whole_run, tmp_path):
    """A copy of the run without its checkpoints. A report can be made of it."""
    return copy_run(whole_run.folder, tmp_path / "copy", "checkpoints", "tensorboard", "figures")


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    "file, content, parts",
    [
        ("config.json", b"[" * 100_000, ("config.json", "delete")),
        ("config.json", {"sft": [1]}, ("earlier version",)),
        ("config.json", {"sft": None}, ("earlier version",)),
        ("data/manifest.json", b"{}", ("manifest.json", "delete")),
        ("data/manifest.json", {"config": []}, ("manifest.json", "delete")),
        ("data/manifest.json", {"held_out_problems": "x"}, ("manifest.json", "delete")),
        ("evaluate/sft_apr.jsonl/made_of.json", b"null", ("made_of.json", "delete")),
        ("evaluate/sft_apr.jsonl/made_of.json", b"\xff\xff", ("made_of.json", "delete")),
        ("evaluate/sft_apr.jsonl/made_of.json", {"step": "x"}, ("made_of.json", "delete")),
        ("export/check.json", b"{}", ("check.json", "delete")),
        ("export/check.json", {"model": 3}, ("check.json", "delete")),
        ("export/check.json", {"model": "../../.."}, ("check.json", "delete")),
    ],
)
def test_a_broken_file_of_a_run_is_named(light, refused, file, content, parts):
    path = light / file
    if path.name == "made_of.json":
        path = path.parent.resolve().with_name(path.name)  # in the store
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        edit(path, **content)
    assert has(refused(SMOKE, f"--workdir={light}", "--stage=report"), *parts)


@pytest.mark.parametrize(
    "file, content",
    [
        ("versions.json", b"[1]"),
        ("versions.json", b'{"earlier": null, "a": 1}'),
        ("sft_apr/metrics.jsonl", b"\xff\xfe\n[1]\n3\n"),
        ("sft_apr/metrics.jsonl", b'{"step": "a", "loss": 1}\n{"step": 1, "loss": "b", "tokens": "c"}\n'),
    ],
)
def test_a_report_is_made_without_optional_files(light, main, file, content):
    (light / file).write_bytes(content)
    done = main(SMOKE, f"--workdir={light}", "--stage=report")
    assert done.code == 0 and "| APR SFT |" in done.out, done.err


def test_a_broken_imported_data_set_asks_for_another_import(light, refused):
    (light / "data" / "manifest.json").write_text("{}")
    (light / "data" / "config.json").unlink()  # which an import does not write
    line = refused(SMOKE, f"--workdir={light}", "--stage=report")
    assert has(line, "data/manifest.json", "import") and "--stage=data" not in line


def test_records_of_other_problems_are_named(light, refused):
    path = light / "evaluate" / "sft_apr.jsonl"
    lines = path.read_text().splitlines(True)
    for changed in (lines[:3], lines * 2, [re.sub('"target":[0-9]+', '"target":1', line) for line in lines]):
        path.write_text("".join(changed))
        line = refused(SMOKE, f"--workdir={light}", "--stage=report")
        assert has(line, "APR SFT", "APR SFT+GRPO", "problems", "--stage=evaluate")
    path.write_text("".join(re.sub('"failures":{[^}]*}', '"failures":{"length":"x"}', line) for line in lines))
    assert has(refused(SMOKE, f"--workdir={light}", "--stage=report"), "line 1", "failures")


def test_a_checkpoint_in_the_folder_of_another_variant_is_refused(whole_run, tmp_path, refused):
    copy_run(whole_run.folder, tmp_path, "checkpoints", "grpo*", "evaluate*", "export*", "tensorboard")
    for other, name in (("sft_sos_plus", "sft_apr"), ("sft_apr", "sft_sos_plus")):
        shutil.copytree(whole_run.folder / other / "checkpoints", tmp_path / name / "checkpoints")
    for stage in ("grpo", "evaluate", "export"):
        line = refused(SMOKE, f"--workdir={tmp_path}", f"--stage={stage}")
        assert has(line, "countdown", "sft_apr", "sft_sos_plus", 40)
        assert not (tmp_path / "evaluate").exists() and not (tmp_path / "export").exists()


def test_a_model_with_a_broken_last_step_is_reported_with_the_step_that_was_read(whole_run, tmp_path, main, refused):
    """The last step has all its files, but the config of another model."""
    copy_run(whole_run.folder, tmp_path, "*sos_plus", "grpo*", "evaluate*", "export*")
    meta = tmp_path / "sft_apr" / "checkpoints" / "40" / "meta" / "metadata"
    edit(meta, model=json.loads(meta.read_text())["model"] | {"layers": 5})
    command = (SMOKE, f"--workdir={tmp_path}", "--variants=apr")
    done = main(*command, "--stage=evaluate,report")
    assert done.code == 0 and "| APR SFT (step 20 of 40) |" in done.out, done.err
    done = main(*command, "--stage=export")
    assert done.code == 1 and has(done.err.splitlines()[-1], "sft_apr", 20, 40, "--stage=sft")
    assert not (tmp_path / "export").exists()


# ---------------------------------------------------------------------- the process


def test_no_result_is_lost_when_streams_are_closed_or_full(whole_run, tmp_path):
    """The number of a closed stderr would be the next opened file's, and JAX writes to that number."""
    folder = copy_run(whole_run.folder, tmp_path / "copy", "evaluate*")
    command = [sys.executable, "-m", "experiments.run", SMOKE, f"--workdir={folder}", "--variants=apr"]
    closed = f"exec {' '.join(command)} --stage=evaluate,report >&- 2>&-"
    assert subprocess.run(["sh", "-c", closed], cwd=ROOT).returncode == 0
    name = Path("evaluate", "grpo_apr.jsonl")
    assert (folder / name).read_bytes() == (whole_run.folder / name).read_bytes()
    for path in (folder / "evaluate", *folder.glob("store/evaluate-*")):
        shutil.rmtree(path)
    with Path("/dev/full").open("w") as full:  # like a closed terminal
        assert subprocess.run([*command, "--stage=evaluate"], cwd=ROOT, stderr=full).returncode == 0
    assert (folder / name).read_bytes() == (whole_run.folder / name).read_bytes()


@pytest.mark.parametrize("platform", ["nosuch", "cuda"])
def test_a_missing_platform_ends_a_run_in_one_line(tmp_path, platform):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": platform}
    done = finish(start(f"--workdir={tmp_path}", "--stage=report", env=env))
    assert done.code == 1 and "Traceback" not in done.err
    assert has(done.err.splitlines()[-1], "error", "JAX_PLATFORMS", repr(platform))


# ---------------------------------------------------------------------- files of another data set


@pytest.fixture
def trained(whole_run, tmp_path):
    """A copy of the run with its data and its supervised APR model only."""
    left_out = ("sft_sos_plus", "grpo*", "evaluate*", "export*", "figures", "report.md", "summary.json")
    return copy_run(whole_run.folder, tmp_path / "copy", *left_out)


def test_held_out_problems_of_another_data_set_are_refused(trained, refused):
    data = trained / "data"
    held_out, train = ((data / f"{name}.jsonl").read_text().splitlines() for name in ("held_out", "train"))
    turned = json.loads(train[0])
    turned["numbers"].reverse()
    for other, says in (
        (train[:12], "12 problems of"),  # training problems
        ([*held_out[:-1], json.dumps(turned)], "1 problems of"),  # a training problem in another order
        (held_out[:5], "5 problems"),
    ):
        (data / "held_out.jsonl").write_text("".join(f"{line}\n" for line in other))
        for stage in ("evaluate", "export"):
            line = refused(SMOKE, f"--workdir={trained}", "--variants=apr", f"--stage={stage}")
            assert says in line and "held_out.jsonl" in line
    assert not list(trained.glob("evaluate/*.jsonl"))


def test_a_tokenizer_of_another_data_set_is_refused(trained, refused):
    countdown_tokenizer(50).save(trained / "data" / "tokenizer.json")
    for stage in ("grpo", "evaluate", "export"):
        line = refused(SMOKE, f"--workdir={trained}", "--variants=apr", f"--stage={stage}")
        assert has(line, "vocabulary", len(countdown_tokenizer(50)), "tokenizer.json")
    assert {path.name for path in trained.iterdir()} == {
        "config.json", "data", "sft_apr", "store", "versions.json",
    }  # fmt: skip


def test_no_data_are_made_in_an_imported_data_set_without_a_manifest(whole_run, light, refused):
    (light / "data").unlink()
    shutil.copytree(whole_run.folder / "data", light / "data")
    for name in ("manifest.json", "config.json"):  # an import writes a manifest only
        (light / "data" / name).unlink()
    before = sorted(light.rglob("*"))
    assert has(refused(SMOKE, f"--workdir={light}", "--stage=data"), light / "data", "import")
    assert sorted(light.rglob("*")) == before
