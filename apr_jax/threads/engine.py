"""The engine contract: a runner passes token ids to an engine and gets token ids back. An engine has no text, no task
and no tree."""

import dataclasses
from collections.abc import Callable
from collections.abc import Sequence as Ids
from typing import Protocol

from apr_jax.checks import check_fields
from apr_jax.errors import UserError

# Watches one decode. It is called on the event loop with (index of the first new id in this decode, the new ids). The
# index is the number of ids before, or smaller: then the ids from the index on are replaced.
Watch = Callable[[int, Ids[int]], None]
LEAST_TEMPERATURE = 1e-6  # below it float32 overflows for some logits, and SGLang decodes greedily


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. Logits are divided by `temperature`; then `top_k` and after it `top_p` remove
    tokens; then one remaining token is drawn by its renormalised probability. Temperature 0 is greedy: the likeliest
    token, whatever `top_k` and `top_p` are.

    * `top_k`: exactly the k likeliest tokens remain. 0, or k at or above the vocabulary's size: all tokens.
    * `top_p`: the probabilities of the tokens that top-k left are renormalised. The likeliest of them remain, as few
      as reach `top_p` in sum, and at least one. 1: all tokens. Probability and sum are float32.
    * Of equally likely tokens the one with the lower id is kept first.

    This is the order of transformers' TopKLogitsWarper and TopPLogitsWarper. They differ for ties alone: its top-k
    keeps every token as likely as the k-th, and its top-p has no rule for ties. SGLang has no rule for ties either. It
    also measures top-p on the whole distribution, without renormalising after top-k, so the SGLang engine refuses the
    two together.

    Raises UserError for a value out of bounds.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        check_fields(self)
        if self.temperature < 0:
            raise UserError(f"temperature is 0 or more, was given {self.temperature}")
        if 0 < self.temperature < LEAST_TEMPERATURE:
            raise UserError(
                f"temperature is 0 (greedy) or at least {LEAST_TEMPERATURE:g}, was given {self.temperature}"
            )
        if self.top_k < 0:
            raise UserError(f"top_k is 0 (all) or more, was given {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is above 0 and at most 1, was given {self.top_p}")

    @property
    def truncated(self) -> bool:
        """Whether some tokens cannot be drawn at all."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1)


@dataclasses.dataclass(frozen=True)
class Decoded:
    """The tokens of one call of `Engine.decode`. `stopped`: the last id is a stop id; else the limit was reached.

    `logprobs`: the log-probability of each token under the distribution that it was drawn from; under the model's own
    distribution when decoding is greedy. `model_logprobs`: under the model's own distribution, at temperature 1 and
    without top-k and top-p.
    """

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    stopped: bool
    model_logprobs: tuple[float, ...]


class Sequence(Protocol):
    """A handle that an engine gives out for one context. `ids` are all token ids of the context so far."""

    ids: list[int]


class Engine(Protocol):
    """A decoder of many sequences at the same time. A sequence may stay idle between calls for any length of time;
    meanwhile the engine may drop the sequence's key/value cache and compute it again later."""

    context: int  # the most tokens that a sequence can hold

    def open(self, ids: Ids[int], name: Ids[int]) -> Sequence:
        """Return a new sequence with the context `ids`. `name` (any integers) is its identity. Seed, name and position
        together decide every random draw, so samples do not depend on the batch composition.

        A name also encodes the family tree of threads, by which the SGLang engine assigns requests to servers and
        groups measurements. A child's name is its parent thread's name and two more numbers. When a thread resumes in
        a fork of its sequence, the fork's name is the thread's name and one more number."""

    def fork(self, sequence: Sequence, length: int, name: Ids[int]) -> Sequence:
        """Return a new sequence whose context is the first `length` ids of `sequence`, which does not change."""

    def extend(self, sequence: Sequence, ids: Ids[int]) -> None:
        """Append ids that the model did not sample to a sequence."""

    async def decode(
        self, sequence: Sequence, stop: frozenset[int], limit: int, sampling: Sampling, watch: Watch | None = None
    ) -> Decoded:
        """Sample tokens until a stop id or until `limit` tokens, and append them to the sequence. A stop id is kept,
        as the last id. `watch` is called with new ids as they arrive, and with all of them before this returns; it
        changes no id."""

    def free(self, sequence: Sequence) -> None:
        """Release a sequence, which must not be used again."""
