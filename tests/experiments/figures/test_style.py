"""The common style of figures: metrics files, and the writing of a figure."""

import pytest

from experiments.figures import style


def test_a_truncated_last_line_of_metrics_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert style.read_metrics(path) == []
    path.write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "lo')
    assert style.read_metrics(path) == [{"step": 1, "loss": 2.5}]


def test_a_figure_that_fails_does_not_replace_the_earlier_one(tmp_path):
    path = tmp_path / "deep" / "figure.png"
    style.save_figure(path, "title", lambda axes: axes.plot([1, 2]))
    before = path.read_bytes()

    def fails(axes):
        raise KeyError("on purpose")

    with pytest.raises(KeyError):
        style.save_figure(path, "title", fails)
    assert path.read_bytes() == before and [file.name for file in path.parent.iterdir()] == ["figure.png"]
