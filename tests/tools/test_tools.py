"""Tests of tools.view by its command line: output, pages and errors."""

import html.parser
import json
import random
import re

import pytest

from apr_jax.evaluate.records import Record
from apr_jax.tasks.countdown import Problem
from apr_jax.tasks.countdown.solver import SolverConfig, solve_apr
from apr_jax.tasks.countdown.vocabulary import countdown_tokenizer
from apr_jax.threads import Block, Spawn, Thread, ThreadTree, encode_tree, metrics
from apr_jax.threads.tree_json import tree_to_json
from tools import solve, view
from tools.draw import Drawing, lanes_of

TOKENIZER = countdown_tokenizer(99)
PROBLEM = Problem((7, 13, 10, 1), 16)


def solver_tree(seed=1):
    return solve_apr(PROBLEM, SolverConfig.paper_apr(beam=(3, 3), sub_beam=(3, 3)), random.Random(seed))


def record(index, tree, **changes):
    fields = {"task": "countdown", "variant": "apr", "correct": True, "answered": True} | changes
    fields = {"tree": tree and tree_to_json(tree)} | fields
    return Record(index, {"numbers": list(PROBLEM.numbers), "target": PROBLEM.target}, name="sft_apr", **fields)


@pytest.fixture
def run_folder(tmp_path):
    """A run folder with the records of three problems; the evaluation of the last one raised an error."""
    (tmp_path / "data").mkdir()
    (tmp_path / "evaluate").mkdir()
    TOKENIZER.save(tmp_path / "data" / "tokenizer.json")
    tree = encode_tree(solver_tree(), TOKENIZER.encode, TOKENIZER.bos, TOKENIZER.eos)
    prompt, written, *rest = tree.root.blocks
    surprising = Block(written.content, True, tuple([-3.0] + [-0.01] * (len(written) - 1)))
    cut = Thread((prompt, surprising, *rest), failure="length")
    lines = [
        record(0, tree).line(),
        record(1, ThreadTree(cut), correct=False).line(),
        record(2, None, correct=False, failures={"error:OSError": 1}).line(),
    ]
    (tmp_path / "evaluate" / "sft_apr.jsonl").write_text("".join(lines))
    return tmp_path


def call(tool, *arguments):
    return tool.main(["tool", *map(str, arguments)])


def refused(capsys, tool, *arguments):
    """Run a wrong command, and return its one line of error."""
    assert call(tool, *arguments) == 1
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in out + err
    return err


# ---------------------------------------------------------------------- drawing


def test_lanes_end_with_the_longest_chain_and_children_begin_where_their_call_ends():
    for seed in range(5):
        tree = solver_tree(seed)
        lanes = lanes_of(tree)
        assert max(lane.end for lane in lanes) == lanes[0].end == metrics.sequential_tokens(tree)
        assert len(lanes) == metrics.children(tree) + 1
        calls = {span.end for span in lanes[0].spans if span.kind == "call"}
        assert {lane.start for lane in lanes[1:]} == calls
        assert sum(lane.size for lane in lanes) == metrics.total_tokens(tree)
        for lane in lanes:
            assert all(before.end <= after.start for before, after in zip(lane.spans, lane.spans[1:]))


def test_the_text_form_shows_structure_and_writers():
    child = Thread((Block("look\n", False), Block("found\n", True)))
    failed = Thread((Block("look\n", False), Block("a\nb\nc\nd\n", True)), failure="length")
    spawn = Spawn((Block("help\n", True),), (child, failed), Block("joined\n", False))
    tree = ThreadTree(Thread((Block("start", False), Block("\nthinking\n", True), spawn, Block("done\n", True))))
    drawing = Drawing(tree, None, lambda text: text if "found" in text else None)
    assert drawing.terminal(lines=2).split("\n") == [
        "root: 32 characters, returned nothing",
        "  prompt, 5 characters",
        "    : start",
        "  written, 10 characters",
        "    | thinking",
        "  call of 2, 5 characters",
        "    | help",
        "    child 0: 11 characters, returned a path",
        "      prompt, 5 characters",
        "        : look",
        "      written, 6 characters",
        "        | found",
        "    child 1: 13 characters, FAILED (length)",
        "      prompt, 5 characters",
        "        : look",
        "      written, 8 characters",
        "        | a",
        "        | b",
        "        | ... 2 more lines",
        "  join, 7 characters",
        "    : joined",
        "  written, 5 characters",
        "    | done",
        "",
    ]
    assert "d" in drawing.terminal(lines=0) and "more lines" not in drawing.terminal(lines=0)


