"""Tests of tools.import_hf: imports load and export again unchanged, and errors are one line."""

import json
import re

import huggingface_hub
import jax
import numpy as np
import pytest
import tokenizers
from flax import nnx

from apr_jax.export.hf import export_hf
from apr_jax.model.family import config_json
from apr_jax.tasks.countdown import trace
from apr_jax.text.hub import HubTokenizer, load_tokenizer
from apr_jax.text.tokenizer import Tokenizer
from apr_jax.train.checkpoint import load_meta, load_model, save_model
from tests.tiny import TOKENIZER, make_model
from tools import export_hf as export_command
from tools import import_hf as command


def call(capsys, *arguments) -> tuple[int, list[str]]:
    """Run tools.import_hf. Return the exit code and the lines on stderr."""
    capsys.readouterr()
    code = command.main(["import_hf", *(f"--{argument}" for argument in arguments)])
    return code, capsys.readouterr().err.splitlines()


@pytest.fixture
def folder(tmp_path):
    export_hf(make_model(1), TOKENIZER, tmp_path / "hf")
    return tmp_path / "hf"


def same(a, b) -> bool:
    """Return whether two models have equal configs and weights."""
    equal = jax.tree.map(lambda x, y: bool(np.array_equal(x, y)), nnx.state(a), nnx.state(b))
    return a.config == b.config and all(jax.tree.leaves(equal))


def test_an_export_of_ours_contains_what_it_was_trained_on(tmp_path, capsys):
    trained = {"task": "factors", "task_settings": {"largest": 40}, "variant": "inherit", "condition": "few "}
    stored = {**trained, "family": "llama", "window": 96}
    export_hf(make_model(1), TOKENIZER, tmp_path / "hf", {**trained, "step": 3, "config": {"window": 96}})
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["apr_jax"] == stored
    assert "`factors`" in (tmp_path / "hf" / "README.md").read_text()
    assert call(capsys, f"model={tmp_path}/hf", f"out={tmp_path}/imported") == (0, [])
    assert load_model(tmp_path / "imported")[1].items() >= {**trained, "window": 96}.items()
    again = ["export_hf", f"--checkpoint={tmp_path}/imported", f"--out={tmp_path}/again", "--check=0"]
    assert export_command.main(again) == 0
    assert json.loads((tmp_path / "again" / "config.json").read_text())["apr_jax"] == stored


def test_an_imported_export_is_exported_again_unchanged(folder, tmp_path, capsys):
    out, again = tmp_path / "imported", tmp_path / "again"
    for _ in range(2):  # the second import replaces the first
        assert call(capsys, f"model={folder}", f"out={out}") == (0, [])
    model, meta = load_model(out)
    assert same(model, make_model(1))
    assert (meta["stage"], meta["step"], meta["source"]) == ("imported", 0, "hf") and "task" not in meta
    assert Tokenizer.load(out / "tokenizer.json").encode("3+4") == TOKENIZER.encode("3+4")
    assert not [path for path in out.rglob("*") if path.is_file() and str(tmp_path).encode() in path.read_bytes()]
    assert export_command.main(["export_hf", f"--checkpoint={out}", f"--out={again}", "--check=0"]) == 0
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (again / name).read_bytes() == (folder / name).read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "imported", "again"}


def save_foreign_tokenizer(folder) -> None:
    """Save a word-level tokenizer of transformers, which splits text differently from ours."""
    from transformers import PreTrainedTokenizerFast

    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "Moving": 3}, "<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)


def test_a_model_with_a_foreign_tokenizer_keeps_it(folder, tmp_path, capsys):
    save_foreign_tokenizer(folder)
    out, again = tmp_path / "imported", tmp_path / "again"
    for _ in range(2):
        assert call(capsys, f"model={folder}", f"out={out}") == (0, [])
    assert load_model(out)[0].config.context == 256 + 8  # not marked as our export: the spare positions count
    tokenizer = load_tokenizer(str(out / "tokenizer.json"))
    assert isinstance(tokenizer, HubTokenizer) and tokenizer.encode("Moving on") == [3, 0]
    for _ in range(2):
        assert export_command.main(["export_hf", f"--checkpoint={out}", f"--out={again}", "--check=0"]) == 0
    assert load_tokenizer(str(again)).encode("Moving on") == [3, 0]
    assert json.loads((again / "config.json").read_text())["eos_token_id"] == 2
    out = tmp_path / "second"
    assert call(capsys, f"model={again}", f"out={out}") == (0, [])
    assert load_meta(out)[0] == load_meta(tmp_path / "imported")[0]


