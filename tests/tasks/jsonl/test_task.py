"""The task of files: what is right, what a rollout is worth, and data sets that depend on the files' content."""

import asyncio
import json
import shutil

import pytest

from apr_jax.data.dataset import DataConfig, make_dataset, read_manifest
from apr_jax.errors import UserError
from apr_jax.tasks.jsonl.task import Jsonl, JsonlSettings, load_reward, same_answer
from apr_jax.tasks.task import load_task
from apr_jax.threads import decode_tree, encode_tree
from apr_jax.threads.engine import Sampling
from apr_jax.threads.run import Budget, TreeRunner, run_all
from apr_jax.train.reward import Penalties, reward_terms, rewards, rollout_metrics
from tests.tasks.jsonl import make
from tests.threads.fake_engine import scripted, scripts_of

CLOSENESS = "tests.tasks.jsonl.make:closeness"


def task(**others):
    return Jsonl(JsonlSettings(**make.settings(**others)))


@pytest.mark.parametrize("right, given", [("4", "4"), ("4", "4.0"), ("4", " 4\n"), ("0.5", ".5"), ("-3", "-30e-1"),
    ("1e400", "10e399"), ("a b", "a b"), ("12345678901234567890", "12345678901234567890.0"), ("nan", "nan"),
    ("+0", "-0.0"), ("1e99999999999999999999", "1e99999999999999999999")])  # fmt: skip
def test_answers_are_the_same_text_or_number(right, given):
    assert same_answer(right, given) and same_answer(given, right)


@pytest.mark.parametrize("right, given", [("4", "5"), ("4", ""), ("a b", "a  b"), ("a", "A"), ("4", "4 apples"),
    ("12345678901234567890", "12345678901234567891"), ("0.1", "0.1000000000000000001"), ("4", "٤"), ("1_0", "10"),
    ("nan", "NaN"), ("inf", "Infinity"), ("1e99999999999999999999", "1e99999999999999999998")])  # fmt: skip
def test_other_answers_are_wrong(right, given):
    assert not same_answer(right, given) and not same_answer(given, right)


def test_right_is_what_the_root_returns_last():
    mine = task()
    (problem,) = mine.problems(0, "train", [0])
    protocol = mine.protocol("threads")
    assert problem.answer == "6" and protocol.correct(problem, "<return>9</return> <return>6.0</return>")
    assert not protocol.correct(problem, "6") and not protocol.correct(problem, "<join><result>6</result></join>")
    assert protocol.steps("1+1=3") == (0, 0) and protocol.reward is None


@pytest.mark.parametrize("reward", ["", CLOSENESS])
@pytest.mark.parametrize("children", ["fresh", "inherit"])
def test_the_runner_replays_the_demonstrations(reward, children):
    mine = task(reward=reward, children=children)
    words, problems = mine.tokenizer(), mine.problems(0, "train", range(30))
    texts = [mine.demonstration(problem, "threads", 0, "train", i) for i, problem in enumerate(problems)]
    trees = [encode_tree(text, words.encode, words.bos, words.eos) for text in texts]
    scripts = {}
    for index, tree in enumerate(trees):
        scripts |= scripts_of(tree, (index,))
    runner = TreeRunner(scripted(scripts, shuffle=1), mine.protocol("threads"), words, Budget(96), Sampling())
    played = asyncio.run(run_all([lambda i=i: runner.run(problems[i], (i,)) for i in range(len(problems))]))
    for tree, text in zip(played, texts, strict=True):
        assert decode_tree(tree, words.decode).root == text.root and tree.outcome.correct
        assert tree.outcome.reward == (1.0 if reward else None)


def rollout(mine, written):
    """The tree of the first training problem, 1+5+2+8, whose root writes a text and ends."""
    words, (problem,) = mine.tokenizer(), mine.problems(0, "train", [0])
    engine = scripted({(0,): (*words.encode(written), words.eos)})
    return asyncio.run(TreeRunner(engine, mine.protocol("threads"), words, Budget(48), Sampling()).run(problem, (0,)))


@pytest.mark.parametrize(
    "written, worth, correct",
    [("<return>6</return>", 1.0, True), ("<return>7</return>", 0.8, False), ("<return>1</return>", 0.0, False),
     ("no", 0.0, False), ("<return>x</return>", 0.0, False)],
)  # fmt: skip
def test_a_reward_is_told_apart_from_being_right(written, worth, correct):
    """What is learned from is the function's, less penalties; right, and so accuracy, is the answer alone."""
    own, plain = rollout(task(reward=CLOSENESS), written), rollout(task(), written)
    assert (own.outcome.reward, own.outcome.correct) == (pytest.approx(worth), correct)
    assert plain.outcome.reward is None and plain.outcome.correct == correct and own.root == plain.root
    penalties = Penalties(token=0.01)
    cost = 0.01 * sum(thread.sampled_tokens for thread in own.threads())
    assert reward_terms(own, penalties) == pytest.approx({"task": worth, "token": -cost})
    assert reward_terms(plain, penalties) == pytest.approx({"correct": float(correct), "token": -cost})
    metrics = rollout_metrics([[own, own]], penalties)
    assert metrics["rollout/correct"] == correct and metrics["rollout/reward"] == pytest.approx(worth - cost)
    assert metrics["rollout/reward_task"] == pytest.approx(worth)
    assert rewards([own, plain], Penalties()) == pytest.approx([worth, float(correct)])


