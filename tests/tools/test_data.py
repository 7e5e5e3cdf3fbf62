"""Tests of tools.data: making, statistics, and export and import in the authors' format."""

import json
import random

import pytest

from apr_jax.data.dataset import read_manifest
from apr_jax.data.folder import DataFolder
from apr_jax.data.packing import StoredSegments
from apr_jax.data.store import TreeStore
from apr_jax.tasks.countdown import ProblemRange, authors
from apr_jax.tasks.countdown.search import SolverConfig
from apr_jax.tasks.countdown.solver import SOLVERS
from apr_jax.tasks.countdown.task import Countdown
from apr_jax.threads import decode_tree
from experiments.command import load_config
from experiments.settings import read_settings
from experiments.stages.data import make_data
from tools import data

CONFIG = "experiments/configs/smoke.py"
TRAIN = "--set=data.train=350"
IMPORT = ("import", "--task=countdown")


def call(*arguments):
    return data.main(["data", *map(str, arguments)])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "data"
    assert call("make", f"--config={CONFIG}", f"--out={folder}", TRAIN, "--processes=1") == 0
    return folder


def test_make_makes_what_a_run_reads(made, capsys):
    config = load_config(CONFIG)
    config.data.train = 350
    assert make_data(read_settings(config), made) == read_manifest(made)
    assert call("make", f"--config={CONFIG}", f"--out={made}", TRAIN) == 0
    out = capsys.readouterr().out
    assert "apr_train: " in out and f"content {read_manifest(made)['sha256']}" in out


def test_shares_say_when_others_are_missing(made, tmp_path, capsys):
    line = ("make", f"--config={CONFIG}", f"--out={tmp_path}/data", TRAIN, "--processes=1")
    assert call(*line, "--shard=1/2") == 0
    assert "share 1 of 2 is done; other shares of" in capsys.readouterr().out
    assert call(*line, "--shard=0/2") == 0
    assert read_manifest(tmp_path / "data") == read_manifest(made)


