"""Solvers' trees with a condition first on their root's prompt, as `Task.condition_of` has them put there."""

import dataclasses

from apr_jax.threads import ThreadTree


def conditioned(tree: ThreadTree, condition: str) -> ThreadTree:
    prompt, *rest = tree.root.blocks
    prompt = dataclasses.replace(prompt, content=condition + prompt.content)
    return dataclasses.replace(tree, root=dataclasses.replace(tree.root, blocks=(prompt, *rest)))
