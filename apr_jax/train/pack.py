"""Packing thread trees into rows, each shared prefix once (design: training on trees).

A thread's blocks form a small tree of tokens: a spawn's call and what follows the join both continue the
same prefix. Laid out depth first, every token carries

* its position on its path,
* the index of its predecessor on the path, whose logits predict it (-1 for a first token),
* the entry and exit number of its block in the walk: token i sees token j where
  ``enter[j] <= enter[i] < exit[j]`` and j is not later.

A child begins with a context of its own, so every thread is a piece by itself, and the same rule packs the
pieces of any trees into one row: one mask, one loss, no special case.

    prompt P, written W, call C, join J, written X  ->  row   P W C J X
    enter                                                     0 1 2 3 4
    exit                                                      5 5 3 5 5
"""

import dataclasses
import random
from collections.abc import Iterable, Sequence

import numpy as np

from apr_jax.threads import Block, Spawn, Thread, ThreadTree

ROW_FIELDS = ("tokens", "positions", "predecessors", "enter", "exit", "sampled", "logprobs", "share", "advantage")


@dataclasses.dataclass(frozen=True)
class Piece:
    """One thread laid out; every array has its n tokens, `nodes` counts its blocks."""

    tokens: np.ndarray  # int32
    positions: np.ndarray  # int32
    predecessors: np.ndarray  # int32, index within the piece, -1 for the first
    enter: np.ndarray  # int32
    exit: np.ndarray  # int32
    sampled: np.ndarray  # bool: the model wrote it (or would have: a solver's thread)
    logprobs: np.ndarray  # float32: under the distribution it was drawn from; 0 where forced or unknown
    share: np.ndarray  # float32: weight of each of its trained tokens (1 in SFT, GRPO's aggregation)
    advantage: np.ndarray  # float32: GRPO's, 0 in SFT
    nodes: int

    def __len__(self) -> int:
        return len(self.tokens)


def lay_out(thread: Thread, share: float = 1.0, advantage: float = 0.0) -> Piece:
    """The piece of one thread of ids, without its children."""
    placed: list[tuple[Block, int, bool]] = []  # block, position of its first token, in the context to the end?
    position = 0
    for item in thread.blocks:
        if isinstance(item, Spawn):
            ahead = position
            for block in item.call:
                placed.append((block, ahead, False))
                ahead += len(block)
            item = item.join
        placed.append((item, position, True))
        position += len(item)
    nodes = len(placed)
    columns = {name: [] for name in ("tokens", "positions", "predecessors", "enter", "exit", "sampled", "logprobs")}
    path_end = call_end = -1  # index of the last token on the context's path, and on the open call's
    for enter, (block, start, stays) in enumerate(placed):
        n, first = len(block), len(columns["tokens"])
        follows_call = not stays and enter > 0 and not placed[enter - 1][2]
        last = call_end if follows_call else path_end
        closes = nodes if stays else next(i for i in range(enter, nodes) if placed[i][2])
        columns["tokens"].extend(block.content)
        columns["positions"].extend(range(start, start + n))
        columns["predecessors"].extend([last, *range(first, first + n - 1)][:n])
        columns["enter"].extend([enter] * n)
        columns["exit"].extend([closes] * n)
        columns["sampled"].extend([block.sampled] * n)
        columns["logprobs"].extend(block.logprobs if block.logprobs is not None else [0.0] * n)
        end = first + n - 1 if n else last
        if stays:
            path_end = end
        call_end = end
    kinds = {"sampled": bool, "logprobs": np.float32}
    arrays = {name: np.asarray(column, kinds.get(name, np.int32)) for name, column in columns.items()}
    n = len(columns["tokens"])
    return Piece(
        **arrays, share=np.full(n, share, np.float32), advantage=np.full(n, advantage, np.float32), nodes=nodes
    )


def lay_out_tree(tree: ThreadTree) -> list[Piece]:
    """The pieces of all threads of a tree, root first."""
    return [lay_out(thread) for thread in tree.threads()]


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
    nothing, no predecessor and no weight; `row_count` adds empty rows."""
    rows = list(rows)
    B, T = row_count or len(rows), row_length
    packed = {name: np.zeros((B, T), np.int32) for name in ("tokens", "positions")}
    packed |= {name: np.full((B, T), -1, np.int32) for name in ("predecessors", "enter", "exit")}
    packed["sampled"] = np.zeros((B, T), bool)
    packed["logprobs"] = np.zeros((B, T), np.float32)
    packed["share"] = np.zeros((B, T), np.float32)
    packed["advantage"] = np.zeros((B, T), np.float32)
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
    resuming needs no state but the step. Every epoch packs a new order."""

    def __init__(self, pieces: Sequence[Piece], row_length: int, batch_rows: int, seed: int):
        self.pieces = [piece for piece in pieces if len(piece) <= row_length]
        self.too_long = len(pieces) - len(self.pieces)  # dropped, to be reported
        self.row_length, self.batch_rows, self.seed = row_length, batch_rows, seed
        if not self.pieces:
            raise ValueError(f"no thread fits a row of {row_length} tokens")
        self._epoch, self._first_step, self._rows = -1, 0, []

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        if step < self._first_step:
            self._epoch, self._first_step, self._rows = -1, 0, []
        while step >= self._first_step + len(self._rows) // self.batch_rows:
            self._first_step += len(self._rows) // self.batch_rows
            self._open_epoch(self._epoch + 1)
        row = (step - self._first_step) * self.batch_rows
        chosen = self._rows[row : row + self.batch_rows]
        return pack_rows([[self.pieces[i] for i in indices] for indices in chosen], self.row_length)

    def _open_epoch(self, epoch: int) -> None:
        rng = random.Random(f"{self.seed}/{epoch}")
        order = list(range(len(self.pieces)))
        rng.shuffle(order)
        rows = first_fit([len(self.pieces[i]) for i in order], self.row_length)
        rows = [[order[i] for i in row] for row in rows]
        rng.shuffle(rows)  # the last rows opened are the emptiest: not all at an epoch's end
        rows += rows[: -len(rows) % self.batch_rows] if len(rows) > self.batch_rows else rows * self.batch_rows
        self._epoch, self._rows = epoch, rows
