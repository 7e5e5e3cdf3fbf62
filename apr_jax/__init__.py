"""Adaptive Parallel Reasoning (APR, arXiv 2504.15466) in JAX.

A language model writes a *thread* of tokens. A thread may spawn child threads, which decode at the same time; a join
block then puts their results into the parent's context.

Floors. A package imports only from lower floors, or from its own floor without circles:

    4  evaluate, export, trained (a model with its task, ready to solve problems)
    3  train (sft, grpo)
    2  rollout (engines, scheduler), data (data sets, stores, packing)
    1  tasks (Countdown, factor search, sums)
    0  io, text, threads (tree, protocol, runner), model; below them errors and checks

Shape letters. An array that crosses a function has its axes as a suffix of its name (``tokens_BxT``):

    B  batch: rows of tokens, or the slots or threads of one call
    T  time: tokens of a row; queries in attention
    S  key time, where keys and queries differ in number
    D  width of the model             F  width of the feed-forward        L  layers
    N  query heads                    K  key/value heads                  H  head size
    V  vocabulary                     P  slots of the key/value cache     G  rollouts of one prompt (a group)
    C  children of a spawn
    W  key time of the cache: the most tokens that a slot holds, or the part of them that a call works on
    M  B * T as one axis, inside the model

Blocked attention also has I, the blocks of a row, and Q, queries over all heads that share a key/value head. A digit is
an axis of that length. A module that works on other things than tokens lists its letters itself.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    """Return `apr_jax.trained.load` as ``apr_jax.load``. It is imported when it is first used, since it needs JAX."""
    if name == "load":
        from apr_jax.trained import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
