"""Fuzz tests: for any text, the protocol, the verifier and the parsers raise no other error than their own.

APR_LONG=1 tests 200,000 texts and as many traces; else 3,000 are tested.
"""

import copy
import json
import pathlib
import random
import string
import time

from apr_jax.tasks.countdown import (
    CountdownProtocol,
    MalformedSpawn,
    Problem,
    authors,
    check_solution,
    operations,
    trace,
)
from apr_jax.tasks.countdown.authors import trace_from_tree, tree_from_trace
from apr_jax.tasks.countdown.protocol import SPAWN_ERRORS
from apr_jax.tasks.countdown.search import SolverConfig
from apr_jax.tasks.countdown.solver import solve_apr
from tests.conftest import LONG
from tests.tasks.countdown.conditioned import conditioned

COUNT = 200_000 if LONG else 3_000
GOLDEN = json.loads(pathlib.Path(__file__).with_name("golden_traces.json").read_text())


def _nested(seed):
    """Return a solver's trace with several levels of children and a budget."""
    rng = random.Random(seed)
    entry = GOLDEN[seed]
    config = SolverConfig(beam=(2, 3), sub_beam=(2, 3), promising=0.9, depth=3)
    tree = conditioned(
        solve_apr(Problem(entry["nums"], entry["target"]), config, rng), CountdownProtocol().condition(seed)
    )
    return trace_from_tree(tree)


def _texts(trace_dict):
    below = [text for calls in trace_dict["sub_calls"] for child in calls for text in _texts(child)]
    return trace_dict["main_calls"] + below


NESTED = [_nested(seed) for seed in range(8)]
TRACES = [entry["apr"] for entry in GOLDEN if entry["apr"]["sub_calls"]] + NESTED
TEXTS = [text for entry in GOLDEN for text in (*entry["apr"]["main_calls"], entry["sosp"])]
TEXTS += [child["main_calls"][0] for entry in GOLDEN for calls in entry["apr"]["sub_calls"] for child in calls[:2]]
TEXTS += [text for nested in NESTED for text in _texts(nested)[:10]]
SPAWNING = [text for text in TEXTS if text.endswith(trace.SPAWN_CLOSE)]
PIECES = [
    trace.SPAWN_OPEN, trace.SPAWN_CLOSE, trace.JOIN_OPEN, trace.JOIN_CLOSE, trace.NO_SOLUTION, "Goal Reached",
    "Current State: ", "Moving to Node #", "Generated Node #0,0: ", "Exploring Operation: ", ", Resulting Numbers: [",
    trace.SPAWN_OPEN + trace.SPAWN_CLOSE,
    "<Start Sub Search 0 at level 1> Moving to Node #0,1\n", "Operations: []", "9" * 5000, "٣", "²", "\x00", "\ud800",
    "\u2028", "__import__('os')", "1/0=0", "-1", "0,0,0", "#", "[", "]", "'", ",", "\n", "\r", " ", "",
]  # fmt: skip


def mutated(rng, text):
    """Return a text with random cuts, insertions, repeated or exchanged lines, or parts of other texts."""
    for _ in range(rng.choice((1, 1, 2, 5))):
        kind, at = rng.randrange(10), rng.randrange(len(text) + 1)
        lines = text.split("\n")
        line = rng.randrange(len(lines))
        if kind == 0:
            text = text[:at]
        elif kind == 1:
            text = text[:at] + rng.choice(PIECES) + text[at:]
        elif kind == 2:
            text = text[:at] + text[min(len(text), at + rng.randrange(1, 40)) :]
        elif kind == 3:
            text = "\n".join(lines[:line] + [rng.choice(lines)] + lines[line + 1 :])
        elif kind == 4:
            text = "\n".join(lines[:line] + lines[line + 1 :])
        elif kind == 5:
            rng.shuffle(lines)
            text = "\n".join(lines)
        elif kind == 6:
            other = rng.choice(TEXTS)
            text = text[:at] + other[rng.randrange(len(other)) :]
        elif kind == 7:  # cut at any byte, which may be inside a character
            data = text.encode("utf-8", "replace")
            text = data[: rng.randrange(len(data) + 1)].decode("utf-8", rng.choice(("replace", "surrogateescape")))
        elif kind == 8:
            at, line = sorted((line, rng.randrange(len(lines))))
            lines[at], lines[line] = lines[line], lines[at]
            text = "\n".join(lines)
        else:
            text = text[:at] + rng.choice(string.printable) + text[at + 1 :]
    return text


