"""The store: runs share outputs for equal settings, and have their own for other settings. No output is lost."""

import json
import os
import shutil
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from apr_jax.data.folder import DataFolder
from apr_jax.data.imported import import_dataset
from apr_jax.data.store import TreeStore
from apr_jax.errors import UserError
from apr_jax.evaluate.records import read_records
from apr_jax.tasks.countdown.task import Countdown
from apr_jax.text.tokenizer import Tokenizer
from apr_jax.threads import decode_tree
from apr_jax.train.checkpoint import fingerprint, load_model
from experiments.command import parse
from experiments.stages import first_weights, sft, trained
from experiments.stages.run import Run
from experiments.workspace import NOTE, Workspace
from tests.experiments.conftest import SMOKE, copy_run, finish, has, snapshot, start

OUTPUTS = ("checkpoints/**/*", "*.jsonl", "*.json")


def stages_of(run: Path) -> Counter:
    """Return how many outputs of each stage a run's store has."""
    return Counter(path.name.partition("-")[0] for path in (run / "store").iterdir())


def made_by(run: Path) -> dict[str, bytes]:
    """Return the content of the files of all outputs in a run's store, by path."""
    return snapshot(run / "store", *(f"*/{pattern}" for pattern in (*OUTPUTS, *(f"*/{p}" for p in OUTPUTS))))


@pytest.fixture
def copy(whole_run, tmp_path):
    """A copy of the whole run, to be changed."""
    return copy_run(whole_run.folder, tmp_path / "run", "tensorboard")


def test_a_whole_run_has_an_output_for_each_stage_and_model(whole_run):
    assert stages_of(whole_run.folder) == {"data": 1, "sft": 2, "grpo": 1, "evaluate": 6, "export": 1}
    for link in (
        whole_run.folder / name for name in ("data", "sft_apr", "grpo_apr", "export", "evaluate/sft_apr.jsonl")
    ):
        assert link.is_symlink() and not link.readlink().is_absolute()
        note = json.loads((link.resolve().parent / NOTE).read_text())
        assert note["stage"] == link.resolve().parent.name.partition("-")[0] and note["edition"] == 1


def test_another_setting_of_grpo_keeps_data_and_supervised_models(copy, main):
    before = made_by(copy)
    done = main(SMOKE, f"--workdir={copy}", "--config.grpo.kl=0.01", "--stage=data,sft,grpo")
    assert done.code == 0 and "grpo grpo_apr: 2/2" in done.err and "sft sft" not in done.err and "data" not in done.err
    assert stages_of(copy) == {"data": 1, "sft": 2, "grpo": 2, "evaluate": 6, "export": 1}
    assert before.items() <= made_by(copy).items()
    assert not (copy / "report.md").exists() and not (copy / "evaluate" / "grpo_apr.jsonl").exists()  # of another model
    done = main(SMOKE, f"--workdir={copy}")  # the first settings again: only the report is made
    assert done.code == 0 and done.err == "" and "| APR SFT+GRPO |" in done.out


def test_another_sft_rate_keeps_the_data(copy, main):
    done = main(
        SMOKE, f"--workdir={copy}", "--config.sft.optimizer.peak_lr=0.002", "--stage=data,sft", "--variants=apr"
    )
    assert done.code == 0 and "sft sft_apr: 40/40" in done.err and "data" not in done.err
    assert stages_of(copy)["sft"] == 3 and (copy / "sft_sos_plus").exists() is False


