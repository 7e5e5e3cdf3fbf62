"""Helpers for the tests of several packages: a tokenizer, small models, a nonsense task, random trees, and the slow
reference for every fast computation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from apr_jax.model.attention import attend_masked
from apr_jax.model.llama import Llama, LlamaConfig
from apr_jax.tasks.countdown import trace
from apr_jax.tasks.countdown.vocabulary import countdown_tokenizer
from apr_jax.threads import Block, MalformedSpawn, Spawn, SpawnRequest, TaskProtocol, Thread, map_blocks

TOKENIZER = countdown_tokenizer(30)
SIZES = {"width": 32, "layers": 2, "heads": 4, "kv_heads": 2, "feed_forward": 64, "context": 256}


def make_model(seed=0, vocab_size=len(TOKENIZER), **sizes):
    """Return a small Llama with random weights. `sizes` are fields of its config that differ from `SIZES`."""
    return Llama(LlamaConfig(vocab_size=vocab_size, **SIZES | sizes), rngs=nnx.Rngs(seed))


def spawning_model(seed=0, opens=4.5, closes=3.5, ends=1.5, **sizes):
    """Return an untrained model that spawns often. The first feature of all embeddings is the same number, so the
    head's first row is a bias of the logits: about `opens` for the tokens that open a spawn or a join, `closes` for the
    token that closes a spawn, `ends` for the end token, and 0 for all others."""
    model = make_model(seed, **sizes)
    model.embed_VxD[...] = model.embed_VxD[...].at[:, 0].set(4.0)
    bias = np.zeros(len(TOKENIZER), np.float32)
    for text, value in ((trace.SPAWN_OPEN, opens), (trace.JOIN_OPEN, opens), (trace.SPAWN_CLOSE, closes)):
        bias[TOKENIZER.token(text)] = value
    bias[TOKENIZER.eos] = ends
    model.head_DxV[...] = model.head_DxV[...].at[0].set(bias / 3.3)  # the feature is about 3.3 after the last norm
    return model


class NonsenseProtocol(TaskProtocol):
    """A `TaskProtocol` for untrained models. Every spawn that is opened and closed has `width` children, whose prompts
    contain the position of the spawn. A thread's result is a number that depends on its whole text, and about half of
    all trees are correct: those with an even number."""

    spawn_open, spawn_close, join_open = trace.SPAWN_OPEN, trace.SPAWN_CLOSE, trace.JOIN_OPEN

    def __init__(self, width=3, inherit=False):
        self.width, self.inherit = width, inherit

    def root_prompt(self, problem):
        return f"{problem}\n"

    def parse_spawn(self, text):
        if not text.endswith(self.spawn_close):
            return None
        position = text.rfind(self.spawn_open)
        if position < 0:
            raise MalformedSpawn("unopened", "nothing was opened")
        children = tuple(f"{position} {index}\n" for index in range(self.width))
        return SpawnRequest(children, position, inherit=self.inherit)

    def join(self, spawn, results):
        assert len(results) == len(spawn.children)
        results = ["none" if result is None else result for result in results]
        return self.join_open + "".join(f"{result}\n" for result in results)

    def join_nothing(self):
        return self.join_open

    def result(self, text):
        return str(sum(map(ord, text)) % 1000)

    def steps(self, text):
        return 0, 0

    def correct(self, problem, text):
        return int(self.result(text)) % 2 == 0


def without_logprobs(tree):
    """Return the root of a tree without log-probabilities, for comparing trees token by token."""
    return map_blocks(tree.root, lambda block: Block(tuple(block.content), block.sampled))


def random_thread(rng, depth=2, spawns=2, longest=9, logprobs=False, inherit=0.0):
    """Return a thread of random ids. Each thread has up to `spawns` spawns, with children down to the level `depth`.
    Blocks have up to `longest` tokens and may be empty; calls have one or several writers; up to two blocks follow a
    join. `inherit` is the fraction of spawns whose children inherit their parent's context."""

    def block(sampled, shortest=0):
        content = tuple(rng.randrange(len(TOKENIZER)) for _ in range(rng.randint(shortest, longest)))
        given = tuple(-rng.random() * 5 for _ in content) if sampled and logprobs else None
        return Block(content, sampled, given)

    def thread(depth, inherits=False):
        items = [block(False, 1), *(block(rng.random() < 0.7) for _ in range(rng.randint(0, 2)))]
        for _ in range(rng.randint(0, spawns) if depth else 0):
            call = tuple(block(sampled) for sampled in rng.choice([(True,), (True, False, True), (False, True)]))
            begun = rng.random() < inherit if inherit else False
            items.append(Spawn(call, tuple(thread(depth - 1, begun) for _ in range(rng.randint(1, 2))), block(False)))
            items += [block(True) for _ in range(rng.randint(0, 2))]
        return Thread(tuple(items), inherits=inherits)

    return thread(depth)


def paths(thread):
    """Return all paths of dependent tokens through a thread: for each spawn the context before it and its call, then
    this context in front of each path of a child that inherits it; at last the thread's whole context. A path is a list
    of (id, sampled, logprob, counted). A token may be on several paths; `counted` is true on one of them."""

    def entries(block, counted=True):
        logprobs = block.logprobs or (0.0,) * len(block)
        return [(token, block.sampled, logprob, counted) for token, logprob in zip(block.content, logprobs)]

    found, before = [], []
    for item in thread.blocks:
        if isinstance(item, Spawn):
            called = [entry for block in item.call for entry in entries(block)]
            shared = [(*entry[:3], False) for entry in before]
            found.append(shared + called)
            found += [shared + path for child in item.children if child.inherits for path in paths(child)]
            item = item.join
        before = before + entries(item)
    return [*found, before]


def causal_logits(model, tokens_BxT):
    """Return the logits [B, T, V] of a plain causal forward pass, without packing or cache: each row is one text."""
    B, T = tokens_BxT.shape
    mask = jnp.broadcast_to(jnp.tri(T, dtype=bool)[None], (B, T, T))
    positions = jnp.broadcast_to(jnp.arange(T)[None], (B, T))
    hidden, _ = model.hidden(tokens_BxT, positions, lambda q, k, v, carry: (attend_masked(q, k, v, mask), carry))
    return model.logits(hidden)


@functools.partial(jax.jit, static_argnums=0)
def _causal(graphdef, weights, tokens_BxT):
    return causal_logits(nnx.merge(graphdef, weights), tokens_BxT)


def plain_logits(model, ids):
    """Return the logits [T, V] of a plain forward pass over T `ids`: the reference for every fast computation."""
    padded = np.zeros((1, -(-len(ids) // 64) * 64), np.int32)
    padded[0, : len(ids)] = ids
    return np.asarray(_causal(*nnx.split(model), padded)[0, : len(ids)])


def log_softmax(logits):
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
