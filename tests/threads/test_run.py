"""The runner over a fake engine that plays scripts: the trees that result from the tokens of a model."""

import asyncio
import dataclasses
import random

import pytest

from apr_jax.errors import UserError
from apr_jax.tasks.countdown import CountdownProtocol, Problem, ProblemRange, trace
from apr_jax.tasks.countdown.solver import SOLVERS, SolverConfig
from apr_jax.tasks.countdown.vocabulary import countdown_tokenizer
from apr_jax.threads import Spawn, encode_tree, map_blocks
from apr_jax.threads.engine import Sampling
from apr_jax.threads.metrics import sampled_tokens
from apr_jax.threads.run import Budget, TreeRunner, run_all
from tests.tasks.countdown.conditioned import conditioned
from tests.threads.fake_engine import FakeEngine, drawing, scripted, scripts_of

TOKENIZER = countdown_tokenizer(99)
PROBLEM = Problem((2, 3, 4), 9)
BODY = (
    "\nExploring Operation: 2+3=5, Resulting Numbers: [4, 5]\n"
    "Generated Node #0,0: 9:[4, 5] Operation: 2+3=5\n"
    "Exploring Operation: 3*4=12, Resulting Numbers: [2, 12]\n"
    "Generated Node #0,1: 9:[2, 12] Operation: 3*4=12\n"
)
PATH = (
    "Moving to Node #0,0\nCurrent State: 9:[4, 5], Operations: ['2+3=5']\n"
    "Exploring Operation: 4+5=9, Resulting Numbers: [9]\n9,9 equal: Goal Reached\n"
)
FOUND = "\nExploring Operation: 4+5=9, Resulting Numbers: [9]\n9,9 equal: Goal Reached\n" + PATH
NOT_FOUND = "\n" + trace.NO_SOLUTION
ANSWER = (
    "Moving to Node #0\nCurrent State: 9:[2, 3, 4], Operations: []\n"
    "Exploring Operation: 2+3=5, Resulting Numbers: [4, 5]\n" + PATH
)


def call(*nodes, level=1):
    return trace.SPAWN_OPEN + "".join(trace.spawn_line(i, level, n) for i, n in enumerate(nodes)) + trace.SPAWN_CLOSE


def ids(text, end=True):
    return (*TOKENIZER.encode(text), *([TOKENIZER.eos] if end else []))


def runner(engine, context=2048, protocol=CountdownProtocol(), **budget):
    return TreeRunner(engine, protocol, TOKENIZER, Budget(context, **budget), Sampling(1.0))


def play(scripts, problem=PROBLEM, **budget):
    """Run the tree of a problem and return it. `scripts` are the texts or ids that the threads write, by thread name;
    an end token is appended to texts."""
    engine = scripted({name: text if isinstance(text, tuple) else ids(text) for name, text in scripts.items()})
    tree = asyncio.run(runner(engine, **budget).run(problem, (7,)))
    assert not engine.live, "a sequence was not freed"
    assert len(set(engine.names)) == len(engine.names), "two sequences have the same name, so the same random draws"
    return tree


def text_of(block):
    return TOKENIZER.decode(block.content)


def plain(thread):
    return map_blocks(thread, lambda block: type(block)(tuple(block.content), block.sampled))


