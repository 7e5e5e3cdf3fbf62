"""Tests of the solvers: their traces are correct, follow the settings, and agree with the protocol."""

import hashlib
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apr_jax.tasks.countdown import CountdownProtocol, Problem, ProblemRange, check_solution, operations, trace
from apr_jax.tasks.countdown.problem import successors
from apr_jax.tasks.countdown.search import HEURISTICS, Node, Search, SolverConfig, rank
from apr_jax.tasks.countdown.solver import SOLVERS
from apr_jax.threads import Spawn
from apr_jax.threads.metrics import children, depth

SOURCE = ProblemRange(max_number=30, max_target=60)


def gave_up(thread):
    """Return whether a solver's thread ended without reaching the target."""
    return trace.GOAL_REACHED not in thread.context[-1].content


@st.composite
def solved(draw, solvers=tuple(SOLVERS), **changes):
    """Draw (problem, solver's name, settings, tree) with random settings."""
    rng = random.Random(draw(st.integers(0, 2**32)))
    beam = draw(st.tuples(st.integers(1, 4), st.integers(0, 3)))
    values = {
        "beam": (beam[0], beam[0] + beam[1]),
        "sub_beam": draw(st.none() | st.just((2, 5))),
        "promising": draw(st.sampled_from([0.0, 0.5, 1.0])),
        "heuristic": draw(st.sampled_from(sorted(HEURISTICS))),
        "max_value": draw(st.sampled_from([0, 60])),
        "shuffle": draw(st.booleans()),
        "rank_root": draw(st.booleans()),
        "distinct": draw(st.booleans()),
        "depth": draw(st.integers(0, 3)),
    }
    solver = draw(st.sampled_from(solvers))
    source = ProblemRange(count=draw(st.integers(3, 5)), max_number=20, max_target=60)
    problem = source.draw(rng)
    config = SolverConfig(**values | changes)
    return problem, solver, config, SOLVERS[solver](problem, config, rng)


@settings(max_examples=60)
@given(solved())
def test_traces_are_correct_and_info_says_whether_they_are_solved(made):
    problem, solver, config, tree = made
    protocol = CountdownProtocol("apr" if solver == "apr" else "sos_plus")
    for thread in tree.threads():
        right, total = operations(thread.text)
        assert right == total
    text, solved = tree.root.text, tree.info["solved"]
    assert bool(check_solution(problem, text)) == solved == protocol.correct(problem, text)
    assert gave_up(tree.root) != solved
    if solver != "sos":
        assert text.endswith(trace.NO_SOLUTION) != solved
    assert tree.root.blocks[0].content == protocol.root_prompt(problem)


@settings(max_examples=60)
@given(solved(solvers=("apr",)))
def test_the_protocol_makes_the_same_children_and_joins(made):
    """For every spawn at any depth, compares the children's prompts and the join."""
    problem, _, config, tree = made
    protocol = CountdownProtocol("apr")
    assert depth(tree) <= config.depth
    for thread in tree.threads():
        text = ""
        for item in thread.blocks:
            if not isinstance(item, Spawn):
                text += item.content
                continue
            called = text + "".join(block.content for block in item.call)
            spawn = protocol.parse_spawn(called)
            assert list(spawn.children) == [child.blocks[0].content for child in item.children]
            results = [protocol.result(child.text) for child in item.children]
            assert protocol.join(spawn, results) == item.join.content and called[: spawn.position] == text
            text += item.join.content


def test_spawns_nest_to_the_depth_of_the_setting():
    config = SolverConfig(beam=(3, 3), sub_beam=(3, 3), promising=1.0)
    problem = Problem((3, 5, 7, 11, 13), 99)
    trees = {
        deep: SOLVERS["apr"](problem, SolverConfig(**vars(config) | {"depth": deep}), random.Random(0))
        for deep in range(4)
    }
    assert [depth(tree) for tree in trees.values()] == [0, 1, 2, 3]
    assert [children(tree) for tree in trees.values()] == sorted(children(tree) for tree in trees.values())
    second = [thread for thread in trees[2].threads() if thread.spawns]
    assert any("at level 2>" in spawn.call[0].content for thread in second for spawn in thread.spawns)


