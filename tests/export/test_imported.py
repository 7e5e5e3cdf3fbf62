"""Tests of the import: exports are restored bit for bit, transformers' models compute the same, others are refused."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from apr_jax.export.hf import _logits, export_hf, load_transformers
from apr_jax.export.imported import HfFolderError, import_hf
from apr_jax.model.llama import Llama, LlamaConfig
from apr_jax.tasks.countdown.vocabulary import countdown_tokenizer

TOKENIZER = countdown_tokenizer(9)
SMALL = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 72, "num_hidden_layers": 2,
         "num_attention_heads": 4, "max_position_embeddings": 64}  # fmt: skip


def tiny(**sizes) -> Llama:
    sizes = {"width": 32, "layers": 2, "heads": 4, "context": 128} | sizes
    return Llama(LlamaConfig(len(TOKENIZER) + 3, **sizes), rngs=nnx.Rngs(5))


def same(a: Llama, b: Llama) -> bool:
    """Whether config, structure and every bit agree."""
    (one, ours), (two, theirs) = nnx.split(a), nnx.split(b)
    equal = jax.tree.map(lambda x, y: x.dtype == y.dtype and bool(np.array_equal(x, y)), ours, theirs)
    return a.config == b.config and one == two and all(jax.tree.leaves(equal))


def save_transformers(folder, seed: int = 0, **config):
    """Save a randomly initialised Llama with transformers, and return it."""
    import torch
    from transformers import LlamaForCausalLM
    from transformers import LlamaConfig as TheirConfig  # isort: skip

    torch.manual_seed(seed)
    model = LlamaForCausalLM(TheirConfig(**SMALL | config)).eval()
    for name, weight in model.named_parameters():
        if "norm" in name:  # norms of ones would hide a norm that is read into the wrong place
            torch.nn.init.normal_(weight, 1.0, 0.2)
    model.save_pretrained(folder)
    return model


@pytest.fixture
def folder(tmp_path):
    """An export that tests may damage."""
    export_hf(tiny(), TOKENIZER, tmp_path / "hf")
    return tmp_path / "hf"


def change_config(folder, **changes) -> None:
    path = folder / "config.json"
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value != "absent"}))


def change_weights(folder, change) -> None:
    arrays = load_file(folder / "model.safetensors")
    change(arrays)
    save_file(arrays, folder / "model.safetensors")


def refusal(folder) -> str:
    """Return the one line with which the import refuses a folder."""
    with pytest.raises(HfFolderError) as caught:
        import_hf(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------------- imports that work


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"tie_embeddings": True, "kv_heads": 2},
        {"kv_heads": 1, "layers": 1, "feed_forward": 80, "rope_theta": 500.0, "norm_epsilon": 1e-2},
    ],
)
def test_an_export_comes_back_bit_for_bit(sizes, tmp_path):
    model = tiny(**sizes)
    export_hf(model, TOKENIZER, tmp_path / "hf")
    assert same(import_hf(tmp_path / "hf"), model)


def test_a_bfloat16_export_comes_back_rounded(tmp_path):
    model = tiny(kv_heads=2)
    export_hf(model, TOKENIZER, tmp_path / "hf", dtype="bfloat16")
    graphdef, weights = nnx.split(model)
    rounded = jax.tree.map(lambda value: value.astype(jnp.bfloat16).astype(jnp.float32), weights)
    assert same(import_hf(tmp_path / "hf"), nnx.merge(graphdef, rounded))


def test_an_export_in_shards_comes_back_whole(tmp_path):
    model = tiny(tie_embeddings=True)
    export_hf(model, TOKENIZER, tmp_path / "hf", shard_bytes=20_000)
    files = sorted(path.name for path in (tmp_path / "hf").glob("*.safetensors"))
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert set(index["weight_map"].values()) == set(files)
    weights = [load_file(tmp_path / "hf" / file) for file in files]
    assert all(sum(array.nbytes for array in one.values()) <= 20_000 or len(one) == 1 for one in weights)
    assert index["metadata"]["total_size"] == sum(array.nbytes for one in weights for array in one.values())
    assert same(import_hf(tmp_path / "hf"), model)
    theirs = load_transformers(tmp_path / "hf").get_input_embeddings().weight.detach().numpy()
    assert np.array_equal(theirs, model.embed_VxD[...])

    export_hf(model, TOKENIZER, tmp_path / "hf")  # replaces the shards
    assert [path.name for path in (tmp_path / "hf").glob("*.safetensors*")] == ["model.safetensors"]
    export_hf(model, TOKENIZER, tmp_path / "hf", shard_bytes=20_000)
    assert same(import_hf(tmp_path / "hf"), model)


@pytest.mark.parametrize("theirs", [{}, {"num_key_value_heads": 2, "tie_word_embeddings": True, "rms_norm_eps": 0.01}])
def test_an_imported_model_has_the_logits_of_transformers(theirs, tmp_path):
    import torch

    saved = save_transformers(tmp_path, **theirs)
    model = import_hf(tmp_path)
    assert model.config.context == 64 and model.config.hidden == 72
    tokens = np.random.default_rng(1).integers(40, size=(2, 30))
    with torch.inference_mode():
        expected = saved(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(_logits(*nnx.split(model), jnp.asarray(tokens)), expected, atol=1e-4)


def test_what_older_versions_wrote(folder):
    """rope_theta alone, no head_dim, tables of angles, float16 and float64, a head saved beside the embedding."""
    change_config(folder, rope_parameters="absent", rope_scaling=None, rope_theta=500, head_dim="absent",
                  num_key_value_heads="absent", mlp_bias="absent", tie_word_embeddings=True)  # fmt: skip

    def older(arrays):
        for l in range(2):
            arrays[f"model.layers.{l}.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
        arrays["model.norm.weight"] = arrays["model.norm.weight"].astype(np.float16)
        arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"].astype(np.float64)

    change_weights(folder, older)
    model = import_hf(folder)
    assert model.config.rope_theta == 500.0 and model.head_DxV is None
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(nnx.state(model)))
    change_weights(folder, lambda arrays: arrays.update({"lm_head.weight": arrays["lm_head.weight"] + 1}))
    assert "lm_head.weight" in refusal(folder)


def test_without_our_tokenizer_config_the_context_is_the_number_of_positions(folder):
    (folder / "tokenizer_config.json").unlink()
    assert import_hf(folder).config.context == 128 + 8


@pytest.mark.slow
def test_a_checkpoint_in_the_authors_shape(tmp_path):
    saved = save_transformers(
        tmp_path, vocab_size=32_000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=18,
        num_attention_heads=16, max_position_embeddings=4096,
    )  # fmt: skip
    model = import_hf(tmp_path)
    assert (model.config.layers, model.config.context) == (18, 4096)
    q = saved.model.layers[17].self_attn.q_proj.weight.detach().numpy()
    assert np.array_equal(np.asarray(model.layers["q_LxDxNxH"][17]).reshape(1024, 1024).T, q)
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model))) == saved.num_parameters()


# ---------------------------------------------------------------------- folders that are refused


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"architectures": ["MistralForCausalLM"]}, 'architectures is ["MistralForCausalLM"]'),
        ({"architectures": "absent"}, "architectures is null"),
        ({"hidden_act": "gelu"}, 'hidden_act is "gelu"'),
        ({"attention_bias": True}, "attention_bias is true"),
        ({"mlp_bias": True}, "mlp_bias is true"),
        ({"quantization_config": {"bits": 4}}, 'quantization_config is {"bits": 4}'),
        ({"head_dim": 16}, "head_dim is 16"),
        ({"hidden_size": "absent"}, "hidden_size is null"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_hidden_layers": True}, "num_hidden_layers is true"),
        ({"vocab_size": 12.5}, "vocab_size is 12.5"),
        ({"rms_norm_eps": "small"}, 'rms_norm_eps is "small"'),
        ({"num_key_value_heads": 3}, "kv_heads (3)"),
        ({"num_attention_heads": 5, "head_dim": "absent"}, "5 heads"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling is "),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, 'rope_parameters is {"rope_type": "llama3"'),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters is {"),
        ({"rope_parameters": "linear"}, 'rope_parameters is "linear"'),
        ({"rope_theta": 5e5}, "rope_theta is 500000.0"),
        ({"rope_theta": -1, "rope_parameters": None}, "rope_theta is -1"),
        ({"rope_scaling": "default"}, 'rope_scaling is "default"'),
        ({"rope_scaling": {"rope_type": ["default"]}}, 'rope_scaling is {"rope_type": ["default"]}'),
        ({"rope_scaling": {"rope_type": "default", "type": "linear"}}, '"type": "linear"}'),
        ({"rope_scaling": {"factor": 2.0}}, "rope_scaling.factor is 2.0"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 5.0}}}, "rope_parameters.full_attention is {"),
        ({"rope_scaling": {"rope_theta": 9.0}, "rope_theta": None}, 'rope_scaling is {"rope_theta": 9.0}'),
        ({"model_type": "mistral"}, 'model_type is "mistral"'),
        ({"model_type": ""}, 'model_type is ""'),
        ({"model_type": ["llama"]}, 'model_type is ["llama"]'),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1"),
        ({"is_causal": False}, "is_causal is false"),
        ({"rope_interleaved": True}, "rope_interleaved is true"),
        ({"pruned_heads": {"0": [1]}}, 'pruned_heads is {"0": [1]}'),
        ({"sliding_window": 8}, "sliding_window is 8"),
        ({"layer_types": ["sliding_attention"] * 2}, 'layer_types is ["sliding_attention", "sliding_attention"]'),
        ({"attention_multiplier": 0.5}, "attention_multiplier is 0.5"),
        ({"logits_scaling": 2.0}, "logits_scaling is 2.0"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
        ({"per_layer_config": {"0": {"rms_norm_eps": 1.0}}}, 'per_layer_config is {"0": {"rms_norm_eps": 1.0}}'),
        ({"auto_map": {"AutoModelForCausalLM": "mine.Llama"}}, "auto_map is "),
        ({"no_such_key": 0}, "no_such_key is 0"),
    ],
)
def test_a_config_that_computes_something_else_is_refused(folder, changes, says):
    change_config(folder, **changes)
    line = refusal(folder)
    assert says in line and "config.json: " in line


def test_keys_that_do_not_change_the_logits_are_accepted(folder):
    """These are keys of generation, storage and origin, keys with the value null, and a missing model_type."""
    before = import_hf(folder)
    change_config(folder, _name_or_path="someone/llama", max_sequence_length=128, temperature=0.7, top_p=0.9,
                  use_cache=False, pretraining_tp=2, sliding_window=None, layer_types=None, attention_dropout=0.0,
                  model_type="absent", torch_dtype="float16", transformers_version="4.30.0", eos_token_id=[2, 5],
                  rope_scaling=None, partial_rotary_factor=1.0)  # fmt: skip
    assert same(import_hf(folder), before)


def test_an_adapter_is_refused(folder):
    (folder / "adapter_config.json").write_text("{}")
    assert "adapter_config.json" in refusal(folder)


FAMILIES = {
    "mistral": {"sliding_window": 8}, "mistral without a window": {"sliding_window": None}, "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8}, "granite": {"attention_multiplier": 0.5, "logits_scaling": 2.0}, "qwen2": {},
    "qwen3": {"head_dim": 8}, "olmo": {}, "olmo2": {}, "phi3": {"pad_token_id": 0}, "stablelm": {}, "cohere": {},
    "starcoder2": {}, "smollm3": {"pad_token_id": 0}, "glm": {"head_dim": 8, "pad_token_id": 0},
    "helium": {"head_dim": 8}, "llama": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
    "llama with its defaults": {},
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("model_type", ["own", "absent", "llama"])
def test_a_model_that_is_accepted_has_the_logits_of_transformers(family, model_type, tmp_path):
    """A model of another family whose config names Llama is refused, or has transformers' logits with a cache."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

    kind = family.split()[0]
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SMALL | {"num_key_value_heads": 2} | FAMILIES[family])
    saved = AutoModelForCausalLM.from_config(config).eval()
    saved.save_pretrained(tmp_path)
    changes = {"architectures": ["LlamaForCausalLM"]}
    change_config(tmp_path, **changes if model_type == "own" else changes | {"model_type": model_type})
    # These have only a Llama's keys and tensors. Without their own model_type, transformers loads them as Llamas, too.
    alike = ("mistral without a window", "helium") if model_type != "own" else ()
    if family not in ("llama with its defaults", *alike):
        assert refusal(tmp_path)
        return
    model = import_hf(tmp_path)
    if alike:
        saved = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    tokens = torch.tensor(np.random.default_rng(1).integers(40, size=(2, 30)))
    with torch.inference_mode():
        first = saved(tokens[:, :13], use_cache=True)
        steps, cache = [first.logits], first.past_key_values
        for at in range(13, 30):
            step = saved(tokens[:, at : at + 1], past_key_values=cache, use_cache=True)
            steps, cache = [*steps, step.logits], step.past_key_values
    expected = torch.cat(steps, dim=1).numpy()
    np.testing.assert_allclose(_logits(*nnx.split(model), jnp.asarray(tokens.numpy())), expected, atol=1e-4)


Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda a: a.pop(Q), f"{Q} (shape [32, 32]), 1 of 21"),
        (lambda a: a.update({"model.layers.2.mlp.up_proj.weight": a[Q]}), "holds model.layers.2.mlp.up_proj.weight"),
        (lambda a: a.update({Q.replace("weight", "bias"): a[Q][0]}), "q_proj.bias (shape [32])"),
        (lambda a: a.update({Q: a[Q][:16]}), f"{Q} has the shape [16, 32]"),
        (lambda a: a.update({Q: a[Q].reshape(-1)}), f"{Q} has the shape [1024]"),
        (lambda a: a.update({Q: a[Q].astype(np.int8)}), f"{Q} is of type I8"),
        (lambda a: a.update({Q: a[Q] * np.nan}), f"{Q} holds 1024 values"),
        (lambda a: a.update({Q: a[Q] + np.eye(32) * 1e300}), f"{Q} holds 32 values"),
        (lambda a: a.clear(), "model.embed_tokens.weight (shape ["),
    ],
    ids=["missing", "layer", "bias", "shape", "flat", "integers", "nan", "overflow", "empty"],
)  # fmt: skip
def test_wrong_weights_are_refused_by_name(folder, change, says):
    change_weights(folder, change)
    assert says in refusal(folder)