def mutated_trace(rng):
    """Return a trace_dict with one random change in a text or in its structure."""
    whole = copy.deepcopy(rng.choice(TRACES))
    place = whole
    while place["sub_calls"] and rng.random() < 0.6:
        place = rng.choice(rng.choice(place["sub_calls"]))
    texts, calls = place["main_calls"], place["sub_calls"]
    kind, at = rng.randrange(10), rng.randrange(len(texts))
    if kind < 4 or not calls:
        texts[at] = mutated(rng, texts[at])
    elif kind == 4:
        place[rng.choice(("main_calls", "sub_calls"))] = rng.choice((None, [], {}, 7, "text", [[]], [None], [7.5]))
    elif kind == 5:
        del place[rng.choice(("main_calls", "sub_calls"))]
    elif kind == 6:
        rng.choice((texts, calls, rng.choice(calls))).pop()
    elif kind == 7:
        rng.shuffle(rng.choice((texts, calls, rng.choice(calls))))
    elif kind == 8:
        rng.choice(calls)[0] = rng.choice((None, [], "text", place, copy.deepcopy(rng.choice(TRACES))))
    else:
        texts.insert(at, rng.choice(TEXTS))
        calls.insert(at % len(calls), rng.choice(([], [copy.deepcopy(rng.choice(TRACES))], copy.deepcopy(calls[0]))))
    return whole


def test_texts_raise_no_other_error():
    rng = random.Random(0)
    protocols = [CountdownProtocol(variant) for variant in ("apr", "sos_plus")]
    kinds, spawns, solved, slowest = {}, 0, 0, 0.0
    for _ in range(COUNT):
        text, entry = mutated(rng, rng.choice(TEXTS)), rng.choice(GOLDEN)
        if rng.random() < 0.3:  # only a text with this end can be a spawn
            text = mutated(rng, rng.choice(SPAWNING)).removesuffix(trace.SPAWN_CLOSE) + trace.SPAWN_CLOSE
        protocol, problem = rng.choice(protocols), Problem(tuple(entry["nums"]), entry["target"])
        start = time.perf_counter()
        verdict = check_solution(problem, text)
        assert verdict or (verdict.reason and "\n" not in verdict.reason)
        verdict.reason.encode()
        solved += bool(verdict)
        right, total = operations(text)
        assert 0 <= right <= total
        result = protocol.result(text)
        assert protocol.correct(problem, text) == bool(check_solution(problem, result))
        try:
            spawn = protocol.parse_spawn(text)
        except MalformedSpawn as error:
            kinds[error.kind] = kinds.get(error.kind, 0) + 1
            assert error.kind in SPAWN_ERRORS and str(error).encode()
        else:
            if spawn is not None:
                spawns += 1
                joined = protocol.join(spawn, [result] * len(spawn.children))
                assert joined.startswith(trace.JOIN_OPEN) and joined.endswith(trace.JOIN_CLOSE)
                assert text[spawn.position :].startswith(trace.SPAWN_OPEN)
        slowest = max(slowest, time.perf_counter() - start)
    print(f"\n{COUNT} texts: {spawns} spawns, malformed {kinds}, {solved} solved, slowest {1000 * slowest:.0f} ms")
    assert spawns > COUNT // 100 and set(kinds) == set(SPAWN_ERRORS)


def test_traces_raise_no_other_error_and_are_written_back_unchanged():
    rng = random.Random(1)
    trees, slowest = 0, 0.0
    for _ in range(COUNT):
        if rng.random() < 0.5:
            given = mutated_trace(rng)
        else:
            text = mutated(rng, rng.choice(TEXTS))
            child, after = {"main_calls": [text], "sub_calls": []}, text + rng.choice(PIECES)
            texts = rng.choice(([text], [text, after], [after, text]))
            given = {"main_calls": texts, "sub_calls": [[child]] * (len(texts) - 1)}
        start = time.perf_counter()
        try:
            tree = tree_from_trace(given)
        except ValueError as error:
            assert "\n" not in str(error) and str(error).encode()
        else:
            trees += 1
            assert trace_from_tree(tree) == given
        slowest = max(slowest, time.perf_counter() - start)
    print(f"\n{COUNT} traces: {trees} read, slowest {1000 * slowest:.0f} ms")
    assert COUNT // 20 < trees < COUNT


def test_files_raise_no_other_error(tmp_path, monkeypatch):
    rng = random.Random(2)
    rows = [{"nums": e["nums"], "target": e["target"], "trace_dict": e["apr"]} for e in GOLDEN[:3]]
    rows += [{"nums": e["nums"], "target": e["target"], "search_path": e["sosp"]} for e in GOLDEN[:3]]
    path, read = tmp_path / "file.json", 0
    for _ in range(COUNT // 10):
        monkeypatch.setattr(authors, "_CHUNK", rng.choice((61, 1 << 20)))
        text = mutated(rng, json.dumps(rows, indent=rng.choice((None, 1))))
        path.write_bytes(text.encode("utf-8", rng.choice(("surrogatepass", "replace"))))
        for reader in (authors.read_problems, authors.read_traces):
            try:
                read += len(list(reader(path)))
            except ValueError as error:
                assert str(error).startswith(str(path)) and "\n" not in str(error) and str(error).encode()
    print(f"\n{COUNT // 10} files: {read} entries read")