@pytest.mark.parametrize(
    "changes",
    [
        ["evaluate.window=192"], ["evaluate.temperature=0.7"], ["budget.tokens=60"], ["evaluate.top_k=3"],
        ["evaluate.extra_temperatures=0.3"],
    ],
    ids=lambda changes: changes[0].partition("=")[0],
)  # fmt: skip
def test_another_setting_of_evaluation_needs_no_training(copy, main, changes):
    names = ("--variants=apr", "--stage=data,sft,evaluate,report")
    changes = [f"--config.{change}" for change in ("grpo.steps=0", *changes)]
    old = (copy / "evaluate" / "sft_apr.jsonl").resolve()
    kept, trained_before = old.read_bytes(), stages_of(copy)["sft"]
    done = main(SMOKE, f"--workdir={copy}", *names, *changes)
    assert done.code == 0 and "evaluate sft_apr" in done.err and "sft sft" not in done.err, done.err
    assert old.read_bytes() == kept and stages_of(copy)["sft"] == trained_before
    if "extra" not in changes[1]:
        new = (copy / "evaluate" / "sft_apr.jsonl").resolve()
        assert new != old and len(read_records(new)) == 12
        if "window" in changes[1]:
            assert max(record.sequential_tokens for record in read_records(new)) <= 192
    again = main(SMOKE, f"--workdir={copy}", *names, *changes)
    assert again.code == 0 and again.err == "" and again.out == done.out


def test_settings_that_change_no_result_change_no_output(copy, main):
    changes = ("devices=1", "sft.save_every=7", "sft.log_every=3", "grpo.slots=4", "evaluate.slots=6", "name=other")
    done = main(
        SMOKE, f"--workdir={copy}", *(f"--config.{change}" for change in changes), "--stage=data,sft,grpo,evaluate"
    )
    assert done.code == 0 and done.err == "", done.err


def test_a_fingerprint_depends_on_the_settings_that_shape_its_output(tmp_path, monkeypatch):
    def outputs(*changes: str) -> dict[str, str]:
        command = parse(["run", SMOKE, *(f"--config.{change}" for change in changes), f"--workdir={tmp_path}"])
        with Run(command.settings, command.workdir, stages=["data"]) as run:
            found = {name: made.fingerprint for name, made in trained.outputs(run).items()}
            return {"data": run.data_fingerprint} | found

    plain = outputs()
    changed = {
        "seed=1": {*plain}, "countdown.apr.shuffle=true": {*plain}, "sft.steps=41": {*plain} - {"data"},
        "model.width=64": {*plain} - {"data"}, "model.dtype=bfloat16": {*plain} - {"data"},
        "grpo.optimizer.peak_lr=1": {"grpo_apr", "grpo_sos_plus"}, "budget.threads=9": {"grpo_apr", "grpo_sos_plus"},
        "evaluate.temperature=0.5": set(), "export.dtype=bfloat16": set(), "model.remat=full": set(), "fsdp=2": set(),
    }  # fmt: skip
    for change, names in changed.items():
        assert {name for name, value in outputs(change).items() if value != plain[name]} == names, change
    monkeypatch.setattr(sft, "EDITION", 2)  # a corrected stage runs again, and so do the stages that read its output
    assert {name for name, value in outputs().items() if value != plain[name]} == {*plain} - {"data"}


# ---------------------------------------------------------------------- run folders


def test_a_real_folder_in_place_of_a_link_is_refused(copy, refused):
    where = (copy / "sft_apr").resolve()
    (copy / "sft_apr").unlink()
    shutil.copytree(where, copy / "sft_apr")
    for stage in ("sft", "evaluate", "report"):
        line = refused(SMOKE, f"--workdir={copy}", f"--stage={stage}")
        assert has(line, copy / "sft_apr", "no link", copy / "store")


def test_another_file_in_place_of_records_is_not_replaced(copy, refused):
    path = copy / "evaluate" / "sft_apr.jsonl"
    path.unlink()
    path.write_text("mine\n")
    assert has(refused(SMOKE, f"--workdir={copy}", "--stage=evaluate"), path, "--workdir")
    assert path.read_text() == "mine\n"


def test_processes_with_different_settings_do_not_share_a_run_folder(tmp_path):
    def settings(*changes):
        return parse(["run", SMOKE, f"--workdir={tmp_path}", *changes]).settings

    first, second, third = (Workspace(tmp_path / "run", tmp_path / "store") for _ in range(3))
    first.claim(settings())
    second.claim(settings())
    with pytest.raises(UserError, match="/run .*sft.steps .*40.*41"):
        third.claim(settings("--config.sft.steps=41"))
    first.close()
    second.close()
    third.claim(settings("--config.sft.steps=41"))
    assert json.loads((tmp_path / "run" / "config.json").read_text())["sft"]["steps"] == 41
    third.close()


