"""Tests of the authors' files: they are read and written character for character, and errors name the wrong entry."""

import copy
import io
import json
import pathlib
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apr_jax.tasks.countdown import CountdownProtocol, Problem, ProblemRange, authors, check_solution, trace
from apr_jax.tasks.countdown.authors import trace_from_tree, tree_from_trace
from apr_jax.tasks.countdown.search import SolverConfig
from apr_jax.tasks.countdown.solver import SOLVERS
from apr_jax.threads import Block, Spawn, Thread, ThreadTree, encode_tree
from tests.conftest import LONG
from tests.tasks.countdown.conditioned import conditioned

GOLDEN = json.loads(pathlib.Path(__file__).with_name("golden_traces.json").read_text())


def solver_tree(seed, solver="apr", depth=1, condition=""):
    rng = random.Random(seed)
    problem = ProblemRange(count=rng.randint(3, 5), max_number=20, max_target=60).draw(rng)
    config = SolverConfig(beam=(1, 3), sub_beam=(1, 3), promising=0.8, depth=depth)
    return problem, conditioned(SOLVERS[solver](problem, config, rng), condition)


# ---------------------------------------------------------------------- parse(render(tree)) = tree

FREE_TEXT = st.text(st.sampled_from("ab 3,[]:#'\n"), min_size=1, max_size=12)


@st.composite
def threads(draw, depth, node="0"):
    """Draw any thread of the trace language: sampled text is arbitrary; states, calls and joins are well formed."""
    written = FREE_TEXT.map(lambda text: f"\n{text}\n")
    numbers = draw(st.lists(st.integers(1, 99), min_size=1, max_size=4))
    prompt = trace.moving(node) + trace.state(draw(st.integers(1, 99)), numbers, ())
    blocks: list = [Block(prompt, False), Block(draw(written), True)]
    for _ in range(draw(st.integers(0, 2)) if depth else 0):
        steps = draw(st.lists(st.integers(0, 9), min_size=1, max_size=3))
        children = tuple(draw(threads(depth - 1, f"{node},{step}")) for step in steps)
        lines = [trace.spawn_line(i, 1, f"{node},{step}") for i, step in enumerate(steps)]
        solved = [draw(st.booleans()) for _ in children]
        outcomes = [trace.join_line(i, 1, f"0,{i}", right) + draw(FREE_TEXT) + "\n" for i, right in enumerate(solved)]
        call = Block(trace.SPAWN_OPEN + "".join(lines) + trace.SPAWN_CLOSE, True)
        blocks.append(Spawn((call,), children, Block(trace.JOIN_OPEN + "".join(outcomes) + trace.JOIN_CLOSE, False)))
        if draw(st.booleans()):
            blocks.append(Block(draw(written), True))
    if isinstance(blocks[-1], Spawn):
        blocks.append(Block("", True))  # a thread that ends at once still has a block, for the end token
    return Thread(tuple(blocks))


@settings(max_examples=10_000 if LONG else 200)
@given(threads(3))
def test_any_tree_survives_conversion_to_texts(thread):
    texts = trace_from_tree(ThreadTree(thread))
    assert tree_from_trace(json.loads(json.dumps(texts))).root == thread


@settings(max_examples=10_000 if LONG else 100)
@given(st.integers(0, 2**32), st.sampled_from(sorted(SOLVERS)), st.integers(0, 3), st.none() | st.integers(0, 4096))
def test_solvers_trees_survive_conversion_to_texts(seed, solver, depth, budget):
    condition = "" if budget is None else CountdownProtocol("apr" if solver == "apr" else "sos_plus").condition(budget)
    _, tree = solver_tree(seed, solver, depth, condition)
    back = tree_from_trace(trace_from_tree(tree))
    assert back.root == tree.root and back.info["solved"] == tree.info["solved"]


# ---------------------------------------------------------------------- the authors' own traces


