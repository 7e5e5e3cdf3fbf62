"""Thread trees of ids on disk: shards of zarr3 arrays, each written whole or not at all, read by index.

A shard's bytes are a function of its trees alone, so it does not matter which process wrote it, or after how many
kills. A store is a folder of numbered shards; within one, a tree's threads follow each other depth first and a
thread's own blocks lie together, so that a thread is read without the rest of its tree. A child that inherits its
parent's context is no thread of its own here: it stands among its parent's blocks.

    00003/tokens    uint16 or uint32 [tokens]   the ids of all blocks, one after the other
          blocks    int32 [blocks, 3]           role, tokens, children (of a join, else 0)
          threads   int32 [threads, 2]          blocks, tokens
          trees     int64 [trees, 2]            threads, bytes of info
          info      uint8 [bytes]               each tree's `info` as JSON
          shard.json                            counts, and the sha256 of the arrays
"""

import array
import dataclasses
import hashlib
import itertools
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import tensorstore as ts

from apr_jax.errors import UserError
from apr_jax.io.files import whole
from apr_jax.threads.tree import Block, Spawn, Thread, ThreadTree

# What a block is to its thread. A call leaves the thread's context where its join comes in. A child that inherits its
# parent's context stands in the parent's rows, between the call and the join, from an empty BRANCH to an empty END.
FORCED, SAMPLED, CALL_FORCED, CALL_SAMPLED, JOIN, BRANCH, END = range(7)
SAMPLED_ROLES = (SAMPLED, CALL_SAMPLED)
ARRAYS = ("tokens", "blocks", "threads", "trees", "info")
_CHUNK = 1 << 16  # elements read and decompressed together
_CACHE_BYTES = 64 << 20  # of decompressed chunks kept while reading


def block_rows(thread: Thread) -> Iterator[tuple[Thread, Block, int, int]]:
    """The blocks of a thread and of the children that inherit from it, in the order they were written, as (whose,
    block, role, children of a join that have a context of their own)."""
    for item in thread.blocks:
        if not isinstance(item, Spawn):
            yield thread, item, SAMPLED if item.sampled else FORCED, 0
            continue
        for block in item.call:
            yield thread, block, CALL_SAMPLED if block.sampled else CALL_FORCED, 0
        for child in item.children:
            if child.inherits:
                yield child, _NOTHING, BRANCH, 0
                yield from block_rows(child)
                yield child, _NOTHING, END, 0
        yield thread, item.join, JOIN, sum(not child.inherits for child in item.children)


_NOTHING = Block((), sampled=False)


def write_shard(folder: Path, trees: Iterable[ThreadTree], counts: dict) -> dict:
    """Writes a shard of trees of ids at `folder`; returns what its shard.json holds, `counts` among it (read when
    `trees` has ended, so that a generator may count as it goes).

    Raises ValueError for a tree that a solver could not have made: the store keeps neither log-probabilities nor
    failures. OSError or ValueError of a full disk leave nothing at `folder`.
    """
    tokens = array.array("I")
    blocks, threads, sizes, infos = [], [], [], []
    for tree in trees:
        before = len(threads)
        for thread in tree.threads():
            if thread.failure is not None:
                raise ValueError(f"a store keeps solvers' trees, was given a thread that failed: {thread.failure}")
            if thread.inherits:
                continue
            rows = list(block_rows(thread))
            start = len(tokens)
            for _, block, role, children in rows:
                if block.logprobs is not None:
                    raise ValueError("a store keeps solvers' trees, was given log-probabilities")
                tokens.extend(block.content)
                blocks.append((role, len(block), children))
            threads.append((len(rows), len(tokens) - start))
        infos.append(json.dumps(tree.info, separators=(",", ":")).encode())
        sizes.append((len(threads) - before, len(infos[-1])))
    wide = np.frombuffer(tokens, np.uint32)
    arrays = {
        "tokens": wide if wide.max(initial=0) > np.iinfo(np.uint16).max else wide.astype(np.uint16),
        "blocks": np.asarray(blocks, np.int32).reshape(-1, 3),
        "threads": np.asarray(threads, np.int32).reshape(-1, 2),
        "trees": np.asarray(sizes, np.int64).reshape(-1, 2),
        "info": np.frombuffer(b"".join(infos), np.uint8),
    }
    digest = hashlib.sha256()
    for name in ARRAYS:
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}\n".encode() + arrays[name].tobytes())
    described = {**counts, "threads": len(threads), "tokens": len(tokens), "sha256": digest.hexdigest()}
    with whole(folder) as part:
        part.mkdir()
        for name, values in arrays.items():
            _create(part / name, values)
        (part / "shard.json").write_text(json.dumps(described))
        shutil.rmtree(folder, ignore_errors=True)
    return described


def read_counts(folder: Path) -> dict | None:
    """A shard's shard.json, None where there is no whole shard."""
    try:
        return json.loads((folder / "shard.json").read_text())
    except (FileNotFoundError, ValueError):
        return None


