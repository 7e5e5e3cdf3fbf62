"""Run folders whose files somebody edited, emptied, mixed up or half lost: one line, and never another model's
result."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from apr_jax.tasks.countdown.vocabulary import countdown_tokenizer
from tests.experiments.conftest import ROOT, SMOKE, finish, start

LIGHT = shutil.ignore_patterns("checkpoints", "tensorboard", "figures")


@pytest.fixture
def light(whole_run, tmp_path):
    """A copy of the run without its checkpoints, of which a report can be made."""
    return shutil.copytree(whole_run.folder, tmp_path / "copy", ignore=LIGHT)


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    "file, content, says",
    [
        ("config.json", b"[" * 100_000, "config.json is broken"),
        ("config.json", {"sft": [1]}, "sft was [1]"),
        ("config.json", {"sft": None}, "sft was None"),
        ("data/manifest.json", b"{}", "manifest.json is broken: delete it"),
        ("data/manifest.json", {"config": []}, "manifest.json is broken: delete it"),
        ("data/manifest.json", {"held_out_problems": "x"}, "manifest.json is broken: delete it"),
        ("evaluate/sft_apr.stamp.json", b"null", "sft_apr.stamp.json is broken: delete it"),
        ("evaluate/sft_apr.stamp.json", b"\xff\xff", "sft_apr.stamp.json is broken: delete it"),
        ("evaluate/sft_apr.stamp.json", {"step": "x"}, "sft_apr.stamp.json is broken: delete it"),
        ("export/check.json", b"{}", "check.json is broken: delete it"),
        ("export/check.json", {"model": 3}, "check.json is broken: delete it"),
        ("export/check.json", {"model": "../../.."}, "check.json is broken: delete it"),
    ],
)
def test_a_note_of_the_run_with_another_content_is_named(light, refused, file, content, says):
    if isinstance(content, bytes):
        (light / file).write_bytes(content)
    else:
        edit(light / file, **content)
    assert says in refused(SMOKE, f"--workdir={light}", "--stage=report")


@pytest.mark.parametrize(
    "file, content",
    [
        ("versions.json", b"[1]"),
        ("versions.json", b'{"earlier": null, "a": 1}'),
        ("sft_apr/metrics.jsonl", b"\xff\xfe\n[1]\n3\n"),
        ("sft_apr/metrics.jsonl", b'{"step": "a", "loss": 1}\n{"step": 1, "loss": "b", "tokens": "c"}\n'),
    ],
)
def test_what_a_report_can_do_without_does_not_stop_it(light, main, file, content):
    (light / file).write_bytes(content)
    done = main(SMOKE, f"--workdir={light}", "--stage=report")
    assert done.code == 0 and "| APR SFT |" in done.out, done.err


def test_an_imported_data_set_is_not_to_be_made_again(light, refused):
    (light / "data" / "manifest.json").write_text("{}")
    (light / "data" / "config.json").unlink()  # which an import does not write
    assert "import the data set again" in refused(SMOKE, f"--workdir={light}", "--stage=report")


def test_records_of_other_problems_are_named(light, refused):
    path = light / "evaluate" / "sft_apr.jsonl"
    lines = path.read_text().splitlines(True)
    for changed in (lines[:3], lines * 2, [re.sub('"target":[0-9]+', '"target":1', line) for line in lines]):
        path.write_text("".join(changed))
        line = refused(SMOKE, f"--workdir={light}", "--stage=report")
        assert "APR SFT and APR SFT+GRPO are of other problems: run --stage=evaluate again" in line
    path.write_text("".join(re.sub('"failures":{[^}]*}', '"failures":{"length":"x"}', line) for line in lines))
    assert "line 1: no record: failures" in refused(SMOKE, f"--workdir={light}", "--stage=report")


def test_a_checkpoint_in_the_folder_of_another_variant_is_no_result_of_it(whole_run, tmp_path, refused):
    shutil.copytree(whole_run.folder / "data", tmp_path / "data")
    for there, name in (("sft_sos_plus", "sft_apr"), ("sft_apr", "sft_sos_plus")):
        shutil.copytree(whole_run.folder / there, tmp_path / name, ignore=shutil.ignore_patterns("tensorboard"))
    for stage in ("grpo", "evaluate", "export"):
        assert "holds no checkpoint of countdown's " in refused(SMOKE, f"--workdir={tmp_path}", f"--stage={stage}")
        assert not (tmp_path / "evaluate").exists() and not (tmp_path / "export").exists()


def test_a_model_whose_last_step_is_broken_is_told_by_the_step_it_has(whole_run, tmp_path, main, refused):
    """Its newest step has all its parts, but another model's sizes."""
    shutil.copytree(whole_run.folder / "data", tmp_path / "data")
    shutil.copytree(whole_run.folder / "sft_apr", tmp_path / "sft_apr")
    meta = tmp_path / "sft_apr" / "checkpoints" / "40" / "meta" / "metadata"
    edit(meta, model=json.loads(meta.read_text())["model"] | {"layers": 5})
    command = (SMOKE, f"--workdir={tmp_path}", "--variants=apr")
    done = main(*command, "--stage=evaluate,report")
    assert done.code == 0 and "| APR SFT (step 20 of 40) |" in done.out, done.err
    done = main(*command, "--stage=export")
    assert done.code == 1 and "the newest readable step of sft_apr is 20 of 40" in done.err.splitlines()[-1]
    assert not (tmp_path / "export").exists()