def test_errors_are_one_line(folder, tmp_path, capsys, monkeypatch):
    out, tokenizer = tmp_path / "out", tmp_path / "own.json"
    model = make_model(1)
    TOKENIZER.save(tokenizer)

    def fails(match: str, *arguments: str) -> None:
        code, lines = call(capsys, *arguments)
        assert code == 1 and len(lines) == 1 and lines[0].startswith("error: ") and re.search(match, lines[0]), lines
        assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]

    fails("--model ")
    fails("--out ", f"model={folder}")
    fails("no-such", f"model={folder}", f"out={out}", "no-such=1")
    fails("--variant .*--task", f"model={folder}", f"out={out}", "variant=apr")
    fails("countdown .*apr, sos_plus.*'sos'", f"model={folder}", f"out={out}", "task=countdown", "variant=sos")
    fails("nowhere.*OWNER/NAME", "model=nowhere", f"out={out}")
    fails(f"{tmp_path}/none", f"model={tmp_path / 'none'}", f"out={out}")
    fails(f"tokenizer .*{tmp_path}/none", f"model={folder}", f"out={out}", f"tokenizer={tmp_path / 'none'}")
    fails("config.json .*tokenizer.json", f"model={folder}", f"out={out}", f"tokenizer={folder / 'config.json'}")

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    fails("thesis.tex", f"model={folder}", f"out={tmp_path / 'mine'}")
    fails(f"{tokenizer} is a file", f"model={folder}", f"out={tokenizer}")
    fails("Not a directory", f"model={folder}", f"out={tokenizer / 'below'}")
    meta = {"model": config_json(model.config), "variant": "apr", "stage": "sft", "step": 0}
    save_model(tmp_path / "trained", model, meta)
    fails(" 0: ", f"model={folder}", f"out={tmp_path / 'trained'}")
    assert same(load_model(tmp_path / "trained")[0], model)

    (folder / "tokenizer.json").unlink()
    fails(f"tokenizer.json .*{folder}", f"model={folder}", f"out={out}")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    fails(f"{weights} ", f"model={folder}", f"out={out}", f"tokenizer={tokenizer}")
    export_hf(make_model(1, vocab_size=len(TOKENIZER)), TOKENIZER, folder)
    large = tmp_path / "large.json"
    Tokenizer.build([], [], [f"word{i}" for i in range(300)]).save(large)
    fails(f"the model {len(TOKENIZER)}", f"model={folder}", f"out={out}", f"tokenizer={large}")
    assert not out.exists()


def test_safetensors_are_downloaded_from_the_hub_and_errors_are_one_line(folder, tmp_path, capsys, monkeypatch):
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
    assert "someone/else" in lines[0] and "Got: ConnectError" in lines[0]
    assert asked == [(name, ["*.safetensors", "*.json"]) for name in ("someone/llama", "someone/else")]
    assert load_meta(out)[1]["source"] == "someone/llama"  # a failure leaves the earlier import


def test_help(capsys):
    assert command.main(["import_hf", "--help"]) == 0
    assert "--model=" in capsys.readouterr().out


# ---------------------------------------------------------------------- foreign models


def save_foreign_model(folder, rows: int = 60, positions: int = 128, **config) -> None:
    """Save a random Llama of transformers, with the word-level tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": rows, "hidden_size": 32, "intermediate_size": 72, "num_hidden_layers": 2,
             "num_attention_heads": 4, "max_position_embeddings": positions}  # fmt: skip
    LlamaForCausalLM(LlamaConfig(**sizes | config)).save_pretrained(folder)
    save_foreign_tokenizer(folder)


def export(capsys, *arguments) -> tuple[int, str, list[str]]:
    """Run tools.export_hf. Return the exit code, the text on stdout, and the lines of errors on stderr."""
    capsys.readouterr()
    code = export_command.main(["export_hf", *(f"--{argument}" for argument in arguments)])
    out, err = capsys.readouterr()
    return code, out, [line for line in err.splitlines() if line.startswith("error: ")]


def read(path) -> dict:
    return json.loads(path.read_text())


def test_a_foreign_model_is_exported_again_unchanged(tmp_path, capsys):
    """Positions, ends and the tokenizer's length are kept. Logits are compared, trees are not."""
    theirs, out, again = (tmp_path / name for name in ("theirs", "imported", "again"))
    save_foreign_model(theirs, eos_token_id=[2, 3], bos_token_id=1)
    length = read(theirs / "tokenizer_config.json").get("model_max_length")
    for source in (theirs, again):  # the second import is of our own export
        assert call(capsys, f"model={source}", f"out={out}") == (0, [])
        assert load_model(out)[0].config.context == 128
        code, printed, errors = export(capsys, f"checkpoint={out}", f"out={again}", "check=2")
        assert (code, errors) == (0, [])
        assert re.search("logit.* 2 sequences", printed) and re.search("trees .*no task", printed)
        config = read(again / "config.json")
        assert config["max_position_embeddings"] == 128
        assert config["eos_token_id"] == read(again / "generation_config.json")["eos_token_id"] == [2, 3]
        assert read(again / "tokenizer_config.json").get("model_max_length") == length
    card = (again / "README.md").read_text()
    assert "Countdown" not in card and "countdown" not in card


