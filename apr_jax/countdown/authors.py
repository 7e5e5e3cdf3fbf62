"""The authors' JSON files, read into our trees and problems and written from them, character for character.

Three kinds, each one JSON array: problems; traces for supervision (APR with a `trace_dict`, SoS+ with its
`search_path`); prompts for GRPO. They are read in a stream, an entry at a time, however large the file is.

A `trace_dict` has `main_calls`, a thread's text at each of its spawns and at its end, and `sub_calls`, for each spawn
the children's own dictionaries.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from apr_jax.countdown import trace
from apr_jax.countdown.problem import Problem, successors
from apr_jax.threads import Block, Spawn, Thread, ThreadTree

_CHUNK = 1 << 20  # characters read at once


# ---------------------------------------------------------------------- texts and trees


def tree_from_trace(trace_dict: dict[str, Any]) -> ThreadTree:
    """The tree of text of one `trace_dict`, with the blocks that our solvers give it. Its info has `solved`.

    Raises ValueError where the texts are not those of one thread that spawned and joined.
    """
    root = _thread(trace_dict)
    return ThreadTree(root, {"solved": not root.text.endswith(trace.NO_SOLUTION)})


def _thread(trace_dict: Any) -> Thread:
    texts, calls = _texts(trace_dict)
    blocks: list[Block | Spawn] = []
    at = _prompt_end(texts[0])
    blocks.append(Block(texts[0][:at], sampled=False))
    for index, (text, after, children) in enumerate(zip(texts, texts[1:], calls)):
        call_at = text.rfind(trace.SPAWN_OPEN)
        if call_at < at or not text.endswith(trace.SPAWN_CLOSE):
            raise ValueError(f"call {index} of a thread does not end in a spawn: {text[-60:]!r}")
        join_end = after.find(trace.JOIN_CLOSE, call_at) + len(trace.JOIN_CLOSE)
        if after[:call_at] != text[:call_at] or not after.startswith(trace.JOIN_OPEN, call_at):
            raise ValueError(f"call {index + 1} of a thread does not go on from call {index} with a join")
        if join_end < call_at + len(trace.JOIN_OPEN):
            raise ValueError(f"the join of call {index + 1} of a thread has no end")
        if call_at > at:
            blocks.append(Block(text[at:call_at], sampled=True))
        call, join = Block(text[call_at:], sampled=True), Block(after[call_at:join_end], sampled=False)
        blocks.append(Spawn((call,), tuple(map(_thread, children)), join))
        at = join_end
    if at < len(texts[-1]):
        blocks.append(Block(texts[-1][at:], sampled=True))
    return Thread(tuple(blocks))


def _texts(trace_dict: Any) -> tuple[list[str], list[list]]:
    try:
        texts, calls = trace_dict["main_calls"], trace_dict["sub_calls"]
    except (KeyError, TypeError):
        raise ValueError("a trace has main_calls and sub_calls") from None
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError("main_calls is a list of one text or more")
    if not isinstance(calls, list) or not all(isinstance(children, list) for children in calls):
        raise ValueError("sub_calls is a list with a list of children for each spawn")
    if len(calls) != len(texts) - 1:
        raise ValueError(f"{len(texts)} main_calls go with {len(texts) - 1} sub_calls, there are {len(calls)}")
    return texts, calls


def _prompt_end(text: str) -> int:
    """Where a thread's prompt ends: after the first state, before its line end."""
    start = text.find("Current State: ")
    end = text.find("\n", start)
    if start < 0 or end < 0 or trace.read_state(text[start:end]) is None:
        raise ValueError(f"a thread begins with the state it searches from, this one with {text[:60]!r}")
    return end


def trace_from_tree(tree: ThreadTree) -> dict[str, Any]:
    """The `trace_dict` of a tree of text: the inverse of `tree_from_trace`."""

    def thread(entry: Thread) -> dict[str, Any]:
        texts, calls, before = [], [], ""
        for item in entry.blocks:
            if isinstance(item, Spawn):
                texts.append(before + "".join(block.content for block in item.call))
                calls.append([thread(child) for child in item.children])
                item = item.join
            before += item.content
        return {"main_calls": [*texts, before], "sub_calls": calls}

    return thread(tree.root)


# ---------------------------------------------------------------------- files


def read_problems(path: Path) -> Iterator[Problem]:
    """Raises ValueError, in one line with the file, the entry and what is wrong, and OSError."""
    yield from _read(path, _problem)


def read_traces(path: Path) -> Iterator[tuple[Problem, ThreadTree]]:
    """Problems and their trees of text, APR's or SoS+'s; info as the solver's, as far as the file tells. Raises as
    `read_problems`."""

    def entry(row: dict) -> tuple[Problem, ThreadTree]:
        problem = _problem(row)
        apr = "trace_dict" in row
        if not apr and not isinstance(row.get("search_path"), str):
            raise ValueError("it has neither trace_dict nor search_path")
        tree = tree_from_trace(row["trace_dict"] if apr else {"main_calls": [row["search_path"]], "sub_calls": []})
        info = {"numbers": list(problem.numbers), "target": problem.target, "style": "apr" if apr else "sosp"}
        beams = {ours: row[theirs] for ours, theirs in _BEAMS.items() if theirs in row}
        return problem, ThreadTree(tree.root, {**info, **tree.info, **beams})

    yield from _read(path, entry)


def read_prompts(path: Path) -> Iterator[tuple[Problem, str]]:
    """The root prompts of a GRPO data set and their problems. Raises as `read_problems`."""

    def entry(row: Any) -> tuple[Problem, str]:
        prompt = row.get("prefix") if isinstance(row, dict) else row
        if not isinstance(prompt, str):
            raise ValueError("a prompt is a text, or an object with a prefix")
        start = prompt.find("Current State: ")
        state = trace.read_state(prompt[start:]) if start >= 0 else None
        if state is None or state.operations:
            raise ValueError(f"no root state in {prompt[:80]!r}")
        return Problem(state.numbers, state.target), prompt

    yield from _read(path, entry)


