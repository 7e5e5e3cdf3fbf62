"""Llama: its sizes, and equal results with a cache, with rematerialisation, under a scan and in bfloat16."""

import decimal
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from apr_jax.model.attention import attend_masked
from apr_jax.model.cache import cached_attention, make_cache, put, take
from apr_jax.model.family import parameter_count
from apr_jax.model.flops import product_parameters, training_flops
from apr_jax.model.llama import PRESETS, Llama, LlamaConfig
from apr_jax.model.llama.model import REMAT, rotary_angles, rotary_frequencies
from experiments.configs import paper
from experiments.settings import read_settings
from tests.tiny import TOKENIZER, causal_logits, log_softmax, make_model, plain_logits

TOKENS = np.random.default_rng(0).integers(4, len(TOKENIZER), (3, 40)).astype(np.int32)


@pytest.mark.parametrize("name, millions", [("tiny", 0.8), ("small", 25.3), ("base", 227.7)])
def test_presets_have_their_number_of_parameters(name, millions):
    """Millions of parameters outside the embedding and the head. "base" has the paper's 228, and 293 in all with the
    vocabulary of Llama 2."""
    config = LlamaConfig(vocab_size=32_000, **PRESETS[name])
    shapes = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))
    total = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(shapes, nnx.Param)))
    tables = 2 * config.width * config.vocab_size
    assert round((total - tables) / 1e6, 1) == millions
    gains = (2 * config.layers + 1) * config.width
    assert product_parameters(config) == total - config.width * config.vocab_size - gains
    if name == "base":
        assert round(total / 1e6) == 293
        sizes = read_settings(paper.get_config()).model
        assert LlamaConfig(vocab_size=32_000, **sizes | {"context": 1024, "remat": "none", "scan": False}) == config


@pytest.mark.parametrize("dtype, precision", [("float32", "HIGHEST"), ("bfloat16", "DEFAULT")])
def test_float32_is_multiplied_as_float32_forward_and_backward(dtype, precision):
    """Every product in the program of the gradient has this precision. By default GPUs would round float32 to TF32, and
    the log-probabilities of rollouts and training would differ."""
    graphdef, weights = nnx.split(make_model(0, dtype=dtype, attention="dense"))
    positions = jnp.broadcast_to(jnp.arange(40), TOKENS.shape)

    def loss(weights):
        model = nnx.merge(graphdef, weights)
        mask = jnp.broadcast_to(jnp.tri(40, dtype=bool), (3, 40, 40))
        attend = lambda q, k, v, carry: (attend_masked(q, k, v, mask), carry)  # noqa: E731
        return model.logits(model.hidden(TOKENS, positions, attend)[0]).sum()

    text = str(jax.make_jaxpr(jax.grad(loss))(weights))
    precisions = re.findall("precision=(.*)", text)
    assert len(precisions) == text.count("dot_general") > 20
    assert set(precisions) == {f"(Precision.{precision}, Precision.{precision})"}


def test_training_flops_are_about_the_count_of_xla():
    """Forward and backward with dense attention. The numbers differ a little, since XLA counts every operation and we
    count products alone."""
    model = make_model(0)
    graphdef, weights = nnx.split(model)

    def loss(weights):
        return jnp.sum(causal_logits(nnx.merge(graphdef, weights), TOKENS))

    B, T = TOKENS.shape
    counted = jax.jit(jax.grad(loss)).lower(weights).compile().cost_analysis()["flops"]
    ours = training_flops(model.config, B * T, B * T * T)  # dense attention computes T keys for each token
    assert 0.7 < ours / counted < 1.1


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_counted_with_and_without_the_tables(tied):
    total, inner = parameter_count(make_model(tie_embeddings=tied))
    assert total - inner == len(TOKENIZER) * 32 * (1 if tied else 2)
    assert inner == 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32) + 32


@pytest.mark.parametrize("sizes", [{}, {"kv_heads": 4}, {"kv_heads": 1}, {"tie_embeddings": True}])
def test_a_prefill_and_then_one_token_at_a_time_equals_the_plain_forward(sizes):
    """Prompts of different lengths in slots out of order. Every call takes a part of the cache and puts it back."""
    model = make_model(2, **sizes)
    right = np.asarray(jax.jit(lambda tokens: causal_logits(model, tokens))(TOKENS))
    cache, slots, lengths, far = (
        make_cache(model.config, 4, 64),
        np.array([2, 0, 3]),
        [5, 20, 1],
        np.iinfo(np.int32).max,
    )
    rows = np.array([*slots, 4, 4])  # the index 4 is no slot: results of the last two rows are dropped
    positions = np.full((3, 24), far, np.int32)
    for row, length in enumerate(lengths):
        positions[row, :length] = np.arange(length)

    @jax.jit
    def prefill(cache):
        part = take(cache, slots, 32)
        hidden, part = model.hidden(TOKENS[:, :24], positions, cached_attention(positions), part)
        return model.logits(hidden), put(cache, slots, part, np.zeros(3, np.int32), 24)

    @jax.jit
    def decode(cache, tokens, positions):
        part = take(cache, rows, 48)
        hidden, part = model.hidden(tokens, positions, cached_attention(positions), part)
        return model.logits(hidden[:, 0]), put(cache, rows, part, positions[:, 0], 1)

    logits, cache = prefill(cache)
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(logits[row, :length], right[row, :length], atol=1e-4)
    for step in range(15):
        tokens, at = np.zeros((5, 1), np.int32), np.full((5, 1), far, np.int32)
        for row, length in enumerate(lengths):
            tokens[row, 0], at[row, 0] = TOKENS[row, length + step], length + step
        logits, cache = decode(cache, tokens, at)
        for row, length in enumerate(lengths):
            np.testing.assert_allclose(logits[row], right[row, length + step], atol=1e-4)
    assert not np.asarray(cache[0].k_PxKxWxH[1]).any(), "a slot that was not used has changed"


