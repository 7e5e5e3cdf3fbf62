"""Solvers' trees with a condition at the start of their root's prompt, as a data set of conditioned models has them."""

import dataclasses

from apr_jax.threads import ThreadTree


def conditioned(tree: ThreadTree, condition: str) -> ThreadTree:
    """Return the tree with `condition` at the start of its root's prompt."""
    prompt, *rest = tree.root.blocks
    prompt = dataclasses.replace(prompt, content=condition + prompt.content)
    return dataclasses.replace(tree, root=dataclasses.replace(tree.root, blocks=(prompt, *rest)))
