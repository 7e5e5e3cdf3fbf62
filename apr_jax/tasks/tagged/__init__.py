"""Threads of free text with tags, and two small tasks on them: a second protocol beside Countdown's."""

from apr_jax.tasks.tagged.factors import WORDS, FactorTask, Span, solve, spans
from apr_jax.tasks.tagged.protocol import TagProtocol, tag_tokenizer
from apr_jax.tasks.tagged.sums import SUM_WORDS, RangeSum, SumTask, range_sums, solve_sum

__all__ = [
    "SUM_WORDS", "WORDS", "FactorTask", "RangeSum", "Span", "SumTask", "TagProtocol", "range_sums", "solve",
    "solve_sum", "spans", "tag_tokenizer",
]  # fmt: skip
