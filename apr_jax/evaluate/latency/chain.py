"""The requests that a sample waited for, one after the other, and the parts of a latency along them.

A thread's next request waits for its last one, or for the child that ended last.
"""

from collections.abc import Sequence

from apr_jax.rollout.measure import Measurement


def waited_for(calls: Sequence[Measurement]) -> list[Measurement]:
    """The requests of one tree that decided when it ended, in order: the last one of all, before it the last that it
    can have waited for, and so on. A request waits for its own thread's and for those of threads above and below."""
    chain: list[Measurement] = []
    now = max(calls, key=lambda one: one.end, default=None)
    while now is not None:
        chain.append(now)
        before = (one for one in calls if one.end <= now.asked and _related(one.thread, now.thread))
        now = max(before, key=lambda one: one.end, default=None)
    return chain[::-1]


def _related(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    return a[: len(b)] == b or b[: len(a)] == a


def latency_parts(chain: Sequence[Measurement], latency: float) -> dict[str, float]:
    """A latency in parts, in seconds: `queue`, `prefill`, `decode` of the chain, and the rest as `overhead`."""
    queue = prefill = decode = 0.0
    for one in chain:
        first = one.start if one.first is None else one.first
        there = min(one.server_queue or 0.0, first - one.start)
        queue += one.start - one.asked + there
        prefill += first - one.start - there
        decode += one.end - first
    return {"queue": queue, "prefill": prefill, "decode": decode, "overhead": latency - queue - prefill - decode}
