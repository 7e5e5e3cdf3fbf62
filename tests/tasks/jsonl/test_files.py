"""Files of problems and demonstrations: a wrong line is named by file, line and field."""

import json

import pytest

from apr_jax.errors import UserError
from apr_jax.tasks.jsonl.files import JsonlProblem, read_problem
from apr_jax.tasks.jsonl.task import Jsonl, JsonlSettings
from apr_jax.text.tokenizer import Tokenizer
from apr_jax.threads import Block, Thread, ThreadTree
from apr_jax.threads.tree_json import tree_to_json
from tests.tasks.jsonl import make

PROBLEM = {"id": 1, "prompt": "3+9", "answer": 2}
TEXT = "<spawn><thread>3+9\n<return>2</return></thread></spawn><return>2</return>"


def write(folder, train=(PROBLEM,), held_out=(PROBLEM | {"id": "x", "prompt": "1+1"},), demonstrations=(), **others):
    """The task of files whose lines are objects, or texts as they are."""
    for name, rows in (("train", train), ("held_out", held_out), ("demonstrations", demonstrations)):
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return Jsonl(JsonlSettings(**make.settings(folder, **others)))


def check(task):
    task.check(Tokenizer.build(("<spawn>",), (), "é"))


def refused(task):
    with pytest.raises(UserError) as caught:
        check(task)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_files_of_the_tests_are_those_of_their_script(tmp_path):
    make.main("", str(tmp_path))
    for name in make.NAMES:
        assert (tmp_path / f"{name}.jsonl").read_bytes() == (make.HERE / f"{name}.jsonl").read_bytes()
    task = Jsonl(JsonlSettings(**make.settings()))
    task.check(task.tokenizer())
    assert [path.parent for path in task.files()] == [make.HERE] * 3


def test_problems_are_those_of_the_lines(tmp_path):
    task = write(tmp_path, train=[PROBLEM, "", {"id": "two", "prompt": "a\nb", "answer": "yes", "more": []}])
    check(task)
    assert task.problems(5, "train", [1, 0, 2]) == [JsonlProblem("two", "a\nb", "yes"), JsonlProblem("1", "3+9", "2")]
    assert task.root_prompt(task.problems(0, "train", [1])[0]) == "a\nb\n"
    assert task.describe(task.problems(0, "train", [1])[0]) == "two, a b"
    assert task.demonstration(task.problems(0, "train", [0])[0], "threads", 0, "train", 0) is None


@pytest.mark.parametrize(
    "row, field",
    [
        ({"id": 1, "prompt": "a"}, "answer"), ({"prompt": "a", "answer": 1}, "id"), ({"id": 1, "answer": 1}, "prompt"),
        (PROBLEM | {"id": 1.5}, "id"), (PROBLEM | {"id": True}, "id"), (PROBLEM | {"id": ""}, "id"),
        (PROBLEM | {"prompt": 3}, "prompt"), (PROBLEM | {"prompt": ""}, "prompt"),
        (PROBLEM | {"answer": None}, "answer"), (PROBLEM | {"answer": ["2"]}, "answer"),
        (PROBLEM | {"answer": ""}, "answer"),
        (PROBLEM | {"prompt": "a<spawn>"}, "prompt"), (PROBLEM | {"answer": "a<b"}, "answer"),
        (PROBLEM | {"prompt": "\ud800"}, "prompt"), (PROBLEM | {"answer": "\udfff"}, "answer"),
    ],
)  # fmt: skip
def test_a_wrong_problem_is_named_by_file_line_and_field(tmp_path, row, field):
    for name in ("train", "held_out"):
        first = PROBLEM | {"id": "first", "prompt": "0"}
        told = refused(write(tmp_path, **{name: [first, "", row]}))
        assert told.startswith(f"{tmp_path}/{name}.jsonl, line 3: {field} ")
    with pytest.raises(UserError, match=f"^{field} "):
        read_problem(row)


