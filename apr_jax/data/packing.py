"""Packs thread trees into rows of tokens for training, with each shared prefix stored once.

The blocks of a thread form a small tree of tokens: a spawn's call continues a prefix, and the spawn's join continues
the same prefix. The *path* of a token runs from the first token of that tree to the token itself. `flatten_thread`
writes the tree depth first as a *segment*. Each token of a segment has

* its position on its path,
* the index of its predecessor, the token before it on its path, whose logits predict it (-1 for a first token),
* the entry number and the exit number of its block in the depth-first walk. Token i attends to token j where
  ``enter[j] <= enter[i] < exit[j]`` and j <= i.

A child that inherits its parent's context is another branch of the same segment. A child with a fresh context is a
segment of its own. A row holds segments of any trees. The same attention rule separates branches and segments, so one
mask and one loss serve all cases.

    prompt P, written W, call C, join J, written X  ->  row   P W C J X
    enter                                                     0 1 2 3 4
    exit                                                      5 5 3 5 5
"""

import dataclasses
import random
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import numpy as np

from apr_jax.data.store import BRANCH, CALL_FORCED, CALL_SAMPLED, END, JOIN, SAMPLED_ROLES, TreeStore, block_rows
from apr_jax.errors import UserError
from apr_jax.threads import Block, Thread, ThreadTree

Array = np.ndarray | jax.Array
_INTEGERS = ("tokens", "positions", "predecessors", "enter", "exit", "role")
_FLOATS = ("logprobs", "loss_weight", "kl_weight", "advantage")
_OPTIONAL = ("reference_logprobs", "old_logprobs")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedBatch:
    """B rows of T tokens; a row has some segments, then padding.

    A pytree of arrays [B, T]: NumPy arrays from `pack_rows`, JAX arrays inside a compiled function.
    """

    tokens: Array  # [B, T] int32
    positions: Array  # [B, T] int32, position on the token's path; 0 in padding
    predecessors: Array  # [B, T] int32, index in the row of the token before it on its path; -1: none
    enter: Array  # [B, T] int32, number of its block in the row; -1 in padding
    exit: Array  # [B, T] int32, number of the first block that no longer attends to it; -1 in padding
    role: Array  # [B, T] int32, role of its block (data/store.py); -1 in padding
    logprobs: Array  # [B, T] float32, under the distribution it was sampled from; 0 where forced or unknown
    loss_weight: Array  # [B, T] float32, weight in the loss if the token is trained on (1 in SFT); 0 in padding
    kl_weight: Array  # [B, T] float32, weight in the KL divergence from the reference model; 0 in padding
    advantage: Array  # [B, T] float32, GRPO's advantage; 0 in SFT
    reference_logprobs: Array | None = None  # [B, T] float32, under the model that GRPO began with; only with a KL term
    old_logprobs: Array | None = None  # [B, T] float32, under the trainer before the update; only with tis_clip

    @property
    def real(self) -> Array:
        """[B, T] bool: whether a token is not padding."""
        return self.exit > self.enter

    def check(self) -> None:
        """Raise ValueError that names the first broken invariant.

        * All arrays have the same shape and their documented dtypes.
        * Padding attends to nothing, and has no role and no weight. No token attends to padding, since padding has
          empty intervals.
        * The intervals [enter, exit) of tokens that attend to each other are nested.
        * The predecessor of a token is the last earlier token that it attends to.
        * The position of a token is the number of earlier tokens that it attends to.
        """
        shape = np.shape(self.tokens)
        for names, dtype in ((_INTEGERS, np.int32), (_FLOATS + _OPTIONAL, np.float32)):
            for name in names:
                values = getattr(self, name)
                if values is None and name in _OPTIONAL:
                    continue
                if (values.shape, values.dtype) != (shape, dtype) or len(shape) != 2:
                    raise ValueError(f"{name} is {values.dtype} {values.shape}, not {np.dtype(dtype)} {shape}")
        for row in range(shape[0]):
            if broken := self._broken(row):
                raise ValueError(f"row {row} of a batch: {broken}")

    def _broken(self, row: int) -> str | None:
        """Return the first invariant that a row breaks, or None."""
        enter_T, exit_T, predecessors_T = (np.asarray(x)[row] for x in (self.enter, self.exit, self.predecessors))
        T = len(enter_T)
        real_T = np.asarray(self.real)[row]
        sees_TxT = (enter_T <= enter_T[:, None]) & (enter_T[:, None] < exit_T)  # first axis: the token that attends
        before_TxT = sees_TxT & np.tri(T, k=-1, dtype=bool)
        last_T = np.where(before_TxT.any(axis=1), T - 1 - before_TxT[:, ::-1].argmax(axis=1), -1)
        role_T, positions_T = np.asarray(self.role)[row], np.asarray(self.positions)[row]
        weights_T = np.asarray(self.loss_weight)[row], np.asarray(self.kl_weight)[row]
        rules = {
            "padding sees a token": ~sees_TxT[~real_T].any(),
            "padding has a role": (role_T[~real_T] < 0).all() and (role_T[real_T] >= 0).all(),
            "padding has a weight": not any(weight_T[~real_T].any() for weight_T in weights_T),
            "intervals are not nested": (~sees_TxT | (exit_T[:, None] <= exit_T))[np.ix_(real_T, real_T)].all(),
            "a predecessor is not the last token seen before": (predecessors_T == last_T).all(),
            "a position is not the number of tokens seen before": (positions_T == before_TxT.sum(axis=1)).all(),
        }
        return next((rule for rule, holds in rules.items() if not holds), None)


