"""Finds the chain of requests that decided a tree's latency, and splits the latency along that chain.

A thread's next request waits for the thread's previous request, or for the child that ends last.
"""

from collections.abc import Sequence

from apr_jax.rollout.measure import Measurement


def critical_path(calls: Sequence[Measurement]) -> list[Measurement]:
    """Return the requests of one tree that decided when the tree ended, in order of time.

    The chain is built backwards from the request that ended last. Before each request comes the latest request that had
    ended when it was asked for, of the same thread, an ancestor or a descendant.
    """
    chain: list[Measurement] = []
    now = max(calls, key=lambda one: one.end, default=None)
    while now is not None:
        chain.append(now)
        before = (one for one in calls if one.end <= now.asked and _related(one.thread, now.thread))
        now = max(before, key=lambda one: one.end, default=None)
    return chain[::-1]


def _related(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Whether two threads, given by name, are the same thread, or one is an ancestor of the other."""
    return a[: len(b)] == b or b[: len(a)] == a


def latency_parts(chain: Sequence[Measurement], latency: float) -> dict[str, float]:
    """Split a latency (seconds) into the `queue`, `prefill` and `decode` seconds of its chain of requests, and
    `overhead`, which is the rest."""
    queue = prefill = decode = 0.0
    for one in chain:
        first = one.start if one.first is None else one.first
        queued = min(one.server_queue or 0.0, first - one.start)
        queue += one.start - one.asked + queued
        prefill += first - one.start - queued
        decode += one.end - first
    return {"queue": queue, "prefill": prefill, "decode": decode, "overhead": latency - queue - prefill - decode}
