"""Conversion of thread trees to JSON objects and back."""

import dataclasses
from collections.abc import Iterable
from typing import Any

from apr_jax.errors import UserError
from apr_jax.threads.tree import Block, Spawn, Thread, ThreadTree, TreeOutcome


def tree_to_json(tree: ThreadTree, digits: int | None = None) -> dict[str, Any]:
    """Convert a tree into an object for `json.dumps`. A block's content is a string or a list of ids, for example
    `{"sampled": true, "content": [7]}`. A rollout's tree also has its "outcome".

    `digits` rounds log-probabilities to that many decimals, for small files. Without it `tree_from_json` returns an
    equal tree.
    """

    def block(entry: Block) -> dict[str, Any]:
        content = entry.content if isinstance(entry.content, str) else [int(token) for token in entry.content]
        row = {"sampled": entry.sampled, "content": content}
        if entry.logprobs is not None:
            row["logprobs"] = shown(entry.logprobs)
        if entry.model_logprobs is not None:
            row["model_logprobs"] = shown(entry.model_logprobs)
        return row

    def shown(logprobs: Iterable[float]) -> list[float]:
        return [float(p) if digits is None else round(float(p), digits) for p in logprobs]

    def item(entry: Block | Spawn) -> dict[str, Any]:
        if isinstance(entry, Block):
            return block(entry)
        children = [thread(child) for child in entry.children]
        return {"call": [block(part) for part in entry.call], "children": children, "join": block(entry.join)}

    def thread(entry: Thread) -> dict[str, Any]:
        row: dict[str, Any] = {"blocks": list(map(item, entry.blocks))}
        if entry.failure is not None:
            row["failure"] = entry.failure
        if entry.inherits:
            row["inherits"] = True
        return row

    outcome = {} if tree.outcome is None else {"outcome": _outcome_row(tree.outcome)}
    return {"info": tree.info, **outcome, "root": thread(tree.root)}


def _outcome_row(outcome: TreeOutcome) -> dict[str, Any]:
    """An outcome as an object, without the reward where it has none."""
    row = dataclasses.asdict(outcome)
    return {name: value for name, value in row.items() if name != "reward" or value is not None}


def tree_from_json(obj: dict[str, Any]) -> ThreadTree:
    """Convert an object of `tree_to_json` back into a tree; lists of ids become tuples.

    Raises UserError for an object with a missing key or a value of another type, for text and ids in one tree, for an
    id below 0, for a root without a prompt, and for threads that are nested deeper than Python's recursion limit.
    """

    def block(row: dict[str, Any]) -> Block:
        content = _of_type(row, "content", str, list)
        if not isinstance(content, str):
            content = tuple(_of_type({"a token": token}, "a token", int) for token in content)
            if any(token < 0 for token in content):
                raise ValueError(f"a token is {min(content)}")
        kinds.add(type(content))
        given = {
            name: tuple(_of_type({name: value}, name, int, float) for value in _of_type(row, name, list))
            for name in ("logprobs", "model_logprobs")
            if name in row
        }
        return Block(content, _of_type(row, "sampled", bool), **given)

    def item(row: dict[str, Any]) -> Block | Spawn:
        if "join" not in row:
            return block(row)
        call, children = _of_type(row, "call", list), _of_type(row, "children", list)
        return Spawn(tuple(map(block, call)), tuple(map(thread, children)), block(row["join"]))

    def thread(row: dict[str, Any]) -> Thread:
        failure = None if row.get("failure") is None else _of_type(row, "failure", str)
        inherits = "inherits" in row and _of_type(row, "inherits", bool)
        return Thread(tuple(map(item, _of_type(row, "blocks", list))), failure, inherits)

    def outcome(row: dict[str, Any]) -> TreeOutcome:
        counts = {name: _of_type(row, name, dict) for name in ("failures", "malformed")}
        return TreeOutcome(
            **{name: _of_type(row, name, bool) for name in ("correct", "answered")},
            **{name: {kind: _of_type(of_kind, kind, int) for kind in of_kind} for name, of_kind in counts.items()},
            **{name: _of_type(row, name, int) for name in ("suppressed_joins", "forced_spawns")},
            reward=None if row.get("reward") is None else float(_of_type(row, "reward", int, float)),
        )

    kinds: set[type] = set()
    try:
        found = outcome(_of_type(obj, "outcome", dict)) if "outcome" in obj else None
        tree = ThreadTree(thread(obj["root"]), dict(_of_type(obj, "info", dict)), found)
    except RecursionError:
        raise UserError("this is no thread tree as JSON: its threads are nested too deep") from None
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise UserError(f"this is no thread tree as JSON: {type(error).__name__} {error}") from None
    if len(kinds) > 1:
        raise UserError("this is no thread tree as JSON: some blocks hold text, some token ids")
    if not tree.root.blocks or isinstance(tree.root.blocks[0], Spawn):
        raise UserError("this is no thread tree as JSON: its root has no prompt")
    return tree


def _of_type(row: dict[str, Any], name: str, *types: type) -> Any:
    """Return the value of a JSON object under `name`. Raises KeyError where there is none, and TypeError where its
    type is none of `types`."""
    value = row[name]
    if not isinstance(value, types) or isinstance(value, bool) and bool not in types:
        raise TypeError(f"{name} is {str(value)[:40]!r}, no {' or '.join(one.__name__ for one in types)}")
    return value