# ---------------------------------------------------------------------- the process


def test_closed_and_full_streams_lose_no_result(whole_run, tmp_path):
    """Without stderr its number would be the next file's, and JAX writes to it."""
    folder = shutil.copytree(whole_run.folder, tmp_path / "copy", ignore=shutil.ignore_patterns("evaluate"))
    command = [sys.executable, "-m", "experiments.run", SMOKE, f"--workdir={folder}", "--variants=apr"]
    closed = f"exec {' '.join(command)} --stage=evaluate,report >&- 2>&-"
    assert subprocess.run(["sh", "-c", closed], cwd=ROOT).returncode == 0
    name = Path("evaluate", "grpo_apr.jsonl")
    assert (folder / name).read_bytes() == (whole_run.folder / name).read_bytes()
    shutil.rmtree(folder / "evaluate")
    with Path("/dev/full").open("w") as full:  # as a terminal that has gone
        assert subprocess.run([*command, "--stage=evaluate"], cwd=ROOT, stderr=full).returncode == 0
    assert (folder / name).read_bytes() == (whole_run.folder / name).read_bytes()


@pytest.mark.parametrize("platform", ["nosuch", "cuda"])
def test_a_platform_that_is_not_there_is_one_line(tmp_path, platform):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": platform}
    done = finish(start(f"--workdir={tmp_path}", "--stage=report", env=env))
    assert done.code == 1 and "Traceback" not in done.err
    assert done.err.splitlines()[-1].startswith(f"error: JAX_PLATFORMS is '{platform}': ")


# ---------------------------------------------------------------------- files of another data set


@pytest.fixture
def trained(whole_run, tmp_path):
    """The data and the supervised APR model of the run."""
    shutil.copytree(whole_run.folder / "data", tmp_path / "copy" / "data")
    shutil.copytree(whole_run.folder / "sft_apr", tmp_path / "copy" / "sft_apr")
    return tmp_path / "copy"


def test_held_out_problems_of_another_data_set_are_not_evaluated_on(trained, refused):
    data = trained / "data"
    held_out, train = ((data / f"{name}.jsonl").read_text().splitlines() for name in ("held_out", "train"))
    turned = json.loads(train[0])
    turned["numbers"].reverse()
    for other, says in (
        (train[:12], "12 problems of"),  # trained on
        ([*held_out[:-1], json.dumps(turned)], "1 problems of"),  # the same in another order
        (held_out[:5], "holds 5 problems, its data set 12"),
    ):
        (data / "held_out.jsonl").write_text("".join(f"{line}\n" for line in other))
        for stage in ("evaluate", "export"):
            line = refused(SMOKE, f"--workdir={trained}", "--variants=apr", f"--stage={stage}")
            assert says in line and "held_out.jsonl" in line
    assert not list(trained.glob("evaluate/*.jsonl"))


def test_a_tokenizer_of_another_data_set_is_not_decoded_with(trained, refused):
    countdown_tokenizer(50).save(trained / "data" / "tokenizer.json")
    for stage in ("grpo", "evaluate", "export"):
        line = refused(SMOKE, f"--workdir={trained}", "--variants=apr", f"--stage={stage}")
        assert "has a vocabulary of" in line and "tokenizer.json" in line
    assert {path.name for path in trained.iterdir()} == {"config.json", "data", "sft_apr", "versions.json"}


def test_no_data_are_made_into_an_import_without_its_manifest(light, refused):
    for name in ("manifest.json", "config.json"):  # of these an import has the first
        (light / "data" / name).unlink()
    before = sorted(light.rglob("*"))
    assert "import it again" in refused(SMOKE, f"--workdir={light}", "--stage=data")
    assert sorted(light.rglob("*")) == before
