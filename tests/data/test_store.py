"""Tests of the store of trees: trees are read back unchanged, shards are complete, and equal trees give equal bytes."""

import random

import pytest

from apr_jax.data.store import TreeStore, block_rows, read_counts, write_shard
from apr_jax.threads import Block, Spawn, Thread, ThreadTree, map_blocks
from tests.tiny import random_thread


def random_trees(count, seed=0):
    rng = random.Random(seed)
    trees = []
    for index in range(count):
        # A store keeps neither failures nor log-probabilities, and every spawn has its join.
        thread = random_thread(rng, depth=3, inherit=index % 3 / 3)
        thread = map_blocks(thread, lambda block: Block(tuple(block.content), block.sampled))
        trees.append(ThreadTree(_without_failures(thread), {"index": index, "found": [0] * (index % 3)}))
    return trees


def _without_failures(thread):
    blocks = tuple(
        Spawn(item.call, tuple(map(_without_failures, item.children)), Block(item.join.content, False))
        if isinstance(item, Spawn)
        else item
        for item in thread.blocks
    )
    return Thread(blocks, inherits=thread.inherits)


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_trees_are_read_back_unchanged(tmp_path):
    trees = random_trees(60)
    for number in range(3):
        write_shard(tmp_path / f"{number:05d}", trees[20 * number : 20 * number + 20], {})
    store = TreeStore(tmp_path)
    assert len(store) == 60
    for index in random.Random(1).sample(range(60), 60):  # in any order
        assert store[index] == trees[index]
        assert store.info(index) == trees[index].info


def test_a_thread_is_read_without_its_tree(tmp_path):
    trees = random_trees(30)
    write_shard(tmp_path / "00000", trees[:10], {})
    write_shard(tmp_path / "00001", [], {})  # a shard from which every tree was dropped
    write_shard(tmp_path / "00002", trees[10:], {})
    store = TreeStore(tmp_path)
    threads = [thread for tree in trees for thread in tree.threads() if not thread.inherits]
    assert len(threads) == len(store.thread_tokens) == store.tree_threads[-1]
    for index, thread in enumerate(threads):
        own = [block for _, block, _, _ in block_rows(thread)]
        tokens, blocks = store.thread(index)
        assert tokens.tolist() == [token for block in own for token in block.content]
        assert len(tokens) == store.thread_tokens[index]
        assert blocks[:, 1].tolist() == [len(block) for block in own]


def test_the_bytes_depend_on_the_trees_alone(tmp_path):
    one = write_shard(tmp_path / "one" / "0", random_trees(5), {"trees": 5})
    two = write_shard(tmp_path / "two" / "0", iter(random_trees(5)), {"trees": 5})
    other = write_shard(tmp_path / "other" / "0", random_trees(5, seed=1), {"trees": 5})
    assert one == two == read_counts(tmp_path / "one" / "0")
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert one["sha256"] != other["sha256"]


def test_ids_above_16_bits_are_read_back_unchanged(tmp_path):
    tree = ThreadTree(Thread((Block((1, 70_000, 128_255), False), Block((2,), True))), {})
    write_shard(tmp_path / "0", [tree], {})
    assert TreeStore(tmp_path)[0] == tree


def test_a_shard_that_fails_leaves_nothing(tmp_path):
    def trees():
        yield from random_trees(3)
        raise OSError("the disk is full")

    with pytest.raises(OSError):
        write_shard(tmp_path / "00000", trees(), {})
    assert read_counts(tmp_path / "00000") is None and not list(tmp_path.iterdir())


def test_failures_and_log_probabilities_are_refused(tmp_path):
    failed = Thread((Block((1,), False),), failure="length")
    sampled = Thread((Block((1,), False), Block((2,), True, (-0.5,))))
    for thread, says in ((failed, "length"), (sampled, "log-probabilities")):
        with pytest.raises(ValueError, match=says):
            write_shard(tmp_path / "0", [ThreadTree(thread)], {})


def test_a_missing_store_a_broken_shard_and_a_wrong_index_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=tmp_path.name):
        TreeStore(tmp_path)
    write_shard(tmp_path / "00000", random_trees(4), {})
    with pytest.raises(IndexError, match="4 trees, .* tree 4"):
        TreeStore(tmp_path)[4]
    tokens = tmp_path / "00000" / "tokens" / "c" / "0"
    tokens.write_bytes(tokens.read_bytes()[:-20])
    with pytest.raises(ValueError, match="00000 is broken"):
        TreeStore(tmp_path)[0]
    (tmp_path / "00000" / "trees" / "zarr.json").write_bytes(b"{")
    with pytest.raises(ValueError, match="00000 is broken"):
        TreeStore(tmp_path)