class Page(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.attributes = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in ("meta", "rect", "path"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        if tag not in ("p", "html"):
            while self.open and self.open[-1] in ("p", "html"):
                self.open.pop()
            if tag not in ("rect", "path"):
                assert self.open.pop() == tag


def test_the_page_is_one_file_and_shows_every_thread(run_folder, capsys):
    out = run_folder / "tree.html"
    assert call(view, run_folder / "evaluate" / "sft_apr.jsonl", f"--html={out}", "--index=1") == 0
    text = out.read_text()
    page = Page(text)
    threads = metrics.children(solver_tree()) + 1
    assert page.tags.count("details") == page.tags.count("a") == threads > 1
    assert not re.search(r"https?://|src=|@import|<link", text), "the page loads no other files"
    assert all(value.startswith("#") for name, value in page.attributes if name == "href")
    assert "7 13 10 1 to 16" in text and "<b class=wrong>wrong</b>" in text and "FAILED (length)" in text
    assert text.count("<u title=") == 1 and "probability 0.05" in text


def test_the_page_escapes_a_models_text():
    tree = ThreadTree(Thread((Block("p", False), Block("<script>alert(1)</script>&", True)), failure="<b>"))
    page = Drawing(tree, None, lambda text: None).page("<i>", "right", True)
    assert "<script>alert" not in page and "<i>" not in page and "(<b>)" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;&amp;" in page


# ---------------------------------------------------------------------- view


def test_view_prints_the_tree_with_the_tokenizer_of_its_run(run_folder, capsys):
    path = run_folder / "evaluate" / "sft_apr.jsonl"
    assert call(view, path) == 0
    out = capsys.readouterr().out
    assert out.startswith("sft_apr, problem 0: 7 13 10 1 to 16: right\n")
    assert "call of" in out and "child 0:" in out and "    : Moving to Node #0\n" in out
    assert call(view, path, "--lines=0", f"--tokenizer={run_folder / 'data' / 'tokenizer.json'}") == 0
    assert len(capsys.readouterr().out) > len(out)


def test_errors_of_view_are_one_line(run_folder, tmp_path_factory, capsys):
    path = run_folder / "evaluate" / "sft_apr.jsonl"
    assert re.search(" 7.* 3 ", refused(capsys, view, path, "--index=7"))
    assert "error:OSError" in refused(capsys, view, path, "--index=2")
    assert "nothing.jsonl" in refused(capsys, view, run_folder / "nothing.jsonl")
    assert re.search("RECORDS.* 0 ", refused(capsys, view))
    assert "nowhere.json" in refused(capsys, view, path, "--tokenizer=nowhere.json")
    assert "indx" in refused(capsys, view, path, "--indx=3")
    broken = run_folder / "broken.jsonl"
    for text in ("no json\n", "[]\n", '{"index": 0}\n'):
        broken.write_text(text)
        assert "broken.jsonl, line 1: " in refused(capsys, view, broken)
    row = json.loads(path.read_text().splitlines()[0])
    broken.write_text(json.dumps(row | {"tree": {"root": 3}}) + "\n")
    assert "tree" in refused(capsys, view, broken)
    alone = tmp_path_factory.mktemp("alone") / "records.jsonl"
    alone.write_text(path.read_text())
    assert "--tokenizer" in refused(capsys, view, alone)


def damaged(value, rng):
    """Return a JSON value in which one part is replaced, deleted or doubled."""
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.05:
        return rng.choice(
            [None, True, -1, 0.5, 10**12, 10**30, "", "x", [], {}, [[]], [None], float("nan"), {"join": 1}]
        )
    changed = dict(value) if isinstance(value, dict) else list(value)
    key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
    kind = rng.random()
    if kind < 0.1:
        del changed[key]
    elif kind < 0.2 and isinstance(changed, list):
        changed.insert(key, changed[key])
    else:
        changed[key] = damaged(value[key], rng)
    return changed


def test_damaged_records_are_drawn_or_refused_in_one_line(run_folder, capsys):
    path, rng, codes = run_folder / "evaluate" / "sft_apr.jsonl", random.Random(0), []
    rows = [json.loads(line) for line in path.read_text().splitlines()[:2]]
    rows.append(rows[0] | {"tree": tree_to_json(solver_tree())})
    for number in range(400):
        row = rng.choice(rows)
        row = row | {"tree": damaged(row["tree"], rng)} if number % 2 else damaged(row, rng)
        path.write_text(json.dumps(row) + "\n")
        index = row["index"] if isinstance(row, dict) and type(row.get("index")) is int and 0 <= row["index"] < 9 else 0
        html = [f"--html={run_folder / 'tree.html'}"] if number % 3 else []
        codes.append(call(view, path, f"--index={index}", *html))
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err and err.count("\n") == codes[-1], (err, row)
        assert codes[-1] == 0 or err.startswith("error: "), (err, row)
    assert set(codes) == {0, 1} and codes.count(1) > 100


TREE = {"info": {}, "root": {"blocks": [{"sampled": False, "content": [5]}, {"sampled": True, "content": [6, 7]}]}}
DAMAGED = {
    "too few logprobs": ({"logprobs": [-1.0]}, "1 log-probabilities .*2 tokens"),
    "a logprob of another type": ({"logprobs": [None, -1.0]}, "logprobs.*'None'"),
    "a token below 0": ({"content": [6, -7]}, "token.* -7"),
    "a token of another type": ({"content": [6, "a"]}, "token.*'a'"),
    "a token of another vocabulary": ({"content": [6, 900]}, "token 900.*tokenizer"),
    "a token beyond any vocabulary": ({"content": [6, 10**30]}, "token 1000"),
    "text among ids": ({"content": "seven"}, "text.*ids"),
    "no writer": ({"sampled": None}, "sampled.*'None'"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_the_error_of_a_damaged_tree_names_the_damage(name, run_folder, capsys):
    path, (change, says) = run_folder / "evaluate" / "sft_apr.jsonl", DAMAGED[name]
    row, tree = json.loads(path.read_text().splitlines()[0]), json.loads(json.dumps(TREE))
    tree["root"]["blocks"][1] |= change
    path.write_text(json.dumps(row | {"tree": tree}) + "\n")
    assert re.search(says, refused(capsys, view, path))


def test_a_tree_without_a_prompt_or_nested_too_deeply_is_refused(run_folder, capsys):
    path = run_folder / "evaluate" / "sft_apr.jsonl"
    row, block = json.loads(path.read_text().splitlines()[0]), TREE["root"]["blocks"][0]
    for blocks in ([], [{"call": [], "children": [], "join": block}]):
        path.write_text(json.dumps(row | {"tree": {"info": {}, "root": {"blocks": blocks}}}) + "\n")
        assert "prompt" in refused(capsys, view, path)
    for levels in (200, 400, 30_000):  # too deep for drawing, for reading the tree, and for the JSON parser
        thread = '{"blocks": [' + json.dumps(block)
        nested = "".join(f'{thread}, {{"call": [], "join": {json.dumps(block)}, "children": [' for _ in range(levels))
        tree = f'{{"info": {{}}, "root": {nested}{thread}]}}{"]}]}" * levels}}}'
        path.write_text(json.dumps(row | {"tree": None}).replace('"tree": null', f'"tree": {tree}') + "\n")
        code = call(view, path)
        out, err = capsys.readouterr()
        assert "Traceback" not in err and err.count("\n") == code
        assert (code, "nested" in err or "recursion" in err) in ((0, False), (1, True)), err
    assert code == 1


@pytest.mark.parametrize("tool", [solve, view])
def test_help_shows_a_command_and_every_flag(tool, capsys):
    assert call(tool, "--help") == 0
    out = capsys.readouterr().out
    assert "    python -m tools." in out
    for line in out.split("Flags:\n")[1].strip().split("\n"):
        assert re.fullmatch(r" *--\w+(=\.\.\.)? +\S.*", line)