@pytest.mark.parametrize("variant", ["apr", "sos_plus"])
def test_replays_a_solver_exactly(variant):
    """Where the model writes a solver's text, the runner's tree equals the solver's: contents, writers, calls, joins
    and ends."""
    rng = random.Random(3)
    protocol, source = CountdownProtocol(variant), ProblemRange(max_number=20, max_target=30)
    apr = SolverConfig.paper_apr(beam=(2, 5), sub_beam=(2, 6))
    config = {"apr": apr, "sos_plus": SolverConfig.paper_sos_plus()}[variant]
    condition = protocol.condition(6)
    problems = [source.draw(rng) for _ in range(30)]
    texts = [conditioned(SOLVERS[variant](problem, config, rng), condition) for problem in problems]
    trees = [encode_tree(text, TOKENIZER.encode, TOKENIZER.bos, TOKENIZER.eos) for text in texts]
    scripts = {}
    for index, tree in enumerate(trees):
        scripts |= scripts_of(tree, (index,))
    engine = scripted(scripts, context=10**6, shuffle=1)
    taker = runner(engine, context=10**6, protocol=protocol)
    ended = []
    jobs = [lambda i=i: taker.run(problems[i], (i,), condition) for i in range(len(problems))]
    played = asyncio.run(run_all(jobs, lambda index, _: ended.append(index)))
    for tree, text, result in zip(trees, texts, played):
        assert plain(result.root) == tree.root
        assert result.outcome.correct == result.outcome.answered == text.info["solved"]
        assert result.outcome.failures == result.outcome.malformed == {} and result.outcome.suppressed_joins == 0
    assert sorted(ended) == list(range(30)) and ended != sorted(ended), "no tree overtook another"
    assert not engine.live
    if variant == "apr":
        assert sum(len(tree.root.spawns) for tree in trees) > 20


def test_a_join_replaces_the_call_and_has_the_results_of_all_children():
    tree = play({
        (7,): BODY + call("0,0", "0,1") + trace.reached(9, 9) + ANSWER,
        (7, 0, 0): FOUND, (7, 0, 1): NOT_FOUND,
    })  # fmt: skip
    prompt, body, spawn, end = tree.root.blocks
    assert isinstance(spawn, Spawn) and [len(c.blocks) for c in spawn.children] == [2, 2]
    assert [block.sampled for block in (prompt, body, *spawn.call, spawn.join, end)] == [False, True, True, False, True]
    assert text_of(body) == BODY and "".join(map(text_of, spawn.call)) == call("0,0", "0,1")
    assert text_of(spawn.join) == (
        trace.JOIN_OPEN + trace.join_line(0, 1, "0,0", True) + PATH.removesuffix("\n").removesuffix(": Goal Reached")
        + ": Goal Reached\n" + trace.join_line(1, 1, "0,1", False) + trace.JOIN_CLOSE
    )  # fmt: skip
    assert tree.outcome.correct and tree.outcome.answered
    for block in (body, *spawn.call, end):
        assert len(block.logprobs) == len(block.content)


def test_a_spawn_is_parsed_once_and_joined_as_it_was_parsed():
    """`join` gets the very request that `parse_spawn` returned, and its text is encoded unchanged."""
    parsed, joined = [], []

    class Noting(CountdownProtocol):
        def parse_spawn(self, text):
            parsed.append(super().parse_spawn(text))
            return parsed[-1]

        def join(self, spawn, results):
            joined.append(spawn)
            return trace.JOIN_OPEN + f"{len(results)} of {len(spawn.children)}\n"

    engine = scripted({(7,): ids(BODY + call("0,0", "0,1") + NOT_FOUND), (7, 0, 0): ids(FOUND)} | {(7, 0, 1): ids("")})
    tree = asyncio.run(runner(engine, protocol=Noting()).run(PROBLEM, (7,)))
    assert len(parsed) == len(joined) == 1 and parsed[0] is joined[0]
    assert tree.root.spawns[0].join.content == ids(trace.JOIN_OPEN + "2 of 2\n", end=False)


def test_log_probabilities_stay_with_their_tokens_when_a_call_is_cut_out():
    tree = play({(7,): BODY + call("0,0") + NOT_FOUND, (7, 0, 0): NOT_FOUND})
    body, spawn = tree.root.blocks[1:3]
    joint = body.logprobs + spawn.call[0].logprobs
    assert joint == tuple(-0.25 * i for i in range(len(joint)))


