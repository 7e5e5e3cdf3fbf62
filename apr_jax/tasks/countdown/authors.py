"""Reads and writes the JSON files of the paper's authors; texts are kept character for character.

A file is one JSON array, either of problems or of traces for SFT. An APR trace has a `trace_dict`; a trace of SoS+ or
Stream of Search has a `search_path`. Files are read as a stream, one entry at a time, so their size does not matter.

A `trace_dict` describes a thread. Its `main_calls` are the thread's text at each spawn and at its end. Its `sub_calls`
are, for each spawn, a list of the children's own `trace_dict`s.
"""

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from apr_jax.errors import UserError
from apr_jax.io.files import whole
from apr_jax.tasks.countdown import trace
from apr_jax.tasks.countdown.problem import Problem, successors
from apr_jax.tasks.countdown.search import STORED_NAMES
from apr_jax.tasks.countdown.verify import check_path
from apr_jax.threads import Block, Spawn, Thread, ThreadTree

_CHUNK = 1 << 20  # characters that are read at once
_CUT = 16  # an error this close to the end of a chunk may be a literal or escape that the chunk's end cuts in two
_BLANKS = re.compile(r"[ \t\r\n]*")
_MAX_LEVELS = 32  # of children, since trees are walked recursively; the authors' traces have one


# ---------------------------------------------------------------------- texts and trees


def tree_from_trace(trace_dict: dict[str, Any]) -> ThreadTree:
    """Convert a `trace_dict`, the authors' JSON form of a trace, to a tree of text with the blocks of our solvers.

    The tree's info has `numbers`, `target` and `solved`. Raises UserError for texts that are not of this form: a state
    first, then spawns that are each followed by their join.

    A child is compared with its parent's spawn by its node name only, not by its operations. After a spawn without a
    solution the authors' generator may write a wrong node name before a state. The children of a later spawn then have
    other operations than the parent's text states (about 1 spawn in 800 with beams of 9 and 10).
    """
    prompt, root = _thread(trace_dict, 0)
    problem = Problem(prompt.state.numbers, prompt.state.target)
    solved = bool(check_path(problem.numbers, problem.target, trace.read_result(root.text)))
    return ThreadTree(root, {"numbers": list(problem.numbers), "target": problem.target, "solved": solved})


def _thread(trace_dict: Any, depth: int) -> tuple[trace.Prompt, Thread]:
    """Convert the `trace_dict` of a thread at level `depth` (0: the root) to its prompt and the thread of text."""
    if depth > _MAX_LEVELS:
        raise UserError(f"its children are more than {_MAX_LEVELS} levels deep")
    texts, calls = _texts(trace_dict)
    if (prompt := trace.read_prompt(texts[0])) is None:
        raise UserError(f"a thread begins with the state it searches from, this one with {texts[0][:60]!r}")
    at = len(prompt.text)
    blocks: list[Block | Spawn] = [Block(prompt.text, sampled=False)]
    for index, (text, after, children) in enumerate(zip(texts, texts[1:], calls)):
        call_at = text.rfind(trace.SPAWN_OPEN)
        if call_at < at or not text.endswith(trace.SPAWN_CLOSE):
            raise UserError(f"call {index} of a thread does not end in a spawn: {text[-60:]!r}")
        join_end = after.find(trace.JOIN_CLOSE, call_at) + len(trace.JOIN_CLOSE)
        if after[:call_at] != text[:call_at] or not after.startswith(trace.JOIN_OPEN, call_at):
            raise UserError(f"call {index + 1} of a thread does not continue call {index} with a join")
        if join_end < call_at + len(trace.JOIN_OPEN):
            raise UserError(f"the join of call {index + 1} of a thread has no end")
        if call_at > at:
            blocks.append(Block(text[at:call_at], sampled=True))
        call, join = Block(text[call_at:], sampled=True), Block(after[call_at:join_end], sampled=False)
        blocks.append(Spawn((call,), _children(children, call.content, index, depth), join))
        at = join_end
    if texts[-1].endswith(trace.SPAWN_CLOSE):
        raise UserError("the last call of a thread ends in a spawn, its children are not there")
    return prompt, Thread((*blocks, Block(texts[-1][at:], sampled=True)))


