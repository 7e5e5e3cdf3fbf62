"""The figures of evaluations: each is drawn from many records, few and none, with the size that style.py gives."""

import random

import pytest

from apr_jax.evaluate.records import Record
from experiments.figures import accuracy
from tests.experiments.figures.png import size

CURVES = (accuracy.accuracy_against_window, accuracy.accuracy_against_sequential, accuracy.accuracy_against_total)


def records(count, rate, seed=0):
    rng = random.Random(seed)
    made = []
    for i in range(count):
        correct, n = rng.random() < rate, rng.randrange(1, 900)
        costs = {"longest_context": n, "sequential_tokens": n, "total_tokens": 3 * n}
        made.append(Record(i, {}, correct=correct, answered=True, **costs))
    return made


MANY = {"SoS+": records(50, 0), "APR": records(50, 0.6), "APR + GRPO": records(9, 1)}
MODELS = [{}, {"SoS+": []}, {"SoS+": records(1, 1)}, MANY]


@pytest.mark.parametrize("models", MODELS, ids=len)
def test_figures_of_records(models, tmp_path):
    for draw in (accuracy.accuracy_bars, *CURVES):
        path = tmp_path / "deep" / f"{draw.__name__}.png"
        draw(models, path)
        assert size(path) == (800, 500)
        assert [file.name for file in path.parent.glob("*.part")] == []
