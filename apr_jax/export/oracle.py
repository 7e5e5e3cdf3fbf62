"""Greedy decoding by transformers behind the `Engine` protocol: slow and simple, to check the JAX engine against."""

import dataclasses
from collections.abc import Sequence as Ids

import torch

from apr_jax.threads.engine import Decoded, Sampling


@dataclasses.dataclass
class _Sequence:
    ids: list[int]


class TransformersEngine:
    """An `Engine` over a causal model of transformers on the CPU. A sequence is its ids and nothing else:
    every decode reads them anew, so that no cache is ever cut or shared."""

    def __init__(self, model, context: int):
        self.model, self.context = model, context

    def open(self, ids: Ids[int], name: Ids[int]) -> _Sequence:
        if not 1 <= len(ids) <= self.context:
            raise ValueError(f"a sequence holds 1 to {self.context} tokens, was given {len(ids)}")
        return _Sequence(list(ids))

    def fork(self, sequence: _Sequence, length: int, name: Ids[int]) -> _Sequence:
        if not 1 <= length <= len(sequence.ids):
            raise ValueError(f"a fork keeps 1 to {len(sequence.ids)} tokens, was given {length}")
        return _Sequence(sequence.ids[:length])

    def extend(self, sequence: _Sequence, ids: Ids[int]) -> None:
        sequence.ids.extend(ids)

    async def decode(self, sequence: _Sequence, stop: frozenset[int], limit: int, sampling: Sampling) -> Decoded:
        """Raises ValueError for any temperature but 0."""
        if sampling.temperature != 0:
            raise ValueError(f"this engine is greedy: temperature is 0, was given {sampling.temperature}")
        limit = min(limit, self.context - len(sequence.ids))
        if limit < 1:
            raise ValueError(f"no room to decode: {len(sequence.ids)} of {self.context} tokens")
        ids, logprobs, cache, new = [], [], None, sequence.ids
        with torch.inference_mode():
            while len(ids) < limit and not (ids and ids[-1] in stop):
                out = self.model(torch.tensor([new]), past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache, logits_V = out.past_key_values, out.logits[0, -1]
                token = int(logits_V.argmax())
                ids.append(token)
                logprobs.append(float(logits_V.log_softmax(-1)[token]))
                new = [token]
        sequence.ids.extend(ids)
        return Decoded(tuple(ids), tuple(logprobs), ids[-1] in stop)

    def free(self, sequence: _Sequence) -> None:
        """Nothing is held."""
