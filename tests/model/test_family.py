"""Model families: finding them by name, errors, and Qwen3 as a user's own family in every use of a model."""

import asyncio
import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from apr_jax.errors import UserError
from apr_jax.export.hf import _logits, check_export, export_hf, greedy_agreement
from apr_jax.export.imported import HfFolderError, import_hf
from apr_jax.model.family import BUILT_IN, config_json, load_family, make_model, parameter_count, read_config
from apr_jax.model.flops import product_parameters
from apr_jax.model.llama import LlamaConfig
from apr_jax.rollout.engine import JaxEngine
from apr_jax.threads.engine import Sampling
from apr_jax.train.checkpoint import CheckpointError, load_meta, load_model, save_model
from apr_jax.train.step import data_mesh
from tests.model import qwen3
from tests.tiny import SIZES, TOKENIZER, log_softmax, plain_logits

QWEN3 = "tests.model.qwen3"


def tiny(**sizes):
    """A small random Qwen3. Its gains are not all 1: with equal gains a test could not notice two that are swapped."""
    model = make_model(qwen3.Qwen3Config(**{"vocab_size": len(TOKENIZER), "head_dim": 12} | SIZES | sizes), seed=1)
    rng = np.random.default_rng(0)
    for name in ("q_norm_LxH", "k_norm_LxH", "attention_norm_LxD"):
        gains = model.layers[name]
        gains[...] = jnp.asarray(rng.normal(1.0, 0.3, gains.shape), jnp.float32)
    return model


def same(a, b) -> bool:
    equal = jax.tree.map(lambda x, y: bool(np.array_equal(x, y)), *(nnx.to_pure_dict(nnx.state(m)) for m in (a, b)))
    return type(a) is type(b) and a.config == b.config and all(jax.tree.leaves(equal))


# ---------------------------------------------------------------------- finding a family


def test_families_are_found_by_name_or_module():
    assert [load_family(name).name for name in BUILT_IN] == [*BUILT_IN]
    assert load_family(QWEN3) is qwen3.FAMILY


OTHER_NAME = "from apr_jax.model.llama import FAMILY\n"  # a module whose family has another name than the module


@pytest.mark.parametrize(
    "name, part",
    [
        ("none", "none"), ("apr_jax.model.none", "apr_jax.model.none"), ("", "''"), ("a b", "'a b'"),
        (".relative", "'.relative'"), ("my.", "'my.'"), ("apr_jax.model.cache", "FAMILY"),
        ("apr_jax.model.llama", "'llama'"), ("other_name", "'llama'"),
    ],
)  # fmt: skip
def test_a_name_without_a_family_is_refused(tmp_path, monkeypatch, name, part):
    """The one-line message has the setting, the given name, the allowed names and the part at fault."""
    (tmp_path / "other_name.py").write_text(OTHER_NAME)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError) as caught:
        load_family(name)
    line = str(caught.value)
    assert line.startswith("family ") and repr(name) in line and part in line and "\n" not in line
    assert all(allowed in line for allowed in (*BUILT_IN, "package.module"))


