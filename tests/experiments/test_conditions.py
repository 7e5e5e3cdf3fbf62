"""Conditions in prompts: models trained with them are evaluated, trained by GRPO and exported with them."""

import json
from collections import Counter

import pytest

from apr_jax.data.folder import DataFolder
from apr_jax.data.imported import import_dataset
from apr_jax.data.store import TreeStore
from apr_jax.evaluate.records import read_records
from apr_jax.evaluate.run import NAME_TAG
from apr_jax.tasks.countdown.task import Countdown
from apr_jax.text.tokenizer import Tokenizer
from apr_jax.threads import decode_tree
from apr_jax.threads.run import TreeRunner
from apr_jax.train.checkpoint import load_meta
from apr_jax.train.grpo import VALIDATION_TAG
from tests.experiments.conftest import SMOKE, copy_run, has

CHANGES = (
    "--config.countdown.apr.conditioned=true", "--config.countdown.sos_plus.conditioned=true",
    "--config.data.held_out=4",
    "--config.sft.steps=3", "--config.grpo.steps=2", "--config.grpo.validate_every=2", "--config.grpo.validation=3",
    "--config.grpo.prompts=3", "--config.export.check_trees=2",
)  # fmt: skip


def prompt_of(tree, tokenizer):
    return tokenizer.decode(tree.root.blocks[0].content)


def counted(folder, variant):
    """Return how many demonstrations have each condition, counted in the text of their prompts."""
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    prompts = [prompt_of(tree, tokenizer) for tree in TreeStore(folder / f"{variant}_train")]
    word = {"apr": "Sub Call Budget: ", "sos_plus": "Token Budget: "}[variant]
    assert all(prompt.startswith(word) for prompt in prompts)
    return Counter(f"{word}{prompt.removeprefix(word).split(maxsplit=1)[0]} " for prompt in prompts)


@pytest.fixture(scope="module")
def conditioned(tmp_path_factory):
    """A run folder, and for each stage the (name, condition) of every tree that the stage ran."""
    folder, ran = tmp_path_factory.mktemp("conditioned") / "run", {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jax.config.update", lambda *_: None)
        run = TreeRunner.run

        def noted(self, problem, name, condition=""):
            ran[stage].append((tuple(name), condition))
            return run(self, problem, name, condition)

        patch.setattr(TreeRunner, "run", noted)
        from experiments.run import main

        for stage in ("data", "sft", "grpo", "evaluate", "export", "report"):
            ran[stage] = []
            assert main(["run", SMOKE, f"--workdir={folder}", f"--stage={stage}", *CHANGES]) == 0
    return folder, ran


def test_conditions_are_counted_from_the_demonstrations(conditioned, whole_run):
    for variant in ("apr", "sos_plus"):
        folder = conditioned[0] / "data"
        found = DataFolder(folder, Countdown()).conditions(variant)
        assert found == counted(folder, variant)
        budgets = [int(condition.split()[-1]) for condition in found]
        assert budgets == sorted(budgets) and (variant == "sos_plus" or len(budgets) > 1)
        plain = DataFolder(whole_run.folder / "data", Countdown())
        assert plain.conditions(variant) == {"": plain.manifest[f"{variant}_train"]["trees"]}


def test_conditions_of_an_imported_data_set_are_read_from_its_prompts(conditioned, tmp_path):
    data = conditioned[0] / "data"
    tokenizer = Tokenizer.load(data / "tokenizer.json")
    task, path = Countdown(), tmp_path / "theirs.json"
    texts = (decode_tree(tree, tokenizer.decode) for tree in TreeStore(data / "apr_train"))
    task.write_demonstrations(path, texts, tokenizer)
    held_out = DataFolder(data, task).problems("held_out")
    import_dataset(task, task.read_demonstrations(path), held_out, tmp_path / "theirs", window=256)
    found = DataFolder(tmp_path / "theirs", task).conditions("apr")
    kept = TreeStore(tmp_path / "theirs" / "apr_train")
    assert found == Counter(prompt_of(tree, tokenizer).split("Moving")[0] for tree in kept) and len(found) > 1
    assert DataFolder(tmp_path / "theirs", task).conditions("sos_plus") == {}


def test_every_stage_puts_conditions_on_its_prompts(conditioned):
    folder, ran = conditioned
    known = {variant: counted(folder / "data", variant) for variant in ("apr", "sos_plus")}
    usual = {variant: max(counts, key=counts.get) for variant, counts in known.items()}
    groups = {}
    for name, condition in ran["grpo"]:
        if name[0] == VALIDATION_TAG:
            assert condition == usual["apr"]
        else:
            groups.setdefault(name[:2], set()).add(condition)
    assert sum(name[0] == VALIDATION_TAG for name, _ in ran["grpo"]) == 2 * 3
    assert set(groups) == {(step, prompt) for step in (1, 2) for prompt in range(3)}
    assert all(len(conditions) == 1 and conditions <= set(known["apr"]) for conditions in groups.values())
    assert len(set().union(*groups.values())) > 1
    assert {condition for name, condition in ran["evaluate"] if name[0] == NAME_TAG} == set(usual.values())
    assert ran["export"] and {condition for _, condition in ran["export"]} == {usual["apr"]}
    tokenizer = Tokenizer.load(folder / "data" / "tokenizer.json")
    for name in ("sft_sos_plus", "sft_apr", "grpo_apr"):
        condition = usual[name.partition("_")[2]]
        for at in ("", "@1"):
            records = read_records(folder / "evaluate" / f"{name}{at}.jsonl")
            assert len(records) == 4 and {record.condition for record in records} == {condition}
            assert all(prompt_of(record.thread_tree, tokenizer).startswith(condition) for record in records)
        assert load_meta(folder / name / "checkpoints")[1]["condition"] == condition
    check = json.loads((folder / "export" / "check.json").read_text())
    assert check["trees_equal"] == check["trees"] == 2
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["SoS+ SFT"]["condition"], summary["APR SFT"]["condition"]) == (usual["sos_plus"], usual["apr"])


