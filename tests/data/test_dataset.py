"""Tests of data sets: contents and counts, and that shards, processes and kills change no byte."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from apr_jax.data import dataset as module
from apr_jax.data.dataset import DataConfig, make_dataset
from apr_jax.data.demonstrations import encode_demonstration, unshared_tokens
from apr_jax.data.problems import ProblemFile
from apr_jax.data.store import TreeStore
from apr_jax.io.files import LEFT_AFTER
from apr_jax.tasks.countdown import Problem, ProblemRange, check_solution
from apr_jax.tasks.countdown.task import AprSettings, Countdown, CountdownSettings, SosPlusSettings
from apr_jax.tasks.countdown.vocabulary import countdown_tokenizer
from apr_jax.tasks.task import NoSettings
from apr_jax.threads import Spawn
from apr_jax.threads.metrics import total_tokens

ROOT = Path(__file__).resolve().parent.parent.parent
TOKENIZER = countdown_tokenizer(99)
SETTINGS = CountdownSettings(
    problems=ProblemRange(max_number=20),
    apr=AprSettings(beam=(1, 4), sub_beam=(1, 4)),
    sos_plus=SosPlusSettings(beam=(1, 3)),
)
CONFIG = DataConfig("countdown", SETTINGS, train=50, held_out=9, window=1500, validation=5)
VARIANTS = ("apr", "sos_plus")


def changed(config=CONFIG, **settings):
    """Return a config with other settings of the task."""
    return dataclasses.replace(config, settings=dataclasses.replace(config.settings, **settings))


def tree_of(problem, variant, index=0, settings=SETTINGS):
    task = Countdown(settings)
    text = task.demonstration(problem, variant, 0, "train", index)
    return encode_demonstration(task, problem, variant, index, text, TOKENIZER)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(module, "SHARD_PROBLEMS", 8)


def files(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and ".part" not in str(path)
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SHARD_PROBLEMS", 8)
        make_dataset(CONFIG, folder)
    return folder


def problems(folder, name="train"):
    return list(ProblemFile(Countdown(), folder / f"{name}.jsonl"))


# ---------------------------------------------------------------------- the bytes depend on the config alone


def test_separate_calls_for_parts_of_the_shards_make_the_same_bytes(made, tmp_path):
    assert make_dataset(CONFIG, tmp_path, shard=(2, 3)) is None
    assert make_dataset(CONFIG, tmp_path, shard=(0, 3)) is None
    assert make_dataset(CONFIG, tmp_path, shard=(1, 3)) is not None
    assert files(tmp_path) == files(made)


@pytest.mark.parametrize(
    "file_name", ["config.json", "tokenizer.json", "held_out.jsonl", "train.jsonl", "manifest.json"]
)
def test_calls_with_equal_process_ids_do_not_touch_each_others_files(made, tmp_path, monkeypatch, file_name):
    """Containers on several machines can have equal process ids.

    When the first call is about to rename `file_name` into place, the second call runs and makes all its files.
    """
    replace, other = os.replace, []

    def second_call_first(source, target):
        if Path(target).name == file_name and not other:
            other.append(True)
            make_dataset(CONFIG, tmp_path, shard=(1, 2))
        replace(source, target)

    make_dataset(CONFIG, tmp_path, shard=(1, 2)) if file_name == "manifest.json" else None
    monkeypatch.setattr(os, "getpid", lambda: 7)
    monkeypatch.setattr(os, "replace", second_call_first)
    make_dataset(CONFIG, tmp_path, shard=(0, 2))
    assert other and make_dataset(CONFIG, tmp_path, shard=(1, 2)) is not None
    assert files(tmp_path) == files(made)
    assert not list(tmp_path.rglob("*.part"))


def test_the_last_call_removes_part_files_of_killed_processes_but_not_those_being_written(made, tmp_path):
    fresh = [tmp_path / "train.jsonl.5e1f.part", tmp_path / "apr_train" / "00001.5e1f.part"]
    left = [tmp_path / "train.jsonl.99.part", tmp_path / "apr_train" / "00002.99.part"]
    for file, folder in (fresh, left):
        folder.mkdir(parents=True)
        file.write_text("")
        (folder / "shard.json").write_text("")
    for path in left:
        os.utime(path, (time.time() - 2 * LEFT_AFTER,) * 2)
    make_dataset(CONFIG, tmp_path)
    assert [path.exists() for path in (*fresh, *left)] == [True, True, False, False]
    assert files(tmp_path).items() >= files(made).items()


SCRIPT = """
import sys
from pathlib import Path
from apr_jax.data import dataset
from tests.data.test_dataset import CONFIG
dataset.SHARD_PROBLEMS = 8
if __name__ == "__main__":
    dataset.make_dataset(CONFIG, Path(sys.argv[1]), processes=int(sys.argv[2]))
