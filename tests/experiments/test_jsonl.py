"""A task from files through everything, from data to latency, with a GRPO reward of its own."""

import json

import pytest

from apr_jax.evaluate.records import read_records
from apr_jax.export.exported import read_export
from apr_jax.io.json_lines import read_lines
from apr_jax.text.tokenizer import Tokenizer
from apr_jax.threads.tree import decode_tree
from tests.experiments import whole_task
from tests.tasks.jsonl import make

CONFIG = "--config=experiments/configs/jsonl.py"
REWARD = "--config.jsonl.reward=tests.tasks.jsonl.make:closeness"
SMALL = (
    "--config.sft.steps=130", "--config.sft.log_every=20", "--config.grpo.steps=2", "--config.grpo.prompts=8",
    "--config.grpo.group=4", "--config.export.check_trees=2", "--config.evaluate.slots=32", "--config.grpo.slots=32",
)  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """1100 problems, 100 of them held out."""
    folder = tmp_path_factory.mktemp("digits")
    make.main("", str(folder), "1100", "100")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory, files):
    return whole_task.run_whole(tmp_path_factory.mktemp("runs") / "jsonl", f"{CONFIG}:{files}", REWARD, *SMALL)


def test_a_model_learns_what_the_files_demonstrate(run, files):
    for name in ("sft_threads", "grpo_threads"):
        found = whole_task.accuracy(run, name)
        assert found.n == 100 and found.right >= 0.75 and found.interval[0] > 0.6
    asked = [row for _, row in read_lines(files / "held_out.jsonl")]
    for record, row in zip(read_records(run / "evaluate" / "grpo_threads.jsonl"), asked, strict=True):
        assert record.problem == {"id": str(row["id"]), "prompt": row["prompt"], "answer": str(row["answer"])}
        assert record.task == "jsonl" and record.children == 2
    assert "| threads SFT+GRPO |" in (run / "report.md").read_text()


def test_grpo_learns_from_the_reward_and_accuracy_is_told_apart(run):
    """A digit beside the right one is worth 0.8, so the mean reward is above the part that is right."""
    words = Tokenizer.load(run / "data" / "tokenizer.json")
    for row in whole_task.metrics(run, "grpo_threads"):
        assert row["rollout/reward"] >= row["rollout/correct"]
    assert any(row["rollout/reward"] > row["rollout/correct"] for row in whole_task.metrics(run, "grpo_threads"))
    for record in read_records(run / "evaluate" / "sft_threads.jsonl"):
        tree = decode_tree(record.thread_tree, words.decode)
        answer = read_export(run / "export").task.protocol("threads").result(tree.root.text)
        problem = read_export(run / "export").task.read_problem(record.problem)
        assert tree.outcome.reward == make.closeness(problem, answer, tree)
        assert record.correct == (answer == problem.answer)


def test_its_export_and_a_drawing_know_the_files(run, files, capsys):
    whole_task.check_export(run)
    assert read_export(run / "export").task.settings.train == str(files / "train.jsonl")
    printed, page = whole_task.drawing(run, "grpo_threads", capsys)
    first = json.loads((files / "held_out.jsonl").read_text().splitlines()[0])
    assert f"problem 0: 0, {first['prompt']}: " in printed and "<spawn><thread>" in printed and "<html" in page


def test_its_latency_is_measured(run, tmp_path):
    """The fake server writes nonsense, the engine in process what was learned."""
    flags = ("--count=6", "--engine=sglang,jax", f"--launcher={whole_task.FAKE}")
    found = whole_task.latency_samples(run, tmp_path, *flags)
    assert [sample.problem["id"] for sample in found["sglang"]] == [str(i) for i in range(6)]
    evaluated = read_records(run / "evaluate" / "grpo_threads.jsonl")[:6]
    assert [sample.correct for sample in found["jax"]] == [record.correct for record in evaluated]
    assert all(sample.children == 2 for sample in found["jax"])


def test_a_hugging_face_tokenizer_takes_the_place_of_characters(tmp_path, run):
    """A folder that AutoTokenizer reads, whose tags are single tokens."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    from apr_jax.tasks.tagged.protocol import TAGS

    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", "+", "\n", *map(str, range(10))])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = tokenizers.decoders.Fuse()
    hub = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=[*TAGS],
    )
    hub.save_pretrained(tmp_path / "hub")
    changes = ("--stage=data,sft,evaluate", "--config.sft.steps=2", "--config.sft.log_every=1", "--config.grpo.steps=0")
    folder = whole_task.run_whole(tmp_path / "run", CONFIG, f"--config.tokenizer.name={tmp_path}/hub", *changes)
    manifest = json.loads((folder / "data" / "manifest.json").read_text())
    assert manifest["vocabulary"] == len(vocabulary) + len(TAGS) and manifest["threads_train"]["trees"] == 160
    assert whole_task.accuracy(folder, "sft_threads").n == 40
    other = json.loads((run / "data" / "manifest.json").read_text())
    assert other["vocabulary"] == 4 + 96 + len(TAGS)


def test_what_is_wrong_with_the_files_is_one_line(tmp_path, refused):
    make.main("", str(tmp_path), "50", "10")
    lines = (tmp_path / "demonstrations.jsonl").read_text().splitlines()
    lines[20] = lines[20].replace("</spawn>", "")
    (tmp_path / "demonstrations.jsonl").write_text("\n".join(lines))
    for number, (change, says) in enumerate(
        (
            ("name=a", f"{tmp_path}/demonstrations.jsonl, line 21: text: "),
            ("jsonl.demonstrations=", "'no_module:reward'"), ("jsonl.reward=reward", "jsonl.reward is "),
            (f"jsonl.train={tmp_path}/elsewhere.jsonl", f"jsonl.train: no file {tmp_path}/elsewhere.jsonl"),
        )
    ):  # fmt: skip
        reward = ["--config.jsonl.reward=no_module:reward"] if change == "jsonl.demonstrations=" else []
        place = (f"--workdir={tmp_path}/run{number}", "--stage=data")
        assert says in refused(f"{CONFIG}:{tmp_path}", *place, *reward, f"--config.{change}")
    assert f"{tmp_path}/nowhere/train.jsonl" in refused(f"{CONFIG}:{tmp_path}/nowhere")


@pytest.mark.slow
def test_the_documented_experiment(tmp_path):
    """README, "A task of your own": 4,500 problems, 500 of them held out."""
    make.main("", str(tmp_path / "digits"), "4500", "500")
    folder = whole_task.run_whole(tmp_path / "run", f"{CONFIG}:{tmp_path}/digits", "--stage=data,sft,grpo,evaluate")
    for name in ("sft_threads", "grpo_threads"):
        assert whole_task.accuracy(folder, name).right > 0.9