@dataclasses.dataclass(frozen=True)
class Segment:
    """One thread and the children that inherit its context, flattened to n tokens."""

    tokens: np.ndarray  # [n] int32
    positions: np.ndarray  # [n] int32
    predecessors: np.ndarray  # [n] int32, index within the segment, -1 for the first
    enter: np.ndarray  # [n] int32
    exit: np.ndarray  # [n] int32
    role: np.ndarray  # [n] int32, role of its block (data/store.py)
    logprobs: np.ndarray  # [n] float32, under the distribution it was sampled from; 0 where forced or unknown
    loss_weight: np.ndarray  # [n] float32, weight in the loss if the token is trained on (1 in SFT)
    kl_weight: np.ndarray  # [n] float32, weight in the KL divergence from the reference model
    advantage: np.ndarray  # [n] float32, GRPO's advantage; 0 in SFT
    nodes: int  # number of blocks

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def sampled(self) -> np.ndarray:
        """[n] bool: whether a token was written by the model, or by a solver in the model's place."""
        return np.isin(self.role, SAMPLED_ROLES)


# (thread, number of one of its requests) -> a value for the tokens of that request. A thread makes a new request to the
# engine after each join (`Thread.request_tokens`).
PerRequest = Callable[[Thread, int], float]


def flatten_thread(
    thread: Thread,
    loss_weight: PerRequest = lambda thread, request: 1.0,
    advantage: float = 0.0,
    kl_weight: PerRequest | None = None,
) -> Segment:
    """Flatten a thread of token ids, with the children that inherit its context, to a segment.

    `loss_weight` and `kl_weight` (default: as `loss_weight`) give the weights of the tokens of each request. All
    tokens have the same `advantage`.
    """
    rows = list(block_rows(thread))
    tokens = [token for _, block, _, _ in rows for token in block.content]
    logprobs = [p for _, block, _, _ in rows for p in (block.logprobs or [0.0] * len(block))]
    blocks = np.array([(role, len(block), children) for _, block, role, children in rows], np.int32)
    segment = flatten_blocks(np.asarray(tokens, np.int32), blocks, np.asarray(logprobs, np.float32))
    writers = list(_writers(rows))
    for weights, of_request in ((segment.loss_weight, loss_weight), (segment.kl_weight, kl_weight or loss_weight)):
        of_blocks = np.asarray([of_request(whose, request) for whose, request in writers], np.float32)
        weights[:] = np.repeat(of_blocks, blocks[:, 1])
    segment.advantage[:] = advantage
    return segment


def _writers(rows: Iterable[tuple[Thread, Block, int, int]]) -> Iterator[tuple[Thread, int]]:
    """Yield, for each entry of `block_rows`, its thread and the number of the request that the block belongs to."""
    requests = [0]  # a stack: the request number of each open ancestor, then of the current thread
    for whose, _, role, _ in rows:
        if role == BRANCH:
            requests.append(0)
        yield whose, requests[-1]
        if role == END:
            requests.pop()
        elif role == JOIN:
            requests[-1] += 1