def test_an_error_inside_a_family_is_raised_unchanged(tmp_path, monkeypatch):
    (tmp_path / "half_a_family.py").write_text("import no_such_package\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        load_family("half_a_family")


def test_a_config_comes_back_from_its_json_with_its_family():
    for config in (LlamaConfig(9), tiny().config):
        again = read_config(json.loads(json.dumps(config_json(config))))
        assert again == config and type(again) is type(config)
    with pytest.raises(UserError, match="family.*llama"):
        read_config(dataclasses.asdict(LlamaConfig(9)))
    with pytest.raises(UserError, match="family.*'none'"):
        read_config({"family": "none", "vocab_size": 9})


# ---------------------------------------------------------------------- Qwen3


def test_a_checkpoint_records_its_family(tmp_path):
    model = tiny()
    save_model(tmp_path / "own", model, {"model": config_json(model.config), "step": 1})
    assert same(load_model(tmp_path / "own")[0], model)
    save_model(tmp_path / "older", model, {"model": dataclasses.asdict(model.config), "step": 1})
    for read in (load_meta, load_model):
        with pytest.raises(CheckpointError, match="older/1.*family"):
            read(tmp_path / "older")


def test_parameters_of_a_family_are_counted():
    config = tiny().config
    D, F, L, H, V = config.width, config.hidden, config.layers, 12, config.vocab_size
    matrices = L * (2 * D * 4 * H + 2 * D * 2 * H + 3 * D * F)
    assert product_parameters(config) == matrices + D * V
    assert parameter_count(tiny())[1] == matrices + L * (2 * D + 2 * H) + D


@pytest.mark.parametrize("sizes", [{}, {"tie_embeddings": True, "kv_heads": 1, "head_dim": 6, "rope_theta": 500.0}])
def test_transformers_computes_the_same_from_an_export_and_an_import_restores_it(tmp_path, sizes):
    from transformers import AutoModelForCausalLM

    model = tiny(**sizes)
    export_hf(model, TOKENIZER, tmp_path / "hf")
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "hf")).__name__ == "Qwen3ForCausalLM"
    sequences = np.random.default_rng(0).integers(len(TOKENIZER), size=(3, 50)).tolist()
    assert check_export(model, TOKENIZER, tmp_path / "hf", [*sequences, [5]])["max_logit_difference"] < 1e-4
    prompts = [sequence[:12] for sequence in sequences]
    assert greedy_agreement(model, tmp_path / "hf", prompts, 12) == 3
    assert same(import_hf(tmp_path / "hf", QWEN3), model)
    with pytest.raises(HfFolderError, match='model_type.*"qwen3".*"llama"'):
        import_hf(tmp_path / "hf")
    with pytest.raises(HfFolderError, match="architectures.*Qwen3ForCausalLM"):
        import_hf(tmp_path / "hf", "llama")


def test_a_model_of_transformers_is_imported(tmp_path):
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    theirs = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=40,
            hidden_size=32,
            intermediate_size=72,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=10,
            max_position_embeddings=64,
        )  # fmt: skip
    ).eval()
    for name, weight in theirs.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(weight, 1.0, 0.2)
    theirs.save_pretrained(tmp_path)
    model = import_hf(tmp_path, QWEN3)
    assert (model.config.head_size, model.config.norm_epsilon, model.config.context) == (10, 1e-6, 64)
    tokens = np.random.default_rng(1).integers(40, size=(2, 30))
    with torch.inference_mode():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(_logits(*nnx.split(model), jnp.asarray(tokens)), expected, atol=1e-4)
    path = tmp_path / "config.json"
    content = json.loads(path.read_text())
    for key, value in (
        ("layer_types", ["full_attention", "sliding_attention"]),
        ("use_sliding_window", True), ("attention_bias", True), ("no_such_key", 1),
    ):  # fmt: skip
        path.write_text(json.dumps(content | {key: value}))
        with pytest.raises(HfFolderError, match=f"{key}.*{re.escape(json.dumps(value))}"):
            import_hf(tmp_path, QWEN3)


def test_a_decoded_sequence_has_the_log_probabilities_of_the_plain_forward():
    """Tokens are decoded from the key/value cache, by a sequence and by a fork of it."""
    model, prompt = tiny(), tuple(range(4, 24))
    engine = JaxEngine(model, data_mesh(1), slots=4, context=128, seed=3)

    async def decode():
        parent = engine.open(prompt, (0,))
        first = await engine.decode(parent, frozenset(), 20, Sampling(1.0))
        child = engine.fork(parent, 30, (0, 1))
        return first, await engine.decode(child, frozenset(), 20, Sampling(1.0))

    first, second = asyncio.run(decode())
    for before, found in ((prompt, first), ((*prompt, *first.ids)[:30], second)):
        logprobs = log_softmax(plain_logits(model, [*before, *found.ids]))
        right = logprobs[np.arange(len(before) - 1, len(before) + 19), list(found.ids)]
        np.testing.assert_allclose(found.logprobs, right, atol=1e-4)
