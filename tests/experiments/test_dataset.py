"""The data stage: held-out problems stay out, a seed fixes every byte, a full disk loses nothing."""

import dataclasses
import errno
import os

import numpy as np
import pytest

from apr_jax.countdown import split_problems
from apr_jax.countdown.problem import solvable
from experiments.command import PRESETS, load_config
from experiments.dataset import load_pieces, load_problems, make_dataset
from experiments.settings import read_settings


def read_preset(name, **problems):
    config = load_config(str(PRESETS / f"{name}.py"))
    config.problems.update(problems)
    return read_settings(config)


SMALL = read_preset("smoke", train=40, held_out=6)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name", ["smoke", "laptop"])
@pytest.mark.parametrize("seed", [0, 1])
def test_held_out_problems_are_never_trained_on(name, seed):
    settings = read_preset(name)
    train, held_out = split_problems(settings.problems, seed, settings.train, settings.held_out)
    assert (len(train), len(held_out)) == (settings.train, settings.held_out)
    held = {(tuple(sorted(problem.numbers)), problem.target) for problem in held_out}
    assert len(held) == len(held_out)
    assert not held & {(tuple(sorted(problem.numbers)), problem.target) for problem in train}
    assert all(map(solvable, held_out))


def test_the_stage_keeps_them_apart_too(whole_run):
    data = whole_run.folder / "data"
    train, held_out = (load_problems(data / f"{name}.jsonl") for name in ("train", "held_out"))
    assert not {problem.key for problem in train} & {problem.key for problem in held_out}
    for style in ("sosp", "apr"):
        assert all(len(piece) <= 256 for piece in load_pieces(data / f"{style}_train.npz"))


def test_a_seed_fixes_every_byte(tmp_path):
    for name in ("one", "two"):
        make_dataset(SMALL, tmp_path / name)
    make_dataset(dataclasses.replace(SMALL, seed=1), tmp_path / "other")
    one, two, other = (files(tmp_path / name) for name in ("one", "two", "other"))
    assert one == two
    assert one["train.jsonl"] != other["train.jsonl"] and one["apr_train.npz"] != other["apr_train.npz"]


def test_what_is_made_is_only_read(tmp_path, monkeypatch):
    manifest = make_dataset(SMALL, tmp_path)
    monkeypatch.setattr("experiments.dataset.split_problems", None)
    assert make_dataset(SMALL, tmp_path) == manifest
    counts = manifest["apr_train"]
    pieces = load_pieces(tmp_path / "apr_train.npz")
    assert counts["trees"] + counts["too_long"] == 40
    assert len(pieces) == counts["threads"]
    assert all(piece.tokens.dtype == np.int32 and piece.sampled.dtype == bool for piece in pieces)


@pytest.mark.parametrize("fails", range(8))
def test_a_full_disk_loses_nothing(tmp_path, monkeypatch, fails):
    whole, here = tmp_path / "whole", tmp_path / "here"
    make_dataset(SMALL, whole)
    replace, done = os.replace, []

    def full(source, target):
        if len(done) == fails:
            raise OSError(errno.ENOSPC, "No space left on device")
        done.append(target)
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            make_dataset(SMALL, here)
    kept = {path.name: path.read_bytes() for path in done}
    assert len(kept) == fails and "manifest.json" not in kept
    assert kept.items() <= files(whole).items() and kept.items() <= files(here).items()
    make_dataset(SMALL, here)
    assert files(here) == files(whole)


def test_a_window_that_no_tree_fits_is_refused(tmp_path):
    with pytest.raises(ValueError, match="none of 40 sosp trees fits a window of 32 tokens"):
        make_dataset(dataclasses.replace(SMALL, window=32), tmp_path)
    assert not (tmp_path / "manifest.json").exists()


def test_missing_data_is_named(tmp_path):
    for load in (load_pieces, load_problems):
        with pytest.raises(FileNotFoundError, match="run --stage=data first"):
            load(tmp_path / "nothing")