def test_the_guard_replaces_a_sampled_opening_of_a_join_by_that_of_a_spawn():
    """Only this token is forced; the rest of the call is sampled."""
    fake = BODY + trace.JOIN_OPEN + call("0,0").removeprefix(trace.SPAWN_OPEN) + NOT_FOUND
    tree = play({(7,): fake, (7, 0, 0): FOUND})
    assert tree.outcome.suppressed_joins == 1 and tree.outcome.failures == {}
    prompt, body, spawn, end = tree.root.blocks
    assert text_of(body) == BODY
    assert [(text_of(block), block.sampled) for block in spawn.call] == [
        (trace.SPAWN_OPEN, False),
        (call("0,0").removeprefix(trace.SPAWN_OPEN), True),
    ]
    assert "Goal Reached in Sub Search 0" in text_of(spawn.join)


def test_the_guard_replaces_every_opening_of_a_join():
    join = ids(trace.JOIN_OPEN, end=False)
    tree = play({(7,): join * 5 + ids(NOT_FOUND)})
    assert tree.outcome.suppressed_joins == 5 and tree.root.failure is None
    assert all(join[0] not in block.content for block in tree.root.blocks if block.sampled)
    assert all(len(block) for block in tree.root.blocks)


@pytest.mark.parametrize(
    "kind, written",
    [
        ("empty", BODY + call()),
        ("unopened", BODY + trace.SPAWN_CLOSE),
        ("bad_line", BODY + trace.SPAWN_OPEN + "please search\n" + trace.SPAWN_CLOSE),
        ("unknown_node", BODY + call("0,7")),
        ("bad_state", BODY.replace("Generated Node #0,1: 9:[2, 12]", "Generated Node #0,1: 9:[2, 12") + call("0,1")),
        ("too_many", BODY + call("0,0", "0,1", "0,0")),
        ("too_deep", BODY + call("0,0")),
    ],
)
def test_malformed_spawns_end_their_thread_and_are_counted_by_kind(kind, written):
    budget = {"too_many": {"threads": 3}, "too_deep": {"depth": 0}}.get(kind, {})
    tree = play({(7,): written}, **budget)
    assert tree.root.failure == f"malformed:{kind}"
    assert tree.outcome.malformed == {kind: 1} and tree.outcome.failures == {f"malformed:{kind}": 1}
    assert not tree.outcome.correct
    assert text_of(tree.root.blocks[-1]) == written, "the malformed call is not kept for training"


@pytest.mark.parametrize("kind", ["empty", "bad_line", "unknown_node", "too_deep"])
def test_malformed_spawns_may_count_as_children_that_failed(kind):
    """The thread resumes after a join without results."""
    written = {
        "empty": call(),
        "bad_line": trace.SPAWN_OPEN + "please search\n" + trace.SPAWN_CLOSE,
        "unknown_node": call("0,7"),
        "too_deep": call("0,0"),
    }[kind]
    tree = play({(7,): BODY + written + trace.reached(9, 9) + ANSWER}, malformed="fail", depth=int(kind != "too_deep"))
    assert tree.outcome.malformed == {kind: 1} and tree.outcome.failures == {} and tree.outcome.correct
    (spawn,) = tree.root.spawns
    nothing = trace.join_line(0, 1, "0,0", False) if kind == "too_deep" else ""
    assert text_of(spawn.join) == trace.JOIN_OPEN + nothing + trace.JOIN_CLOSE and not spawn.children
    assert "".join(map(text_of, spawn.call)) == written


def test_children_over_the_budget_are_not_run_and_count_as_failed():
    tree = play(
        {(7,): BODY + call("0,0", "0,1", "0,0") + NOT_FOUND, (7, 0, 0): FOUND, (7, 0, 1): NOT_FOUND},
        malformed="fail", threads=3,
    )  # fmt: skip
    (spawn,) = tree.root.spawns
    assert len(spawn.children) == 2 and tree.outcome.malformed == {"too_many": 1} and tree.root.failure is None
    for line in (trace.join_line(0, 1, "0,0", True), trace.join_line(2, 1, "0,0", False)):
        assert line in text_of(spawn.join)