"""


def test_killed_processes_and_a_resumed_run_make_the_same_bytes(made, tmp_path):
    """SIGKILL ends a run of two worker processes at a random time; a run of one process resumes it."""
    script, folder = tmp_path / "script.py", tmp_path / "data"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, str(script), str(folder), "2"], env=environment, start_new_session=True, stderr=subprocess.PIPE
    )
    while not list(folder.glob("*_*/0000?/shard.json")) and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    made_by_then = files(folder)
    assert made_by_then and made_by_then.items() <= files(made).items()
    make_dataset(CONFIG, folder)
    assert files(folder) == files(made)


def test_a_folder_with_a_data_set_of_another_config_is_refused(made):
    before = files(made)
    other = {"task": "sums", "settings": NoSettings()}
    for change in ({"train": 51}, {"seed": 1}, {"settings": CountdownSettings()}, other):
        with pytest.raises(ValueError, match="another (train|seed|settings|task)"):
            make_dataset(dataclasses.replace(CONFIG, **change), made)
    assert files(made) == before


def test_a_data_set_older_than_a_setting_of_its_task_is_accepted(made, tmp_path):
    shutil.copytree(made, copy := tmp_path / "data")
    manifest = json.loads((copy / "manifest.json").read_text())
    for variant in VARIANTS:
        del manifest["config"]["settings"][variant]["distinct"], manifest["config"]["settings"][variant]["beam_weights"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert make_dataset(CONFIG, copy) == manifest
    manifest["config"]["settings"]["apr"]["distinct"] = True
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="another settings"):
        make_dataset(CONFIG, copy)


def test_a_data_set_of_an_earlier_version_is_not_resumed(tmp_path):
    tmp_path.joinpath("config.json").write_text(json.dumps(CONFIG.described() | {"format": module.FORMAT - 1}))
    with pytest.raises(ValueError, match="earlier version"):
        make_dataset(CONFIG, tmp_path)


# ---------------------------------------------------------------------- problems


def test_held_out_problems_are_not_trained_on_and_problems_are_distinct(made):
    train, held_out = ({p.key for p in problems(made, name)} for name in ("train", "held_out"))
    assert len(train) == 50 and len(held_out) == 9 and not train & held_out


def test_training_problems_repeat_only_if_repeats_is_set(tmp_path):
    few = ProblemRange(count=2, max_number=4, min_target=2, max_target=8)
    config = dataclasses.replace(changed(problems=few), train=60, held_out=3)
    with pytest.raises(ValueError, match="60 train .* countdown"):
        make_dataset(config, tmp_path / "distinct")
    assert not (tmp_path / "distinct" / "train.jsonl").exists()
    make_dataset(dataclasses.replace(config, repeats=True), tmp_path / "repeats")
    keys = [problem.key for problem in problems(tmp_path / "repeats")]
    assert len(keys) == 60 > len(set(keys))


def test_unseen_targets_are_never_trained_on(tmp_path):
    make_dataset(dataclasses.replace(changed(unseen_targets=0.2), train=200, held_out=60), tmp_path)
    seen, unseen = ({p.target for p in problems(tmp_path, name)} for name in ("train", "held_out"))
    assert not seen & unseen
    assert len(unseen) <= 18 and len(seen) <= 73  # of 91


# ---------------------------------------------------------------------- demonstrations


def test_the_manifest_counts_kept_and_dropped_trees_and_the_reasons(made):
    manifest = module.read_manifest(made)
    assert manifest["config"] == CONFIG.described()
    for variant in VARIANTS:
        counts, store = manifest[f"{variant}_train"], TreeStore(made / f"{variant}_train")
        assert counts["problems"] == 50 == counts["trees"] + counts["no_demonstration"] + counts["too_long"]
        assert counts["conditions"] == {"": counts["trees"]}
        trees = list(store)
        assert counts["trees"] == len(trees)
        assert counts["tokens"] == sum(map(total_tokens, trees))
        assert counts["solved"] == sum(tree.info["solved"] for tree in trees) <= counts["solved_by_solver"]
        assert counts["unshared_tokens"] == sum(map(unshared_tokens, trees)) >= counts["tokens"]


def test_info_says_whether_a_kept_trace_is_solved(made):
    solved = 0
    for variant in VARIANTS:
        for tree in TreeStore(made / f"{variant}_train"):
            problem = Problem(tuple(tree.info["numbers"]), tree.info["target"])
            assert problem == problems(made)[tree.info["index"]]
            text = TOKENIZER.decode([token for block in tree.root.context for token in block.content])
            assert bool(check_solution(problem, text)) == tree.info["solved"] == (0 in tree.info["found"])
            solved += tree.info["solved"]
    assert solved > 10


def test_correct_only_keeps_solved_trees_alone(tmp_path):
    manifest = make_dataset(changed(apr=dataclasses.replace(SETTINGS.apr, correct_only=True)), tmp_path)
    assert manifest["apr_train"]["no_demonstration"] > 0
    assert all(tree.info["solved"] for tree in TreeStore(tmp_path / "apr_train"))


@pytest.mark.parametrize("variant, label", [("apr", "Sub Call Budget: "), ("sos_plus", "Token Budget: ")])
def test_a_condition_is_the_budget_that_the_tree_uses(variant, label):
    own = dataclasses.replace(getattr(SETTINGS, variant), conditioned=True)
    conditioned = dataclasses.replace(SETTINGS, **{variant: own})
    for index, problem in enumerate([Problem((3, 5, 7, 9), 24), Problem((20, 2, 4, 11), 37)]):
        one, two = (tree_of(problem, variant, index, settings) for settings in (SETTINGS, conditioned))
        prompts = [TOKENIZER.decode(tree.root.blocks[0].content) for tree in (one, two)]
        budget = int(two.info["condition"].removeprefix(label))
        assert "condition" not in one.info and prompts[1] == f"{label}{budget} {prompts[0]}"
        assert list(two.root.blocks[0].content[1:]) == TOKENIZER.encode(prompts[1])
        assert two.root.blocks[1:] == one.root.blocks[1:]
        if variant == "apr":
            spawns = [len(item.children) for item in one.root.blocks if isinstance(item, Spawn)]
            assert budget == round(sum(spawns) / len(spawns)) if spawns else budget == 0
        else:
            assert budget % 512 == 0 and budget - 512 < total_tokens(one) <= budget


def test_unshared_tokens_count_the_prefix_again_for_every_call():
    trees = (tree_of(Problem((3, 5, 7, 9), 24), "apr", index) for index in range(9))
    tree = next(tree for tree in trees if tree.root.children)
    root = tree.root
    expected, before = 0, 0
    for item in root.blocks:
        if isinstance(item, Spawn):
            expected += before + sum(map(len, item.call))
            item = item.join
        before += len(item)
    expected += before + sum(len(block) for child in root.children for block in child.context)
    assert unshared_tokens(tree) == expected


# ---------------------------------------------------------------------- any tokenizer


def test_a_hugging_face_tokenizer_by_folder(made, tmp_path):
    backend = Backend(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    texts = [
        TOKENIZER.decode([t for b in tree.root.context for t in b.content]) for tree in TreeStore(made / "apr_train")
    ]
    every_byte = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=every_byte)
    backend.train_from_iterator(texts, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    wrapped.save_pretrained(tmp_path / "tokenizer")
    config = dataclasses.replace(CONFIG, tokenizer=str(tmp_path / "tokenizer"), window=9999)
    make_dataset(config, tmp_path / "data")
    tokenizer = config.make_tokenizer()
    store = TreeStore(tmp_path / "data" / "apr_train")
    assert len(store) == 50 and not (tmp_path / "data" / "tokenizer.json").exists()
    for tree in (store[0], store[17]):
        problem = problems(tmp_path / "data")[tree.info["index"]]
        text = tree_of(problem, "apr", tree.info["index"])
        ours = [block for thread in text.threads() for block in thread.context]
        theirs = [block for thread in tree.threads() for block in thread.context]
        assert [TOKENIZER.decode(block.content) for block in ours] == [
            tokenizer.decode(block.content) for block in theirs
        ]


def test_a_missing_tokenizer_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match="/nowhere"):
        make_dataset(dataclasses.replace(CONFIG, tokenizer=f"{tmp_path}/nowhere"), tmp_path / "data")


def test_the_search_sos_of_the_sos_plus_variant_is_stream_of_search():
    def searched(problem, *strategies):
        own = SosPlusSettings(search="sos", strategies=strategies)
        return tree_of(problem, "sos_plus", settings=CountdownSettings(sos_plus=own))

    tree = searched(Problem((3, 5, 7, 9), 24), "bfs")
    assert tree.info["strategy"] == "bfs" and not tree.root.children
    assert tree.info["found"] == ([0] if tree.info["solved"] else [])
    for strategy in ("dfs", "bfs"):  # no solution: neither ends with the line of the other solvers
        failed = searched(Problem((6, 2), 5), strategy)
        assert failed.info["found"] == [] and not failed.info["solved"]
        text = "".join(TOKENIZER.decode(block.content) for block in failed.root.blocks)
        assert text.endswith({"dfs": "unequal: No Solution\n", "bfs": "No solution found."}[strategy])
    with pytest.raises(ValueError, match="search.*'sso'"):
        SosPlusSettings(search="sso")


def test_the_end_of_a_worker_process_raises_one_error_and_the_run_can_be_resumed(tmp_path):
    """The operating system ends a process like this when memory runs out."""
    seen = []

    class Bar:
        def update(self, done):
            seen.append(done)
            if len(seen) > 1:
                return
            children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
            workers = [pid for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
            os.kill(int(workers[0]), signal.SIGKILL)

    with pytest.raises(OSError, match="worker process"):
        make_dataset(CONFIG, tmp_path, processes=2, progress=lambda *_: Bar())
    assert seen and not (tmp_path / "manifest.json").exists()
    assert make_dataset(CONFIG, tmp_path) is not None
