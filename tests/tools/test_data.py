"""tools.data: a data set made, told of, exported in the authors' format and imported again."""

import json

import pytest

from apr_jax.countdown.dataset import read_manifest
from apr_jax.threads import decode_tree
from apr_jax.threads.store import TreeStore
from apr_jax.train.pack import StoredPieces
from experiments.command import load_config
from experiments.dataset import load_problems, load_run_tokenizer, make_data
from experiments.settings import read_settings
from tools import data

CONFIG = "experiments/configs/smoke.py"
TRAIN = "--set=problems.train=350"


def call(*arguments):
    return data.main(["data", *map(str, arguments)])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "data"
    assert call("make", f"--config={CONFIG}", f"--out={folder}", TRAIN, "--processes=1") == 0
    return folder


def test_make_makes_what_a_run_reads(made, capsys):
    config = load_config(CONFIG)
    config.problems.train = 350
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
    for style in ("apr", "sosp"):
        assert call("export", made / f"{style}_train", f"--out={tmp_path}/{style}.json") == 0
    rows = json.loads((tmp_path / "apr.json").read_text())
    assert len(rows) == read_manifest(made)["apr_train"]["trees"]
    held_out = [{"nums": row["nums"], "target": row["target"]} for row in rows[70:72]]
    (tmp_path / "val.json").write_text(json.dumps(held_out))
    again = tmp_path / "again"
    line = ("import", tmp_path / "apr.json", tmp_path / "sosp.json", f"--held_out={tmp_path}/val.json")
    assert call(*line, f"--out={again}", "--window=256") == 0
    manifest = read_manifest(again)
    keys = [(*sorted(row["nums"]), row["target"]) for row in rows]
    kept = [index for index, key in enumerate(keys) if key not in (keys[70], keys[71])]  # a range this small repeats
    dropped = sum(manifest[f"apr_{part}"]["held_out"] for part in ("validation", "train"))
    assert dropped == len(rows) - len(kept) >= 2 and manifest["held_out_problems"] == 2
    words = load_run_tokenizer(again, "")
    theirs = [decode_tree(tree, words.decode).root for tree in TreeStore(made / "apr_train")]
    stores = [TreeStore(again / f"apr_{part}") for part in ("validation", "train")]
    ours = [decode_tree(tree, words.decode).root for store in stores for tree in store]
    assert ours == [theirs[index] for index in kept]
    assert len(StoredPieces(TreeStore(again / "apr_train"))) == manifest["apr_train"]["threads"]
    assert make_data(read_settings(load_config(CONFIG)), again) == manifest  # a run takes it as it is
    assert {p.target for p in load_problems(again / "held_out.npy")} == {row["target"] for row in held_out}
    assert call(*line, f"--out={again}") == 1
    assert "is there already: give another folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, says",
    [
        ([], "the first word is one of make, stats, import, export, was given nothing"),
        (["mke"], "was given 'mke'"),
        (["make", "--out=x"], "--config is needed"),
        (["make", f"--config={CONFIG}"], "--out is needed"),
        (["make", f"--config={CONFIG}", "--out=x", "--shard=3/3"], "--shard is i/n with i from 0 to n - 1, was given"),
        (["make", f"--config={CONFIG}", "--out=x", "--set=problems.trian=3"], "no setting problems.trian"),
        (["make", "more", f"--config={CONFIG}", "--out=x"], "no such argument: 'more'"),
        (["stats"], "stats takes one folder, 0 were given"),
        (["stats", "nowhere"], "no finished data set at nowhere"),
        (["import", "--out=x"], "import takes one file of traces or more, none was given"),
        (["import", "nowhere.json", "--out=x/y"], "No such file"),
        (["export", "--out=x"], "export takes one folder of trees"),
        (["export", "nowhere", "--out=x"], "no trees under nowhere"),
    ],
)
def test_a_wrong_command_is_one_line(arguments, says, capsys, tmp_path, monkeypatch):
    lines = [argument.replace("=x", f"={tmp_path}/x") for argument in arguments]
    assert call(*lines) == 1
    captured = capsys.readouterr().err
    assert captured.startswith("error: ") and captured.count("\n") == 1 and says in captured
