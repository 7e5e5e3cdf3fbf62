"""Tests of reading a data set: problems, segments and errors; and that a full disk loses nothing."""

import dataclasses
import errno
import os

import numpy as np
import pytest

from apr_jax.data.folder import DataFolder
from apr_jax.data.packing import flatten_tree
from apr_jax.tasks.countdown import trace
from apr_jax.tasks.countdown.problem import solvable
from experiments.command import PRESETS, load_config
from experiments.settings import read_settings
from experiments.stages.data import make_data


def read_preset(**data):
    config = load_config(str(PRESETS / "smoke.py"))
    config.seed = data.pop("seed", 0)
    config.window = data.pop("window", config.window)
    config.data.update(data)
    return read_settings(config)


SMALL = read_preset(train=40, held_out=6)


def opened(folder):
    return DataFolder(folder, SMALL.task)


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("seed", [0, 1])
def test_held_out_problems_are_distinct_and_never_trained_on(seed, tmp_path):
    make_data(read_preset(seed=seed, train=300, held_out=6), tmp_path)
    train, held_out = (list(opened(tmp_path).problems(name)) for name in ("train", "held_out"))
    held = {(tuple(sorted(problem.numbers)), problem.target) for problem in held_out}
    assert (len(train), len(held_out), len(held)) == (300, 6, 6)
    assert not held & {(tuple(sorted(problem.numbers)), problem.target) for problem in train}
    assert all(map(solvable, held_out + train))


def test_segments_fit_their_rows_and_have_the_lengths_that_are_listed(tmp_path):
    make_data(SMALL, tmp_path)
    for variant in ("sos_plus", "apr"):
        segments = opened(tmp_path).segments(variant, "train")
        assert max(segments.lengths) <= 256
        assert all(len(segments[i]) == segments.lengths[i] for i in range(0, len(segments), 7))


def test_a_seed_fixes_every_byte(tmp_path):
    for name in ("one", "two"):
        make_data(SMALL, tmp_path / name)
    make_data(read_preset(train=40, held_out=6, seed=1), tmp_path / "other")
    one, two, other = (files(tmp_path / name) for name in ("one", "two", "other"))
    assert one == two
    assert one["train.jsonl"] != other["train.jsonl"]
    assert one["manifest.json"] != other["manifest.json"]


def test_a_finished_data_set_is_not_made_again(tmp_path, monkeypatch):
    manifest = make_data(SMALL, tmp_path)
    monkeypatch.setattr("apr_jax.data.dataset._make_problems", None)
    assert make_data(SMALL, tmp_path) == manifest == opened(tmp_path).manifest
    counts = manifest["apr_train"]
    segments = opened(tmp_path).segments("apr", "train")
    assert counts["trees"] + counts["too_long"] == counts["problems"] == 40
    assert len(segments) == counts["threads"] and sum(segments.lengths) == counts["tokens"]
    assert all(segment.tokens.dtype == np.int32 and segment.sampled.dtype == bool for segment in segments)


def test_segments_from_the_store_are_those_of_its_trees(tmp_path):
    make_data(SMALL, tmp_path)
    segments = opened(tmp_path).segments("apr", "train")
    expected = [segment for tree in segments.store for segment in flatten_tree(tree)]
    assert len(expected) == len(segments) > 40
    for one, two in zip(segments, expected):
        for field in dataclasses.fields(one):
            np.testing.assert_array_equal(getattr(one, field.name), getattr(two, field.name))


def test_children_that_found_a_solution_are_chosen_first(tmp_path):
    make_data(SMALL, tmp_path)
    tokenizer = opened(tmp_path).tokenizer()
    store = opened(tmp_path).segments("apr", "train").store
    chosen = opened(tmp_path).segments("apr", "train", children=1, seed=3)
    again = opened(tmp_path).segments("apr", "train", children=1, seed=3)
    assert [len(segment) for segment in chosen] == [len(segment) for segment in again]
    texts = iter([tokenizer.decode(segment.tokens) for segment in chosen])
    for tree in store:
        assert next(texts).startswith("Moving to Node #0\n")
        if children := tree.root.children:
            texts_of_children = {
                tokenizer.decode([i for block in child.context for i in block.content]) for child in children
            }
            child = next(texts)
            assert child in texts_of_children
            solved = [text for text in texts_of_children if not text.endswith(trace.NO_SOLUTION)]
            assert not solved or child in solved
    assert next(texts, None) is None


@pytest.mark.parametrize("fails", range(10))
def test_a_full_disk_loses_nothing(tmp_path, monkeypatch, fails):
    whole, here = tmp_path / "whole", tmp_path / "here"
    make_data(SMALL, whole)
    replace, done = os.replace, []

    def full(source, target):
        if len(done) == fails:
            raise OSError(errno.ENOSPC, "No space left on device")
        done.append(target)
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        if fails < 9:
            with pytest.raises(OSError, match="No space left"):
                make_data(SMALL, here)
            assert "manifest.json" not in files(here)
        else:
            make_data(SMALL, here)
    kept = {name: content for name, content in files(here).items() if ".part" not in name}
    assert kept.items() <= files(whole).items()
    make_data(SMALL, here)
    assert files(here) == files(whole)


def test_a_window_that_no_tree_fits_is_refused(tmp_path):
    with pytest.raises(ValueError, match="40 apr .* 40 do not fit .* 32 tokens"):
        make_data(read_preset(train=40, held_out=6, window=32), tmp_path)
    assert not (tmp_path / "manifest.json").exists()


def test_missing_data_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="run --stage=data first"):
        opened(tmp_path).problems("train")
    with pytest.raises(FileNotFoundError, match="run --stage=data first"):
        opened(tmp_path).segments("apr", "train")
