"""Adaptive Parallel Reasoning (APR, arXiv 2504.15466) in JAX.

Floors (a package imports only from floors below its own, or from its own without circles):

    4  evaluate, export
    3  train (sft, grpo)
    2  rollout (engines, scheduler), data (data sets, stores, packing)
    1  tasks (Countdown, factor search, sums)
    0  io, text, threads (tree, protocol, runner), model; below all of them errors and checks

Letters of shapes, used as name suffixes where an array crosses a function (``tokens_BxT``):
B batch rows, T time, D model width, N query heads, K key/value heads, H head size, F feed-forward
width, V vocabulary, L layers, S slots, G group, C children.
"""