@settings(max_examples=60)
@given(
    st.lists(st.integers(0, 60), min_size=2, max_size=5).map(tuple), st.integers(2, 60),
    st.sampled_from(sorted(HEURISTICS)), st.sampled_from([0, 50]), st.integers(1, 9), st.booleans(),
)  # fmt: skip
def test_an_expansion_keeps_the_best_of_all_successors(numbers, target, heuristic, cap, beam, distinct):
    """The expected result is made by ranking every successor. With `distinct`, only the first of the successors with
    the same numbers counts."""
    config = SolverConfig(beam=(beam, beam), heuristic=heuristic, max_value=cap, shuffle=False, distinct=distinct)
    lines = []
    found, goal = Search(target, config, random.Random(0)).expand(Node.root(numbers, target), beam, lines)
    plain = [(state, op) for state, op in successors(numbers) if not cap or state[-1] <= cap]
    if distinct:
        plain = [one for i, one in enumerate(plain) if sorted(one[0]) not in [sorted(state) for state, _ in plain[:i]]]
    best = sorted(range(len(plain)), key=lambda i: rank(heuristic, plain[i][0], target))[:beam]
    kept = [plain[i] for i in sorted(best)]
    written = [trace.read_exploring(line) for text in lines for line in text.split("\n")]
    written = [f"{o.left}{o.symbol}{o.right}={o.value}" for o, _ in filter(None, written)]
    if len(numbers) > 2:
        assert written == [operation for _, operation in kept] and goal is None
        ranks = [rank(heuristic, child.numbers, target) for _, child in found]
        assert [ranked for ranked, _ in found] == pytest.approx(ranks) and ranks == sorted(ranks)
        assert {child.numbers for _, child in found} == {state for state, _ in kept}
    else:
        reached = next((i for i, (state, _) in enumerate(kept) if state == (target,)), len(kept))
        assert written == [operation for _, operation in kept[: reached + 1]]
        assert (goal is not None) == (reached < len(kept))


def test_shuffling_gives_every_order_equally_often():
    search = Search(50, SolverConfig(beam=(3, 3)), random.Random(0))
    counts = {}
    for _ in range(3000):
        lines = []
        search.expand(Node.root((7, 9), 50), 3, lines)
        counts[tuple(lines)] = counts.get(tuple(lines), 0) + 1
    assert len(counts) == 6 and all(abs(n - 500) < 5 * (3000 * 5 / 36) ** 0.5 for n in counts.values())


def test_with_rank_root_the_root_of_a_small_beam_begins_like_that_of_a_large_one():
    problem = Problem((3, 3, 7, 10), 24)

    def written(beam):
        config = SolverConfig(beam=(beam, beam), sub_beam=(6, 6), shuffle=False, rank_root=True, distinct=True)
        tree = SOLVERS["apr"](problem, config, random.Random(0))
        own = next(block.content for block in tree.root.blocks if block.sampled)
        return [line for line in own.split("\n") if line.startswith("Exploring Operation")], tree

    wide, tree = written(5)
    assert len(wide) == 5 and all(written(beam)[0] == wide[:beam] for beam in (2, 3, 4))
    (spawn,) = tree.root.spawns
    assert [f"#0,{i}" in line for i, line in enumerate(spawn.call[0].content.split("\n")[1:6])] == [True] * 5


def test_beams_are_drawn_in_proportion_to_their_weights():
    config = SolverConfig(beam=(2, 4), beam_weights=(1, 0, 3), sub_beam=(6, 6))
    drawn = [Search(50, config, random.Random(seed)).beam for seed in range(2000)]
    assert drawn.count(3) == 0 and abs(drawn.count(2) - 500) < 5 * (2000 * 3 / 16) ** 0.5
    for weights in ((1, 2), (0, 0, 0), (1, -1, 1)):
        with pytest.raises(ValueError, match=rf"beam_weights.*\({weights[0]}, "):
            SolverConfig(beam=(2, 4), beam_weights=weights)


