"""How GRPO's objective weighs tokens: one function for each value of `grpo.aggregate`.

An aggregation is a function of one tree. It gives the weight of each token that the model wrote, by the request to the
server that wrote it (up to and with each call, and after the last join), and how much the tree adds to the number by
which the step's sum of losses is divided. A new aggregation is one function with its name above it:

    @aggregation("thread")
    def by_thread(tree: ThreadTree, window: int, trained: bool) -> TreeWeights:
        return _same(lambda thread, request: 1 / max(thread.sampled_tokens, 1), divisor=1)
"""

from collections.abc import Callable
from typing import NamedTuple

from apr_jax.data.packing import PerRequest
from apr_jax.threads import Thread, ThreadTree


class TreeWeights(NamedTuple):
    """The weights of one tree's tokens."""

    loss: PerRequest  # of a token in the loss
    kl: PerRequest  # of a token in the k3 term
    divisor: float  # what the tree adds to the step's divisor


# (tree, window in tokens, whether the tree is trained on) -> its weights
Aggregation = Callable[[ThreadTree, int, bool], TreeWeights]
AGGREGATIONS: dict[str, Aggregation] = {}  # by the name that `grpo.aggregate` has


def aggregation(name: str) -> Callable[[Aggregation], Aggregation]:
    """Makes the function below it the aggregation of a name."""

    def register(function: Aggregation) -> Aggregation:
        AGGREGATIONS[name] = function
        return function

    return register


@aggregation("tree")
def by_tree(tree: ThreadTree, window: int, trained: bool) -> TreeWeights:
    """Every tree 1, spread over its sampled tokens; the default."""
    tokens = max(_sampled_tokens(tree), 1)
    return _same(lambda thread, request: 1 / tokens, divisor=1)


@aggregation("sequence")
def by_sequence(tree: ThreadTree, window: int, trained: bool) -> TreeWeights:
    """Every tree 1, an equal part for each thread that wrote something, spread over the thread's tokens."""
    writing = max(sum(thread.sampled_tokens > 0 for thread in tree.threads()), 1)
    return _same(lambda thread, request: 1 / max(thread.sampled_tokens, 1) / writing, divisor=1)


@aggregation("paper")
def as_the_paper(tree: ThreadTree, window: int, trained: bool) -> TreeWeights:
    """As the authors' code: each request is a sequence. A sequence's mean is divided by its tree's sequences and by
    those of the step, the k3 term by those of the step alone. Trees that are not trained on count none."""
    sequences = _requests(tree)

    def mean(thread: Thread, request: int) -> float:
        return 1 / max(thread.request_tokens[request], 1)

    return TreeWeights(
        lambda thread, request: mean(thread, request) / max(sequences, 1), mean, sequences if trained else 0
    )


@aggregation("token")
def by_token(tree: ThreadTree, window: int, trained: bool) -> TreeWeights:
    """Every token of the step the same; tokens of trees that are not trained on are counted, too."""
    return _same(lambda thread, request: 1.0, divisor=_sampled_tokens(tree))


@aggregation("constant")
def by_window(tree: ThreadTree, window: int, trained: bool) -> TreeWeights:
    """Every token the same, divided by trees and the window (Dr. GRPO: with `normalise` off, longer answers are no
    longer favoured)."""
    return _same(lambda thread, request: 1 / window, divisor=1)


def _same(weight: PerRequest, divisor: float) -> TreeWeights:
    return TreeWeights(weight, weight, divisor)


def _sampled_tokens(tree: ThreadTree) -> int:
    return sum(thread.sampled_tokens for thread in tree.threads())


def _requests(tree: ThreadTree) -> int:
    """How many requests wrote a tree: those that gave no token (a thread at its limit) were never made."""
    return sum(tokens > 0 for thread in tree.threads() for tokens in thread.request_tokens)