def test_each_budget_in_the_settings_has_records_and_a_table(conditioned, tmp_path, main):
    folder = copy_run(conditioned[0], tmp_path / "run")
    before = (folder / "evaluate" / "sft_apr.jsonl").read_bytes()
    ask = ("--config.evaluate.budgets.apr=7,2", "--stage=evaluate,report")
    done = main(SMOKE, f"--workdir={folder}", *CHANGES, *ask)
    assert done.code == 0, done.err
    assert before in [path.read_bytes() for path in folder.glob("store/evaluate-*/sft_apr.jsonl")]
    summary = json.loads((folder / "summary.json").read_text())
    for budget, suffix in ((7, ""), (2, " with Sub Call Budget: 2")):
        condition = Countdown().condition("apr", budget)
        for name, title in (("sft_apr", "APR SFT"), ("grpo_apr", "APR SFT+GRPO")):
            records = read_records(folder / "evaluate" / f"{name}+{budget}.jsonl")
            assert len(records) == 4 and {record.condition for record in records} == {condition}
            assert len(read_records(folder / "evaluate" / f"{name}+{budget}@1.jsonl")) == 4
            assert summary[title + suffix]["condition"] == condition
    assert "With Sub Call Budget: 2:\n\n| model |" in done.out
    assert "At temperature 1, with Sub Call Budget: 2:\n\n| model |" in done.out
    assert "Prompts of APR SFT, APR SFT+GRPO began with 'Sub Call Budget: 7'." in done.out
    again = main(SMOKE, f"--workdir={folder}", *CHANGES, *ask)
    assert again.code == 0 and again.err == ""


def test_wrong_budgets_are_refused(whole_run, tmp_path, refused):
    copy_run(whole_run.folder, tmp_path / "run")
    command = (SMOKE, f"--workdir={tmp_path / 'run'}", "--stage=evaluate")
    line = refused(*command, "--config.evaluate.budgets.sos_plus=512")
    assert has(line, "evaluate.budgets.sos_plus", "none", "countdown")
    for given in ("-1", "1.5", "3,3", "many", "nan", "1e999"):
        assert "evaluate.budgets" in refused(*command, f"--config.evaluate.budgets.apr={given}")
