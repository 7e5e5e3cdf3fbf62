"""Threads of free text with tags, and a small task on them: a second protocol beside Countdown's."""

from apr_jax.tags.factors import WORDS, FactorTask, Span, solve, solve_in_parts, spans
from apr_jax.tags.protocol import TagProtocol, tag_tokenizer

__all__ = ["WORDS", "FactorTask", "Span", "TagProtocol", "solve", "solve_in_parts", "spans", "tag_tokenizer"]
