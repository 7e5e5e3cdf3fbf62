"""Tests of the Countdown protocol: it agrees with the authors' traces, and malformed spawns raise MalformedSpawn."""

import json
import pathlib
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apr_jax.tasks.countdown import SPAWN_ERRORS, CountdownProtocol, MalformedSpawn, Problem, trace

GOLDEN = json.loads(pathlib.Path(__file__).with_name("golden_traces.json").read_text())
PROTOCOL = CountdownProtocol()
HEAD = (
    "Moving to Node #0\nCurrent State: 9:[2, 3, 4], Operations: []\n"
    "Exploring Operation: 2+3=5, Resulting Numbers: [4, 5]\n"
    "Generated Node #0,0: 9:[4, 5] Operation: 2+3=5\n"
    "Exploring Operation: 3*4=12, Resulting Numbers: [2, 12]\n"
    "Generated Node #0,1: 9:[2, 12] Operation: 3*4=12\n"
)
CHILD_0 = "Moving to Node #0,0\nCurrent State: 9:[4, 5], Operations: ['2+3=5']"
CHILD_1 = "Moving to Node #0,1\nCurrent State: 9:[2, 12], Operations: ['3*4=12']"


def spawn(*nodes: str, level: int = 1) -> str:
    lines = [trace.spawn_line(index, level, node) for index, node in enumerate(nodes)]
    return trace.SPAWN_OPEN + "".join(lines) + trace.SPAWN_CLOSE


def kind_of(text: str) -> str:
    with pytest.raises(MalformedSpawn) as raised:
        PROTOCOL.parse_spawn(text)
    assert raised.value.kind in SPAWN_ERRORS
    str(raised.value).encode()  # can be logged
    return raised.value.kind


@pytest.mark.parametrize("problem", GOLDEN, ids=lambda p: f"{p['nums']}to{p['target']}")
def test_prompts_and_joins_equal_those_of_the_authors(problem):
    task = Problem(problem["nums"], problem["target"])
    mains, spawns = problem["apr"]["main_calls"], problem["apr"]["sub_calls"]
    assert mains[0].startswith(PROTOCOL.root_prompt(task) + "\n")
    assert problem["sosp"].startswith(CountdownProtocol("sos_plus").root_prompt(task) + "\n")
    assert len(spawns) == len(mains) - 1
    for before, after, children in zip(mains, mains[1:], spawns):
        request = PROTOCOL.parse_spawn(before)
        assert PROTOCOL.parse_spawn(before.removesuffix("\n")) == request
        assert len(request.children) == len(children)
        texts = [child["main_calls"][0] for child in children]
        assert all(text.startswith(prompt + "\n") for text, prompt in zip(texts, request.children))
        joined = PROTOCOL.join(request, [PROTOCOL.result(text) for text in texts])
        assert after.startswith(before[: request.position] + joined)
        assert all(PROTOCOL.parse_spawn(text) is None for text in texts)
    assert PROTOCOL.parse_spawn(mains[-1]) is None
    assert PROTOCOL.correct(task, mains[-1]) is not mains[-1].endswith(trace.NO_SOLUTION)


def test_golden_traces_cover_the_numbers_of_spawns():
    assert {len(problem["apr"]["main_calls"]) for problem in GOLDEN} == {1, 2, 3, 5}


def test_root_prompts():
    problem = Problem((2, 3, 4), 9)
    state = "Current State: 9:[2, 3, 4], Operations: []"
    assert PROTOCOL.root_prompt(problem) == "Moving to Node #0\n" + state
    assert PROTOCOL.condition(0) == "Sub Call Budget: 0 "
    sos_plus = CountdownProtocol(variant="sos_plus")
    assert sos_plus.root_prompt(problem) == state
    assert sos_plus.condition(1024) == "Token Budget: 1024 "
    with pytest.raises(ValueError, match="-1"):
        sos_plus.condition(-1)
    with pytest.raises(ValueError, match="variant.*apr.*sos_plus.*'sos'"):
        CountdownProtocol(variant="sos")


@pytest.mark.parametrize("condition", ["", "Sub Call Budget: 6 "])
def test_children_are_in_the_order_of_their_lines(condition):
    request = PROTOCOL.parse_spawn(condition + HEAD + spawn("0,1", "0,0", "0,1"))
    assert request.children == (CHILD_1, CHILD_0, CHILD_1)
    assert request.nodes == ("0,1", "0,0", "0,1") and request.levels == (1, 1, 1)
    assert request.position == len(condition + HEAD)
    assert PROTOCOL.parse_spawn(condition + HEAD + spawn("0")).children[0] == HEAD[: HEAD.index("\nExploring")]


def test_a_spawn_begins_at_the_last_opening_tag():
    text = HEAD + trace.SPAWN_OPEN + "given up"
    assert PROTOCOL.parse_spawn(text + spawn("0,0")).position == len(text)


