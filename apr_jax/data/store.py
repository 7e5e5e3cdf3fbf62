"""Stores thread trees of token ids on disk and reads them by index.

A store is a folder of numbered shards. A shard is a folder of zarr3 arrays, written completely or not at all. Its bytes
are a function of its trees alone: neither the process that writes it nor earlier kills change them.

Within a shard, the threads of a tree are stored depth first. The blocks of a thread are stored together, so a thread
can be read without the rest of its tree. A child that inherits its parent's context is not stored as a thread: its
blocks are stored among its parent's blocks.

    00003/tokens    uint16 or uint32 [tokens]   the ids of all blocks, concatenated
          blocks    int32 [blocks, 3]           per block: role, tokens, children (of a join, else 0)
          threads   int32 [threads, 2]          per thread: blocks, tokens
          trees     int64 [trees, 2]            per tree: threads, info bytes
          info      uint8 [bytes]               the `info` of each tree as JSON
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

# The role of a block in its thread. A call is in the thread's context only until its join replaces it. A child that
# inherits its parent's context is stored in the parent's rows, between the call and the join: an empty BRANCH block,
# the child's blocks, an empty END block.
FORCED, SAMPLED, CALL_FORCED, CALL_SAMPLED, JOIN, BRANCH, END = range(7)
SAMPLED_ROLES = (SAMPLED, CALL_SAMPLED)
ARRAYS = ("tokens", "blocks", "threads", "trees", "info")
_CHUNK = 1 << 16  # elements that are read and decompressed together
_CACHE_BYTES = 64 << 20  # size of the cache of decompressed chunks


def block_rows(thread: Thread) -> Iterator[tuple[Thread, Block, int, int]]:
    """Yield the blocks of a thread and of the children that inherit its context, in the order of writing.

    Each entry is (thread that has the block, block, role, children). `children` is, for a join, the number of joined
    children that start with a fresh context; 0 for any other role.
    """
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
    """Write trees of token ids as a shard at `folder`, and return the content of its shard.json.

    The entries of `counts` are part of it. They are read after `trees` is exhausted, so a generator may update them
    while it yields.

    Raises ValueError for a tree with log-probabilities or failures, which a store cannot keep; a solver's tree has
    none. After any error, such as OSError or ValueError from a full disk, nothing is left at `folder`.
    """
    tokens = array.array("I")
    blocks, threads, sizes, infos = [], [], [], []
    for tree in trees:
        before = len(threads)
        for thread in tree.threads():
            if thread.failure is not None:
                raise ValueError(f"a store keeps trees without failures, was given a failure: {thread.failure}")
            if thread.inherits:
                continue
            rows = list(block_rows(thread))
            start = len(tokens)
            for _, block, role, children in rows:
                if block.logprobs is not None:
                    raise ValueError("a store keeps trees without log-probabilities, was given a block with some")
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
    """Return the content of a shard's shard.json, or None where there is no complete shard."""
    try:
        return json.loads((folder / "shard.json").read_text())
    except (FileNotFoundError, ValueError):
        return None


def _create(path: Path, values: np.ndarray) -> None:
    chunk = (max(1, _CHUNK // max(1, values[:1].size)), *values.shape[1:])
    file_shape = (-(-max(1, len(values)) // chunk[0]) * chunk[0], *values.shape[1:])  # one file holds the whole array
    inner = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "zstd", "configuration": {"level": 3}}]
    sharding = {"name": "sharding_indexed", "configuration": {"chunk_shape": chunk, "codecs": inner}}
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": str(path)},
        "metadata": {
            "shape": values.shape,
            "data_type": values.dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": file_shape}},
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
    """The trees of a store as a read-only sequence, and its threads by number.

    Token ids stay on disk; memory holds a few integers for each thread and each tree. Raises FileNotFoundError where
    the folder has no shard, and UserError, also while reading, where a shard is broken.
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
        self._threads = np.concatenate(threads)  # [threads, 3]: first block and token in its shard; tokens
        self._trees = np.concatenate(trees)  # [trees, 4]: first thread and info byte in its shard; threads, info bytes
        self._tree_shards = [shard.first_tree for shard in self._shards]
        self._thread_shards = [shard.first_thread for shard in self._shards]
        # [trees + 1]: the number of each tree's first thread; the last entry is the number of all threads.
        self.tree_threads = np.concatenate([[0], np.cumsum(self._trees[:, 2])])

    def __len__(self) -> int:
        return len(self._trees)

    @property
    def thread_tokens(self) -> np.ndarray:
        """The number of tokens of each thread's segment, [threads]: its calls, joins and inheriting children count."""
        return self._threads[:, 2]

    def info(self, tree: int) -> dict:
        """Return the `info` of tree number `tree` without reading its token ids."""
        shard = self._shards[np.searchsorted(self._tree_shards, tree, side="right") - 1]
        _, start, _, length = self._trees[tree].tolist()
        return json.loads(shard.arrays["info"][start : start + length].read().result().tobytes())

    def thread(self, thread: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the token ids of a thread, int32 [n], and its blocks, int32 [blocks, 3] of (role, tokens, children).

        Threads are numbered through the whole store. Raises UserError where the shard is broken.
        """
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
    """Return the exclusive cumulative sum of `counts` [n, k] along its first axis, as int64."""
    return np.cumsum(counts, axis=0, dtype=np.int64) - counts
