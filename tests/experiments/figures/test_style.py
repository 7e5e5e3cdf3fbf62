"""What all figures share."""

import pytest

from experiments.figures import style


def test_metrics_are_read_up_to_where_a_kill_cut_them(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert style.read_metrics(path) == []
    path.write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "lo')
    assert style.read_metrics(path) == [{"step": 1, "loss": 2.5}]


def test_a_figure_that_fails_leaves_the_one_before(tmp_path):
    path = tmp_path / "deep" / "figure.png"
    style.save_figure(path, "title", lambda axes: axes.plot([1, 2]))
    before = path.read_bytes()

    def fails(axes):
        raise KeyError("on purpose")

    with pytest.raises(KeyError):
        style.save_figure(path, "title", fails)
    assert path.read_bytes() == before and [file.name for file in path.parent.iterdir()] == ["figure.png"]