def test_a_join_replaces_the_spawn():
    request = PROTOCOL.parse_spawn(HEAD + spawn("0,1", "0,0", "0,1"))
    assert PROTOCOL.join(request, [None, "the path", ""]) == (
        "<Sub Searches>\n"
        "<No Solution in Sub Search 0 at level 1 at Node #0,1>\n"
        "<Goal Reached in Sub Search 1 at level 1 at Node #0,0>\nthe path\n"
        "<Goal Reached in Sub Search 2 at level 1 at Node #0,1>\n\n"
        "<End Sub Searches>\n"
    )
    with pytest.raises(ValueError, match="3 .*2 ") as raised:
        PROTOCOL.join(request, [None, None])
    assert not isinstance(raised.value, MalformedSpawn)
    assert PROTOCOL.join_nothing() == "<Sub Searches>\n<End Sub Searches>\n"


def test_a_later_spawn_and_a_nested_one():
    joined = PROTOCOL.join(PROTOCOL.parse_spawn(HEAD + spawn("0,0")), [None])
    deeper = HEAD + joined + "Generated Node #0,1,0: 9:[24] Operation: 2*12=24\n" + spawn("0,1,0", level=2)
    request = PROTOCOL.parse_spawn(deeper)
    assert request.children == ("Moving to Node #0,1,0\nCurrent State: 9:[24], Operations: ['3*4=12', '2*12=24']",)
    line = "<No Solution in Sub Search 0 at level 2 at Node #0,1,0>\n"
    assert PROTOCOL.join(request, [None]) == trace.JOIN_OPEN + line + trace.JOIN_CLOSE
    child = CHILD_0 + "\nGenerated Node #0,0,0: 9:[9] Operation: 4+5=9\n" + spawn("0,0,0", level=2)
    assert PROTOCOL.parse_spawn(child).children[0].endswith("9:[9], Operations: ['2+3=5', '4+5=9']")


def test_a_nodes_state_is_that_of_its_last_move_or_else_of_its_first_generation():
    moved = "Moving to Node #0,0\nCurrent State: 9:[{}], Operations: ['2+3=5']\n"
    text = HEAD + moved.format("4, 6") + moved.format("4, 7")
    assert "[4, 7]" in PROTOCOL.parse_spawn(text + spawn("0,0")).children[0]
    again = HEAD + "Generated Node #0,0: 9:[1, 1] Operation: 1+1=2\n"
    assert PROTOCOL.parse_spawn(again + spawn("0,0")).children == (CHILD_0,)


def test_broken_lines_that_no_child_needs_are_ignored():
    broken = "Generated Node #0,2: 9:[, 5] Operation: \nMoving to Node #0,3\nCurrent State: x\nGenerated Node\n\ud800"
    assert PROTOCOL.parse_spawn(HEAD + broken + "\n" + spawn("0,0")).children == (CHILD_0,)
    assert kind_of(HEAD + broken + "\n" + spawn("0,2")) == "bad_state"
    assert kind_of(HEAD + broken + "\n" + spawn("0,3")) == "bad_state"


@pytest.mark.parametrize("text", ["", "\n", HEAD, trace.SPAWN_OPEN, spawn("0,0") + "\n", spawn("0,0")[:-2]])
def test_a_text_without_a_spawn_at_its_end_gives_none(text):
    assert PROTOCOL.parse_spawn(text) is None
    assert PROTOCOL.parse_spawn(HEAD + text) is None


HOSTILE = "Moving to Node #0\nCurrent State: 9:[__import__('os')], Operations: []\n"
LONG = "Moving to Node #0\nCurrent State: 9:[" + "9" * 5000 + "], Operations: []\n"
UNICODE = "Moving to Node #0\nCurrent State: 9:[٣, 4], Operations: []\n"
CODE = "Moving to Node #0\nCurrent State: 9:[3, 4], Operations: [print('x')]\n"


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("unopened", trace.SPAWN_CLOSE),
        ("unopened", HEAD + spawn("0,0").removeprefix(trace.SPAWN_OPEN)),
        ("unopened", HEAD + spawn("0,0") + trace.SPAWN_CLOSE),
        ("empty", HEAD + spawn()),
        ("bad_line", HEAD + spawn("0,0").replace(trace.SPAWN_CLOSE, "\n" + trace.SPAWN_CLOSE)),
        ("bad_line", HEAD + spawn("0,0").replace("#0,0\n", "#0,0")),
        ("bad_line", HEAD + spawn("0,0").replace("level 1", "level " + "1" * 5000)),
        ("bad_line", HEAD + spawn("0,0").replace("level 1", "level ²")),
        ("bad_line", HEAD + spawn("0,x")),
        ("bad_line", HEAD + spawn(",".join("0" * 1000))),
        ("unknown_node", HEAD + spawn("0,0", "0,2")),
        ("unknown_node", spawn("0")),
        ("bad_state", "Generated Node #0,0: 9:[4, 5] Operation: 2+3=5\n" + spawn("0,0")),
        ("bad_state", "Generated Node #0: 9:[4, 5] Operation: 2+3=5\n" + spawn("0")),
        ("bad_state", HEAD.replace("3*4=12\nG", "3*4\nG").replace("n: 3*4=12", "n: 3*4=-12") + spawn("0,1")),
        *[("bad_state", bad + spawn("0")) for bad in (HOSTILE, LONG, UNICODE, CODE)],
    ],
)
def test_a_malformed_spawn_has_its_kind(kind, text):
    assert kind_of(text) == kind