def test_earlier_contents_of_a_slot_change_nothing():
    """No token sees old entries at later positions of its slot, or a padding token, whose position is past the
    window."""
    model = make_model(2)
    positions = np.arange(8, dtype=np.int32)[None]
    clean = make_cache(model.config, 1, 32)
    dirty = jax.tree.map(lambda x: x + 7.0, clean)
    positions_and_padding = np.concatenate([positions, np.full((1, 4), np.iinfo(np.int32).max, np.int32)], axis=1)

    def hidden(cache, positions):
        T = positions.shape[1]
        return model.hidden(TOKENS[:1, :T], positions, cached_attention(positions), cache)

    (right, cache), (other, _) = hidden(clean, positions), hidden(dirty, positions)
    padded, cache_padded = hidden(clean, positions_and_padding)
    np.testing.assert_array_equal(right, other)
    np.testing.assert_allclose(padded[:, :8], right, atol=1e-5)
    for a, b in zip(jax.tree.leaves(cache), jax.tree.leaves(cache_padded)):
        np.testing.assert_allclose(a, b, atol=1e-5)


def value_and_gradient(**sizes):
    graphdef, weights = nnx.split(make_model(3, **sizes))

    def loss(weights):
        logits = causal_logits(nnx.merge(graphdef, weights), TOKENS)
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), TOKENS[:, 1:, None], axis=-1))

    return jax.jit(jax.value_and_grad(loss))(weights)


@pytest.mark.parametrize("remat", list(REMAT))
@pytest.mark.parametrize("scan", [False, True])
def test_remat_and_scan_change_neither_loss_nor_gradient(remat, scan):
    (right, right_gradient), (loss, gradient) = value_and_gradient(), value_and_gradient(remat=remat, scan=scan)
    np.testing.assert_allclose(right, loss, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(right_gradient), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)


def test_bfloat16_gives_nearly_the_same_logits_in_float32():
    wide, narrow = make_model(4), make_model(4, dtype="bfloat16")
    ids = TOKENS[0].tolist()
    a, b = plain_logits(wide, ids), plain_logits(narrow, ids)
    assert a.dtype == b.dtype == np.float32
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(nnx.state(narrow, nnx.Param)))
    difference = np.abs(log_softmax(a) - log_softmax(b))
    assert 0 < difference.mean() < 0.02 and difference.max() < 0.15


ROTARY = [(16, 1e4), (24, 1e4), (32, 1e4), (64, 1e4), (96, 5e5), (128, 5e5), (128, 1e6)]


@pytest.mark.parametrize("head_size, theta", ROTARY)
def test_rotary_frequencies_have_the_same_bits_on_every_machine(head_size, theta):
    """The reference is computed with 50 decimal digits and rounded to float32 where transformers rounds."""
    with decimal.localcontext(prec=50):
        exponents = [np.float32(i) / np.float32(head_size) for i in range(0, head_size, 2)]
        powers = [decimal.Decimal(theta) ** decimal.Decimal(float(exponent)) for exponent in exponents]
        right = np.float32(1) / np.array([np.float32(str(power)) for power in powers])
    assert rotary_frequencies(head_size, theta).tobytes() == right.tobytes()


@pytest.mark.parametrize("head_size, theta", ROTARY)
def test_rotary_angles_are_those_of_transformers_at_any_position(head_size, theta):
    """The bound allows an error of one bit in a frequency, since torch's differ by as much between processors, and of
    one bit in an angle. So the bound grows with the angle: at position 32,000 it is 8e-3 for the highest frequency."""
    import torch
    from transformers.models.llama.modeling_llama import LlamaConfig as TheirConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = TheirConfig(
        hidden_size=2 * head_size, num_attention_heads=2, rope_parameters={"rope_type": "default", "rope_theta": theta}
    )
    positions = np.arange(0, 32_768, 7)[None]
    ours = rotary_angles(jnp.asarray(positions), head_size, theta)
    theirs = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.from_numpy(positions))
    bound = positions[:, :, None] * rotary_frequencies(head_size, theta) * 2.0**-22 + 1e-6
    for mine, other in zip(ours, theirs, strict=True):
        assert (np.abs(mine[:, :, 0] - other[..., : head_size // 2].numpy()) <= bound).all()


def test_logits_depend_on_differences_of_positions_alone():
    model = make_model(5)

    def logits(offset):
        positions = np.arange(offset, offset + 40, dtype=np.int32)[None].repeat(3, axis=0)
        mask = jnp.broadcast_to(jnp.tri(40, dtype=bool)[None], (3, 40, 40))
        hidden, _ = model.hidden(TOKENS, positions, lambda q, k, v, carry: (attend_masked(q, k, v, mask), carry))
        return model.logits(hidden)

    np.testing.assert_allclose(logits(0), logits(100), atol=1e-3)


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"width": 30}, "width.*30.*4"),
        ({"width": 12}, "width.*12.*4"),
        ({"kv_heads": 3}, "kv_heads.*3"),
        ({"dtype": "float16"}, "dtype.*'float16'"),
    ],
)
def test_wrong_sizes_are_refused_with_setting_and_value(sizes, message):
    with pytest.raises(ValueError, match=message):
        make_model(**sizes)
