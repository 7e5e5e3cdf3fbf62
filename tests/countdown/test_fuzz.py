"""Whatever a model writes: the protocol, the verifier and the parsers raise nothing but their own error.

APR_LONG=1 tries 200,000 texts, else 4,000.
"""

import json
import pathlib
import random
import string

from apr_jax.countdown import CountdownProtocol, MalformedSpawn, Problem, check_solution, operations, trace
from apr_jax.countdown.authors import tree_from_trace
from apr_jax.countdown.protocol import SPAWN_ERRORS
from tests.conftest import LONG

GOLDEN = json.loads(pathlib.Path(__file__).with_name("golden_traces.json").read_text())
TEXTS = [text for entry in GOLDEN for text in (*entry["apr"]["main_calls"], entry["sosp"])]
TEXTS += [child["main_calls"][0] for entry in GOLDEN for calls in entry["apr"]["sub_calls"] for child in calls[:2]]
PIECES = [
    trace.SPAWN_OPEN, trace.SPAWN_CLOSE, trace.JOIN_OPEN, trace.JOIN_CLOSE, trace.NO_SOLUTION, "Goal Reached",
    "Current State: ", "Moving to Node #", "Generated Node #0,0: ", "Exploring Operation: ", ", Resulting Numbers: [",
    "<Start Sub Search 0 at level 1> Moving to Node #0,1\n", "Operations: []", "9" * 5000, "٣", "²", "\x00", "\ud800",
    "\u2028", "__import__('os')", "1/0=0", "-1", "0,0,0", "#", "[", "]", "'", ",", "\n", "\r", " ", "",
]  # fmt: skip


def mutated(rng):
    """A text of the authors, cut, mixed, doubled or filled with what does not belong there."""
    text = rng.choice(TEXTS)
    for _ in range(rng.choice((1, 1, 2, 5))):
        kind, at = rng.randrange(8), rng.randrange(len(text) + 1)
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
        else:
            text = text[:at] + rng.choice(string.printable) + text[at + 1 :]
    return text


def test_no_text_raises_anything_else():
    rng = random.Random(0)
    protocols = [CountdownProtocol(style) for style in ("apr", "sosp")]
    kinds, spawns, solved, trees = {}, 0, 0, 0
    for _ in range(200_000 if LONG else 4_000):
        text, entry, protocol = mutated(rng), rng.choice(GOLDEN), rng.choice(protocols)
        problem = Problem(tuple(entry["nums"]), entry["target"])
        verdict = check_solution(problem, text)
        assert verdict or (verdict.reason and "\n" not in verdict.reason)
        solved += bool(verdict)
        right, total = operations(text)
        assert 0 <= right <= total
        result = protocol.result(text)
        assert protocol.correct(problem, text) == bool(check_solution(problem, result))
        try:
            spawn = protocol.parse_spawn(text)
        except MalformedSpawn as error:
            kinds[error.kind] = kinds.get(error.kind, 0) + 1
            assert error.kind in SPAWN_ERRORS
        else:
            if spawn is not None:
                spawns += 1
                joined = protocol.join(text, [result] * len(spawn.children))
                assert joined.startswith(text[: spawn.position] + trace.JOIN_OPEN) and joined.endswith(trace.JOIN_CLOSE)
        after = text + rng.choice(PIECES)
        for texts in ([text], [text, after], [after, text]):
            try:
                child = {"main_calls": [text], "sub_calls": []}
                tree_from_trace({"main_calls": texts, "sub_calls": [[child]] * (len(texts) - 1)})
                trees += 1
            except ValueError as error:
                assert "\n" not in str(error)
    assert spawns > 50 and trees > 500 and len(kinds) >= 4, (kinds, spawns, solved, trees)
    print(f"\n{kinds}, {spawns} spawns, {solved} solved, {trees} trees")