def _children(children: Sequence[Any], call: str, index: int, depth: int) -> tuple[Thread, ...]:
    """Convert the children of call `index`. Raises UserError where their nodes are not those that the call names."""
    lines = call[len(trace.SPAWN_OPEN) : -len(trace.SPAWN_CLOSE)].removesuffix("\n").split("\n")
    named = [line and line[1] for line in map(trace.read_spawn_line, lines)]
    if len(children) != len(named):
        raise UserError(f"call {index} of a thread names {len(named)} children, {len(children)} are there")
    threads = []
    for number, (child, node) in enumerate(zip(children, named)):
        try:
            prompt, thread = _thread(child, depth + 1)
            if node is None or prompt.node != node:
                raise UserError(f"it is of {prompt.text.splitlines()[0]!r}, its parent called {lines[number][:80]!r}")
        except UserError as error:
            raise UserError(f"child {number} of call {index}: {error}") from None
        threads.append(thread)
    return tuple(threads)


def _texts(trace_dict: Any) -> tuple[list[str], list[list]]:
    """Return `main_calls` and `sub_calls`. Raises UserError where they have wrong types or lengths."""
    try:
        texts, calls = trace_dict["main_calls"], trace_dict["sub_calls"]
    except (KeyError, TypeError, IndexError):
        raise UserError("a trace has main_calls and sub_calls") from None
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise UserError("main_calls is a list of one text or more")
    if not isinstance(calls, list) or not all(isinstance(children, list) for children in calls):
        raise UserError("sub_calls is a list with a list of children for each spawn")
    if len(calls) != len(texts) - 1:
        raise UserError(f"{len(texts)} main_calls go with {len(texts) - 1} sub_calls, there are {len(calls)}")
    return texts, calls


def trace_from_tree(tree: ThreadTree) -> dict[str, Any]:
    """Convert a tree of text to a `trace_dict`: the inverse of `tree_from_trace`."""

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
    """Yield the problems of a file. Raises OSError, and UserError with the file, the entry and what is wrong in it."""
    yield from _read(path, _problem)


def read_traces(path: Path) -> Iterator[tuple[Problem, ThreadTree]]:
    """Yield each problem of a file with its tree of text, of APR, SoS+ or Stream of Search.

    A tree's info has the entries that our solvers give it, as far as the file contains them. Raises as `read_problems`.
    """

    def entry(row: dict) -> tuple[Problem, ThreadTree]:
        problem = _problem(row)
        apr = "trace_dict" in row
        if not apr and not isinstance(row.get("search_path"), str):
            raise UserError("it has neither trace_dict nor search_path")
        tree = tree_from_trace(row["trace_dict"] if apr else {"main_calls": [row["search_path"]], "sub_calls": []})
        if (tree.info["numbers"], tree.info["target"]) != (list(problem.numbers), problem.target):
            raise UserError(f"its trace is of another problem: {tree.info['numbers']} to {tree.info['target']}")
        kind, _, size = str(row.get("search_type", "")).partition("_")
        solver = "apr" if apr else "sos" if kind in ("sos", *_STRATEGIES) else STORED_NAMES["sos_plus"]
        known = {"style": solver} | ({"strategy": kind} if solver == "sos" and kind in _STRATEGIES else {})
        beams = {ours: row[theirs] for ours, theirs in _BEAMS.items() if theirs in row}
        if not apr and re.fullmatch("[0-9]{1,9}", size):  # such an entry has its beam in search_type only
            beams = dict.fromkeys(_BEAMS, int(size))
        condition = _CONDITION.match(tree.root.blocks[0].content)
        conditions = {"condition": condition[0]} if condition else {}
        return problem, ThreadTree(tree.root, {**tree.info, **known, **beams, **conditions})

    yield from _read(path, entry)