def test_a_result_is_the_text_after_the_last_but_one_goal():
    assert PROTOCOL.result("") is None
    assert PROTOCOL.result("9,9 equal: Goal Reached\n") is None
    assert PROTOCOL.result("9,9 equal: Goal Reached\n the path\n9,9 equal: Goal Reached\n\n") == (
        "the path\n9,9 equal: Goal Reached"
    )
    right = "Exploring Operation: 4+5=9, Resulting Numbers: [9]\n9,9 equal: Goal Reached\n"
    assert not PROTOCOL.correct(Problem((4, 5), 9), right)  # nothing was returned
    assert PROTOCOL.correct(Problem((4, 5), 9), right + right)


@pytest.mark.parametrize(
    "unit",
    ["[", "Moving to Node #0\nCurrent State: ", "Moving to Node #", "Generated Node #0,0", "0,0,", "'1+1=2', ", "\n",
     " ", "9", "<Start Sub Search 0 at level 1> Moving to Node #0,0\n", trace.SPAWN_OPEN, trace.SPAWN_CLOSE],
)  # fmt: skip
def test_long_garbage_takes_bounded_time(unit):
    start = time.perf_counter()
    for text in (
        HEAD + (unit * 200_000)[:200_000] + "\n" + spawn("0,0"),
        HEAD + trace.SPAWN_OPEN + (unit * 200_000)[:200_000] + "\n" + trace.SPAWN_CLOSE,
        HEAD[:-1] + (unit * 200_000)[:200_000] + "\n" + spawn("0,1"),
    ):
        check_only_malformed(text)
    assert time.perf_counter() - start < 5


def test_the_prompts_of_many_deep_children_have_bounded_size():
    names = ["0" + ",1" * depth for depth in range(60)]
    lines = [trace.generated(name, 9, (1,), "1+1=2") for name in names[1:]]
    assert kind_of(HEAD + "".join(lines) + spawn(*names)) == "bad_line"  # deeper than in any problem
    request = PROTOCOL.parse_spawn(HEAD + "".join(lines) + spawn(*names[:32] * 100))
    assert len(request.children) == 3200 and max(map(len, request.children)) < 1000


def check_only_malformed(text: str) -> None:
    """Check that, for this text, no method of the protocol raises any error but MalformedSpawn."""
    try:
        request = PROTOCOL.parse_spawn(text)
    except MalformedSpawn as error:
        assert error.kind in SPAWN_ERRORS
        str(error).encode()
        return
    finally:
        PROTOCOL.result(text)
        PROTOCOL.correct(Problem((2, 3, 4), 9), text)
    if request is not None:
        assert request.children and text[request.position :].startswith(trace.SPAWN_OPEN)
        joined = PROTOCOL.join(request, [None] * len(request.children))
        assert joined.startswith(trace.JOIN_OPEN) and joined.endswith(trace.JOIN_CLOSE)


PIECES = [
    *HEAD.splitlines(True), *spawn("0,0", "0,1").splitlines(True), trace.JOIN_OPEN, trace.JOIN_CLOSE, "Goal Reached",
    "Moving to Node #", "Current State:", "Generated Node #0,0:", "0,0", "\n", "]", "'", "9" * 5000, "٣",
    "\x00", "\ud800", "-",
]  # fmt: skip
BASES = [HEAD + spawn("0,0", "0,1")] + [text for p in GOLDEN for text in p["apr"]["main_calls"] if len(text) < 4000]


@settings(max_examples=1000)
@given(st.one_of(st.text(), st.lists(st.sampled_from(PIECES)).map("".join)), st.booleans())
def test_random_texts_raise_no_other_error(text, closed):
    check_only_malformed(text + (trace.SPAWN_CLOSE if closed else ""))


@settings(max_examples=1000)
@given(st.sampled_from(BASES), st.data())
def test_changed_and_cut_traces_raise_no_other_error(text, data):
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(text)))
        piece = data.draw(st.one_of(st.sampled_from(["", *PIECES]), st.characters()))
        text = text[:at] + piece + text[at + data.draw(st.integers(0, 12)) :]
    cut = data.draw(st.sampled_from([None, -1, -3, len(text) // 2]))
    check_only_malformed(text[:cut])
    check_only_malformed(text[:cut] + trace.SPAWN_CLOSE)