@pytest.mark.parametrize("entry", GOLDEN, ids=lambda e: f"{e['nums']}to{e['target']}")
def test_golden_traces_are_written_back_unchanged(entry):
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
        assert after.startswith(text[: found.position] + protocol.join(found, results))
    one = tree_from_trace({"main_calls": [entry["sosp"]], "sub_calls": []})
    assert len(one.root.blocks) == 2 and one.root.text == entry["sosp"]
    assert one.info == {**{key: tree.info[key] for key in ("numbers", "target")}, "solved": one.info["solved"]}
    assert one.info["solved"] == bool(check_solution(problem, entry["sosp"]))


def test_a_child_whose_operations_differ_from_its_parents_text_is_read():
    texts = a_trace()
    child = texts["sub_calls"][0][0]["main_calls"]
    child[0] = child[0].replace("Operations: ['", "Operations: ['1+1=2', '", 1)
    assert trace_from_tree(tree_from_trace(texts)) == texts


def test_a_thread_that_ends_at_its_join_has_a_last_block():
    texts = a_trace()
    last = texts["main_calls"][-1]
    texts["main_calls"][-1] = last[: last.index(trace.JOIN_CLOSE) + len(trace.JOIN_CLOSE)]
    tree = tree_from_trace(texts)
    assert trace_from_tree(tree) == texts and not tree.info["solved"]
    assert encode_tree(tree, list, 0, 2).root.blocks[-1].content == (2,)


