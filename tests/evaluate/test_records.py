"""Files of records: what is read, and what is refused."""

import json

import pytest

from apr_jax.errors import UserError
from apr_jax.evaluate.records import Record, read_records, whole_records

RIGHT = Record(
    0, {"number": 3}, "tests.task:Task", "threads", "Budget: 2 ", correct=True, failures={"length": 1}, name="apr",
    weights="a1",
)  # fmt: skip


def test_a_broken_records_file_is_named_with_its_line(tmp_path):
    path = tmp_path / "broken.jsonl"
    path.write_text(Record(0, {}, name="apr", correct=True).line() + '{"index": 1')
    with pytest.raises(ValueError, match="line 2"):
        read_records(path)


def test_a_record_comes_back_as_it_was(tmp_path):
    path = tmp_path / "apr.jsonl"
    path.write_text(RIGHT.line())
    assert read_records(path) == whole_records(path) == [RIGHT]
    row = json.loads(RIGHT.line())
    assert (row["task"], row["variant"], row["condition"]) == ("tests.task:Task", "threads", "Budget: 2 ")


@pytest.mark.parametrize(
    "change", [{"correct": 1}, {"steps": True}, {"task": None}, {"variant": 3}, {"malformed": {"empty": "x"}}, {"x": 1}]
)
def test_a_record_with_another_value_is_refused(tmp_path, change):
    path = tmp_path / "apr.jsonl"
    path.write_text(RIGHT.line() + json.dumps(json.loads(RIGHT.line()) | change) + "\n")
    with pytest.raises(UserError, match=f"line 2.*{next(iter(change))}"):
        read_records(path)
    assert whole_records(path) == [RIGHT]
