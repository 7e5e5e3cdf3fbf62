"""Tests of files of records: they are read back unchanged, and broken ones are refused."""

import json

import pytest

from apr_jax.errors import UserError
from apr_jax.evaluate.records import Record, read_records, whole_records

RIGHT = Record(
    0, {"number": 3}, "tests.task:Task", "threads", "Budget: 2 ", correct=True, failures={"length": 1}, name="apr",
    weights="a1",
)  # fmt: skip


def test_a_broken_file_is_refused_with_its_line_number(tmp_path):
    path = tmp_path / "broken.jsonl"
    path.write_text(Record(0, {}, name="apr", correct=True).line() + '{"index": 1')
    with pytest.raises(ValueError, match="line 2"):
        read_records(path)


def test_a_record_is_the_same_after_writing_and_reading(tmp_path):
    path = tmp_path / "apr.jsonl"
    path.write_text(RIGHT.line())
    assert read_records(path) == whole_records(path) == [RIGHT]
    row = json.loads(RIGHT.line())
    assert (row["task"], row["variant"], row["condition"]) == ("tests.task:Task", "threads", "Budget: 2 ")


@pytest.mark.parametrize(
    "change", [{"correct": 1}, {"steps": True}, {"task": None}, {"variant": 3}, {"malformed": {"empty": "x"}}, {"x": 1}]
)
def test_a_record_with_a_wrong_type_or_an_unknown_field_is_refused(tmp_path, change):
    path = tmp_path / "apr.jsonl"
    path.write_text(RIGHT.line() + json.dumps(json.loads(RIGHT.line()) | change) + "\n")
    with pytest.raises(UserError, match=f"line 2.*{next(iter(change))}"):
        read_records(path)
    assert whole_records(path) == [RIGHT]
