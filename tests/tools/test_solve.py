"""Tests of tools.solve by its command line: a model and a solver at work, exit codes, output, views and refusals."""

import io
import json
import re

import pytest
from rich.console import Console

from apr_jax.evaluate.records import Record
from apr_jax.model.family import config_json
from apr_jax.tasks.countdown import CountdownProtocol, Problem
from apr_jax.tasks.countdown.problem import ProblemRange
from apr_jax.tasks.countdown.task import Countdown, CountdownSettings
from apr_jax.tasks.task import settings_json
from apr_jax.threads import Block, Thread, ThreadTree
from apr_jax.train.checkpoint import save_model
from tests.evaluate.nonsense import SPEC
from tests.rollout.fake_server import FakeServer
from tests.tiny import TOKENIZER, spawning_model
from tools import solve
from tools.live import View

PUBLISHED = ("3", "5", "7", "8", "--target=24")  # the published model solves it greedily
SETTINGS = settings_json(Countdown(CountdownSettings(ProblemRange(max_number=10, max_target=30), largest_token=30)))


@pytest.fixture(autouse=True)
def devices(monkeypatch):
    monkeypatch.setattr("apr_jax.devices.start_devices", lambda count: None)  # tests have started their own devices


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """The folder of a checkpoint with random weights, which is never right."""
    folder, model = tmp_path_factory.mktemp("untrained"), spawning_model(1)
    TOKENIZER.save(folder / "tokenizer.json")
    trained_on = {"task": "countdown", "task_settings": SETTINGS, "variant": "apr", "window": 128}
    save_model(folder / "checkpoints", model, {"step": 1, "model": config_json(model.config), **trained_on})
    return folder / "checkpoints"


def call(*arguments):
    return solve.main(["solve", *map(str, arguments)])


def refused(capsys, *arguments):
    """Run a command that is refused, and return its one line of error."""
    assert call(*arguments) == 1
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in out + err and not out
    return err.strip()


# ---------------------------------------------------------------------- a model


def test_the_published_model_solves_a_problem_and_its_threads_are_printed(capsys, tmp_path):
    assert call(*PUBLISHED, f"--svg={tmp_path}/view.svg") == 0
    out, err = capsys.readouterr()
    assert "\x1b" not in out and not err
    *_, answer, costs, times = out.strip().split("\n")
    assert re.fullmatch(r"right: (\S+=\d+, ){2}\S+=24", answer)
    total, sequential, children = (
        int(n.replace(",", "")) for n in re.findall(r"([\d,]+) (?:tokens|one|children)", costs)
    )
    assert total > sequential > 300 and out.count("    child ") == children > 1
    assert re.match(r"[\d.]+ s, [\d.]+ s ", times)
    svg = (tmp_path / "view.svg").read_text()
    assert svg.startswith("<svg") and "child&#160;0" in svg and "root&#160;waits" in svg
    assert not re.search(r"url\(.?http|@import|<image|href=", svg), "the image loads no other files"


def test_a_wrong_answer_has_an_exit_code_of_its_own(untrained, capsys):
    outs = []
    for seed in (1, 1, 2):
        assert call(*PUBLISHED, f"--checkpoint={untrained}", "--temperature=1", f"--seed={seed}") == 3
        outs.append(re.sub(r"[\d.]+ s", "", capsys.readouterr().out))
        *_, answer, costs, times = outs[-1].strip().split("\n")
        assert re.match("no answer: |wrong: ", answer) and "tokens in all" in costs and times
    assert outs[0] == outs[1] != outs[2]


def test_a_terminal_shows_panels_of_threads(untrained, capsys, monkeypatch):
    file = io.StringIO()
    terminal = Console(file=file, force_terminal=True, width=100, height=30, legacy_windows=False)
    monkeypatch.setattr(solve, "Console", lambda: terminal)
    assert call(*PUBLISHED, f"--checkpoint={untrained}", "--temperature=1") == 3
    shown, out = file.getvalue(), capsys.readouterr().out
    assert "\x1b[" in shown and "3 5 7 8 to 24" in shown
    assert "╭─ root" in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown)
    assert len(out.strip().split("\n")) == 3  # the answer, its costs and times
    assert call(*PUBLISHED, f"--checkpoint={untrained}", "--temperature=1", "--tree") == 3
    assert "  prompt, " in capsys.readouterr().out


def test_servers_decode_in_place_of_this_process(untrained, capsys):
    flags = (*PUBLISHED, f"--checkpoint={untrained}", "--engine=sglang")
    with FakeServer() as server:
        assert call(*flags, f"--servers={server.url}") == 3
        assert len(server.requests) >= 1
    out = capsys.readouterr().out
    assert "root: " in out and "tokens in all" in out
    assert "127.0.0.1" in refused(capsys, *flags, f"--servers={server.url}")  # it has stopped
    assert "--servers" in refused(capsys, *flags)
    assert "--servers" in refused(capsys, *PUBLISHED, f"--servers={server.url}")
    assert "nohost" in refused(capsys, *flags, "--servers=nohost")