def test_an_output_is_made_by_one_process_at_a_time(tmp_path, capsys):
    """A second process waits. It then finds the output, or makes it if the first process made nothing."""
    for made in (True, False):
        spaces = [Workspace(tmp_path / f"{made}{i}", tmp_path / "store") for i in range(2)]
        one, two = (space.output("sft_apr", "sft", 1, {"made": made}, {}) for space in spaces)
        found, begun = [], threading.Event()

        def wait(space=spaces[1], output=two, found=found, begun=begun):
            begun.wait()
            with space.making(output) as folder:
                found.append((folder / "model").exists())
                (folder / "model").write_text("x")

        thread = threading.Thread(target=wait)
        thread.start()
        with spaces[0].making(one) as folder:
            begun.set()
            time.sleep(0.5)
            assert not found
            if made:
                (folder / "model").write_text("x")
        thread.join()
        assert found == [made] and one.path == two.path
        assert "another process is making it" in capsys.readouterr().err
        for space in spaces[not made :]:
            assert (space.folder / "sft_apr" / "model").read_text() == "x"
        assert (spaces[0].folder / "sft_apr").exists() is made  # an output that was not made has no link


# ---------------------------------------------------------------------- inputs that change


def test_settings_that_change_no_result_keep_the_report(copy, main):
    before = snapshot(copy, "report.md", "summary.json", "figures/*", "evaluate/*")
    assert main(SMOKE, f"--workdir={copy}", "--config.name=x", "--config.evaluate.slots=16", "--stage=data").code == 0
    assert snapshot(copy, "report.md", "summary.json", "figures/*", "evaluate/*") == before


def test_files_of_the_user_stay_where_links_are_removed(copy, main):
    mine = [copy / "figures" / "mine.png", copy / "evaluate" / "summary.json"]
    for path in mine:
        path.write_text("mine")
    assert main(SMOKE, f"--workdir={copy}", "--config.seed=1", "--stage=data").code == 0
    assert [path.read_text() for path in mine] == ["mine", "mine"]
    assert not (copy / "report.md").exists() and not list((copy / "evaluate").glob("*.jsonl"))


def test_a_checkpoint_with_other_contents_is_another_input(copy, tmp_path, main):
    """The report never has rows of both, whether or not config.json is there."""
    given = tmp_path / "given"
    small = ("--config.sft.steps=0", "--config.grpo.steps=0", f"--config.model.checkpoint={given}", "--variants=apr")
    shutil.copytree(copy / "sft_apr" / "checkpoints" / "20", given)
    command = (SMOKE, f"--workdir={copy}", *small, "--config.evaluate.extra_temperatures=()")
    assert main(*command, "--stage=sft,evaluate,report").code == 0
    first = fingerprint(load_model(copy / "sft_apr" / "checkpoints")[0])
    shutil.rmtree(given)
    shutil.copytree(copy / "store" / find(copy, "grpo") / "grpo_apr" / "checkpoints" / "2", given)
    (copy / "config.json").unlink()
    done = main(*command, "--stage=report")
    assert done.code == 1 and "no records" in done.err  # of the new weights
    assert main(*command, "--stage=sft,evaluate,report").code == 0
    assert fingerprint(load_model(copy / "sft_apr" / "checkpoints")[0]) != first
    shutil.rmtree(given)
    done = main(*command, "--stage=evaluate,report")
    assert done.code == 0, done.err


def find(run: Path, stage: str) -> str:
    return next(path.name for path in (run / "store").iterdir() if path.name.startswith(f"{stage}-"))


def test_sft_may_begin_with_a_model_of_its_own_run_folder(copy, main):
    given = f"--config.model.checkpoint={copy / 'grpo_apr' / 'checkpoints'}"
    for _ in range(2):
        done = main(SMOKE, f"--workdir={copy}", given, "--config.sft.steps=1", "--variants=apr", "--stage=sft")
        assert done.code == 0, done.err


