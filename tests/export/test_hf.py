"""Tests of the export: logits, tokens and greedy trees equal transformers', and a failed export leaves no trace."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from apr_jax.export import hf
from apr_jax.export.hf import ExportError, check_export, check_trees, export_hf, greedy_agreement
from apr_jax.model.family import config_json
from apr_jax.model.llama import Llama, LlamaConfig
from apr_jax.tasks.countdown import trace
from apr_jax.tasks.countdown.problem import Problem
from apr_jax.tasks.countdown.protocol import CountdownProtocol, CountdownSpawn
from apr_jax.tasks.countdown.vocabulary import countdown_tokenizer
from apr_jax.threads.run import Budget
from apr_jax.train.checkpoint import Checkpoints, save_model
from tools import export_hf as command

TOKENIZER = countdown_tokenizer(99)
PROBLEMS = [Problem((3, 5, 7, 2), 20), Problem((10, 4, 9, 1), 31), Problem((6, 6, 8), 12)]
TRACE = (
    "Moving to Node #0\nCurrent State: 20:[3, 5, 7, 2], Operations: []\n"
    "Exploring Operation: 3+5=8, Resulting Numbers: [7, 2, 8]\n"
    "Generated Node #0,0: 20:[7, 2, 8] Operation: 3+5=8\n<Calling Sub Searches>\n"
    "<Start Sub Search 0 at level 1> Moving to Node #0,0\n<End Calling Sub Searches>\n"
)


def tiny(seed: int = 3, **sizes) -> Llama:
    return Llama(LlamaConfig(len(TOKENIZER), **{"width": 32, "layers": 2, "context": 128} | sizes), rngs=nnx.Rngs(seed))


@pytest.fixture(scope="module")
def model() -> Llama:
    return tiny()


META = {"task": "countdown", "variant": "apr", "step": 12, "config": {"seed": 7}}


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "hf"
    export_hf(model, TOKENIZER, folder, META)
    return folder


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"tie_embeddings": True},
        {"kv_heads": 2, "feed_forward": 80},
        {"heads": 2, "kv_heads": 1, "layers": 1, "rope_theta": 500.0, "norm_epsilon": 1e-2, "tie_embeddings": True},
    ],
)
def test_logits_are_equal_to_those_of_transformers(sizes, tmp_path):
    model = tiny(**sizes)
    export_hf(model, TOKENIZER, tmp_path / "hf")
    sequences = np.random.default_rng(0).integers(len(TOKENIZER), size=(3, 50)).tolist()
    check = check_export(model, TOKENIZER, tmp_path / "hf", [*sequences, [5]])
    assert check["sequences"] == 4 and check["max_logit_difference"] < 1e-4


def test_a_bfloat16_export_has_the_rounded_weights(model, tmp_path):
    export_hf(model, TOKENIZER, tmp_path / "hf", dtype="bfloat16")
    small = (tmp_path / "hf" / "model.safetensors").stat().st_size
    assert small < 0.7 * 4 * sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert check_export(model, TOKENIZER, tmp_path / "hf", [list(range(40))])["max_logit_difference"] < 1e-4


def test_the_check_notices_wrong_weights(model, folder):
    other = tiny()
    other.layers["q_LxDxNxH"][...] = other.layers["q_LxDxNxH"][...][..., ::-1]
    assert check_export(other, TOKENIZER, folder, [list(range(40))])["max_logit_difference"] > 1e-2


def test_config_json_and_the_card_describe_the_model(model, folder):
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    assert (config.vocab_size, config.max_position_embeddings) == (len(TOKENIZER), 128 + 8)
    assert (config.head_dim, config.num_key_value_heads, config.tie_word_embeddings) == (8, 4, False)
    special = (TOKENIZER.bos, TOKENIZER.eos, TOKENIZER.pad)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == special
    assert config.rope_parameters["rope_theta"] == json.loads((folder / "config.json").read_text())["rope_theta"] == 1e4
    card = (folder / "README.md").read_text()
    assert "| step | 12 |" in card and '"seed": 7' in card


def test_transformers_tokenizer_gives_the_same_ids_and_text(folder):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder)
    for text in (TRACE, CountdownProtocol().root_prompt(PROBLEMS[0]), "123 <s> </s> 's , . n't  é\n", ""):
        ids = TOKENIZER.encode(text)
        assert theirs(text).input_ids == ids
        assert theirs.decode(ids, skip_special_tokens=True) == TOKENIZER.decode(ids)
    assert theirs.decode([TOKENIZER.bos, *TOKENIZER.encode(TRACE), TOKENIZER.eos]) == f"<s>{TRACE}</s>"


def test_greedy_text_and_trees_are_equal_to_those_of_transformers(model, folder):
    prompts = [[TOKENIZER.bos, *TOKENIZER.encode(CountdownProtocol().root_prompt(problem))] for problem in PROBLEMS]
    assert greedy_agreement(model, folder, prompts, 24) == 3
    with pytest.raises(ValueError, match="128"):
        greedy_agreement(model, folder, prompts, 120)
    protocol = CountdownProtocol()
    assert check_trees(model, TOKENIZER, folder, protocol, PROBLEMS, Budget(context=128)) == (3, 3)
    other = tiny(seed=4)
    assert check_trees(other, TOKENIZER, folder, protocol, PROBLEMS[:1], Budget(context=64)) == (0, 1)


class EagerProtocol(CountdownProtocol):
    """A protocol that gives every spawn the same two children, whatever its text."""

    def parse_spawn(self, text):
        children = (self.root_prompt(PROBLEMS[1]), self.root_prompt(PROBLEMS[2]))
        return CountdownSpawn(children, text.rfind(self.spawn_open), ("0", "0"), (1, 1))

    def join(self, spawn, results):
        return self.join_open + "<End Sub Searches>\n"


def test_trees_with_spawns_and_joins_are_equal_to_those_of_transformers(tmp_path, monkeypatch):
    # With layers that write almost nothing, a token's embedding alone picks the next token: ] -> spawn -> end of spawn.
    spawner = tiny()
    for name in ("o_LxNxHxD", "down_LxFxD"):
        spawner.layers[name][...] = 0.01 * spawner.layers[name][...]
    prompt = TOKENIZER.encode(CountdownProtocol().root_prompt(PROBLEMS[0]))
    chain = [prompt[-1], *map(TOKENIZER.token, (trace.SPAWN_OPEN, trace.SPAWN_CLOSE))]
    for before, after in zip(chain, chain[1:]):
        spawner.head_DxV[...] = spawner.head_DxV[...].at[:, after].set(spawner.embed_VxD[...][before])
    export_hf(spawner, TOKENIZER, tmp_path / "hf")
    roots, decode = [], hf._greedy_trees
    monkeypatch.setattr(hf, "_greedy_trees", lambda *of: roots.append(decode(*of)) or roots[-1])
    budget = Budget(context=128, threads=8)
    assert check_trees(spawner, TOKENIZER, tmp_path / "hf", EagerProtocol(), PROBLEMS[:2], budget) == (2, 2)
    assert all(len(root.children) >= 2 for both in roots for root in both)


def test_a_parameter_without_a_rule_is_refused(tmp_path):
    model = tiny(layers=1)
    model.bias_D = nnx.Param(jnp.zeros(32))
    with pytest.raises(ExportError, match="bias_D"):
        export_hf(model, TOKENIZER, tmp_path / "hf")
    assert not list(tmp_path.iterdir())


def test_bad_models_and_folders_are_refused_by_name(model, tmp_path):
    broken = tiny(layers=1)
    broken.norm_D[...] = jnp.full(32, jnp.nan)
    with pytest.raises(ExportError, match="norm_D"):
        export_hf(broken, TOKENIZER, tmp_path / "hf")
    with pytest.raises(ExportError, match=f"{len(countdown_tokenizer(200))} tokens"):
        export_hf(model, countdown_tokenizer(200), tmp_path / "hf")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(ExportError, match="thesis.tex"):
        export_hf(model, TOKENIZER, tmp_path / "mine")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    (tmp_path / "loop").symlink_to("loop")
    for folder in (Path("/"), tmp_path / "loop"):
        with pytest.raises(ExportError, match=f"export to {folder} "):
            export_hf(model, TOKENIZER, folder)


def test_an_export_into_a_saved_step_is_refused(model, tmp_path):
    save_model(tmp_path, model, {"model": config_json(model.config), "step": 3})
    before = sorted(tmp_path.rglob("*"))
    for folder in (tmp_path / "3" / "hf", tmp_path / "3" / "state" / "hf"):
        with pytest.raises(ExportError, match="saved step"):
            export_hf(model, TOKENIZER, folder)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_failed_export_leaves_the_old_one(model, tmp_path, monkeypatch):
    export_hf(model, TOKENIZER, tmp_path / "hf")
    before = {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()}

    def full(*_, **__):
        raise hf.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(hf, "save_file", full)
        with pytest.raises(ExportError, match="No space left"):
            export_hf(tiny(layers=1), TOKENIZER, tmp_path / "hf")
    assert {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]

    (tmp_path / "hf").rename(tmp_path / ".hf.old")  # as after a kill between the renames: restored, then replaced
    export_hf(tiny(layers=1), TOKENIZER, tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["num_hidden_layers"] == 1


def call(capsys, *arguments) -> tuple[int, list[str]]:
    """Return the command's exit code and its lines on stderr."""
    code = command.main(["export_hf", *(f"--{argument}" for argument in arguments)])
    return code, capsys.readouterr().err.splitlines()