def _create(path: Path, values: np.ndarray) -> None:
    chunk = (max(1, _CHUNK // max(1, values[:1].size)), *values.shape[1:])
    whole = (-(-max(1, len(values)) // chunk[0]) * chunk[0], *values.shape[1:])  # one file an array
    inner = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "zstd", "configuration": {"level": 3}}]
    sharding = {"name": "sharding_indexed", "configuration": {"chunk_shape": chunk, "codecs": inner}}
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": str(path)},
        "metadata": {
            "shape": values.shape,
            "data_type": values.dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": whole}},
            "codecs": [sharding],
        },
    }
    ts.open(spec, create=True).result().write(values).result()


@dataclasses.dataclass(frozen=True)
class _Shard:
    path: Path
    arrays: dict[str, ts.TensorStore]
    first_tree: int
    first_thread: int


class TreeStore(Sequence[ThreadTree]):
    """All trees of a store by number, and all its threads. In memory are two numbers a thread and two a tree.

    Raises FileNotFoundError where there is no shard, ValueError where one is broken.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        paths = sorted(path for path in self.folder.glob("*") if path.name.isdigit())
        if not paths:
            raise FileNotFoundError(f"no trees under {self.folder}")
        context = ts.Context({"cache_pool": {"total_bytes_limit": _CACHE_BYTES}})
        self._shards: list[_Shard] = []
        threads, trees = [], []
        first_tree = first_thread = 0
        for path in paths:
            try:
                opened = {name: _open(path.absolute() / name, context) for name in ARRAYS}
                own_threads, own_trees = (opened[name].read().result() for name in ("threads", "trees"))
            except ValueError as error:
                raise _broken(path, error) from None
            self._shards.append(_Shard(path, opened, first_tree, first_thread))
            threads.append(np.concatenate([_starts(own_threads), own_threads[:, 1:]], axis=1))
            trees.append(np.concatenate([_starts(own_trees), own_trees], axis=1))
            first_tree += len(own_trees)
            first_thread += len(own_threads)
        self._threads = np.concatenate(threads)  # [threads, 3] first block and token in its shard, tokens
        self._trees = np.concatenate(trees)  # [trees, 4] first thread and info byte in its shard, and how many
        self._tree_shards = [shard.first_tree for shard in self._shards]
        self._thread_shards = [shard.first_thread for shard in self._shards]
        self.tree_threads = np.concatenate([[0], np.cumsum(self._trees[:, 2])])  # a tree's first thread, [trees + 1]

    def __len__(self) -> int:
        return len(self._trees)

    @property
    def thread_tokens(self) -> np.ndarray:
        """Own tokens of every thread [threads], calls and joins included: the length of its piece."""
        return self._threads[:, 2]

    def info(self, tree: int) -> dict:
        shard = self._shards[np.searchsorted(self._tree_shards, tree, side="right") - 1]
        _, start, _, length = self._trees[tree].tolist()
        return json.loads(shard.arrays["info"][start : start + length].read().result().tobytes())

    def thread(self, thread: int) -> tuple[np.ndarray, np.ndarray]:
        """A thread's own ids int32 [n] and its blocks int32 [blocks, 3]: role, tokens, children."""
        shard = self._shards[np.searchsorted(self._thread_shards, thread, side="right") - 1]
        block, token, length = self._threads[thread].tolist()
        last = thread + 1 - shard.first_thread == shard.arrays["threads"].shape[0]
        end = shard.arrays["blocks"].shape[0] if last else int(self._threads[thread + 1, 0])
        tokens = shard.arrays["tokens"][token : token + length].read()
        blocks = shard.arrays["blocks"][block:end].read()
        try:
            return tokens.result().astype(np.int32), blocks.result()
        except ValueError as error:
            raise _broken(shard.path, error) from None

    def __getitem__(self, tree: int) -> ThreadTree:
        if not 0 <= tree < len(self):
            raise IndexError(f"the store holds {len(self)} trees, was asked for tree {tree}")
        following = iter(range(self.tree_threads[tree], self.tree_threads[tree + 1]))

        def build() -> Thread:
            tokens, rows = self.thread(next(following))
            return within(iter(rows.tolist()), iter(tokens.tolist()), inherits=False)

        def within(rows: Iterator[list[int]], tokens: Iterator[int], inherits: bool) -> Thread:
            items: list[Block | Spawn] = []
            call: list[Block] = []
            branches: list[Thread] = []
            for role, length, children in rows:
                content = tuple(itertools.islice(tokens, length))
                if role in (CALL_FORCED, CALL_SAMPLED):
                    call.append(Block(content, role == CALL_SAMPLED))
                elif role == BRANCH:
                    branches.append(within(rows, tokens, inherits=True))
                elif role == END:
                    break
                elif role == JOIN:
                    fresh = (build() for _ in range(children))
                    items.append(Spawn(tuple(call), (*branches, *fresh), Block(content, False)))
                    call, branches = [], []
                else:
                    items.append(Block(content, role == SAMPLED))
            return Thread(tuple(items), inherits=inherits)

        return ThreadTree(build(), self.info(tree))


def _open(path: Path, context: ts.Context) -> ts.TensorStore:
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}, "recheck_cached_data": "open"}
    return ts.open(spec, read=True, context=context).result()


def _broken(path: Path, error: ValueError) -> ValueError:
    return UserError(f"{path} is broken: {str(error).splitlines()[0][:200]}")


def _starts(counts: np.ndarray) -> np.ndarray:
    """Where each row's parts begin, of how many parts each row has: int64, as `counts` [n, k]."""
    return np.cumsum(counts, axis=0, dtype=np.int64) - counts