def test_stream_of_search_searches_depth_first_or_breadth_first():
    problem = Problem((3, 5, 7, 11), 24)
    texts = {}
    for strategy in ("dfs", "bfs"):
        config = SolverConfig.paper_sos(strategies=(strategy,), beam=(5, 5), shuffle=False)
        tree = SOLVERS["sos"](problem, config, random.Random(0))
        assert tree.info["strategy"] == strategy and children(tree) == 0
        texts[strategy] = [trace.read_moving(line) for line in tree.root.text.split("\n")]
    moves = {strategy: [node.count(",") for node in nodes if node][:4] for strategy, nodes in texts.items()}
    assert moves["dfs"][:2] == [1, 2] and moves["bfs"][:3] == [1, 1, 1]
    assert all("Sub Search" not in (line or "") for line in texts["dfs"])


# By hand, from the rules: depth first, ranked by the mean distance to the target, nothing ranked above the target; the
# first child has one leaf, the second the goal. Two numbers: back at the parent after every leaf but the last.
DEEP = """\
Current State: 4:[3, 3, 4], Operations: []
Exploring Operation: 3+3=6, Resulting Numbers: [4, 6]
Generated Node #0,0: 4:[4, 6] Operation: 3+3=6
Moving to Node #0,0
Current State: 4:[4, 6], Operations: ['3+3=6']
Exploring Operation: 6-4=2, Resulting Numbers: [2]
2,4 unequal: No Solution
Moving to Node #0
Current State: 4:[3, 3, 4], Operations: []
Exploring Operation: 3/3=1, Resulting Numbers: [4, 1]
Generated Node #0,1: 4:[4, 1] Operation: 3/3=1
Moving to Node #0,1
Current State: 4:[4, 1], Operations: ['3/3=1']
Exploring Operation: 4*1=4, Resulting Numbers: [4]
4,4 equal: Goal Reached
"""
DEEP_IN_VAIN = """\
Current State: 5:[6, 2], Operations: []
Exploring Operation: 6-2=4, Resulting Numbers: [4]
4,5 unequal: No Solution
Moving to Node #0
Current State: 5:[6, 2], Operations: []
Exploring Operation: 6/2=3, Resulting Numbers: [3]
3,5 unequal: No Solution
Moving to Node #0
Current State: 5:[6, 2], Operations: []
Exploring Operation: 6+2=8, Resulting Numbers: [8]
8,5 unequal: No Solution
"""
# Breadth first with a beam of 2: the two leaves are kept, queued and taken from the queue; the last line has no end.
BROAD_IN_VAIN = """\
Current State: 5:[6, 2], Operations: []
Exploring Operation: 6-2=4, Resulting Numbers: [4]
4,5 unequal: No Solution
Exploring Operation: 6/2=3, Resulting Numbers: [3]
3,5 unequal: No Solution
Moving to Node #0,0
Current State: 5:[4], Operations: ['6-2=4']
Moving to Node #0,0
Current State: 5:[3], Operations: ['6/2=3']
No solution found."""


@pytest.mark.parametrize(
    "problem, strategy, text",
    [
        (Problem((3, 3, 4), 4), "dfs", DEEP),
        (Problem((6, 2), 5), "dfs", DEEP_IN_VAIN),
        (Problem((6, 2), 5), "bfs", BROAD_IN_VAIN),
    ],
)
def test_stream_of_search_writes_the_originals_lines(problem, strategy, text):
    config = SolverConfig(beam=(2, 2), heuristic="sum", strategies=(strategy,), shuffle=False)
    tree = SOLVERS["sos"](problem, config, random.Random(0))
    assert tree.root.text == text
    solved = trace.GOAL_REACHED in text
    assert tree.info["solved"] == solved == bool(check_solution(problem, text)) != gave_up(tree.root)