def test_a_truncated_trace_is_not_solved():
    unsolved = next(entry["sosp"] for entry in GOLDEN if entry["sosp"].endswith(trace.NO_SOLUTION))
    for cut in (len(unsolved), len(unsolved) // 2):
        assert not tree_from_trace({"main_calls": [unsolved[:cut]], "sub_calls": []}).info["solved"]


def a_trace():
    """Return a copy of a trace with one spawn."""
    return copy.deepcopy(next(entry["apr"] for entry in GOLDEN if len(entry["apr"]["main_calls"]) == 2))


# ---------------------------------------------------------------------- files


@pytest.mark.parametrize("chunk", [7, 1 << 20])
def test_traces_survive_writing_and_reading_a_file(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(authors, "_CHUNK", chunk)  # with small chunks, an entry can begin and end anywhere in a chunk
    made = [solver_tree(seed, solver) for seed in range(3) for solver in ("apr", "sos_plus", "sos")]
    authors.write_traces(tmp_path / "train.json", made)
    back = list(authors.read_traces(tmp_path / "train.json"))
    assert [problem for problem, _ in back] == [problem for problem, _ in made]
    for (_, tree), (_, again) in zip(made, back):
        assert again.root == tree.root
        beams = ("beam", "sub_beam") if tree.info.get("strategy") == "dfs" else ()  # a file has no beam for "dfs"
        assert again.info == {key: tree.info[key] for key in tree.info if key not in beams}


def test_the_files_of_the_authors_generator_are_read(tmp_path):
    rows = []
    for entry in GOLDEN:
        problem = {"nums": entry["nums"], "target": entry["target"], "solution": [], "start_size": 4}
        beams = {"beam_size": entry["apr_beam"], "sub_call_beam_size": entry["apr_sub_beam"]}
        rows.append({**problem, **beams, "search_type": "apr_3", "trace_dict": entry["apr"]})
        rows.append({**problem, "search_path": entry["sosp"], "search_type": f"sosp_{entry['sosp_beam']}"})
    (tmp_path / "train.json").write_text(json.dumps(rows, indent=2))
    trees = [tree for _, tree in authors.read_traces(tmp_path / "train.json")]
    for entry, apr, sosp in zip(GOLDEN, trees[::2], trees[1::2], strict=True):
        assert trace_from_tree(apr) == entry["apr"] and sosp.root.text == entry["sosp"]
        assert (apr.info["beam"], apr.info["sub_beam"]) == (entry["apr_beam"], entry["apr_sub_beam"])
        assert (apr.info["style"], sosp.info["style"], sosp.info["beam"]) == ("apr", "sosp", entry["sosp_beam"])


def test_the_files_of_stream_of_search_are_read(tmp_path):
    """The generator of Stream of Search writes the search_type "dfs", or "bfs" with the beam."""
    made = []
    for seed, (strategy, kind) in enumerate([("dfs", "dfs"), ("bfs", "bfs_3")] * 4):
        config = SolverConfig(beam=(3, 3), strategies=(strategy,), heuristic="sum")
        problem = ProblemRange(count=3 + seed % 2, max_number=20, max_target=40).draw(random.Random(seed))
        made.append((problem, kind, SOLVERS["sos"](problem, config, random.Random(seed))))
    rows = [
        {
            "nums": list(problem.numbers), "target": problem.target, "solution": [], "search_path": tree.root.text,
            "rating": 0.0, "search_type": kind, "optimal_path": "", "heuristic": "sum_heuristic",
        }
        for problem, kind, tree in made
    ]  # fmt: skip
    (tmp_path / "train.json").write_text(json.dumps(rows))
    assert {tree.info["solved"] for *_, tree in made} == {True, False}
    for (problem, kind, tree), (again, read) in zip(made, authors.read_traces(tmp_path / "train.json"), strict=True):
        assert again == problem and read.root.text == tree.root.text
        assert (read.info["style"], read.info["strategy"], read.info["solved"]) == (
            "sos",
            kind[:3],
            tree.info["solved"],
        )
        assert read.info.get("beam") == (3 if kind == "bfs_3" else None)
    authors.write_traces(tmp_path / "again.json", [(problem, tree) for problem, _, tree in made])
    written = json.loads((tmp_path / "again.json").read_text())
    assert [row["search_type"] for row in written] == [kind for _, kind, _ in made]


def test_written_files_have_the_authors_keys_and_counts(tmp_path):
    spawning = (made for seed in range(20) if (made := solver_tree(seed))[1].root.spawns)
    made = [next(spawning), solver_tree(1, "sos_plus")]
    authors.write_traces(tmp_path / "train.json", made, encode=list)
    apr, sosp = json.loads((tmp_path / "train.json").read_text())
    assert set(sosp) == {
        "nums", "target", "solution", "optimal_path", "start_size", "search_path", "rating", "search_type",
        "token_count",
    }  # fmt: skip
    assert set(apr) == set(sosp) | {
        "beam_size", "sub_call_beam_size", "trace_dict", "longest_seq_token_count", "avg_seq_token_count",
        "avg_sub_seq_token_count", "sub_call_count",
    }  # fmt: skip
    assert sosp["token_count"] == len(sosp["search_path"]) + 2
    own, every = apr["trace_dict"]["main_calls"], _texts(apr["trace_dict"])
    below = every[len(own) :]
    assert apr["longest_seq_token_count"] == max(map(len, every)) + 2
    # The prefix that the next text repeats ends with "<", the common first character of "<Calling" and "<Sub".
    repeated = sum(text.rindex(trace.SPAWN_OPEN) + 1 for text in own[:-1])
    assert apr["token_count"] == sum(map(len, every)) + 2 * len(every) - repeated
    assert apr["avg_seq_token_count"] == apr["token_count"] / len(every)
    assert apr["avg_sub_seq_token_count"] == sum(map(len, below)) / len(below) + 2
    assert apr["sub_call_count"] == len(below) / (len(own) - 1)
    operations = sosp["search_path"].count("Exploring Operation")
    most = {3: 48, 4: 1152, 5: 46080}[sosp["start_size"]]
    solved = made[1][1].info["solved"]
    assert sosp["rating"] == pytest.approx(max(0, 1 - (operations + 1) / most) if solved else 0)


def _texts(texts):
    below = [text for calls in texts["sub_calls"] for child in calls for text in _texts(child)]
    return texts["main_calls"] + below


@pytest.mark.parametrize(
    "text, says",
    [
        ("", "0 entries"),
        ("{}", "'{}'"),
        ('[{"nums": [1], "target": 1}, {"nums"', "entry 1: .*JSON"),
        ('[{"nums": [1], "target": 1}', "1 entries"),
        ('[{"nums": [1, 2]}]', "entry 0: .*nums and target"),
        ('[{"nums": "1, 2", "target": 3}]', "entry 0: nums .*'1, 2'"),
        ('[{"nums": [1, -2], "target": 3}]', "entry 0: .*-2"),
        ("[nonsense]", "entry 0: .*JSON"),
        ("[" * 100_000, "entry 0: .*JSON"),
        ("[" + "9" * 5000 + "]", "entry 0: .*JSON"),
        ('[{"nums": [1], "target": 1} {}]', "after entry 0: .*'{'"),
        ('[{"nums": [1], "target": 1},]', "entry 1: .*JSON"),
        ('[{"nums": [1], "target": 1}] []', r"'\['"),
    ],
)
def test_an_error_names_the_broken_file_and_its_entry(tmp_path, text, says):
    (tmp_path / "broken.json").write_text(text)
    with pytest.raises(ValueError, match="broken.json") as raised:
        list(authors.read_problems(tmp_path / "broken.json"))
    assert re.search(says, str(raised.value)) and "\n" not in str(raised.value)


def test_reading_stops_at_a_broken_entry(monkeypatch):
    monkeypatch.setattr(authors, "_CHUNK", 64)
    file = io.StringIO('[{"nums": [1 2]}, ' + '{"nums": [1], "target": 1}, ' * 10_000)
    with pytest.raises(ValueError, match="entry 0"):
        list(authors._entries(file, pathlib.Path("broken.json")))
    assert file.tell() <= 128  # the published files have 13.5 GB


def test_a_trace_of_another_problem_is_refused(tmp_path):
    rows = [{"nums": e["nums"][::-1], "target": e["target"], "search_path": e["sosp"]} for e in GOLDEN[:1]]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match="entry 0: .*another problem"):
        list(authors.read_traces(tmp_path / "train.json"))


def test_a_failed_write_keeps_the_old_file(tmp_path):
    one, path = solver_tree(1), tmp_path / "train.json"
    authors.write_traces(path, [one])
    before = path.read_bytes()
    with pytest.raises(AttributeError):
        authors.write_traces(path, [one, (object(), one[1])])
    assert [path.name for path in tmp_path.iterdir()] == ["train.json"] and path.read_bytes() == before


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda t: t.pop("sub_calls"), "main_calls and sub_calls"),
        (lambda t: t["sub_calls"].pop(), "2 main_calls .*1 sub_calls.* 0"),
        (lambda t: t["main_calls"].__setitem__(0, t["main_calls"][0].replace("Exp", "exp", 1)), "call 1 .*call 0"),
        (lambda t: t["main_calls"].__setitem__(0, "x" + t["main_calls"][0]), "'xMoving to Node"),
        (lambda t: t["sub_calls"][0].pop(), "call 0 .*3 children.* 2 "),
        (lambda t: t["sub_calls"][0].reverse(), "child 0 of call 0: .*'Moving to Node #0,"),
        (lambda t: (t["main_calls"].pop(), t["sub_calls"].pop()), "ends in a spawn.*children"),
        (lambda t: t["sub_calls"][0][1]["main_calls"].append("x"), "child 1 of call 0: 2 main_calls .*1 sub"),
        (lambda t: t["main_calls"].__setitem__(0, t["main_calls"][0][:-5]), "call 0 .*spawn"),
        (lambda t: t["main_calls"].__setitem__(0, 7), "main_calls"),
        (lambda t: t["sub_calls"][0].__setitem__(0, None), "main_calls and sub_calls"),
    ],
)
def test_a_broken_trace_is_refused(change, says):
    texts = a_trace()
    change(texts)
    with pytest.raises(ValueError, match=says):
        tree_from_trace(texts)


def test_a_trace_with_too_many_levels_of_children_is_refused():
    texts = {"main_calls": ["Moving to Node #0\nCurrent State: 9:[9], Operations: []\n"], "sub_calls": []}
    calling = texts["main_calls"][0] + trace.SPAWN_OPEN + trace.spawn_line(0, 1, "0") + trace.SPAWN_CLOSE
    joined = texts["main_calls"][0] + trace.JOIN_OPEN + trace.JOIN_CLOSE
    for depth in range(1, 3000):
        texts = {"main_calls": [calling, joined], "sub_calls": [[texts]]}
        if depth == 30:
            assert len(list(tree_from_trace(texts).threads())) == 31
    with pytest.raises(ValueError, match="32 levels"):
        tree_from_trace(texts)