def test_stats_count_what_is_there(made, tmp_path, capsys):
    tokenizer = made / "tokenizer.json"
    assert call("stats", made, f"--plot={tmp_path}/stats.png", f"--tokenizer={tokenizer}") == 0
    out = capsys.readouterr().out
    counts = read_manifest(made)["apr_train"]
    assert f"kept {counts['trees']} trees" in out and f"all kept trees: {counts['tokens']} tokens" in out
    for words in ("solved by the solver", "with prefixes repeated", "sequential tokens", "children", "other tokenizer"):
        assert words in out
    assert (tmp_path / "stats.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_exported_can_be_imported(made, tmp_path, capsys):
    for style in ("apr", "sos_plus"):
        assert call("export", made / f"{style}_train", f"--out={tmp_path}/{style}.json") == 0
    rows = json.loads((tmp_path / "apr.json").read_text())
    assert len(rows) == read_manifest(made)["apr_train"]["trees"]
    held_out = [{"nums": row["nums"], "target": row["target"]} for row in rows[70:72]]
    (tmp_path / "val.json").write_text(json.dumps(held_out))
    again = tmp_path / "again"
    line = (*IMPORT, tmp_path / "apr.json", tmp_path / "sos_plus.json", f"--held_out={tmp_path}/val.json")
    assert call(*line, f"--out={again}", "--window=256") == 0
    manifest = read_manifest(again)
    keys = [(*sorted(row["nums"]), row["target"]) for row in rows]
    kept = [index for index, key in enumerate(keys) if key not in (keys[70], keys[71])]  # a range this small repeats
    dropped = sum(manifest[f"apr_{part}"]["held_out"] for part in ("validation", "train"))
    assert dropped == len(rows) - len(kept) >= 2 and manifest["held_out_problems"] == 2
    words = DataFolder(again, Countdown()).tokenizer()
    theirs = [decode_tree(tree, words.decode).root for tree in TreeStore(made / "apr_train")]
    stores = [TreeStore(again / f"apr_{part}") for part in ("validation", "train")]
    ours = {tree.info["index"]: decode_tree(tree, words.decode).root for store in stores for tree in store}
    assert [ours[index] for index in sorted(ours)] == [theirs[index] for index in kept] and sorted(ours) == kept
    assert len(StoredSegments(TreeStore(again / "apr_train"))) == manifest["apr_train"]["threads"]
    assert make_data(read_settings(load_config(CONFIG)), again) == manifest  # a run takes it as it is
    kept_out = DataFolder(again, Countdown()).problems("held_out")
    assert {problem.target for problem in kept_out} == {row["target"] for row in held_out}
    assert call(*line, f"--out={again}") == 1
    assert "is there already: give another folder" in capsys.readouterr().err


# ---------------------------------------------------------------------- import


@pytest.fixture(scope="module")
def files(made, tmp_path_factory):
    """Return a folder with the trees of the data set as files in the authors' format."""
    folder = tmp_path_factory.mktemp("files")
    for style in ("apr", "sos_plus"):
        assert call("export", made / f"{style}_train", f"--out={folder}/{style}.json") == 0
    return folder


def write(path, rows):
    path.write_text(json.dumps(rows))
    return path


def keys(folder, *names):
    """Return the problems of the trees in the named stores."""
    infos = (tree.info for name in names for tree in TreeStore(folder / name))
    return {(*sorted(info["numbers"]), info["target"]) for info in infos}


def test_held_out_problems_are_trained_on_by_nobody(files, tmp_path, capsys):
    """Held-out problems are in no training tree and not in train.jsonl, for any order of the traces in their file."""
    rows = json.loads((files / "apr.json").read_text())
    chosen = [{"nums": row["nums"][::-1], "target": row["target"]} for row in (*rows[:5], *rows[70:85])]
    held_out = {(*sorted(row["nums"]), row["target"]) for row in chosen}
    line = (*IMPORT, files / "apr.json", files / "sos_plus.json", f"--held_out={write(tmp_path / 'val.json', chosen)}")
    assert call(*line, f"--out={tmp_path}/data", "--window=256") == 0
    data = tmp_path / "data"
    manifest = read_manifest(data)
    train = [(*sorted(problem.numbers), problem.target) for problem in DataFolder(data, Countdown()).problems("train")]
    assert len(train) == len(set(train)) == manifest["train_problems"] > 100 and not held_out & set(train)
    for style in ("apr", "sos_plus"):
        validation, trained = keys(data, f"{style}_validation"), keys(data, f"{style}_train")
        assert not held_out & (validation | trained) and not validation & trained
        assert len(validation) == 64 and trained <= set(train)
    dropped = sum(counts["held_out"] for counts in manifest.values() if isinstance(counts, dict) and "trees" in counts)
    assert dropped >= 40 and "of held-out problems), " in capsys.readouterr().out


def test_a_variant_with_too_few_traces_is_refused(files, tmp_path, capsys):
    rows = json.loads((files / "sos_plus.json").read_text())
    few = write(tmp_path / "few.json", rows[:30])
    val = write(tmp_path / "val.json", [{"nums": [1, 2, 3], "target": 6}])
    assert call(*IMPORT, files / "apr.json", few, f"--held_out={val}", f"--out={tmp_path}/data") == 1
    assert "no sos_plus tree to train on is left" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"few.json", "val.json"}


def test_traces_of_stream_of_search_are_the_one_thread_variants(tmp_path, capsys):
    """A run uses them like traces of SoS+."""
    source, made = ProblemRange(count=3, max_number=10, max_target=20), []
    for seed in range(80):
        problem = source.draw(random.Random(seed))
        made.append((problem, SOLVERS["sos"](problem, SolverConfig.paper_sos(beam=(1, 2)), random.Random(seed))))
    authors.write_traces(tmp_path / "sos.json", made)
    val = write(tmp_path / "val.json", [GOOD])
    assert call(*IMPORT, tmp_path / "sos.json", f"--held_out={val}", f"--out={tmp_path}/data") == 0
    counts = read_manifest(tmp_path / "data")["sos_plus_validation"]
    assert counts["trees"] >= 64 and 0 < counts["solved"] < counts["trees"]
    words = DataFolder(tmp_path / "data", Countdown()).tokenizer()
    (tree, *_) = TreeStore(tmp_path / "data" / "sos_plus_validation")
    assert decode_tree(tree, words.decode).root.text == made[0][1].root.text


def trace_of(numbers, target):
    state = f"Current State: {target}:{numbers}, Operations: []\n"
    return {"nums": numbers, "target": target, "search_path": state + "No solution found.\n", "search_type": "sosp_1"}


GOOD = {"nums": [1, 2, 3], "target": 6}


@pytest.mark.parametrize(
    "traces, held_out, says",
    [
        ([], None, "--held_out=FILE is needed"),
        ([], [], "there is no held-out problem"),
        ([], [GOOD, {"nums": [1, 1, 1], "target": 19}], "val.json: 1 1 1 to 19 has no solution: leave it out"),
        ([{"nums": [1, 2], "target": 3}], [GOOD], "has neither trace_dict nor search_path"),
    ],
)
def test_what_cannot_be_a_data_set_leaves_one_line_and_nothing_else(files, tmp_path, capsys, traces, held_out, says):
    rows = [*json.loads((files / "sos_plus.json").read_text())[:90], *traces]
    before = [write(tmp_path / "traces.json", rows), write(tmp_path / "val.json", held_out)]
    line = [*IMPORT, tmp_path / "traces.json", f"--out={tmp_path}/data"]
    assert call(*line, *([] if held_out is None else [f"--held_out={tmp_path}/val.json"])) == 1
    captured = capsys.readouterr().err
    assert captured.startswith("error: ") and captured.count("\n") == 1 and says in captured
    assert sorted(tmp_path.iterdir()) == sorted(before)