def test_an_empty_join_replaces_the_whole_call():
    """Even where the call contains a second opening that is spelled in tokens of characters."""
    spelled = tuple(TOKENIZER.token(character) for character in trace.SPAWN_OPEN)
    opened = ids(trace.SPAWN_OPEN, end=False)
    written = ids(BODY, end=False) + opened + spelled + ids(trace.SPAWN_CLOSE, end=False) + ids(NOT_FOUND)
    (spawn,) = play({(7,): written}, malformed="fail").root.spawns
    assert text_of(spawn.join) == trace.JOIN_OPEN + trace.JOIN_CLOSE
    assert spawn.call[0].content[0] == opened[0] and not spawn.children


@pytest.mark.parametrize("kind, children", [("empty", ()), ("too_deep", ("0,0",))])
def test_a_thread_ends_after_too_many_malformed_spawns(kind, children):
    written = ids(BODY, end=False) + ids(call(*children), end=False) * 500
    tree = play({(7,): written}, malformed="fail", threads=5, depth=int(kind != "too_deep"))
    assert tree.root.failure == f"malformed:{kind}" and tree.outcome.malformed == {kind: 5}


def test_a_spawn_without_an_opening_ends_its_thread_under_either_policy():
    tree = play({(7,): BODY + trace.SPAWN_CLOSE}, malformed="fail")
    assert tree.root.failure == "malformed:unopened"


def test_the_limit_of_sampled_tokens_is_divided_among_threads_and_never_exceeded():
    """Two children and their parent each get a third of the tokens that are left at the spawn."""
    scripts = {(7,): BODY + call("0,0", "0,1") + NOT_FOUND + BODY * 9, (7, 0, 0): BODY * 9, (7, 0, 1): NOT_FOUND}
    before = len(ids(BODY + call("0,0", "0,1"), end=False))
    for tokens in (before - 5, before + 2, before + 90, before + 91, before + 200):
        tree = play(scripts, tokens=tokens)
        assert sampled_tokens(tree) <= tokens
        if tokens < before:
            assert tree.root.failure == "tokens" and sampled_tokens(tree) == tokens
        else:
            each = (tokens - before) // 3
            first, second = tree.root.children
            assert first.failure == "tokens" and first.sampled_tokens == each
            assert second.sampled_tokens == min(each, len(ids(NOT_FOUND)))
            assert tree.root.failure == "tokens" and sampled_tokens(tree) == tokens, (
                "the tokens that a child left were lost"
            )
    assert tree.outcome.failures == {"tokens": 2}
    whole = play({(7,): BODY + NOT_FOUND}, tokens=len(ids(BODY + NOT_FOUND)))
    assert whole.root.failure is None


def test_a_root_that_ends_with_too_few_children_is_forced_to_spawn():
    asked = call("0,1").removeprefix(trace.SPAWN_OPEN)
    written = (*ids(BODY + call("0,0") + NOT_FOUND), *ids(asked + NOT_FOUND))
    scripts = {(7,): written, (7, 0, 0): NOT_FOUND, (7, 1, 0): FOUND}
    tree = play(scripts, min_children=2)
    assert [len(spawn.children) for spawn in tree.root.spawns] == [1, 1] and tree.outcome.forced_spawns == 1
    assert [block.sampled for block in tree.root.spawns[1].call] == [False, True] and tree.root.failure is None
    assert len(play(scripts, min_children=1).root.spawns) == 1
    full = play({(7,): written, (7, 0, 0): NOT_FOUND}, min_children=1, threads=2)
    assert full.root.failure is None and full.outcome.forced_spawns == 0
    stubborn = play({(7,): ids(BODY) + ids("") * 300}, min_children=1, context=300)
    assert stubborn.root.failure == "length" and not stubborn.root.spawns


@pytest.mark.parametrize(
    "budget, message",
    [
        ({"threads": 0}, "threads.*0"),
        ({"tokens": 0}, "tokens.*0"),
        ({"threads": 3, "min_children": 3}, "3.*threads"),
        ({"depth": 0, "min_children": 1}, "1.*depth"),
        ({"malformed": "ignore"}, "malformed.*stop.*fail.*'ignore'"),
    ],
)
def test_wrong_budgets_are_refused_with_setting_and_value(budget, message):
    with pytest.raises(UserError, match=message):
        runner(scripted({}), **budget)


