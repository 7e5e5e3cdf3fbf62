"""A task through everything: all stages by the command, then the viewer and the latency tool."""

import json
import shlex
import sys
from types import SimpleNamespace

import pytest

from apr_jax.evaluate.latency.sample import read_samples
from apr_jax.evaluate.records import read_records
from apr_jax.evaluate.statistics import wilson_interval
from apr_jax.io.json_lines import read_lines
from tools import latency, view

FAKE = shlex.join([sys.executable, "-m", "tests.rollout.fake_server"])


def run_whole(folder, *arguments):
    """All stages in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jax.config.update", lambda *_: None)  # the tests' own settings stay
        from experiments.run import main

        assert main(["run", *arguments, f"--workdir={folder}"]) == 0
    return folder


def accuracy(folder, name):
    """Of the records of a model: how many, the part that is right, and its 95 % interval."""
    records = read_records(folder / "evaluate" / f"{name}.jsonl")
    right = sum(record.correct for record in records)
    return SimpleNamespace(n=len(records), right=right / len(records), interval=wilson_interval(right, len(records)))


def metrics(folder, stage):
    """The logged steps of a training."""
    return [row for _, row in read_lines(folder / stage / "metrics.jsonl")]


def check_export(folder):
    """The export gives transformers' trees."""
    check = json.loads((folder / "export" / "check.json").read_text())
    assert check["trees_equal"] == check["trees"] >= 2 and check["max_logit_difference"] < 1e-3


def drawing(folder, name, capsys, index=0):
    """What the viewer prints of a problem, and the page that it writes."""
    path = str(folder / "evaluate" / f"{name}.jsonl")
    capsys.readouterr()
    assert view.main(["view", path, f"--index={index}"]) == 0
    printed = capsys.readouterr().out
    assert view.main(["view", path, f"--index={index}", f"--html={folder}/tree.html"]) == 0
    return printed, (folder / "tree.html").read_text()


def latency_samples(folder, out, *flags):
    """The samples of the latency tool on an export, by engine."""
    assert latency.main(["latency", f"--model={folder}/export", f"--out={out}", *flags]) == 0
    assert "latency" in (out / "report.md").read_text() and list((out / "figures").iterdir())
    found = {}
    for sample in read_samples(out / "samples.jsonl"):
        found.setdefault(sample.setting["engine"], []).append(sample)
    return found
