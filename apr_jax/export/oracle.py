"""An `Engine` on transformers' batched `generate`, greedy: the reference for checks and timings of our engine."""

import asyncio
import dataclasses
from collections.abc import Sequence as Ids

from apr_jax.errors import UserError
from apr_jax.threads.engine import Decoded, Sampling, Watch


def import_torch():
    """Return the module torch, which only comparisons with transformers need. Raises UserError if it is missing."""
    try:
        import torch
    except ImportError:
        raise UserError(
            "torch is needed to compare with transformers: python -m pip install 'torch>=2.13', the extra `check`"
        ) from None
    return torch


@dataclasses.dataclass
class _Sequence:
    ids: list[int]


@dataclasses.dataclass
class _Request:
    sequence: _Sequence
    limit: int
    future: asyncio.Future


class TransformersEngine:
    """An `Engine` on a causal model of transformers. All waiting requests form one batch of `generate`, which lasts as
    long as its longest request. A sequence is just its ids, so that no cache is ever cut or shared. Decoding is greedy,
    and all requests must have the same stop tokens."""

    def __init__(self, model, context: int, batch: int = 64):
        self.model, self.context, self.batch = model, context, batch
        self._torch = import_torch()
        self._waiting: list[_Request] = []
        self._stop: frozenset[int] = frozenset()
        self._loop: asyncio.Task | None = None

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

    async def decode(
        self, sequence: _Sequence, stop: frozenset[int], limit: int, sampling: Sampling, watch: Watch | None = None
    ) -> Decoded:
        """Decode greedily, until a stop token, `limit` new tokens or the end of the context. `watch` is called once,
        with all ids. Raises ValueError for any temperature but 0, and if the context is full."""
        if sampling.temperature != 0:
            raise ValueError(f"this engine is greedy: temperature is 0, was given {sampling.temperature}")
        limit = min(limit, self.context - len(sequence.ids))
        if limit < 1:
            raise ValueError(f"no room to decode: {len(sequence.ids)} of {self.context} tokens")
        request = _Request(sequence, limit, asyncio.get_running_loop().create_future())
        self._waiting.append(request)
        self._stop = stop
        if self._loop is None or self._loop.done():
            self._loop = asyncio.create_task(self._serve())
        decoded = await request.future
        if watch is not None:
            watch(0, decoded.ids)
        return decoded

    def free(self, sequence: _Sequence) -> None:
        """Do nothing: a sequence holds no resources."""

    async def _serve(self) -> None:
        while self._waiting:
            for _ in range(4):  # lets the runners of finished requests ask for the next ones, to fill the batch
                await asyncio.sleep(0)
            requests, self._waiting = self._waiting[: self.batch], self._waiting[self.batch :]
            try:
                decoded = self._generate(requests)
            except Exception as error:
                for request in (*requests, *self._waiting):
                    if not request.future.done():
                        stopped = RuntimeError(f"the engine stopped: {error!r}")
                        stopped.__cause__ = error
                        request.future.set_exception(stopped)
                self._waiting.clear()
                raise
            for request, result in zip(requests, decoded):
                request.sequence.ids.extend(result.ids)
                if not request.future.done():
                    request.future.set_result(result)

    def _generate(self, requests: list[_Request]) -> list[Decoded]:
        torch = self._torch
        longest = max(len(request.sequence.ids) for request in requests)
        prompts = torch.zeros(len(requests), longest, dtype=torch.long)
        seen = torch.zeros_like(prompts)
        for row, request in enumerate(requests):
            ids = request.sequence.ids
            prompts[row, longest - len(ids) :] = torch.tensor(ids)
            seen[row, longest - len(ids) :] = 1
        with torch.inference_mode():
            out = self.model.generate(
                prompts, attention_mask=seen, max_new_tokens=max(request.limit for request in requests),
                do_sample=False, eos_token_id=sorted(self._stop) or None, pad_token_id=0,
                return_dict_in_generate=True, output_logits=True,
            )  # fmt: skip
        tokens_BxT = out.sequences[:, longest:]
        logprobs_BxT = torch.stack(
            [step.log_softmax(-1).gather(1, tokens_BxT[:, [t]])[:, 0] for t, step in enumerate(out.logits)], dim=1
        )
        return [self._decoded(request, *row) for request, row in zip(requests, zip(tokens_BxT, logprobs_BxT))]

    def _decoded(self, request: _Request, tokens_T, logprobs_T) -> Decoded:
        """Cut one request's row of the batch at its first stop token or its own limit."""
        ids = tokens_T[: request.limit].tolist()
        end = next((at + 1 for at, token in enumerate(ids) if token in self._stop), len(ids))
        logprobs = tuple(logprobs_T[:end].tolist())
        return Decoded(tuple(ids[:end]), logprobs, ids[end - 1] in self._stop, logprobs)