def flatten_blocks(tokens: np.ndarray, blocks: np.ndarray, logprobs: np.ndarray | None = None) -> Segment:
    """Flatten a thread to a segment from its ids [n] and its blocks [blocks, 3] of (role, tokens, children).

    See data/store.py for the roles. All weights are 1 and all advantages 0.
    """
    n, nodes = len(tokens), len(blocks)
    roles, lengths = blocks[:, 0], blocks[:, 1]
    stays = (roles != CALL_FORCED) & (roles != CALL_SAMPLED)
    first = np.cumsum(lengths) - lengths
    start, last, closes = (np.zeros(nodes, np.int32) for _ in range(3))
    position = next_position = 0  # the next position on the context's path, and on the open call's path
    path_end = call_end = -1  # index of the last token on the context's path, and on the open call's path
    parents: list[tuple[int, int]] = []  # a stack: (position, path_end) of the parent of each open branch
    for node, (role, length, at, stay) in enumerate(zip(*(x.tolist() for x in (roles, lengths, first, stays)))):
        if role == BRANCH:
            parents.append((position, path_end))
        elif role == END:
            position, path_end = parents.pop()
        if stay or node == 0 or stays[node - 1]:
            next_position, call_end = position, path_end
        start[node], last[node] = next_position, call_end
        next_position += length
        call_end = at + length - 1 if length else call_end
        if stay:
            position, path_end = next_position, call_end
    after = nodes  # the first later block that is not part of a call: a call's tokens are not visible from there on
    ends = [nodes]  # a stack: the end of the thread, then of each branch around the node
    for node in range(nodes - 1, -1, -1):
        if roles[node] == BRANCH:
            ends.pop()
        closes[node] = ends[-1] if stays[node] else after
        if roles[node] == END:
            ends.append(node)
        after = node if stays[node] else after
    index = np.arange(n, dtype=np.int32)
    predecessors = index - 1
    begun = lengths > 0
    predecessors[first[begun]] = last[begun]
    return Segment(
        tokens=tokens,
        positions=index + np.repeat(start - first, lengths).astype(np.int32),
        predecessors=predecessors,
        enter=np.repeat(np.arange(nodes, dtype=np.int32), lengths),
        exit=np.repeat(closes, lengths),
        role=np.repeat(roles, lengths),
        logprobs=np.zeros(n, np.float32) if logprobs is None else logprobs,
        loss_weight=np.ones(n, np.float32),
        kl_weight=np.ones(n, np.float32),
        advantage=np.zeros(n, np.float32),
        nodes=nodes,
    )


def flatten_tree(tree: ThreadTree) -> list[Segment]:
    """Flatten a tree to its segments, the root's first."""
    return [flatten_thread(thread) for thread in tree.threads() if not thread.inherits]


class StoredSegments(Sequence[Segment]):
    """The threads of a store as segments. Each is read from disk and flattened when it is indexed.

    `threads` selects threads by number; None selects all. `lengths` are the tokens of each segment.
    """

    def __init__(self, store: TreeStore, threads: np.ndarray | None = None):
        self.store = store
        self._threads = np.arange(len(store.thread_tokens)) if threads is None else np.asarray(threads)
        self.lengths = store.thread_tokens[self._threads]

    def __len__(self) -> int:
        return len(self._threads)

    def __getitem__(self, index: int) -> Segment:
        return flatten_blocks(*self.store.thread(int(self._threads[index])))


class MixedSegments(Sequence[Segment]):
    """A concatenation of several sequences of segments. `lengths` are the tokens of each segment."""

    def __init__(self, parts: Sequence[Sequence[Segment]]):
        self._parts = parts
        self._ends = np.cumsum([len(part) for part in parts])
        self.lengths = np.concatenate([segment_lengths(part) for part in parts])

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Segment:
        part = int(np.searchsorted(self._ends, index, side="right"))
        return self._parts[part][index - (int(self._ends[part - 1]) if part else 0)]


def segment_lengths(segments: Sequence[Segment]) -> np.ndarray:
    """Return the number of tokens of each segment, int64 [segments], without reading stored ids from disk."""
    if isinstance(segments, StoredSegments | MixedSegments):
        return segments.lengths
    return np.array([len(segment) for segment in segments], np.int64)