def test_broken_folders_are_refused_by_the_files_name(folder, tmp_path):
    assert str(tmp_path / "none") in refusal(tmp_path / "none")
    whole = (folder / "model.safetensors").read_bytes()
    for content in (whole[:-9], whole[:40], b"", b"x" * 100):
        (folder / "model.safetensors").write_bytes(content)
        assert "model.safetensors" in refusal(folder)
    (folder / "model.safetensors").unlink()
    assert "model.safetensors.index.json" in refusal(folder)
    (folder / "pytorch_model.bin").write_bytes(b"never opened")
    assert "pytorch_model.bin" in refusal(folder)
    for content in ("{", "[]"):
        (folder / "config.json").write_text(content)
        assert "config.json" in refusal(folder)
    (folder / "config.json").unlink()
    assert "config.json" in refusal(folder)


def test_numbers_too_large_for_memory_or_a_float_are_refused_at_once(folder):
    config = json.loads((folder / "config.json").read_text())
    for changes, says in (
        ({"num_hidden_layers": 10**9}, "layers is 1000000000"),
        ({"rope_theta": 10**400, "rope_parameters": None}, "rope_theta is 1000"),
    ):
        (folder / "config.json").write_text(json.dumps(config | changes))
        assert says in refusal(folder)


def test_a_broken_index_is_refused_by_name(folder):
    export_hf(tiny(), TOKENIZER, folder, shard_bytes=30_000)
    index = folder / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    first, last = min(places.values()), max(places.values())

    def with_map(content) -> str:
        index.write_text(json.dumps({"weight_map": content}))
        return refusal(folder)

    assert "weight_map" in with_map([])
    assert "../hf/model.safetensors" in with_map(places | {Q: "../hf/model.safetensors"})
    assert "model-9.safetensors" in with_map(places | {"lm.weight": "model-9.safetensors"})
    line = with_map(places | {Q: first})
    assert Q in line and first in line
    assert Q in with_map({name: at for name, at in places.items() if name != Q})
    assert f"{last} does not hold lm.weight" in with_map(places | {"lm.weight": last})
    shutil.copy(folder / first, folder / last)
    assert f"{last} holds" in with_map(places)
