"""The authors' files: read and written to the letter, and what is wrong in one is named."""

import json
import pathlib
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apr_jax.countdown import CountdownProtocol, Problem, ProblemRange, authors, check_solution, trace
from apr_jax.countdown.authors import trace_from_tree, tree_from_trace
from apr_jax.countdown.search import SolverConfig
from apr_jax.countdown.solver import SOLVERS
from apr_jax.threads import Block, Spawn, Thread, ThreadTree
from tests.conftest import LONG

GOLDEN = json.loads(pathlib.Path(__file__).with_name("golden_traces.json").read_text())


def solver_tree(seed, style="apr", depth=1, condition=""):
    rng = random.Random(seed)
    problem = ProblemRange(count=rng.randint(3, 5), max_number=20, max_target=60).draw(rng)
    config = SolverConfig(beam=(1, 3), sub_beam=(1, 3), promising=0.8, depth=depth)
    return problem, SOLVERS[style](problem, config, rng, condition)


# ---------------------------------------------------------------------- parse(render(tree)) = tree

WORDS = st.text(st.sampled_from("ab 3,[]:#'\n"), min_size=1, max_size=12)


@st.composite
def threads(draw, depth):
    """Any thread that the language can hold: its writing is free, its states, calls and joins are its own."""
    written = WORDS.map(lambda text: f"\n{text}\n")
    numbers = draw(st.lists(st.integers(0, 99), min_size=1, max_size=4))
    prompt = trace.moving(draw(st.sampled_from(["0", "0,1"]))) + trace.state(draw(st.integers(1, 99)), numbers, ())
    blocks: list = [Block(prompt, False), Block(draw(written), True)]
    for _ in range(draw(st.integers(0, 2)) if depth else 0):
        children = tuple(draw(st.lists(threads(depth - 1), min_size=1, max_size=3)))
        lines = [trace.spawn_line(i, 1, f"0,{i}") for i in range(len(children))]
        solved = [draw(st.booleans()) for _ in children]
        outcomes = [trace.join_line(i, 1, f"0,{i}", right) + draw(WORDS) + "\n" for i, right in enumerate(solved)]
        call = Block(trace.SPAWN_OPEN + "".join(lines) + trace.SPAWN_CLOSE, True)
        blocks.append(Spawn((call,), children, Block(trace.JOIN_OPEN + "".join(outcomes) + trace.JOIN_CLOSE, False)))
        if draw(st.booleans()):
            blocks.append(Block(draw(written), True))
    return Thread(tuple(blocks))


@settings(max_examples=10_000 if LONG else 200)
@given(threads(3))
def test_any_tree_comes_back_from_its_texts(thread):
    texts = trace_from_tree(ThreadTree(thread))
    assert tree_from_trace(json.loads(json.dumps(texts))).root == thread


@settings(max_examples=10_000 if LONG else 100)
@given(st.integers(0, 2**32), st.sampled_from(sorted(SOLVERS)), st.integers(0, 3), st.none() | st.integers(0, 4096))
def test_so_do_the_solvers_trees(seed, style, depth, budget):
    condition = CountdownProtocol("apr" if style == "apr" else "sosp").condition(budget)
    _, tree = solver_tree(seed, style, depth, condition)
    back = tree_from_trace(trace_from_tree(tree))
    assert back.root == tree.root and back.info["solved"] == tree.info["solved"]


# ---------------------------------------------------------------------- the authors' own traces


@pytest.mark.parametrize("entry", GOLDEN, ids=lambda e: f"{e['nums']}to{e['target']}")
def test_golden_traces_are_written_back_to_the_letter(entry):
    tree = tree_from_trace(entry["apr"])
    assert trace_from_tree(tree) == entry["apr"]
    problem = Problem(tuple(entry["nums"]), entry["target"])
    assert bool(check_solution(problem, tree.root.text)) == tree.info["solved"]
    protocol = CountdownProtocol("apr")
    assert tree.root.blocks[0].content == protocol.root_prompt(problem)
    for spawn, text, after in zip(tree.root.spawns, entry["apr"]["main_calls"], entry["apr"]["main_calls"][1:]):
        found = protocol.parse_spawn(text)
        assert list(found.children) == [child.blocks[0].content for child in spawn.children]
        results = [protocol.result(child.text) for child in spawn.children]
        assert after.startswith(protocol.join(text, results))
    one = tree_from_trace({"main_calls": [entry["sosp"]], "sub_calls": []})
    assert len(one.root.blocks) == 2 and one.root.text == entry["sosp"]