_CONDITION = re.compile(r"(?:Token|Sub Call) Budget: \d+ ")
_STRATEGIES = ("dfs", "bfs")  # of Stream of Search; its files have them in search_type, as "dfs" or "bfs_3"
_BEAMS = {"beam": "beam_size", "sub_beam": "sub_call_beam_size"}  # our name in a tree's info -> the authors'


def _problem(row: Any) -> Problem:
    if not isinstance(row, dict) or "nums" not in row or "target" not in row:
        raise UserError("a problem has nums and target")
    if not isinstance(row["nums"], list):
        raise UserError(f"nums is a list of numbers, was {row['nums']!r}")
    return Problem(tuple(row["nums"]), row["target"])


def _read(path: Path, entry: Callable[[Any], Any]) -> Iterator[Any]:
    """Yield `entry(row)` for each entry of a file, with the file and the entry's number added to a UserError."""
    with open(path, encoding="utf-8") as file:
        for number, row in enumerate(_entries(file, path)):
            try:
                yield entry(row)
            except UserError as error:
                raise UserError(f"{path}, entry {number}: {error}") from None


def _entries(file: TextIO, path: Path) -> Iterator[Any]:
    """Yield the entries of a JSON array. An entry is parsed as soon as the text up to its end is read."""
    text, number = _Chunks(file, path), 0
    if text.next() not in ("[", ""):
        raise UserError(f"{path} is not a JSON array: it begins with {text.read[:20]!r}")
    text.at += 1
    while (character := text.next()) != "]":
        if not character:
            raise UserError(f"{path} ends after {number} entries without the end of its array")
        if number:
            if character != ",":
                raise UserError(f"{path}, after entry {number - 1}: a comma is missing before {character!r}")
            text.at += 1
        yield text.value(f"{path}, entry {number}")
        number += 1
    text.at += 1
    if character := text.next():
        raise UserError(f"{path}: {character!r} follows its array")


class _Chunks:
    """A JSON text that is read in chunks. `read[at:]` is the text that is read but not parsed yet."""

    def __init__(self, file: TextIO, path: Path):
        self.file, self.path = file, path
        self.read, self.at, self.ended = "", 0, False
        self.decode = json.JSONDecoder().raw_decode

    def more(self) -> None:
        """Read another chunk.

        It is at least as long as the text that is not parsed yet, so that the attempts to parse a long entry take
        linear time in total.
        """
        unparsed = self.read[self.at :]
        try:
            chunk = self.file.read(max(_CHUNK, len(unparsed)))
        except UnicodeDecodeError:
            raise UserError(f"{self.path} is not a JSON text") from None
        self.read, self.at, self.ended = unparsed + chunk, 0, not chunk

    def next(self) -> str:
        """Return the next character that is not blank, without using it; "" at the end of the file."""
        while True:
            self.at = _BLANKS.match(self.read, self.at).end()
            if self.at < len(self.read) or self.ended:
                return self.read[self.at : self.at + 1]
            self.more()

    def value(self, where: str) -> Any:
        """Parse and return the next JSON value. Raises UserError, which begins with `where`, for a broken one."""
        self.next()
        while True:
            try:
                value, end = self.decode(self.read, self.at)
                if end < len(self.read) or self.ended:  # else a number may continue in the next chunk
                    self.at = end
                    return value
            except (ValueError, RecursionError) as error:
                # More is read only if the next chunk can resolve the error, so a broken file is not read to its end.
                unfinished = isinstance(error, json.JSONDecodeError) and (
                    error.msg.startswith("Unterminated string") or error.pos >= len(self.read) - _CUT
                )
                if self.ended or not unfinished:
                    raise UserError(f"{where}: it is truncated or not JSON") from None
            self.more()