def test_the_check_of_trees_needs_the_tasks_tokens(tmp_path, capsys):
    theirs, out, again = (tmp_path / name for name in ("theirs", "imported", "again"))
    save_foreign_model(theirs)
    assert call(capsys, f"model={theirs}", f"out={out}", "task=countdown") == (0, [])
    code, printed, errors = export(capsys, f"checkpoint={out}", f"out={again}", "check=1")
    assert (code, errors) == (0, [])
    assert re.search(r"trees .*'<Calling Sub Searches>\\n'", printed)


def test_a_foreign_model_without_a_number_of_positions_has_the_default_of_transformers(tmp_path, capsys):
    theirs, out, again = (tmp_path / name for name in ("theirs", "imported", "again"))
    save_foreign_model(theirs)
    config = read(theirs / "config.json")
    del config["max_position_embeddings"]
    (theirs / "config.json").write_text(json.dumps(config))
    assert call(capsys, f"model={theirs}", f"out={out}") == (0, [])
    assert export(capsys, f"checkpoint={out}", f"out={again}", "check=0")[0] == 0
    assert load_model(out)[0].config.context == read(again / "config.json")["max_position_embeddings"] == 2048


def test_trees_are_compared_if_a_foreign_tokenizer_has_the_tasks_tokens(tmp_path, capsys):
    from transformers import AutoTokenizer

    theirs, out, again = (tmp_path / name for name in ("theirs", "imported", "again"))
    save_foreign_model(theirs)
    tokenizer = AutoTokenizer.from_pretrained(theirs)
    texts = [trace.SPAWN_OPEN, trace.SPAWN_CLOSE, trace.JOIN_OPEN]
    tokenizer.add_special_tokens({"additional_special_tokens": texts})
    tokenizer.save_pretrained(theirs)
    assert call(capsys, f"model={theirs}", f"out={out}", "task=countdown", "variant=sos_plus") == (0, [])
    code, printed, errors = export(capsys, f"checkpoint={out}", f"out={again}", "check=2", "window=64")
    assert (code, errors) == (0, []) and re.search("trees .*2 of 2", printed)


def test_a_second_end_token_of_generation_config_is_kept(folder, tmp_path, capsys):
    """transformers reads ends from generation_config.json first. They are kept with our own tokenizer, too."""
    out, again = tmp_path / "imported", tmp_path / "again"
    ends = [TOKENIZER.eos, TOKENIZER.token("7")]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    for _ in range(2):
        assert call(capsys, f"model={folder}", f"out={out}", "task=countdown") == (0, [])
    assert load_tokenizer(str(out / "tokenizer.json")).ends == set(ends)
    code, printed, errors = export(capsys, f"checkpoint={out}", f"out={again}", "check=1", "window=64")
    assert (code, errors) == (0, []) and "1 of 1" in printed
    assert read(again / "config.json")["eos_token_id"] == ends
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 9999]}')
    code, (line,) = call(capsys, f"model={folder}", f"out={tmp_path / 'other'}")
    assert code == 1 and re.search("generation_config.json.*eos_token_id.*9999", line)


@pytest.mark.parametrize("changes", [{"model_type": "mistral"}, {"sliding_window": 8}, {"logits_scaling": 2.0}])
def test_a_config_that_is_not_a_llamas_is_refused_by_key_and_value(folder, tmp_path, capsys, changes):
    path = folder / "config.json"
    path.write_text(json.dumps(read(path) | changes))
    code, (line,) = call(capsys, f"model={folder}", f"out={tmp_path / 'out'}")
    ((key, value),) = changes.items()
    assert code == 1 and re.search(f"config.json.*{key} .*{re.escape(json.dumps(value))}", line)
    assert not (tmp_path / "out").exists()
