"""The figures of latency from many samples, few and none, and the text of the report."""

import dataclasses

import pytest

from apr_jax.evaluate.latency.passes import Throughput
from apr_jax.evaluate.latency.report import latency_text
from apr_jax.evaluate.latency.sample import Sample, Setting
from apr_jax.evaluate.latency.summary import summarise_latency
from experiments.figures import latency
from tests.experiments.figures.png import size

SETTING = Setting("package.module:Own", "main", "My title", "w", "sglang", 2, "roots_apart", 1, 128, 1, 0, 0.0)


def samples(setting, count, seconds=1.0):
    where = dataclasses.asdict(setting)
    return [
        Sample(i, {"number": i}, correct=i % 2 == 0, setting=where, latency=seconds * (i + 1), decode=seconds * (i + 1),
               predicted_decode=0.5, digest=f"{i}")
        for i in range(count)
    ]  # fmt: skip


OTHER = dataclasses.replace(SETTING, variant="other", title="Another", window=64, condition="Budget: 3 ")
GROUPS = [[], [(SETTING, samples(SETTING, 1))], [(SETTING, samples(SETTING, 9)), (OTHER, samples(OTHER, 7, 0.2))]]


@pytest.mark.parametrize("groups", GROUPS, ids=len)
def test_figures_of_samples(groups, tmp_path):
    for draw in (latency.accuracy_against_latency, latency.accuracy_within_latency):
        draw(groups, tmp_path / "figure.png")
        assert size(tmp_path / "figure.png") == (800, 500)


def test_a_figure_of_load(tmp_path):
    latency.load_curves({"My title": [(1, 2.0, 0.5), (4, 5.0, 0.9)], "Another": []}, tmp_path / "load.png")
    assert size(tmp_path / "load.png") == (800, 500)


def test_the_text_has_a_row_for_each_setting_and_the_largest_gaps():
    groups = GROUPS[2]
    summaries = [summarise_latency(found) for _, found in groups]
    lines = latency_text(groups, summaries, {SETTING: Throughput(9, 3.25, 40.0)}, 9).splitlines()
    assert lines[2].startswith("| My title | 2 SGLang servers, roots apart | 1 | window 128 | 9 of 9 | 55.6 % (")
    assert lines[2].endswith("| 3.25 | 40 |")
    assert lines[3].startswith("| Another | 2 SGLang servers, roots apart | 1 | window 64, Budget: 3 | 7 of 9 |")
    gaps = [line for line in lines if line.startswith("- problem ")]
    assert gaps[0].startswith("- problem 8: 9000 ms, predicted 500 ms; most of it slower decoding (+8500 ms)")


def test_engines_that_did_the_same_work_are_compared():
    jax = dataclasses.replace(SETTING, engine="jax", servers=1, placement="one")
    mine, theirs = samples(jax, 3), samples(SETTING, 3)
    mine[1] = dataclasses.replace(mine[1], digest="other")
    groups = [(jax, mine), (SETTING, theirs)]
    rates = {jax: Throughput(3, 1.0, 50.0), SETTING: Throughput(3, 1.0, 20.0)}
    text = latency_text(groups, [summarise_latency(found) for _, found in groups], rates, 3)
    assert "2 of 3 trees are the same token for token" in text and ": 2.5 times" in text