MODULE = """
def whole(problem, answer, tree):
    return 2 if answer is None else -1

def seen(problem, answer, tree):
    return len(tree.root.text) + (problem.prompt == "1+5+2+8") / 2 + tree.outcome.answered / 4

def nothing(problem, answer, tree):
    return None

def endless(problem, answer, tree):
    return float("inf")

value = 3
"""


@pytest.fixture
def my_reward(tmp_path, monkeypatch):
    (tmp_path / "my_reward.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    yield
    load_reward.cache_clear()


def test_a_reward_of_the_current_folder_gets_problem_answer_and_tree(my_reward):
    assert rollout(task(reward="my_reward:whole"), "a").outcome.reward == 2.0
    assert rollout(task(reward="my_reward:whole"), "<return>5</return>").outcome.reward == -1.0
    cut_off = rollout(task(reward="my_reward:whole"), "<return>5</return>" + "x" * 99)
    assert cut_off.root.failure == "length" and cut_off.outcome.reward == 2.0
    assert rollout(task(reward="my_reward:seen"), "ab").outcome.reward == len("1+5+2+8\nab") + 0.5
    for name, given in (("nothing", "None"), ("endless", "inf")):
        with pytest.raises(UserError, match=f"my_reward:{name} gave {given} for problem 40"):
            rollout(task(reward=f"my_reward:{name}"), "a")


@pytest.mark.parametrize("spec", ["my_reward:value", "my_reward:none", "nowhere:f", "nowhere.at_all:f"])
def test_a_reward_that_does_not_exist_is_refused_before_anything_is_made(my_reward, spec):
    mine = task(reward=spec)
    with pytest.raises(UserError, match=f"jsonl.reward is .* was given '{spec}'"):
        mine.check(mine.tokenizer())


def test_wrong_settings_are_named():
    for wrong, says in (({"reward": "f"}, "reward is package.module:function, was given 'f'"),
                        ({"reward": ":f"}, "was given ':f'"), ({"reward": "a:"}, "was given 'a:'"),
                        ({"reward": ".a:b"}, "was given '.a:b'"), ({"levels": -1}, "levels is at least 0"),
                        ({"children": "both"}, "children is one of fresh, inherit, was given 'both'"),
                        ({"train": 3}, "train is a text")):  # fmt: skip
        with pytest.raises(UserError, match=says):
            load_task("jsonl", wrong)
    with pytest.raises(UserError, match="variants of jsonl are threads"):
        task().protocol("apr")


def test_a_data_set_is_that_of_the_files_content(tmp_path):
    files = tmp_path / "files"
    files.mkdir()
    for name in make.NAMES:
        shutil.copy(make.HERE / f"{name}.jsonl", files)
    config = DataConfig("jsonl", JsonlSettings(**make.settings(files)), train=160, held_out=40, window=64)
    manifest = make_dataset(config, tmp_path / "data")
    assert manifest["threads_train"]["trees"] == 160 and manifest["threads_train"]["solved_by_solver"] == 160
    assert {*manifest["config"]["files"]} == {str(files / f"{name}.jsonl") for name in make.NAMES}
    assert make_dataset(config, tmp_path / "data") == manifest
    rows = [json.loads(line) for line in (tmp_path / "data" / "train.jsonl").read_text().splitlines()]
    assert rows[0] == {"id": "40", "prompt": "1+5+2+8", "answer": "6"}
    path = files / "demonstrations.jsonl"
    path.write_text(path.read_text().replace("3", "4"))
    with pytest.raises(UserError, match="another files"):
        make_dataset(config, tmp_path / "data")
    assert read_manifest(tmp_path / "data") == manifest


def test_nothing_is_made_of_files_with_a_wrong_line(tmp_path):
    make.main("", str(tmp_path))
    with (tmp_path / "held_out.jsonl").open("a") as file:
        file.write('{"id": 900, "prompt": "1+1"}\n')
    config = DataConfig("jsonl", JsonlSettings(**make.settings(tmp_path)), train=160, held_out=40, window=64)
    with pytest.raises(UserError, match="held_out.jsonl, line 41: answer is missing"):
        make_dataset(config, tmp_path / "data")
    assert not (tmp_path / "data").exists()
    with pytest.raises(UserError, match="161 train problems were asked for, jsonl gives about 160"):
        make_dataset(
            DataConfig("jsonl", JsonlSettings(**make.settings()), train=161, held_out=40, window=64), tmp_path / "d"
        )
