"""The report agrees with the records, also for a run that is not complete."""

import json
import shutil

import pytest

from apr_jax.data.folder import DataFolder
from apr_jax.errors import UserError
from apr_jax.evaluate.records import read_records
from apr_jax.tasks.countdown.task import Countdown
from experiments.stages.report import _changes, write_report
from tests.experiments.conftest import has

APR, SOS_PLUS = (Countdown().published_changes(variant) for variant in ("apr", "sos_plus"))
ROWS = {"sft_apr": "APR SFT", "sft_sos_plus": "SoS+ SFT", "grpo_apr": "APR SFT+GRPO"}


def test_every_model_has_a_row_and_a_summary(whole_run):
    folder = whole_run.folder
    summary = json.loads((folder / "summary.json").read_text())
    text = (folder / "report.md").read_text()
    assert list(summary) == [*ROWS.values(), *(f"{title} at temperature 1" for title in ROWS.values())]
    for name, title in ROWS.items():
        records = read_records(folder / "evaluate" / f"{name}.jsonl")
        found = summary[title]
        assert found["n"] == len(records) == 12
        assert found["accuracy"] == sum(record.correct for record in records) / 12
        assert found["total_tokens"] == pytest.approx(sum(record.total_tokens for record in records) / 12)
        assert found["sequential_tokens"] <= found["total_tokens"]
        row, sampled = [line for line in text.splitlines() if line.startswith(f"| {title} |")]
        assert f"| {found['accuracy']:.1%} (" in row and "n=12" in row
        assert row.count(" | ") == text.splitlines()[0].count(" | ")
        again = summary[f"{title} at temperature 1"]
        assert again["accuracy"] == sum(r.correct for r in read_records(folder / f"evaluate/{name}@1.jsonl")) / 12
        assert f"| {again['accuracy']:.1%} (" in sampled and text.index("At temperature 1:") < text.index(sampled)
    assert "Export of grpo_apr against transformers: " in text
    before, after = (read_records(folder / "evaluate" / f"{name}.jsonl") for name in ("sft_apr", "grpo_apr"))
    points = 100 * (sum(r.correct for r in after) - sum(r.correct for r in before)) / 12
    assert f"GRPO over APR SFT on the same problems: {points:+.1f} points (" in text
    assert "okens a sequence" in text and "; paper +22.1 %)" in text
    assert text in whole_run.out


def test_changes_by_grpo_are_reported_beside_the_papers():
    before, after = {"children": 3.0, "total_tokens": 2000}, {"children": 4.5, "total_tokens": 3300}
    assert _changes(APR, before, after) == (
        "Children 3.0 to 4.5 (+50.0 %; paper +34.4 %); tokens a sequence 500.0 to 600.0 (+20.0 %; paper +22.1 %)."
    )
    assert _changes(APR, before | {"children": 0}, after).startswith("Children 0.0 to 4.5 (from none; paper")
    assert "children" not in _changes(SOS_PLUS, before | {"children": 0}, after | {"children": 0}).lower()


def test_the_line_on_demonstrations_agrees_with_the_manifest(whole_run):
    manifest = json.loads((whole_run.folder / "data" / "manifest.json").read_text())
    text = (whole_run.folder / "report.md").read_text()
    for variant in ("sos_plus", "apr"):
        counts = manifest[f"{variant}_train"]
        assert counts["trees"] + counts["too_long"] == 200 == manifest["train_problems"]
        dropped = f"{counts['too_long']} too long, {counts['no_demonstration']} without one"
        assert f"kept {counts['trees']} trees ({dropped})" in text


def test_a_report_of_a_run_with_records_of_one_model(whole_run, tmp_path):
    shutil.copytree(whole_run.folder / "data", tmp_path / "data")
    (tmp_path / "evaluate").mkdir()
    shutil.copy(whole_run.folder / "evaluate" / "sft_apr.jsonl", tmp_path / "evaluate")
    text = write_report(DataFolder(tmp_path / "data", Countdown()), tmp_path)
    assert "| APR SFT |" in text and "GRPO" not in text and "Export" not in text
    assert not (tmp_path / "figures" / "grpo_reward.png").exists()


def test_a_stopped_evaluation_is_reported_with_the_number_of_problems_that_ran(whole_run, tmp_path):
    """It has no row. The rows of the others say that all problems ran."""
    for part in ("data", "evaluate"):
        shutil.copytree(whole_run.folder / part, tmp_path / part)
    path = tmp_path / "evaluate" / "grpo_apr.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    partial = tmp_path / "grpo_apr.jsonl.partial"
    partial.write_text("".join(lines[:5]))
    path.unlink()
    text = write_report(DataFolder(tmp_path / "data", Countdown()), tmp_path, unfinished={"grpo_apr": partial})
    assert any(has(line, "grpo_apr", "5 of 12") for line in text.splitlines())
    assert "| APR SFT+GRPO |" not in text and text.count("n=12 of 12") == 2
    broken = {**json.loads(lines[4]), "failures": "none"}
    path.write_text("".join([*lines[:4], json.dumps(broken) + "\n", *lines[5:]]))
    with pytest.raises(UserError, match="grpo_apr.jsonl, line 5: .*failures"):
        write_report(DataFolder(tmp_path / "data", Countdown()), tmp_path)


def test_a_report_without_records_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="--stage=evaluate"):
        write_report(DataFolder(tmp_path / "data", Countdown()), tmp_path)
    assert not list(tmp_path.iterdir())
