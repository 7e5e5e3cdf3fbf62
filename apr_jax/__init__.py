"""Adaptive Parallel Reasoning (APR, arXiv 2504.15466) in JAX.

Floors (a package imports only from floors below its own):

    3  evaluate, export
    2  rollout (engines), train (sft, grpo; grpo uses rollout)
    1  model
    0  countdown, threads, text; below all of them errors, checks and paths

Letters of shapes, used as name suffixes where an array crosses a function (``tokens_BxT``):
B batch rows, T time, D model width, N query heads, K key/value heads, H head size, F feed-forward
width, V vocabulary, L layers, S slots, G group, C children.
"""
