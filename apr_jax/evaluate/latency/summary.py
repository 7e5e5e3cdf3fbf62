"""Summarises the latency samples of one setting."""

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from apr_jax.evaluate.latency.sample import Sample
from apr_jax.evaluate.statistics import wilson_interval

PARTS = ("queue", "prefill", "decode", "overhead")  # a latency is the sum of these


def summarise_latency(samples: Sequence[Sample]) -> dict[str, Any]:
    """Summarise the samples of one setting as a JSON-able dictionary. Times are in seconds; rates and the keys that end
    in `_share` are from 0 to 1; token counts are means per sample."""
    right = sum(sample.correct for sample in samples)
    low, high = wilson_interval(right, len(samples))
    times = sorted(sample.latency for sample in samples)

    def mean(values: Iterable[float]) -> float:
        return sum(values) / max(len(samples), 1)

    latency = mean(times)
    firsts = [sample.first_token for sample in samples]
    reported = all(sample.cached_tokens is not None for sample in samples)
    prompts = sum(sample.prompt_tokens for sample in samples)
    return {
        "n": len(samples), "right": right, "accuracy": right / max(len(samples), 1),
        "accuracy_low": low, "accuracy_high": high,
        "latency": latency, "latency_median": statistics.median(times) if times else 0.0,
        "latency_90": times[int(0.9 * (len(times) - 1))] if times else 0.0,
        "first_token": None if None in firsts else mean(firsts),
        **{f"{part}_share": mean(getattr(sample, part) for sample in samples) / (latency or 1.0) for part in PARTS},
        "cached_share": sum(s.cached_tokens for s in samples) / max(prompts, 1) if reported and samples else None,
        "predicted": mean(sample.predicted for sample in samples),
        "gap": {part: mean(sample.gap[part] for sample in samples) for part in PARTS},
        "requests": mean(sample.requests for sample in samples),
        "output_tokens": mean(sample.output_tokens for sample in samples),
        "chain_tokens": mean(sample.chain_tokens for sample in samples),
        "sequential_tokens": mean(sample.sequential_tokens for sample in samples),
        "total_tokens": mean(sample.total_tokens for sample in samples),
        "children": mean(sample.children for sample in samples),
        "disturbed": sum(sample.tries > 1 for sample in samples),
        "failures": dict(sorted(sum((Counter(sample.failures) for sample in samples), Counter()).items())),
    }  # fmt: skip