def test_the_folder_s_own_data_must_be_of_the_run_s_config(copy, refused):
    where = (copy / "data").resolve()
    (copy / "data").unlink()
    shutil.copytree(where, copy / "data")
    line = refused(SMOKE, f"--workdir={copy}", "--config.seed=1", "--stage=sft")
    assert "another seed" in line


def test_data_of_the_folder_s_own_have_the_fingerprint_of_the_store_s(copy, main):
    where = (copy / "data").resolve()
    (copy / "data").unlink()
    shutil.copytree(where, copy / "data")
    done = main(SMOKE, f"--workdir={copy}")
    assert done.code == 0 and done.err == "", done.err


def test_the_same_weights_in_another_precision_are_evaluated_again(copy, main):
    given = copy / "store" / find(copy, "grpo") / "grpo_apr" / "checkpoints"
    changes = ("sft.steps=0", "grpo.steps=0", f"model.checkpoint={given}", "evaluate.extra_temperatures=()")
    places = set()
    for dtype in ("float32", "bfloat16"):
        line = (SMOKE, f"--workdir={copy}", *(f"--config.{change}" for change in (*changes, f"model.dtype={dtype}")))
        assert main(*line, "--variants=apr", "--stage=sft,evaluate").code == 0
        places.add((copy / "evaluate" / "sft_apr.jsonl").resolve())
    assert len(places) == 2


def test_a_tokenizer_file_with_another_content_makes_the_data_anew(whole_run, tmp_path):
    path = tmp_path / "words" / "tokenizer.json"
    path.parent.mkdir()
    shutil.copy(whole_run.folder / "data" / "tokenizer.json", path)

    def data() -> str:
        line = ["run", SMOKE, f"--config.tokenizer.name={path}", f"--workdir={tmp_path / 'run'}"]
        command = parse(line)
        with Run(command.settings, command.workdir, stages=["data"]) as run:
            return run.data_fingerprint

    before = data()
    content = json.loads(path.read_text())
    ids = content["model"]["vocab"]
    ids["8"], ids["9"] = ids["9"], ids["8"]
    path.write_text(json.dumps(content))
    assert data() != before


def test_a_checkpoint_that_changes_while_the_run_is_at_work_is_refused(whole_run):
    """The output would be stored under the fingerprint of the earlier contents."""
    steps = whole_run.folder / "sft_apr" / "checkpoints"
    command = parse(["run", SMOKE, f"--config.model.checkpoint={steps / '20'}", "--workdir=/no/such"])
    known = first_weights.find(command.settings, whole_run.folder / "no_store")
    tokenizer = Tokenizer.load(whole_run.folder / "data" / "tokenizer.json")
    config = command.settings.family.Config(vocab_size=len(tokenizer), **command.settings.model)
    first_weights.load(command.settings, config, tokenizer, steps / "20", known)
    with pytest.raises(UserError, match="changed"):
        first_weights.load(command.settings, config, tokenizer, steps / "40", known)


def test_an_export_is_of_the_context_that_it_describes(copy, main):
    changes = ("--config.evaluate.window=1024", "--config.export.check_trees=0", "--variants=apr", "--stage=export")
    assert main(SMOKE, f"--workdir={copy}", *changes).code == 0
    assert json.loads((copy / "export" / "config.json").read_text())["max_position_embeddings"] >= 1024


def test_imported_data_with_other_held_out_problems_have_another_hash(whole_run, tmp_path):
    """The counts in both manifests are equal."""
    task, data, path = Countdown(), whole_run.folder / "data", tmp_path / "traces.json"
    tokenizer = Tokenizer.load(data / "tokenizer.json")
    trees = (decode_tree(tree, tokenizer.decode) for tree in TreeStore(data / "apr_train"))
    task.write_demonstrations(path, trees, tokenizer)
    held_out = list(DataFolder(data, task).problems("held_out"))
    manifests = [
        import_dataset(task, task.read_demonstrations(path), problems, tmp_path / name, window=256)
        for name, problems in (("one", held_out[:6]), ("two", held_out[6:]), ("again", held_out[:6]))
    ]
    one, two, again = (manifest.pop("sha256") for manifest in manifests)
    assert manifests[0] == manifests[1] and one == again != two


