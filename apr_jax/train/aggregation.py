"""Token weights of GRPO's objective: one function for each value of `grpo.aggregate`.

An aggregation is a function of one tree. It returns the weight of each sampled token, and what the tree adds to the
divisor of the step: the sum of the weighted token losses of all trees is divided by the sum of these.

A weight may depend on the token's thread and *request*. A stateless server needs several requests for a thread: a
request ends with each spawn call, and the next one begins after the join. `Thread.request_tokens` counts their tokens.

A new aggregation is one function with its name in a decorator:

    @aggregation("thread")
    def by_thread(tree: ThreadTree, window: int, trained: bool) -> TreeWeights:
        return _same(lambda thread, request: 1 / max(thread.sampled_tokens, 1), divisor=1)
"""

from collections.abc import Callable
from typing import NamedTuple

from apr_jax.data.packing import PerRequest
from apr_jax.threads import Thread, ThreadTree


class TreeWeights(NamedTuple):
    """The weights of the sampled tokens of one tree."""

    loss: PerRequest  # weight of a token's policy loss
    kl: PerRequest  # weight of a token's k3 term
    divisor: float  # added to the divisor of the step


# (tree, window in tokens, whether the tree is trained on) -> the weights of its tokens
Aggregation = Callable[[ThreadTree, int, bool], TreeWeights]
AGGREGATIONS: dict[str, Aggregation] = {}  # by the value of `grpo.aggregate`


def aggregation(name: str) -> Callable[[Aggregation], Aggregation]:
    """A decorator that registers a function as the aggregation `name`."""

    def register(function: Aggregation) -> Aggregation:
        AGGREGATIONS[name] = function
        return function

    return register


@aggregation("tree")
def by_tree(tree: ThreadTree, window: int, trained: bool) -> TreeWeights:
    """Each tree has the weight 1, spread evenly over its sampled tokens. The default."""
    tokens = max(_sampled_tokens(tree), 1)
    return _same(lambda thread, request: 1 / tokens, divisor=1)


@aggregation("sequence")
def by_sequence(tree: ThreadTree, window: int, trained: bool) -> TreeWeights:
    """Each tree has the weight 1. Its threads with sampled tokens have equal parts, spread over these tokens."""
    threads = max(sum(thread.sampled_tokens > 0 for thread in tree.threads()), 1)
    return _same(lambda thread, request: 1 / max(thread.sampled_tokens, 1) / threads, divisor=1)


@aggregation("paper")
def as_the_paper(tree: ThreadTree, window: int, trained: bool) -> TreeWeights:
    """As in the authors' code, where each request is a sequence of its own. The mean policy loss of a sequence is
    divided by the number of sequences in its tree and by the number in the step. The mean k3 term is divided by the
    number in the step alone. Sequences of trees that are not trained on are not counted."""
    sequences = _requests(tree)

    def mean(thread: Thread, request: int) -> float:
        return 1 / max(thread.request_tokens[request], 1)

    return TreeWeights(
        lambda thread, request: mean(thread, request) / max(sequences, 1), mean, sequences if trained else 0
    )


@aggregation("token")
def by_token(tree: ThreadTree, window: int, trained: bool) -> TreeWeights:
    """All sampled tokens of a step weigh the same. The divisor counts those of trees that are not trained on, too."""
    return _same(lambda thread, request: 1.0, divisor=_sampled_tokens(tree))


@aggregation("constant")
def by_window(tree: ThreadTree, window: int, trained: bool) -> TreeWeights:
    """All sampled tokens weigh 1 / window, divided by the number of trees. This is Dr. GRPO if `normalise` is off: the
    length of an answer then has no influence on the weight of its tokens."""
    return _same(lambda thread, request: 1 / window, divisor=1)


def _same(weight: PerRequest, divisor: float) -> TreeWeights:
    """The same weights for the policy loss and the k3 term."""
    return TreeWeights(weight, weight, divisor)


def _sampled_tokens(tree: ThreadTree) -> int:
    return sum(thread.sampled_tokens for thread in tree.threads())


def _requests(tree: ThreadTree) -> int:
    """The number of requests that sampled a tree. A request without tokens was never made: its thread had reached a
    limit."""
    return sum(tokens > 0 for thread in tree.threads() for tokens in thread.request_tokens)