_BEAMS = {"beam": "beam_size", "sub_beam": "sub_call_beam_size"}


def _problem(row: Any) -> Problem:
    if not isinstance(row, dict) or "nums" not in row or "target" not in row:
        raise ValueError("a problem has nums and target")
    if not isinstance(row["nums"], list):
        raise ValueError(f"nums is a list of numbers, was {row['nums']!r}")
    return Problem(tuple(row["nums"]), row["target"])


def _read(path: Path, entry: Callable[[Any], Any]) -> Iterator[Any]:
    with open(path, encoding="utf-8") as file:
        for number, row in enumerate(_entries(file, path)):
            try:
                yield entry(row)
            except ValueError as error:
                raise ValueError(f"{path}, entry {number}: {error}") from None


def _entries(file: TextIO, path: Path) -> Iterator[Any]:
    """The entries of one JSON array, each parsed when the text up to its end has been read."""
    decode, blanks = json.JSONDecoder().raw_decode, " \t\r\n"
    text, opened, number = "", False, 0
    while True:
        try:
            chunk = file.read(_CHUNK)
        except UnicodeDecodeError:
            raise ValueError(f"{path} is no JSON text") from None
        text += chunk
        at = 0
        while True:
            before = blanks + ("," if opened else "")
            while at < len(text) and text[at] in before:
                at += 1
            if at == len(text):
                break
            if not opened:
                if text[at] != "[":
                    raise ValueError(f"{path} is no JSON array: it begins with {text[at : at + 20]!r}")
                opened, at = True, at + 1
                continue
            if text[at] == "]":
                return
            try:
                row, at = decode(text, at)
            except (ValueError, RecursionError):
                if not chunk:
                    raise ValueError(f"{path}, entry {number}: it is cut short or no JSON") from None
                break
            yield row
            number += 1
        text = text[at:]
        if not chunk:
            raise ValueError(f"{path} ends after {number} entries without the end of its array")


def write_problems(path: Path, problems: Iterable[Problem]) -> None:
    """As the authors' generator does, with a solution and its path."""
    _write(path, map(_problem_row, problems))


def write_traces(
    path: Path, traces: Iterable[tuple[Problem, ThreadTree]], encode: Callable[[str], list[int]] | None = None
) -> None:
    """Trees of text as the authors' files for supervision. `encode` adds their token counts, without begin and end."""

    def row(problem: Problem, tree: ThreadTree) -> dict[str, Any]:
        texts = trace_from_tree(tree)
        end = texts["main_calls"][-1]
        values = {**_problem_row(problem), "search_path": end, "heuristic": "mult_heuristic"}
        if tree.info["style"] != "apr":
            return {**values, "search_type": f"{tree.info['style']}_{tree.info.get('beam', '')}"}
        values |= {"search_type": f"apr_{tree.info.get('beam', '')}"}
        values |= {theirs: tree.info[ours] for ours, theirs in _BEAMS.items() if ours in tree.info}
        values |= {"trace_dict": texts}
        if encode is not None:
            lengths = [len(encode(text)) for text in _all_texts(texts)]
            spawns = [len(spawn.children) for thread in tree.threads() for spawn in thread.spawns]
            values |= {
                "longest_seq_token_count": max(lengths),
                "avg_seq_token_count": sum(lengths) / len(lengths),
                "sub_call_count": sum(spawns) / len(spawns) if spawns else 0,
            }
        return values

    _write(path, (row(problem, tree) for problem, tree in traces))


def write_prompts(path: Path, prompts: Iterable[str]) -> None:
    """Root prompts for the authors' GRPO."""
    _write(path, prompts)


def _all_texts(texts: dict[str, Any]) -> list[str]:
    below = [text for children in texts["sub_calls"] for child in children for text in _all_texts(child)]
    return texts["main_calls"] + below


def _write(path: Path, rows: Iterable[Any]) -> None:
    """One array, an entry a line; whole or not at all."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    with open(part, "w", encoding="utf-8") as file:
        for number, row in enumerate(rows):
            file.write(("[\n" if number == 0 else ",\n") + json.dumps(row))
        file.write("[]\n" if file.tell() == 0 else "\n]\n")
    part.replace(path)


def _problem_row(problem: Problem) -> dict[str, Any]:
    steps = _solution(problem.numbers, problem.target)
    row = {"nums": list(problem.numbers), "target": problem.target, "start_size": len(problem.numbers)}
    if steps is None:
        return row
    return row | {"solution": [operation for _, operation in steps], "optimal_path": _path(problem, steps)}


def _solution(numbers: tuple[int, ...], target: int) -> list[tuple[tuple[int, ...], str]] | None:
    """States and operations to the target, the first that a search in the order of `successors` finds."""
    if len(numbers) == 1:
        return [] if numbers[0] == target else None
    for state, operation in successors(numbers):
        if (rest := _solution(state, target)) is not None:
            return [(state, operation), *rest]
    return None


def _path(problem: Problem, steps: list[tuple[tuple[int, ...], str]]) -> str:
    lines, done = [trace.state(problem.target, problem.numbers, ()) + "\n"], []
    for number, (state, operation) in enumerate(steps, 2):
        lines.append(trace.exploring(operation, state))
        if len(state) == 1:
            lines.append(trace.reached(problem.target, problem.target))
        else:
            done.append(operation)
            lines.append(f"Generated Node #{number}: {list(state)} from Operation: {operation}\n")
            lines.append(trace.state(problem.target, state, done) + "\n")
    return "".join(lines)