def test_the_command_exports_a_checkpoint_and_refuses_wrong_flags_in_one_line(model, tmp_path, capsys):
    steps = Checkpoints(tmp_path / "run" / "sft_apr" / "checkpoints")
    meta = {"model": config_json(model.config), "task": "countdown", "variant": "apr", "step": 3}
    steps.save(3, {"weights": nnx.to_pure_dict(nnx.state(model, nnx.Param))}, meta)
    steps.close()
    step, out = tmp_path / "run" / "sft_apr" / "checkpoints" / "3", tmp_path / "out"
    file = tmp_path / "file"
    file.write_text("{}")

    def fails(match: str, *arguments: str) -> None:
        code, lines = call(capsys, *arguments)
        assert code == 1 and len(lines) == 1 and match in lines[0], lines

    fails("--checkpoint")
    fails("--out", f"checkpoint={step}")
    fails(str(tmp_path / "none"), f"checkpoint={tmp_path / 'none'}", f"out={out}")
    fails("tokenizer.json", f"checkpoint={step}", f"out={out}")
    fails(str(file), f"checkpoint={step}", f"out={out}", f"tokenizer={file}")
    fails(str(tmp_path / "none"), f"checkpoint={step}", f"out={out}", f"tokenizer={tmp_path / 'none'}")
    (tmp_path / "run" / "data").mkdir()
    TOKENIZER.save(tmp_path / "run" / "data" / "tokenizer.json")
    fails(str(file), f"checkpoint={step}", f"out={file}")
    fails(str(file / "below"), f"checkpoint={step}", f"out={file / 'below'}")
    fails("dtype", f"checkpoint={step}", f"out={out}", "dtype=int8")
    fails("no-such", f"checkpoint={step}", f"out={out}", "no-such=1")
    (tmp_path / "broken" / "state").mkdir(parents=True)
    tokenizer = tmp_path / "run" / "data" / "tokenizer.json"
    fails("broken", f"checkpoint={tmp_path / 'broken'}", f"out={out}", f"tokenizer={tokenizer}")
    assert not out.exists()

    assert command.main(["export_hf", f"--checkpoint={step.parent}", f"--out={out}", "--check=2", "--window=96"]) == 0
    assert "2 of 2" in capsys.readouterr().out
    assert command.main(["export_hf", "--help"]) == 0
    assert "--checkpoint" in capsys.readouterr().out
