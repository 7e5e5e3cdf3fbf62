"""The figures of training: each is drawn from many lines of metrics, few and none."""

import json
import math

import pytest

from apr_jax.train.metrics import MetricsLog
from experiments.figures import style, training
from tests.experiments.figures.png import size

LINES = [
    {"step": step, "loss": 3 / step, "rollout/correct": step / 50, "validation/accuracy": step / 60}
    for step in range(1, 41)
]


VALIDATED = [*LINES, {"step": 40, "validation_loss": 0.2}]
RUNS = [{}, {"APR": []}, {"APR": LINES[:1]}, {"SoS+": LINES, "APR": VALIDATED}]


@pytest.mark.parametrize("runs", RUNS)
def test_figures_of_metrics(runs, tmp_path):
    for draw in (training.sft_losses, training.grpo_rewards):
        draw(runs, tmp_path / "curve.png")
        assert size(tmp_path / "curve.png") == (800, 500)


def test_values_that_are_not_finite_are_left_out(tmp_path):
    log = MetricsLog(tmp_path, 0)
    for step, loss in enumerate([2.5, math.nan, math.inf, 2.0], 1):
        log.write(step, {"loss": loss, "tokens": 9.0})
    log.close()
    path = tmp_path / "metrics.jsonl"
    constants = []
    rows = [json.loads(line, parse_constant=constants.append) for line in path.read_text().splitlines()]
    assert [row["loss"] for row in rows] == [2.5, None, None, 2.0] and not constants
    with path.open("a") as file:
        file.write('{"step": 5, "loss": NaN, "tokens": 9.0}\n')  # as older versions wrote it
    rows = style.read_metrics(path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5] and all(row["tokens"] == 9 for row in rows)
    assert [row.get("loss") for row in rows] == [2.5, None, None, 2.0, None]
    training.sft_losses({"APR SFT": rows}, tmp_path / "curve.png")
    assert size(tmp_path / "curve.png") == (800, 500)
    MetricsLog(tmp_path, 3).close()  # a resumed run keeps lines with null
    assert [row["step"] for row in style.read_metrics(path)] == [1, 2, 3]