def test_a_spawn_spelled_in_characters_is_no_spawn():
    """Only the opening token begins a call, since the call must be cut out of the context at a token."""
    spelled = tuple(TOKENIZER.token(character) for character in trace.SPAWN_OPEN)
    rest = ids(call("0,0").removeprefix(trace.SPAWN_OPEN), end=False)
    tree = play({(7,): ids(BODY, end=False) + spelled + rest})
    assert tree.root.failure == "malformed:unopened"


def test_a_child_that_fails_is_a_child_without_a_solution():
    broken = FOUND + trace.SPAWN_CLOSE
    tree = play({(7,): BODY + call("0,0", "0,1") + NOT_FOUND, (7, 0, 0): broken, (7, 0, 1): NOT_FOUND})
    spawn = tree.root.spawns[0]
    assert spawn.children[0].failure == "malformed:unopened" and tree.root.failure is None
    assert "No Solution in Sub Search 0" in text_of(spawn.join)
    assert tree.outcome.failures == {"malformed:unopened": 1}


def test_an_answer_is_correct_only_where_the_root_wrote_its_end():
    right = BODY + trace.reached(9, 9) + ANSWER
    whole = 1 + len(ids(CountdownProtocol().root_prompt(PROBLEM) + right))
    assert play({(7,): right}, context=whole).outcome.correct
    cut = play({(7,): right}, context=whole - 1)
    assert cut.root.failure == "length" and not cut.outcome.correct and cut.outcome.answered


def test_no_thread_grows_past_its_window():
    long = BODY * 40
    tree = play({(7,): BODY + call("0,0") + long, (7, 0, 0): long}, context=300)
    assert tree.root.failure == tree.root.children[0].failure == "length"
    for thread in tree.threads():
        assert sum(map(len, thread.context)) == 300


def test_a_prompt_that_fills_the_window_and_a_join_that_overflows_it_are_length_failures():
    assert play({}, context=10).root.failure == "length"
    length = len(ids(CountdownProtocol().root_prompt(PROBLEM) + BODY + call("0,0")))
    tree = play({(7,): BODY + call("0,0"), (7, 0, 0): FOUND}, context=length)
    assert tree.root.failure == "length" and len(tree.root.spawns) == 1


def test_children_may_spawn_where_the_budget_allows_the_depth():
    child = (
        "\nExploring Operation: 4+5=9, Resulting Numbers: [9]\nGenerated Node #0,0,0: 9:[9] Operation: 4+5=9\n"
        + call("0,0,0", level=2) + trace.reached(9, 9) + PATH
    )  # fmt: skip
    scripts = {(7,): BODY + call("0,0") + NOT_FOUND, (7, 0, 0): child, (7, 0, 0, 0, 0): NOT_FOUND}
    tree = play(scripts, depth=2)
    grandchild = tree.root.children[0].children[0]
    assert text_of(grandchild.blocks[0]) == trace.moving("0,0,0") + trace.state(9, (9,), ("2+3=5", "4+5=9"))
    assert tree.outcome.failures == {}
    assert play(scripts, depth=1).root.children[0].failure == "malformed:too_deep"


def test_the_budget_of_threads_holds_in_every_order():
    """Two children that spawn at the same time must not both take the last threads."""
    script = {(7,): BODY + call("0,0", "0,1") + NOT_FOUND}
    for index in (0, 1):
        nodes = (f"0,{index},0", f"0,{index},1")
        lines = "".join(trace.generated(node, 9, (9,), "4+5=9") for node in nodes)
        script[(7, 0, index)] = "\n" + lines + call(*nodes, level=2) + NOT_FOUND
        script |= {(7, 0, index, 0, i): NOT_FOUND for i in (0, 1)}
    made = []
    for shuffle in range(20):
        engine = scripted({name: ids(text) for name, text in script.items()}, shuffle=shuffle)
        made.append(asyncio.run(runner(engine, threads=6, depth=2).run(PROBLEM, (7,))))
    assert max(len(list(tree.threads())) for tree in made) <= 6
    assert all(tree == made[0] for tree in made), "timing decided which spawn was refused"