@pytest.mark.parametrize("line", ['{"id": 1,', "[1]", "3", '"a"', "\x00", "nan"])
def test_a_line_that_is_no_object_is_named(tmp_path, line):
    for name in make.NAMES:
        assert refused(write(tmp_path, **{name: [line]})).startswith(f"{tmp_path}/{name}.jsonl, line 1")


def test_an_id_stands_once(tmp_path):
    told = refused(write(tmp_path, held_out=[PROBLEM | {"id": "1"}]))
    assert told.startswith(f"{tmp_path}/held_out.jsonl, line 1: id ") and f"{tmp_path}/train.jsonl, line 1" in told
    told = refused(write(tmp_path, demonstrations=[{"id": 1, "text": TEXT}, {"id": "1", "text": TEXT}]))
    assert told.startswith(f"{tmp_path}/demonstrations.jsonl, line 2: id ") and "line 1" in told.partition("id ")[2]
    told = refused(write(tmp_path, demonstrations=[{"id": "?", "text": TEXT}]))
    assert told.startswith(f"{tmp_path}/demonstrations.jsonl, line 1: id ") and "'?'" in told


def tree(text=TEXT, prompt="3+9\n", call="<spawn><thread>3+9</thread></spawn>", **changes):
    """The tree of `TEXT` as JSON, with other parts."""
    child = {"blocks": [{"sampled": False, "content": "3+9\n"}, {"sampled": True, "content": "<return>2</return>"}]}
    join = {"sampled": False, "content": "<join><result>2</result></join>"}
    spawn = {"call": [{"sampled": True, "content": call}], "children": [child], "join": join} | changes
    end = {"sampled": True, "content": "<return>2</return>"}
    return {"info": {}, "root": {"blocks": [{"sampled": False, "content": prompt}, spawn, end]}}


@pytest.mark.parametrize(
    "row, field, says",
    [
        ({"text": "<spawn>"}, "text", "<thread>"), ({"text": 3}, "text", "'3'"), ({"text": ""}, "text", "empty"),
        ({"text": "\ud800"}, "text", "half"), ({"text": "</spawn>"}, "text", "</spawn>"),
        ({}, "text or tree", "none"), ({"text": TEXT, "tree": tree()}, "text or tree", "text and tree"),
        ({"tree": TEXT}, "tree", "<spawn>"), ({"tree": {}}, "tree", "root"),
        ({"tree": {"info": {}, "root": {"blocks": [{"sampled": False, "content": [5]}]}}}, "tree", "ids"),
        ({"tree": tree(prompt="4+9\n")}, "tree", "'4+9\\n'"), ({"tree": tree(call="<spawn></spawn>")}, "tree", "empty"),
        ({"tree": tree(call="3+9")}, "tree", "'3+9'"), ({"tree": tree(children=[])}, "tree", "1"),
        ({"tree": tree(call="<spawn><thread>4+9</thread></spawn>")}, "tree", "'4+9\\n'"),
        ({"tree": tree(join={"sampled": False, "content": "<join><nothing/></join>"})}, "tree", "<nothing/>"),
        ({"tree": tree(join={"sampled": True, "content": "<join><result>2</result></join>"})}, "tree", "sampled"),
    ],
)  # fmt: skip
def test_a_wrong_demonstration_is_named_by_file_line_and_field(tmp_path, row, field, says):
    other = PROBLEM | {"id": "other", "prompt": "0"}
    rows = [{"id": "other", "text": "<return>0</return>"}, {"id": 1} | row]
    told = refused(write(tmp_path, train=[PROBLEM, other], demonstrations=rows))
    assert told.startswith(f"{tmp_path}/demonstrations.jsonl, line 2: {field}") and says in told


def test_a_tree_as_json_is_the_same_demonstration_as_a_text(tmp_path):
    trees = []
    for row in ({"text": TEXT}, {"tree": tree()}):
        task = write(tmp_path, demonstrations=[{"id": 1} | row])
        check(task)
        trees.append(task.demonstration(task.problems(0, "train", [0])[0], "threads", 0, "train", 0))
    assert trees[0] == trees[1] and trees[0].info == {"id": "1"}
    assert tree_to_json(trees[0])["root"] == tree()["root"]