def test_problems_of_any_size_are_one_data_set(files, tmp_path):
    """Problems have different counts of numbers, some of them larger than 32 or 64 bits."""
    odd = [trace_of([1, 2, 3, 4], 10), trace_of([10**20, 2, 3], 10)]
    rows = [*json.loads((files / "sos_plus.json").read_text())[:90], *odd]
    held_out = [GOOD, {"nums": [1, 2], "target": 3}, {"nums": [1, 10**20], "target": 10**20 + 1}]
    val = write(tmp_path / "val.json", held_out)
    assert call(*IMPORT, write(tmp_path / "t.json", rows), f"--held_out={val}", f"--out={tmp_path}/data") == 0
    folder = DataFolder(tmp_path / "data", Countdown())
    assert [problem.target for problem in folder.held_out()] == [6, 3, 10**20 + 1]
    assert [problem.numbers for problem in folder.problems("train")][-2:] == [(1, 2, 3, 4), (10**20, 2, 3)]


def test_a_file_that_is_missing_is_named_before_the_others_are_read(files, tmp_path, capsys):
    val = write(tmp_path / "val.json", [GOOD])
    broken = write(tmp_path / "broken.json", {})
    assert call(*IMPORT, broken, tmp_path / "nowhere.json", f"--held_out={val}", f"--out={tmp_path}/data") == 1
    assert "nowhere.json" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["lengths", "lengths.txt", "."])
def test_a_plot_is_written_to_the_file_that_is_named_or_not_at_all(made, tmp_path, capsys, name):
    assert call("stats", made, f"--plot={tmp_path}/folder/{name}") == 1
    assert "--plot is a PNG to draw, NAME.png" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_stats_of_validation_trees_that_were_all_dropped(tmp_path, capsys):
    """A held-out problem whose trees do not fit the window leaves an empty store."""
    line = ("--set=data.train=60", "--set=data.held_out=1", "--set=window=160")
    assert call("make", f"--config={CONFIG}", f"--out={tmp_path}/data", *line, "--processes=1") == 0
    assert 0 in {counts["trees"] for name, counts in read_manifest(tmp_path / "data").items() if "_validation" in name}
    capsys.readouterr()
    assert call("stats", tmp_path / "data") == 0
    assert "sos_plus_validation: 1 problems" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, says",
    [
        ([], "the first word is one of make, stats, import, export, was given nothing"),
        (["mke"], "was given 'mke'"),
        (["make", "--out=x"], "--config is needed"),
        (["make", f"--config={CONFIG}"], "--out is needed"),
        (["make", f"--config={CONFIG}", "--out=x", "--shard=3/3"], "--shard is i/n with i from 0 to n - 1, was given"),
        (["make", f"--config={CONFIG}", "--out=x", "--set=data.trian=3"], "no setting data.trian (did you mean"),
        (["make", "more", f"--config={CONFIG}", "--out=x"], "no such argument: 'more'"),
        (["stats"], "the arguments are stats FOLDER, 0 were given"),
        (["stats", "nowhere"], "no finished data set at nowhere"),
        (["import", "--out=x"], "import takes one file of traces or more, none was given"),
        (["import", "nowhere.json", "--out=x/y"], "No such file"),
        (["import", __file__, f"--held_out={__file__}", "--out=x"], "--task=NAME is needed"),
        (["import", __file__, f"--held_out={__file__}", "--out=x", "--task=sums"], "sums reads no files of other"),
        (["import", __file__, f"--held_out={__file__}", "--out=x", "--task=cuontdown"], "task is one of countdown, "),
        (["export", "--out=x"], "the arguments are export FOLDER, 0 were given"),
        (["export", "nowhere", "--out=x"], "no finished data set at ."),
    ],
)
def test_a_wrong_command_is_one_line(arguments, says, capsys, tmp_path, monkeypatch):
    lines = [argument.replace("=x", f"={tmp_path}/x") for argument in arguments]
    assert call(*lines) == 1
    captured = capsys.readouterr().err
    assert captured.startswith("error: ") and captured.count("\n") == 1 and says in captured