def test_children_with_one_prompt_are_two_threads():
    tree = play({(7,): BODY + call("0,0", "0,0") + NOT_FOUND, (7, 0, 0): FOUND, (7, 0, 1): NOT_FOUND})
    first, second = tree.root.children
    assert first.blocks[0] == second.blocks[0] and first.blocks[1] != second.blocks[1]


def test_random_tokens_always_give_a_tree():
    """Every tree ends without an exception, all sequences are freed, and each failure has a known kind."""
    likely = [TOKENIZER.token(t) for t in (trace.SPAWN_OPEN, trace.SPAWN_CLOSE, trace.JOIN_OPEN, "Moving to Node #0")]
    likely += [TOKENIZER.eos, *ids(call("0"), end=False), *ids("\nMoving to Node #0\n", end=False)]

    def trees(shuffle):
        engine = drawing(len(TOKENIZER), likely, shuffle=shuffle)
        taker = runner(engine, context=200, threads=20)
        jobs = [lambda i=i: taker.run(PROBLEM, (i,)) for i in range(150)]
        made = asyncio.run(run_all(jobs))
        assert not engine.live
        return made

    made = trees(1)
    kinds = {kind for tree in made for kind in tree.outcome.failures}
    assert {"malformed:unopened", "malformed:empty"} <= kinds
    assert all(kind == "length" or kind.startswith("malformed:") for kind in kinds)
    assert made == trees(2), "trees depend on the order in which they run"


def test_an_error_of_the_engine_is_raised_and_all_sequences_are_freed():
    def tape(name, prompt):
        yield from ids(BODY + call("0,0"), end=False)
        raise MemoryError("no room")

    engine = FakeEngine(tape)
    with pytest.raises((MemoryError, RuntimeError)):
        asyncio.run(runner(engine).run(PROBLEM, (7,)))
    assert not engine.live


def test_all_other_threads_have_ended_before_the_error_of_a_child_is_raised():
    """In its own tree and in trees that run at the same time: no asyncio task and no live sequence is left."""
    scripts = {(7,): BODY + call("0,0", "0,1") + NOT_FOUND, (7, 0, 0): BODY * 9, (8,): BODY * 9}

    def tape(name, prompt):
        if name == (7, 0, 1):
            raise MemoryError("no room")
        return iter(ids(scripts[name]))

    class Slow(FakeEngine):
        async def decode(self, sequence, *asked):
            for _ in range(50 if sequence.name in ((7, 0, 0), (8,)) else 0):
                await asyncio.sleep(0)
            return await super().decode(sequence, *asked)

    async def work():
        engine = Slow(tape)
        taker = runner(engine)
        with pytest.raises(MemoryError, match="no room"):
            await run_all([lambda i=i: taker.run(PROBLEM, (i,)) for i in (7, 8)])
        return engine.live, asyncio.all_tasks() - {asyncio.current_task()}

    assert asyncio.run(work()) == (set(), set())


def test_a_window_above_the_context_of_the_engine_is_refused():
    with pytest.raises(UserError, match="5000.*4096"):
        runner(scripted({}), context=5000)


def test_a_protocol_may_give_a_reward_of_its_own_and_nothing_else_changes():
    """It gets the problem and the rollout as text, with its outcome; without one the tree's outcome has none."""
    seen = []

    class Rewarding(CountdownProtocol):
        def reward(self, problem, tree):
            seen.append((problem, tree))
            return 0.25

    scripts = {(7,): ids(NOT_FOUND)}
    plain, own = (
        asyncio.run(runner(scripted(scripts), protocol=protocol).run(PROBLEM, (7,)))
        for protocol in (CountdownProtocol(), Rewarding())
    )
    assert (plain.outcome.reward, own.outcome.reward) == (None, 0.25) and plain.root == own.root
    assert dataclasses.replace(own.outcome, reward=None) == plain.outcome
    ((problem, tree),) = seen
    assert problem == PROBLEM and tree.root.text.endswith(NOT_FOUND) and tree.outcome == plain.outcome