def test_levels_and_contexts_are_those_of_the_settings(tmp_path):
    rows = [{"id": 1, "text": TEXT}]
    assert "last level" in refused(write(tmp_path, demonstrations=rows, levels=0))
    inherits = write(tmp_path, demonstrations=rows, children="inherit")
    check(inherits)
    root = inherits.demonstration(inherits.problems(0, "train", [0])[0], "threads", 0, "train", 0).root
    assert [thread.inherits for thread in root.walk()] == [False, True]
    told = refused(write(tmp_path, demonstrations=[{"id": 1, "tree": tree()}], children="inherit"))
    assert "line 1: tree: inherits is true" in told


def test_a_thread_that_was_cut_off_may_end_with_a_spawn(tmp_path):
    spawn = tree()["root"]["blocks"][1]
    root = {"blocks": [{"sampled": False, "content": "3+9\n"}, spawn]}
    row = {"id": 1, "tree": {"info": {}, "root": root}}
    assert "ends with a block" in refused(write(tmp_path, demonstrations=[row]))
    root["failure"] = "length"
    check(write(tmp_path, demonstrations=[row]))


def test_a_character_that_the_tokenizer_lacks_is_named(tmp_path):
    strange = PROBLEM | {"prompt": "3+ü"}
    told = refused(write(tmp_path, train=[PROBLEM | {"id": 0}, strange]))
    assert told.startswith(f"{tmp_path}/train.jsonl, line 2: prompt ") and "'ü'" in told
    told = refused(write(tmp_path, demonstrations=[{"id": 1, "text": "ü <return>2</return>"}]))
    assert told.startswith(f"{tmp_path}/demonstrations.jsonl, line 1: text ") and "'ü'" in told
    task = write(tmp_path, train=[strange, PROBLEM | {"id": 2, "prompt": "日本 é"}])
    own = task.tokenizer()
    task.check(own)  # a tokenizer of its own has all of them, and each is one token
    assert own.decode(own.encode("日本 é<spawn>\n")) == "日本 é<spawn>\n" and len(own.encode("日<spawn>")) == 2


def test_a_tag_that_the_tokenizer_lacks_is_named_where_it_is_needed(tmp_path):
    class Lacking:
        unknown = 0

        def encode(self, text):
            return [0 if "<nothing/>" in text else 1]

    write(tmp_path, demonstrations=[{"id": 1, "text": TEXT}]).check(Lacking())
    row = {"id": 1, "text": "<spawn><thread>1\nno</thread></spawn>"}
    with pytest.raises(UserError, match="demonstrations.jsonl, line 1: text has '<nothing/>'"):
        write(tmp_path, demonstrations=[row]).check(Lacking())


def test_files_that_are_missing_or_changed_are_seen(tmp_path):
    with pytest.raises(UserError, match="jsonl.train is a file"):
        Jsonl().files()
    task = write(tmp_path)
    assert len(task.problems(0, "train", range(9))) == 1
    write(tmp_path, train=[PROBLEM, PROBLEM | {"id": 2, "prompt": "4+4"}])
    assert len(task.problems(0, "train", range(9))) == 2
    (tmp_path / "demonstrations.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match="jsonl.demonstrations: no file"):
        check(task)


def test_a_tree_that_our_tools_write_is_read_as_a_demonstration(tmp_path):
    root = Thread((Block("3+9\n", sampled=False), Block("<return>2</return>", sampled=True)))
    task = write(tmp_path, demonstrations=[{"id": 1, "tree": tree_to_json(ThreadTree(root, {"note": 1}))}])
    check(task)
    assert task.demonstration(task.problems(0, "train", [0])[0], "threads", 0, "train", 0).root == root
