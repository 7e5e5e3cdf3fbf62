"""Packing thread trees into rows, each shared prefix once.

A thread's blocks form a small tree of tokens: a spawn's call and what follows the join both continue the
same prefix. Laid out depth first, every token carries

* its position on its path,
* the index of its predecessor on the path, whose logits predict it (-1 for a first token),
* the entry and exit number of its block in the walk: token i sees token j where
  ``enter[j] <= enter[i] < exit[j]`` and j is not later.

A child that inherits its parent's context is one more branch of the prefix. A child that begins with a context of
its own is a piece by itself, and the same rule packs the pieces of any trees into one row: one mask, one loss, no
special case.

    prompt P, written W, call C, join J, written X  ->  row   P W C J X
    enter                                                     0 1 2 3 4
    exit                                                      5 5 3 5 5
"""

import dataclasses
import random
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from apr_jax.data.store import BRANCH, CALL_FORCED, CALL_SAMPLED, END, JOIN, SAMPLED_ROLES, TreeStore, block_rows
from apr_jax.errors import UserError
from apr_jax.threads import Block, Thread, ThreadTree

ROW_FIELDS = (
    "tokens", "positions", "predecessors", "enter", "exit", "role", "logprobs", "share", "kl_share", "advantage",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Piece:
    """One thread laid out with those that inherit from it; every array has its n tokens, `nodes` counts its blocks."""

    tokens: np.ndarray  # int32
    positions: np.ndarray  # int32
    predecessors: np.ndarray  # int32, index within the piece, -1 for the first
    enter: np.ndarray  # int32
    exit: np.ndarray  # int32
    role: np.ndarray  # int32: who wrote it and where, a role of threads.store
    logprobs: np.ndarray  # float32: under the distribution it was drawn from; 0 where forced or unknown
    share: np.ndarray  # float32: weight of each of its trained tokens (1 in SFT, GRPO's aggregation)
    kl_share: np.ndarray  # float32: the same for the divergence from a reference
    advantage: np.ndarray  # float32: GRPO's, 0 in SFT
    nodes: int

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def sampled(self) -> np.ndarray:
        """bool: the model wrote it (or would have: a solver's thread)."""
        return np.isin(self.role, SAMPLED_ROLES)


# (thread, number of a request of it, as in `Thread.request_tokens`) -> a value of the tokens that it wrote
PerRequest = Callable[[Thread, int], float]


def lay_out(
    thread: Thread,
    share: PerRequest = lambda thread, request: 1.0,
    advantage: Callable[[Thread], float] = lambda thread: 0.0,
    kl_share: PerRequest | None = None,
) -> Piece:
    """The piece of one thread of ids and the children that inherit from it. Of each request of theirs, `share` weighs
    the tokens and `kl_share` (default: the same) their divergence; of each thread, `advantage` says how well it did."""
    rows = list(block_rows(thread))
    tokens = [token for _, block, _, _ in rows for token in block.content]
    logprobs = [p for _, block, _, _ in rows for p in (block.logprobs or [0.0] * len(block))]
    blocks = np.array([(role, len(block), children) for _, block, role, children in rows], np.int32)
    piece = lay_out_blocks(np.asarray(tokens, np.int32), blocks, np.asarray(logprobs, np.float32))
    writers = list(_writers(rows))
    columns = (
        (piece.share, [share(whose, request) for whose, request in writers]),
        (piece.kl_share, [(kl_share or share)(whose, request) for whose, request in writers]),
        (piece.advantage, [advantage(whose) for whose, _ in writers]),
    )
    for values, of_blocks in columns:
        values[:] = np.repeat(np.asarray(of_blocks, np.float32), blocks[:, 1])
    return piece


def _writers(rows: Iterable[tuple[Thread, Block, int, int]]) -> Iterator[tuple[Thread, int]]:
    """Of each of `block_rows` its thread and the number of the request that the block belongs to."""
    requests = [0]  # of the thread, and above it of those whose child it is
    for whose, _, role, _ in rows:
        if role == BRANCH:
            requests.append(0)
        yield whose, requests[-1]
        if role == END:
            requests.pop()
        elif role == JOIN:
            requests[-1] += 1


def lay_out_blocks(tokens: np.ndarray, blocks: np.ndarray, logprobs: np.ndarray | None = None) -> Piece:
    """The piece of a thread's own ids [n] and blocks [blocks, 3] (role, tokens, children; see threads.store)."""
    n, nodes = len(tokens), len(blocks)
    roles, lengths = blocks[:, 0], blocks[:, 1]
    stays = (roles != CALL_FORCED) & (roles != CALL_SAMPLED)
    first = np.cumsum(lengths) - lengths
    start, last, closes = (np.zeros(nodes, np.int32) for _ in range(3))
    position = ahead = 0  # where the context, and the open call, go on
    path_end = call_end = -1  # index of the last token on the context's path, and on the open call's
    parents: list[tuple[int, int]] = []  # of open branches: where the parent's context goes on, and its path's end
    for node, (role, length, at, stay) in enumerate(zip(*(x.tolist() for x in (roles, lengths, first, stays)))):
        if role == BRANCH:
            parents.append((position, path_end))
        elif role == END:
            position, path_end = parents.pop()
        if stay or node == 0 or stays[node - 1]:
            ahead, call_end = position, path_end
        start[node], last[node] = ahead, call_end
        ahead += length
        call_end = at + length - 1 if length else call_end
        if stay:
            position, path_end = ahead, call_end
    after = nodes  # where the context goes on after a call
    ends = [nodes]  # of the whole, and of the branches around a node
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
    return Piece(
        tokens=tokens,
        positions=index + np.repeat(start - first, lengths).astype(np.int32),
        predecessors=predecessors,
        enter=np.repeat(np.arange(nodes, dtype=np.int32), lengths),
        exit=np.repeat(closes, lengths),
        role=np.repeat(roles, lengths),
        logprobs=np.zeros(n, np.float32) if logprobs is None else logprobs,
        share=np.ones(n, np.float32),
        kl_share=np.ones(n, np.float32),
        advantage=np.zeros(n, np.float32),
        nodes=nodes,
    )


def lay_out_tree(tree: ThreadTree) -> list[Piece]:
    """The pieces of a tree, its root's first."""
    return [lay_out(thread) for thread in tree.threads() if not thread.inherits]


class StoredPieces(Sequence[Piece]):
    """Threads of a store, laid out when they are asked for: their ids stay on disk. `threads` picks some of them by
    number; None: all."""

    def __init__(self, store: TreeStore, threads: np.ndarray | None = None):
        self.store = store
        self._threads = np.arange(len(store.thread_tokens)) if threads is None else np.asarray(threads)
        self.lengths = store.thread_tokens[self._threads]

    def __len__(self) -> int:
        return len(self._threads)

    def __getitem__(self, index: int) -> Piece:
        return lay_out_blocks(*self.store.thread(int(self._threads[index])))


def piece_lengths(pieces: Sequence[Piece]) -> np.ndarray:
    """Tokens of each piece [pieces], without laying out what lies on disk."""
    return pieces.lengths if isinstance(pieces, StoredPieces) else np.array([len(piece) for piece in pieces], np.int64)


def first_fit(lengths: Sequence[int], row_length: int, open_rows: int = 32) -> list[list[int]]:
    """Rows of indices into `lengths`, each row's sum at most `row_length`; at most `open_rows` are looked
    at for a place. Raises ValueError for an item longer than a row: filter, and count, those before."""
    rows: list[list[int]] = []
    room: list[int] = []
    lowest = 0  # rows before it are closed
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


def pack_rows(rows: Iterable[Sequence[Piece]], row_length: int, row_count: int | None = None) -> dict[str, np.ndarray]:
    """Rows of pieces as arrays [B, T] by the names of `ROW_FIELDS`. Padding has an interval that sees
    nothing, no predecessor, no role and no weight; `row_count` adds empty rows."""
    rows = list(rows)
    B, T = row_count or len(rows), row_length
    packed = {name: np.zeros((B, T), np.int32) for name in ("tokens", "positions")}
    packed |= {name: np.full((B, T), -1, np.int32) for name in ("predecessors", "enter", "exit", "role")}
    packed |= {name: np.zeros((B, T), np.float32) for name in ("logprobs", "share", "kl_share", "advantage")}
    for b, pieces in enumerate(rows):
        at = nodes = 0
        for piece in pieces:
            span = slice(at, at + len(piece))
            for name in ROW_FIELDS:
                packed[name][b, span] = getattr(piece, name)
            packed["enter"][b, span] += nodes
            packed["exit"][b, span] += nodes
            packed["predecessors"][b, span] += np.where(piece.predecessors >= 0, at, 0)
            at, nodes = at + len(piece), nodes + piece.nodes
    return packed


class PackedBatches:
    """Batches of packed rows: `batches[step]` is a pure function of (pieces, seed, step), so that
    resuming needs no state but the step. Every epoch packs a new order. Pieces longer than a row are left out, and
    counted in `too_long`: whoever trains on these says so."""

    def __init__(self, pieces: Sequence[Piece], row_length: int, batch_rows: int, seed: int):
        self.row_length, self.batch_rows, self.seed = row_length, batch_rows, seed
        lengths = piece_lengths(pieces)
        self._pieces, self._lengths = pieces, lengths.tolist()
        self._fitting = np.flatnonzero(lengths <= row_length).tolist()
        self.too_long = len(pieces) - len(self._fitting)
        self.tokens = int(lengths[lengths <= row_length].sum())  # of one epoch
        if not self._fitting:
            raise UserError(
                f"no thread fits a row of {row_length} tokens: the shortest of {len(pieces)} has "
                f"{lengths.min() if len(pieces) else 0}"
            )
        self._epoch, self._first_step, self._rows = -1, 0, []

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        return self.pack(self.rows(step))

    def rows(self, step: int) -> list[list[int]]:
        """The rows of a batch, as numbers of pieces."""
        if step < self._first_step:
            self._epoch, self._first_step, self._rows = -1, 0, []
        while step >= self._first_step + len(self._rows) // self.batch_rows:
            self._first_step += len(self._rows) // self.batch_rows
            self._open_epoch(self._epoch + 1)
        row = (step - self._first_step) * self.batch_rows
        return self._rows[row : row + self.batch_rows]

    def steps_for(self, tokens: int, most: int) -> int:
        """How many batches it takes, from the first on, to have so many tokens, or `most`."""
        step = 0
        while tokens > 0 and step < most:
            tokens -= sum(self._lengths[i] for indices in self.rows(step) for i in indices)
            step += 1
        return step

    def pack(self, rows: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
        """Some rows, as arrays."""
        return pack_rows([[self._pieces[i] for i in indices] for indices in rows], self.row_length)

    def _open_epoch(self, epoch: int) -> None:
        rng = random.Random(f"{self.seed}/{epoch}")
        order = self._fitting.copy()
        rng.shuffle(order)
        rows = first_fit([self._lengths[i] for i in order], self.row_length)
        rows = [[order[i] for i in row] for row in rows]
        rng.shuffle(rows)  # the last rows opened are the emptiest: not all at an epoch's end
        rows += rows[: -len(rows) % self.batch_rows] if len(rows) > self.batch_rows else rows * self.batch_rows
        self._epoch, self._rows = epoch, rows