def first_fit(lengths: Sequence[int], row_length: int, open_rows: int = 32) -> list[list[int]]:
    """Assign items to rows by first-fit bin packing; return, for each row, the indices of its items.

    The lengths in a row sum to at most `row_length`. Only the last `open_rows` rows are searched for space. Raises
    ValueError for an item longer than a row: the caller filters, and counts, such items.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    lowest = 0  # rows with a lower number are closed
    for index, length in enumerate(lengths):
        if length > row_length:
            raise ValueError(f"item {index} has {length} tokens, a row holds {row_length}")
        for row in range(lowest, len(rows)):
            if room[row] >= length:
                rows[row].append(index)
                room[row] -= length
                break
        else:
            rows.append([index])
            room.append(row_length - length)
            lowest = max(lowest, len(rows) - open_rows)
    return rows


def pack_rows(rows: Iterable[Sequence[Segment]], row_length: int, row_count: int | None = None) -> PackedBatch:
    """Pack rows of segments into one batch. `row_count`, if given, is the number of rows: the rest are padding."""
    rows = list(rows)
    shape = (row_count or len(rows), row_length)
    padding = {"tokens": 0, "positions": 0} | dict.fromkeys(("predecessors", "enter", "exit", "role"), -1)
    packed = {name: np.full(shape, padding[name], np.int32) for name in _INTEGERS}
    packed |= {name: np.zeros(shape, np.float32) for name in _FLOATS}
    for b, segments in enumerate(rows):
        at = nodes = 0
        for segment in segments:
            span = slice(at, at + len(segment))
            for name, values in packed.items():
                values[b, span] = getattr(segment, name)
            packed["enter"][b, span] += nodes
            packed["exit"][b, span] += nodes
            packed["predecessors"][b, span] += np.where(segment.predecessors >= 0, at, 0)
            at, nodes = at + len(segment), nodes + segment.nodes
    return PackedBatch(**packed)


class PackedBatches:
    """Training batches by step: `batches[step]` is a pure function of (segments, seed, step).

    So a resumed run needs no state but its step. Each epoch packs the segments in a new order. Segments longer than a
    row are left out, and `too_long` counts them. Raises UserError where no segment fits a row.
    """

    def __init__(self, segments: Sequence[Segment], row_length: int, batch_rows: int, seed: int):
        self.row_length, self.batch_rows, self.seed = row_length, batch_rows, seed
        lengths = segment_lengths(segments)
        self._segments, self._lengths = segments, lengths.tolist()
        self._fitting = np.flatnonzero(lengths <= row_length).tolist()
        self.too_long = len(segments) - len(self._fitting)
        self.tokens = int(lengths[lengths <= row_length].sum())  # in one epoch
        if not self._fitting:
            raise UserError(
                f"no thread fits a row of {row_length} tokens: the shortest of {len(segments)} has "
                f"{lengths.min() if len(segments) else 0}"
            )
        self._epoch, self._first_step, self._rows = -1, 0, []

    def __getitem__(self, step: int) -> PackedBatch:
        return self.pack(self.rows(step))

    def rows(self, step: int) -> list[list[int]]:
        """Return the rows of batch number `step`, each as a list of segment numbers."""
        if step < self._first_step:
            self._epoch, self._first_step, self._rows = -1, 0, []
        while step >= self._first_step + len(self._rows) // self.batch_rows:
            self._first_step += len(self._rows) // self.batch_rows
            self._open_epoch(self._epoch + 1)
        row = (step - self._first_step) * self.batch_rows
        return self._rows[row : row + self.batch_rows]

    def steps_for(self, tokens: int, most: int) -> int:
        """Return how many batches, from the first on, together have at least `tokens` tokens; at most `most`."""
        step = 0
        while tokens > 0 and step < most:
            tokens -= sum(self._lengths[i] for indices in self.rows(step) for i in indices)
            step += 1
        return step

    def pack(self, rows: Sequence[Sequence[int]]) -> PackedBatch:
        """Pack rows of segment numbers into a batch."""
        return pack_rows([[self._segments[i] for i in indices] for indices in rows], self.row_length)

    def _open_epoch(self, epoch: int) -> None:
        rng = random.Random(f"{self.seed}/{epoch}")
        order = self._fitting.copy()
        rng.shuffle(order)
        rows = first_fit([self._lengths[i] for i in order], self.row_length)
        rows = [[order[i] for i in row] for row in rows]
        rng.shuffle(rows)  # otherwise each epoch would end with the emptiest rows, which are opened last
        rows += rows[: -len(rows) % self.batch_rows] if len(rows) > self.batch_rows else rows * self.batch_rows
        self._epoch, self._rows = epoch, rows
