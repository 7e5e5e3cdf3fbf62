"""tools.import_hf: a folder becomes a checkpoint that loads and exports again; what is wrong is one line."""

import dataclasses
import json

import huggingface_hub
import jax
import numpy as np
import pytest
import tokenizers
from flax import nnx

from apr_jax.export.hf import export_hf
from apr_jax.text.hub import HubTokenizer, load_tokenizer
from apr_jax.text.tokenizer import Tokenizer
from apr_jax.train.checkpoint import load_meta, load_model, save_model
from tests.tiny import TOKENIZER, make_model
from tools import export_hf as export_command
from tools import import_hf as command


def call(capsys, *arguments) -> tuple[int, list[str]]:
    """Exit code and lines on stderr."""
    capsys.readouterr()
    code = command.main(["import_hf", *(f"--{argument}" for argument in arguments)])
    return code, capsys.readouterr().err.splitlines()


@pytest.fixture
def folder(tmp_path):
    export_hf(make_model(1), TOKENIZER, tmp_path / "hf")
    return tmp_path / "hf"


def same(a, b) -> bool:
    equal = jax.tree.map(lambda x, y: bool(np.array_equal(x, y)), nnx.state(a), nnx.state(b))
    return a.config == b.config and all(jax.tree.leaves(equal))


def test_import_and_export_go_round(folder, tmp_path, capsys):
    out, again = tmp_path / "imported", tmp_path / "again"
    for style in ("sosp", "apr"):  # the second in place of the first
        assert call(capsys, f"model={folder}", f"out={out}", f"style={style}") == (0, [])
    model, meta = load_model(out)
    assert same(model, make_model(1))
    assert (meta["style"], meta["stage"], meta["step"], meta["source"]) == ("apr", "imported", 0, "hf")
    assert Tokenizer.load(out / "tokenizer.json").encode("3+4") == TOKENIZER.encode("3+4")
    assert not [path for path in out.rglob("*") if path.is_file() and str(tmp_path).encode() in path.read_bytes()]
    assert export_command.main(["export_hf", f"--checkpoint={out}", f"--out={again}", "--check=0"]) == 0
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (again / name).read_bytes() == (folder / name).read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "imported", "again"}


def save_foreign_tokenizer(folder) -> None:
    """A word-level tokenizer of transformers, as no text of ours is cut."""
    from transformers import PreTrainedTokenizerFast

    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "Moving": 3}, "<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)


def test_a_model_with_a_tokenizer_of_its_own(folder, tmp_path, capsys):
    save_foreign_tokenizer(folder)
    out, again = tmp_path / "imported", tmp_path / "again"
    for _ in range(2):
        assert call(capsys, f"model={folder}", f"out={out}") == (0, [])
    assert load_model(out)[0].config.context == 256 + 8  # that of ours went with our tokenizer
    words = load_tokenizer(str(out / "tokenizer.json"))
    assert isinstance(words, HubTokenizer) and words.encode("Moving on") == [3, 0]
    for _ in range(2):
        assert export_command.main(["export_hf", f"--checkpoint={out}", f"--out={again}", "--check=0"]) == 0
    assert load_tokenizer(str(again)).encode("Moving on") == [3, 0]
    assert json.loads((again / "config.json").read_text())["eos_token_id"] == 2
    out = tmp_path / "second"
    assert call(capsys, f"model={again}", f"out={out}") == (0, [])
    assert load_meta(out)[0] == load_meta(tmp_path / "imported")[0]


def test_what_is_wrong_is_one_line(folder, tmp_path, capsys, monkeypatch):
    out, tokenizer = tmp_path / "out", tmp_path / "words.json"
    model = make_model(1)
    TOKENIZER.save(tokenizer)

    def fails(match: str, *arguments: str) -> None:
        code, lines = call(capsys, *arguments)
        assert code == 1 and len(lines) == 1 and lines[0].startswith("error: ") and match in lines[0], lines
        assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]

    fails("--model is needed")
    fails("--out is needed", f"model={folder}")
    fails("no-such", f"model={folder}", f"out={out}", "no-such=1")
    fails("style", f"model={folder}", f"out={out}", "style=sos")
    fails("no folder at nowhere, and a model of the hub is OWNER/NAME", "model=nowhere", f"out={out}")
    fails("no folder at", f"model={tmp_path / 'none'}", f"out={out}")
    fails("no tokenizer at", f"model={folder}", f"out={out}", f"tokenizer={tmp_path / 'none'}")
    fails("is no tokenizer.json", f"model={folder}", f"out={out}", f"tokenizer={folder / 'config.json'}")

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    fails("no import's, such as thesis.tex", f"model={folder}", f"out={tmp_path / 'mine'}")
    fails("is a file", f"model={folder}", f"out={tokenizer}")
    fails("Not a directory", f"model={folder}", f"out={tokenizer / 'below'}")
    meta = {"model": dataclasses.asdict(model.config), "style": "apr", "stage": "sft", "step": 0}
    save_model(tmp_path / "trained", model, meta)
    fails("no import's, such as 0", f"model={folder}", f"out={tmp_path / 'trained'}")
    assert same(load_model(tmp_path / "trained")[0], model)

    (folder / "tokenizer.json").unlink()
    fails("no tokenizer.json in", f"model={folder}", f"out={out}")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    fails("model.safetensors cannot be read", f"model={folder}", f"out={out}", f"tokenizer={tokenizer}")
    export_hf(make_model(1, vocabulary=len(TOKENIZER)), TOKENIZER, folder)
    large = tmp_path / "large.json"
    Tokenizer.build([], [], [f"word{i}" for i in range(300)]).save(large)
    fails(f"the model {len(TOKENIZER)}", f"model={folder}", f"out={out}", f"tokenizer={large}")
    assert not out.exists()


def test_the_hub_gives_safetensors_or_one_line(folder, tmp_path, capsys, monkeypatch):
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append((name, allow_patterns))
        if name != "someone/llama":
            raise huggingface_hub.errors.LocalEntryNotFoundError("Got: ConnectError: no network\nAn error happened")
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    out = tmp_path / "out"
    assert call(capsys, "model=someone/llama", f"out={out}") == (0, [])
    assert load_meta(out)[1]["source"] == "someone/llama"
    code, lines = call(capsys, "model=someone/else", f"out={out}")
    assert code == 1 and len(lines) == 1
    assert "no folder at someone/else, and the hub did not give a model of that name: Got: ConnectError" in lines[0]
    assert asked == [(name, ["*.safetensors", "*.json"]) for name in ("someone/llama", "someone/else")]
    assert load_meta(out)[1]["source"] == "someone/llama"  # what was there stays


def test_help(capsys):
    assert command.main(["import_hf", "--help"]) == 0
    assert "--model=" in capsys.readouterr().out
