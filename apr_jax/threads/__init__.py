"""Threads that spawn children and join their results: the tree, the task protocol, the engine contract, the runner."""

from apr_jax.threads.protocol import MalformedSpawn, SpawnRequest, TaskProtocol
from apr_jax.threads.tree import Block, Spawn, Thread, ThreadTree, TreeOutcome, decode_tree, encode_tree, map_blocks

__all__ = [
    "Block",
    "MalformedSpawn",
    "Spawn",
    "SpawnRequest",
    "TaskProtocol",
    "Thread",
    "ThreadTree",
    "TreeOutcome",
    "decode_tree",
    "encode_tree",
    "map_blocks",
]