def test_a_problem_unlike_the_training_problems_gets_a_warning(untrained, capsys):
    cases = {
        (3, 5, 7, "--target=15"): ["3 numbers"],
        (3, 5, 7, 12, "--target=27"): ["12 as a number"],
        (9, 9, 9, 9, "--target=36"): ["36 as a target"],
        (3, 5, 7, 11, 12, "--target=38"): ["5 numbers", "11 as a number", "12 as a number", "38 as a target"],
    }
    for arguments, named in cases.items():
        assert call(*arguments, f"--checkpoint={untrained}") == 3
        err = capsys.readouterr().err
        assert err.startswith("note: ") and err.count("\n") == 1
        assert all(phrase in err for phrase in ("4 numbers from 1 to 10", "10 to 30", *named))


def test_a_model_that_does_not_fit_is_refused(untrained, tmp_path, capsys):
    assert re.search("apr.*sos_plus", refused(capsys, *PUBLISHED, "--variant=sos_plus"))
    assert "sos" in refused(capsys, *PUBLISHED, "--variant=sos")
    assert "nowhere" in refused(capsys, *PUBLISHED, "--checkpoint=nowhere")
    model = spawning_model(1)
    trained_on = {"task": SPEC, "task_settings": {}, "variant": "threads", "window": 128}
    save_model(tmp_path / "other", model, {"step": 1, "model": config_json(model.config), **trained_on})
    TOKENIZER.save(tmp_path / "tokenizer.json")
    assert SPEC in refused(capsys, *PUBLISHED, f"--checkpoint={tmp_path}/other")
    assert "--beam" in refused(capsys, *PUBLISHED, "--beam=3")
    assert "--solver" in refused(capsys, *PUBLISHED, "--solver=sos")
    assert "--checkpoint" in refused(capsys, *PUBLISHED, "--teacher", f"--checkpoint={untrained}")


# ---------------------------------------------------------------------- the view


def grown(children, length=40):
    """Return a view of a root that waits for children, which have written different texts."""
    view = View("a title", TOKENIZER.decode, lambda text: None, 0.0)
    view.started((0,), 0, TOKENIZER.encode("Moving to Node #0\n"))
    view.spawned((0,), 2, children)
    for index in range(children):
        view.started((0, 0, index), 1, TOKENIZER.encode(f"Moving to Node #0,{index}\n"))
        view.decoded((0, 0, index), 9, tuple(TOKENIZER.encode("Exploring Operation: 1+2=3\n" * length)))
    return view


@pytest.mark.parametrize("children", [0, 1, 5, 40])
@pytest.mark.parametrize("width, height", [(40, 16), (80, 24), (130, 40), (250, 60)])
def test_a_frame_fits_its_terminal(children, width, height):
    console = Console(file=io.StringIO(), width=width, height=height)
    console.print(grown(children).frame(width, height - 1))
    lines = console.file.getvalue().rstrip("\n").split("\n")
    assert len(lines) < height and max(map(len, lines)) <= width
    text = "\n".join(lines)
    assert "root waits" in text and text.count("child ") == min(children, text.count("decodes"))
    assert children < 2 or text.count("child ") >= 1
    assert children < 40 or "threads not shown" in text or lines[-1].endswith("…") or text.count("child ") == 40


def test_states_and_texts_of_threads_follow_the_events():
    def text():
        console = Console(file=io.StringIO(), width=130, height=40)
        console.print(view.frame(130, 40))
        return console.file.getvalue()

    view = View("a title", lambda ids: "".join(map(chr, ids)), lambda text: text if "7" in text else None, 0.0)
    assert "loads the model" in text()
    ids = [tuple(map(ord, part)) for part in ("ask\n", "one\x1b[31m\n", "tw", "two [bold]\n", "seven 7\n", "joined\n")]
    view.started((3,), 0, ids[0])
    assert "compiles" in text() and "root decodes, 4 tokens" in text()
    view.decoded((3,), 4, ids[1])
    view.decoded((3,), 4 + len(ids[1]), ids[2])
    view.decoded((3,), 4 + len(ids[1]), ids[3])  # again
    assert "one�[31m" in text() and "two [bold]" in text() and "twtwo" not in text()
    view.spawned((3,), len(ids[3]), 2)
    for index, written in enumerate((ids[4], ids[2])):
        view.started((3, 0, index), 1, ids[0])
        view.decoded((3, 0, index), 4, written)
    view.started((3, 0, 1, 0, 0), 2, ids[0])
    assert "root waits" in text() and "child 0 decodes" in text() and "child 1.0 decodes" in text()
    thread = Thread((Block(ids[0], False),))
    view.ended((3, 0, 0), thread)
    view.ended((3, 0, 1, 0, 0), thread)
    view.ended((3, 0, 1), Thread((Block(ids[0], False),), failure="length"))
    for state in ("child 0 returned a result", "child 1.0 returned nothing", "child 1 failed"):
        assert state in text()
    view.joined((3,), len(ids[3]), ids[5])
    assert "root decodes" in text() and "joined" in text() and "two [bold]" not in text()


