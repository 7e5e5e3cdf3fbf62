"""What a runner asks of an engine: token ids in, token ids out; no text, no task, no tree."""

import dataclasses
from collections.abc import Sequence as Ids
from typing import Protocol

from apr_jax.checks import check_fields
from apr_jax.errors import UserError

LEAST_TEMPERATURE = 1e-6  # below it float32 overflows for some logits, and SGLang decodes greedily


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: logits are divided by `temperature`, then `top_k`, then `top_p` take tokens away, and one
    of the rest is drawn by its share of their probability. Temperature 0 is greedy: the likeliest token, whatever the
    other two are.

    * `top_k`: the k likeliest tokens stay, exactly k; 0, or k of the vocabulary or more: all.
    * `top_p`: of the tokens that top-k left, with probabilities that add up to 1, the likeliest ones stay, as few as
      have `top_p` together, and at least one. 1: all. Both are counted in float32.
    * Of equally likely tokens the lower id stays first.

    So transformers applies its TopKLogitsWarper and TopPLogitsWarper, but for ties: its top-k keeps all tokens as
    likely as the k-th, and its top-p has no rule for which of equals goes. SGLang has no rule for ties either, and
    takes both shares from the whole distribution: its engine refuses the two together. Raises UserError.
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
    """One consecutive decode. `stopped`: the last id is a stop id (else the limit was reached).

    `logprobs`: of each token under the distribution it was drawn from (the model's own when greedy);
    `model_logprobs`: under the model's own, at temperature 1 and with no word left out.
    """

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    stopped: bool
    model_logprobs: tuple[float, ...]


class Sequence(Protocol):
    """A handle of an engine; `ids` is its whole context so far."""

    ids: list[int]


class Engine(Protocol):
    """Sequences that decode side by side. A sequence may wait as long as its owner likes: the engine may
    then drop what it cached and compute it again."""

    context: int  # most tokens a sequence can hold

    def open(self, ids: Ids[int], name: Ids[int]) -> Sequence:
        """A new sequence. `name` (any integers) is its identity: with the run's seed and the position it
        decides every draw, so that samples do not depend on company.

        Names also say whose thread it is, which places requests and sorts measurements: a child's is its parent
        thread's and two numbers, that of a fork in which a thread goes on the thread's and one."""

    def fork(self, sequence: Sequence, length: int, name: Ids[int]) -> Sequence:
        """A new sequence with the first `length` ids of another, which stays as it is."""

    def extend(self, sequence: Sequence, ids: Ids[int]) -> None:
        """Puts forced ids behind a sequence."""

    async def decode(self, sequence: Sequence, stop: frozenset[int], limit: int, sampling: Sampling) -> Decoded:
        """Samples until a stop id (kept, as the last id) or `limit` tokens; the ids join the sequence."""

    def free(self, sequence: Sequence) -> None:
        """The sequence is not needed again."""