def test_a_link_into_another_store_says_which(copy, refused, tmp_path):
    line = refused(SMOKE, f"--workdir={copy}", f"--store={tmp_path / 'other'}", "--stage=evaluate")
    assert f"give --store={copy / 'store'}" in line


def test_a_report_during_training_is_of_the_newest_evaluated_step(copy, main):
    """Even where training has saved a later step since."""
    shutil.rmtree(copy / "sft_apr" / "checkpoints" / "40")
    command = (SMOKE, f"--workdir={copy}", "--variants=apr", "--config.grpo.steps=0", "--config.sft.save_every=5")
    assert main(*command, "--stage=evaluate").code == 0
    later = (copy / "sft_apr" / "checkpoints").resolve() / "30"
    shutil.copytree(later.with_name("20"), later)
    shutil.rmtree(later / "state")
    shutil.copytree(copy / "sft_sos_plus" / "checkpoints" / "40" / "state", later / "state")
    done = main(*command, "--stage=report")
    assert done.code == 0 and "| APR SFT (step 20 of 40) |" in done.out, done.err


# ---------------------------------------------------------------------- sweeps

SWEEP = ("--sweep=grpo.kl=0.0,0.01,0.1", "--sweep=seed=0,1", "--stage=data,sft,grpo,evaluate")
POINTS = [f"grpo.kl={kl},seed={seed}" for kl in ("0.0", "0.01", "0.1") for seed in (0, 1)]
ENDS = {"data trees: ": 2, "sft sft_apr: 40/40": 2, "sft sft_sos_plus: 40/40": 2, "grpo grpo_apr: 2/2": 6}


def times_run(*errors: str) -> dict[str, int]:
    """Return how many times each stage finished, counted in the printed progress."""
    lines = [line for text in errors for line in text.splitlines()]
    ended = [
        line for line in lines if not line.startswith("data trees: ") or line.split()[2].split("/") == ["424", "424"]
    ]
    return {end: sum(line.startswith(end) for line in ended) for end in ENDS}


@pytest.mark.slow
def test_a_sweep_makes_shared_outputs_once(tmp_path):
    done = finish(start(f"--workdir={tmp_path / 'sweep'}", *SWEEP))
    assert done.code == 0, done.err
    assert times_run(done.err) == ENDS
    assert stages_of(tmp_path / "sweep") == {"data": 2, "sft": 4, "grpo": 6, "evaluate": 2 * (2 + 2 + 3 * 2)}

    two = [start(f"--workdir={tmp_path / 'twice'}", *SWEEP) for _ in range(2)]  # at the same time
    ends = [finish(one) for one in two]
    assert [end.code for end in ends] == [0, 0], [end.err for end in ends]
    assert times_run(*(end.err for end in ends)) == ENDS

    killed, errors = tmp_path / "killed", []
    for _ in range(4):
        process = start(f"--workdir={killed}", *SWEEP, start_new_session=True)
        time.sleep(14)
        os.killpg(process.pid, signal.SIGKILL)
        errors.append(process.communicate()[1])
    last = finish(start(f"--workdir={killed}", *SWEEP))
    assert last.code == 0, last.err
    ran = times_run(*errors, last.err)
    assert all(ran[end] <= ENDS[end] + 4 for end in ENDS)

    for other in ("twice", "killed"):
        assert stages_of(tmp_path / other) == stages_of(tmp_path / "sweep")
        for point in POINTS:
            mine, theirs = (snapshot(tmp_path / run / point, "evaluate/*.jsonl") for run in (other, "sweep"))
            assert len(mine) == 6 and mine == theirs