def stream_of_search(seed, strategy, **changes):
    problem = ProblemRange(count=4, max_number=30, max_target=60).draw(random.Random(seed))
    config = SolverConfig(**{"beam": (1, 4), "strategies": (strategy,)} | changes)
    return problem, config, SOLVERS["sos"](problem, config, random.Random(seed))


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("heuristic", ["sum", "multiply"])
def test_depth_first_goes_down_at_once_and_writes_where_it_is_again(seed, heuristic):
    """Read line by line: every line follows from those before, and children come in the order of their rank."""
    problem, _, tree = stream_of_search(seed, "dfs", heuristic=heuristic)
    lines = tree.root.text.rstrip("\n").split("\n")
    here, states, counts = "0", {"0": trace.State(problem.target, problem.numbers, ())}, {}
    assert trace.read_state(lines[0]) == states["0"]
    at = 1
    while at < len(lines):
        operation, numbers = trace.read_exploring(lines[at])
        kept = [
            (state, operation)
            for state, operation in successors(states[here].numbers)
            if rank(heuristic, state, problem.target) <= problem.target
        ]
        kept.sort(key=lambda one: rank(heuristic, one[0], problem.target))
        step = counts[here] = counts.get(here, -1) + 1
        assert (numbers, "{}{}{}={}".format(*operation)) == kept[step]
        at += 1
        if len(numbers) > 1:
            below = f"{here},{step}"
            assert trace.read_generated_node(lines[at]) == below == trace.read_moving(lines[at + 1])
            states[below] = trace.State(problem.target, numbers, (*states[here].operations, kept[step][1]))
            assert trace.read_state(lines[at + 2]) == states[below]
            here, at = below, at + 3
            continue
        solved = numbers == (problem.target,)
        assert lines[at] == (trace.reached if solved else trace.missed)(numbers[0], problem.target).rstrip("\n")
        at += 1
        assert not solved or at == len(lines)
        if at < len(lines):
            back = trace.read_moving(lines[at])
            assert here == back or here.startswith(back + ",")
            assert trace.read_state(lines[at + 1]) == states[back]
            here, at = back, at + 2
    assert tree.info["solved"] == (lines[-1].endswith(trace.GOAL_REACHED))


@pytest.mark.parametrize("seed", range(12))
def test_breadth_first_takes_all_that_it_keeps_from_its_queue(seed):
    """A failed search moves to each kept state once, states of one number included. At the first level, the best kept
    states come first."""
    problem, config, tree = stream_of_search(seed, "bfs", beam=(2, 2))
    lines = tree.root.text.split("\n")
    kept = [numbers for numbers in (found[1] for found in map(trace.read_exploring, lines) if found)]
    states = [state.numbers for state in map(trace.read_state, lines) if state]
    moves = [node for node in map(trace.read_moving, lines) if node]
    assert len(moves) == len(states) - 1 and moves[0].count(",") == 1
    if tree.info["solved"]:
        assert lines[-2].endswith(trace.GOAL_REACHED) and not lines[-1] and len(states) <= len(kept)
    else:
        assert lines[-1] == "No solution found." and sorted(states) == sorted([problem.numbers, *kept])
        ranks = [rank(config.heuristic, state, problem.target) for state in states[1:3]]
        assert ranks == sorted(rank(config.heuristic, state, problem.target) for state in kept[:2])


def test_the_result_of_a_stream_of_search_trace_is_verified():
    """The result is made from the operations of the last state, and is checked like any path."""
    protocol = CountdownProtocol("sos_plus")
    problem = Problem((3, 3, 4), 4)
    steps = [trace.read_exploring(line) for line in protocol.result(DEEP).split("\n")]
    assert [step and step[1] for step in steps] == [(4, 1), (4,), None]
    assert protocol.correct(problem, DEEP) and protocol.correct(problem, "Token Budget: 512 " + DEEP)
    assert not check_solution(Problem((3, 3, 5), 4), DEEP)
    for change in (("'3/3=1'", "'3/3=2'"), ("'3/3=1'", "'4/4=1'"), ("'3/3=1'", ""), ("4*1=4", "4*2=4")):
        wrong = DEEP.replace(*change)
        assert wrong != DEEP and not check_solution(problem, wrong) and not protocol.correct(problem, wrong)
    wrong = DEEP.replace("'3/3=1'", "'3/3=2'")
    assert protocol.result(wrong) is not None, "a wrong result is a result"
    for nothing in (
        DEEP_IN_VAIN,
        BROAD_IN_VAIN,
        DEEP[:-20],
        DEEP + "Moving to Node #0\n",
        "Moving to Node #0\n" + DEEP,
    ):
        assert protocol.result(nothing) is None and not protocol.correct(problem, nothing)