def write_traces(
    path: Path, traces: Iterable[tuple[Problem, ThreadTree]], encode: Callable[[str], list[int]] | None = None
) -> None:
    """Write trees of text as a file of traces in the authors' format.

    If given, `encode` converts a text to token ids, without begin and end tokens, and the authors' token counts are
    written. `heuristic` and `promising_threshold` are not written, since a tree does not contain them.
    """

    def row(problem: Problem, tree: ThreadTree) -> dict[str, Any]:
        texts, solver, beam = trace_from_tree(tree), tree.info["style"], tree.info.get("beam", "")
        end = texts["main_calls"][-1]
        values = {**_problem_row(problem), "search_path": end, "rating": _rating(problem, end)}
        strategy = tree.info.get("strategy", solver)
        values |= {"search_type": strategy if strategy == "dfs" else f"{strategy}_{beam}"}
        counts = {} if encode is None else _token_counts(texts, encode)
        if solver != "apr":
            return values | {key: counts[key] for key in counts if key == "token_count"}
        values |= {theirs: tree.info[ours] for ours, theirs in _BEAMS.items() if ours in tree.info}
        return {**values, "trace_dict": texts, **counts}

    _write(path, (row(problem, tree) for problem, tree in traces))


def _all_texts(texts: dict[str, Any]) -> list[str]:
    """Return the texts of a `trace_dict`, its own first, then those of all threads below it."""
    below = [text for children in texts["sub_calls"] for child in children for text in _all_texts(child)]
    return texts["main_calls"] + below


def _rating(problem: Problem, text: str) -> float:
    """Return the authors' rating of a trace: 1 minus its operations as a fraction of an exhaustive search's.

    0 for a trace that does not reach the target.
    """
    if trace.GOAL_REACHED not in text:
        return 0.0
    most = math.prod(math.comb(left, 2) * 4 for left in range(2, len(problem.numbers) + 1))
    return max(0.0, 1 - (text.count("Exploring Operation") + 1) / most)


def _token_counts(texts: dict[str, Any], encode: Callable[[str], list[int]]) -> dict[str, float]:
    """Return the authors' token counts.

    Each text counts a begin and an end token. `token_count` counts the text that two consecutive root texts share only
    once. A "sub" text is one of any thread but the root.
    """
    root = texts["main_calls"]
    lengths = [len(encode(text)) + 2 for text in _all_texts(texts)]
    below = lengths[len(root) :]
    total = sum(lengths) - sum(len(encode(os.path.commonprefix(pair))) for pair in zip(root, root[1:]))
    return {
        "token_count": total,
        "longest_seq_token_count": max(lengths),
        "avg_seq_token_count": total / len(lengths),
        "avg_sub_seq_token_count": sum(below) / len(below) if below else 0,
        "sub_call_count": len(below) / (len(root) - 1) if below else 0,
    }


def _write(path: Path, rows: Iterable[Any]) -> None:
    """Write a JSON array with one entry per line. An error leaves no partial file."""
    with whole(Path(path)) as part, open(part, "w", encoding="utf-8") as file:
        for number, row in enumerate(rows):
            file.write(("[\n" if number == 0 else ",\n") + json.dumps(row))
        file.write("[]\n" if file.tell() == 0 else "\n]\n")


def _problem_row(problem: Problem) -> dict[str, Any]:
    steps = _solution(problem.numbers, problem.target)
    row = {"nums": list(problem.numbers), "target": problem.target, "start_size": len(problem.numbers)}
    if steps is None:
        return row
    return row | {"solution": [operation for _, operation in steps], "optimal_path": _path(problem, steps)}


def _solution(numbers: tuple[int, ...], target: int) -> list[tuple[tuple[int, ...], str]] | None:
    """Return the (state, operation) steps to the target that a depth-first search finds first, or None.

    The search follows the order of `successors`.
    """
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