# ---------------------------------------------------------------------- files


@pytest.mark.parametrize("chunk", [7, 1 << 20])
def test_traces_survive_a_file(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(authors, "_CHUNK", chunk)  # entries begin and end anywhere in what is read at once
    made = [solver_tree(seed, style) for seed in range(3) for style in ("apr", "sosp")]
    authors.write_traces(tmp_path / "train.json", made, encode=list)
    rows = json.loads((tmp_path / "train.json").read_text())
    assert all({"nums", "target", "start_size", "solution", "search_path", "search_type"} <= row.keys() for row in rows)
    assert rows[0]["longest_seq_token_count"] == max(
        len(text) for text in [*rows[0]["trace_dict"]["main_calls"], *map(str, _texts(rows[0]["trace_dict"]))]
    )
    back = list(authors.read_traces(tmp_path / "train.json"))
    assert [problem for problem, _ in back] == [problem for problem, _ in made]
    for (_, tree), (_, again) in zip(made, back):
        assert again.root == tree.root
        assert {key: again.info[key] for key in ("numbers", "target", "style", "solved")} == {
            key: tree.info[key] for key in ("numbers", "target", "style", "solved")
        }


def _texts(texts):
    below = [text for calls in texts["sub_calls"] for child in calls for text in _texts(child)]
    return texts["main_calls"] + below


def test_problems_survive_a_file_with_a_right_solution(tmp_path):
    source = ProblemRange()
    problems = source.draw_each([random.Random(i) for i in range(30)])
    authors.write_problems(tmp_path / "problems.json", problems)
    assert list(authors.read_problems(tmp_path / "problems.json")) == problems
    for row, problem in zip(json.loads((tmp_path / "problems.json").read_text()), problems):
        assert check_solution(problem, row["optimal_path"])
        assert len(row["solution"]) == 3 and row["start_size"] == 4


def test_prompts_survive_a_file(tmp_path):
    problems = [Problem((3, 5, 7, 8), 24), Problem((1, 2), 3)]
    for style, budget in (("apr", None), ("apr", 10), ("sosp", 1024)):
        prompts = [CountdownProtocol(style).root_prompt(problem, budget) for problem in problems]
        authors.write_prompts(tmp_path / "prefix.json", prompts)
        assert list(authors.read_prompts(tmp_path / "prefix.json")) == list(zip(problems, prompts))


@pytest.mark.parametrize(
    "text, says",
    [
        ("", "ends after 0 entries without the end of its array"),
        ("{}", "is no JSON array: it begins with '{}'"),
        ('[{"nums": [1], "target": 1}, {"nums"', "entry 1: it is cut short or no JSON"),
        ('[{"nums": [1], "target": 1}', "ends after 1 entries without the end"),
        ('[{"nums": [1, 2]}]', "entry 0: a problem has nums and target"),
        ('[{"nums": "1, 2", "target": 3}]', "entry 0: nums is a list of numbers, was '1, 2'"),
        ('[{"nums": [1, -2], "target": 3}]', "entry 0: Countdown numbers and targets are integers of at least 1"),
        ("[nonsense]", "entry 0: it is cut short or no JSON"),
        ("[" * 100_000, "entry 0: it is cut short or no JSON"),
    ],
)
def test_a_broken_file_is_named_with_its_entry(tmp_path, text, says):
    (tmp_path / "broken.json").write_text(text)
    with pytest.raises(ValueError, match="broken.json") as raised:
        list(authors.read_problems(tmp_path / "broken.json"))
    assert says in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda t: t.pop("sub_calls"), "a trace has main_calls and sub_calls"),
        (lambda t: t["sub_calls"].pop(), "2 main_calls go with 1 sub_calls, there are 0"),
        (lambda t: t["main_calls"].__setitem__(0, "x" + t["main_calls"][0]), "does not go on from call 0 with a join"),
        (lambda t: t["main_calls"].__setitem__(0, t["main_calls"][0][:-5]), "does not end in a spawn"),
        (lambda t: t["main_calls"].__setitem__(0, 7), "main_calls is a list of one text or more"),
        (lambda t: t["sub_calls"][0].__setitem__(0, None), "a trace has main_calls and sub_calls"),
    ],
)
def test_a_broken_trace_is_named(change, says):
    texts = json.loads(json.dumps(next(e["apr"] for e in GOLDEN if len(e["apr"]["main_calls"]) == 2)))
    change(texts)
    with pytest.raises(ValueError, match=says):
        tree_from_trace(texts)