def all_texts(thread):
    """Yield all texts of a thread and of the threads below it, calls included, in the order of writing."""
    for item in thread.blocks:
        if isinstance(item, Spawn):
            yield from (block.content for block in item.call)
            for child in item.children:
                yield from all_texts(child)
            item = item.join
        yield item.content


@pytest.mark.parametrize(
    "solver, values, digest",
    [
        ("sos_plus", {"beam": (1, 5), "promising": 0.5}, "f3da0dcf1272267d"),
        ("sos_plus", {"beam": (1, 5), "promising": 0.5, "shuffle": False}, "44fd7079bdf4d36c"),
        ("sos_plus", {"beam": (2, 4), "promising": 0.9, "max_value": 30, "shuffle": False}, "eb1e4a070f213a01"),
        ("sos_plus", {"beam": (1, 5), "promising": 0.5, "max_value": 30}, "8733b5a38d84b778"),
        ("apr", {"beam": (1, 10), "sub_beam": (1, 15), "promising": 0.9}, "c2b015005085dbf8"),
        ("apr", {"beam": (1, 5), "promising": 0.1, "heuristic": "multiply_paper"}, "6cc870717418095b"),
        ("apr", {"beam": (4, 5), "sub_beam": (4, 5), "promising": 1.0, "max_value": 30, "shuffle": False},
         "7eddbef6b3359598"),
        ("apr", {"beam": (1, 5), "sub_beam": (2, 7), "promising": 0.5, "max_value": 30}, "4f189c860ccc85fa"),
    ],
)  # fmt: skip
def test_traces_equal_those_of_the_first_solvers(solver, values, digest):
    """The digests are of the solvers of commit efd4fda, which made a node of every successor and called
    `random.shuffle`. A faster search must not change the trace of a seed."""
    content, draw = hashlib.sha256(), random.Random(5)
    for seed in range(300):
        numbers = [draw.randint(1, 20) for _ in range(draw.choice([3, 4, 4, 5]))]
        problem = Problem(numbers, draw.randint(10, 60))
        for text in all_texts(SOLVERS[solver](problem, SolverConfig(**values), random.Random(seed)).root):
            content.update(text.encode() + b"|")
    assert content.hexdigest()[:16] == digest


def test_problems_of_one_and_two_numbers():
    for name, solve in SOLVERS.items():
        two = solve(Problem((6, 4), 24), SolverConfig(beam=(4, 4)), random.Random(0))
        one = solve(Problem((7,), 7), SolverConfig(beam=(4, 4)), random.Random(0))
        assert two.info["solved"] and check_solution(Problem((6, 4), 24), two.root.text), name
        assert not one.info["solved"] and gave_up(one.root)  # one number allows no operation


def test_a_tree_is_a_function_of_its_seed():
    for solve in SOLVERS.values():
        problem = SOURCE.draw(random.Random(1))
        config = SolverConfig.paper_apr()
        one, two, other = (solve(problem, config, random.Random(seed)) for seed in (5, 5, 6))
        assert one == two and (one != other or one.info["beam"] == other.info["beam"])


@pytest.mark.parametrize(
    "values, says",
    [
        ({"beam": (3, 2)}, r"beam.*\(3, 2\)"),
        ({"beam": (1, 2), "heuristic": "best"}, "heuristic.*'sum'.*'best'"),
        ({"beam": (1, 2), "promising": 1.5}, "promising.*1.5"),
        ({"beam": (1, 2), "depth": -1}, "depth.*-1"),
        ({"beam": (1, 2), "strategies": ("astar",)}, "strategies.*dfs, bfs.*'astar'"),
    ],
)
def test_wrong_settings_are_refused(values, says):
    with pytest.raises(ValueError, match=says):
        SolverConfig(**values)