# ---------------------------------------------------------------------- a suggestion


def test_the_suggested_command_has_a_solved_held_out_problem_of_the_last_model(tmp_path, capsys):
    (tmp_path / "evaluate").mkdir()
    for stage, numbers in (("sft", [1, 1, 2, 10]), ("grpo", [2, 3, 4, 6])):
        rows = [
            Record(0, {"numbers": [9, 9, 9, 9], "target": 11}, "countdown", "apr", correct=False),
            Record(1, {"numbers": numbers, "target": 15}, "countdown", "apr", correct=True),
        ]
        (tmp_path / "evaluate" / f"{stage}_apr.jsonl").write_text("".join(row.line() for row in rows))
        (tmp_path / f"{stage}_apr").mkdir()
        assert call(f"--suggest={tmp_path}") == 0
        command = capsys.readouterr().out.strip().split("\n")[-1].split()
        assert "python" in command[0] and command[1:3] == ["-m", "tools.solve"]
        expected = [*map(str, numbers), "--target=15", f"--checkpoint={tmp_path / f'{stage}_apr'}"]
        assert command[3:] == expected
    path = tmp_path / "evaluate" / "grpo_apr.jsonl"
    path.write_text(Record(0, {"numbers": [9, 9, 9, 9], "target": 11}, "countdown", "apr").line())
    assert call(f"--suggest={tmp_path}") == 0
    assert "9 9 9 9 --target=11" in capsys.readouterr().out
    path.write_text(json.dumps(json.loads(path.read_text()) | {"task": SPEC}) + "\n")
    assert SPEC in refused(capsys, f"--suggest={tmp_path}")
    path.write_text("")
    assert str(path) in refused(capsys, f"--suggest={tmp_path}")
    assert "nowhere" in refused(capsys, "--suggest=nowhere")
    assert "'3'" in refused(capsys, "3", f"--suggest={tmp_path}")


# ---------------------------------------------------------------------- the answer


def test_the_answer_line_says_why_there_is_no_answer():
    def line(text, failure=None):
        return solve.answer_line(Problem((6, 4), 24), ThreadTree(Thread((Block(text, True),), failure)))

    right = "Exploring Operation: 6*4=24, Resulting Numbers: [24]\n24,24 equal: Goal Reached\n"
    assert line(right) == "right: 6*4=24"
    assert "length" in line(right, "length") and line(right, "length").startswith("no answer: ")
    assert line("No solution found.\n").startswith("no answer: ")


# ---------------------------------------------------------------------- a symbolic solver and refusals


@pytest.mark.parametrize("solver", ["apr", "sos_plus"])
def test_solve_prints_a_trace_and_a_correct_answer(solver, capsys):
    assert call(9, 8, 3, "--target=24", "--teacher", f"--solver={solver}", "--beam=10") == 0
    out = capsys.readouterr().out
    assert out.startswith(CountdownProtocol(solver).root_prompt(Problem((9, 8, 3), 24)))
    *_, last = out.strip().split("\n")
    assert re.fullmatch(r"right: (\S+=\d+, )*\S+=24", last)


def test_solve_draws_a_tree_that_the_seed_determines(capsys):
    outs = []
    for seed in (1, 1, 2):
        assert call(3, 5, 7, 8, "--target=24", "--teacher", "--tree", f"--seed={seed}") in (0, 3)
        outs.append(capsys.readouterr().out)
    assert outs[0] == outs[1] != outs[2]
    assert "child 0:" in outs[0]


def test_solve_reports_that_the_search_missed_a_solution(capsys):
    assert call(3, 5, 7, 8, "--target=24", "--teacher", "--seed=0", "--beam=1") == 3
    out = capsys.readouterr().out
    assert "no answer: " in out and "--beam" in out


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["1", "1", "--target=24"], "1 1 .*24"),
        (["3", "--target=24"], "2 to 6 numbers.* 1 "),
        (["1"] * 7 + ["--target=7"], "2 to 6 numbers.* 7 "),
        (["3", "0", "--target=24"], "1 to 99999.*'0'"),
        (["3", "100000", "--target=24"], "1 to 99999.*'100000'"),
        (["3", "9" * 5000, "--target=24"], "1 to 99999.*'999"),
        (["3", "-7", "--target=24"], "1 to 99999.*'-7'"),
        (["3", "1.5", "--target=24"], r"1 to 99999.*'1\.5'"),
        (["3", "x", "--target=24"], "1 to 99999.*'x'"),
        (["3", "٣", "--target=24"], "1 to 99999.*'٣'"),
        (["3", "8"], "--target "),
        (["3", "8", "--target=1"], "2 to 99999.* 1$"),
        (["3", "8", "--target=many"], "--target=many"),
        (["3", "8", "--target=24", "--solver=bfs"], "--solver=bfs"),
        (["3", "8", "--target=24", "--beam=0"], "--beam=0"),
        (["3", "8", "--target=24", "--bem=3"], "bem"),
    ],
)
def test_errors_of_solve_are_one_line(arguments, says, capsys):
    assert re.search(says, refused(capsys, *arguments))
