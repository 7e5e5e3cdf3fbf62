"""JSON lines: reading by iteration and by index, and errors for broken lines."""

import json
import pickle
import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apr_jax.errors import UserError
from apr_jax.io import json_lines
from apr_jax.io.json_lines import JsonLines, read_lines

ROWS = [{"index": 0, "text": "ä\u2028\n\x85"}, {}, {"index": 2, "deep": {"list": [1, [2, None]]}}]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "rows.jsonl"


def write(path, rows):
    with path.open("a", encoding="utf-8") as file:
        for row in rows:
            json_lines.append(file, row)


def test_written_rows_come_back(path):
    write(path, ROWS[:1])
    write(path, ROWS[1:])
    assert list(read_lines(path)) == list(enumerate(ROWS, 1))
    assert list(JsonLines(path)) == ROWS


def test_a_line_is_flushed_at_once(path):
    with path.open("a") as file:
        json_lines.append(file, ROWS[0])
        assert path.read_text() == json_lines.to_line(ROWS[0])


def test_rows_by_index(path):
    write(path, ROWS)
    rows = JsonLines(path)
    assert (len(rows), rows[1], rows[-1], rows[1:], rows[::-1]) == (3, {}, ROWS[2], ROWS[1:], ROWS[::-1])
    with pytest.raises(IndexError):
        rows[3]


def test_a_missing_or_empty_file(path):
    assert list(read_lines(path, cut_short=True)) == []
    for read in (JsonLines, lambda path: list(read_lines(path))):
        with pytest.raises(FileNotFoundError):
            read(path)
    path.touch()
    assert len(JsonLines(path)) == 0 and list(read_lines(path)) == [] and JsonLines(path)[:] == []


def test_blank_lines_and_a_last_line_without_an_end(path):
    path.write_text('\n{"a":1}\n\n\n{"a":2}')
    assert list(read_lines(path)) == [(2, {"a": 1}), (5, {"a": 2})]
    assert list(JsonLines(path)) == [{"a": 1}, {"a": 2}]


BROKEN = [b'{"a": 1', b"[1]", b"3", b"no", b"\xff\xfe{}x", b'{"a":' + b"[" * 100_000]


@pytest.mark.parametrize("line", BROKEN)
def test_a_broken_line_is_named_by_file_and_number(path, line):
    path.write_bytes(b'{"a":1}\n\n' + line + b'\n{"a":4}\n')
    for read in (lambda: list(read_lines(path)), lambda: JsonLines(path)[1]):
        with pytest.raises(UserError) as error:
            read()
        message = str(error.value).removeprefix(str(path))
        assert message != str(error.value) and re.search(r"\b3\b", message) and "\n" not in message
    assert JsonLines(path)[2] == {"a": 4}


@pytest.mark.parametrize("line", BROKEN)
def test_a_line_that_a_kill_cut_short_is_skipped(path, line):
    path.write_bytes(b'{"a":1}\n' + line)
    assert list(read_lines(path, cut_short=True)) == [(1, {"a": 1})]


@given(st.lists(st.dictionaries(st.text(), st.text() | st.integers() | st.none())))
def test_any_rows(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    assert list(JsonLines(path)) == [row for _, row in read_lines(path)] == rows


def test_another_process_reads_the_same(path):
    write(path, ROWS)
    assert list(pickle.loads(pickle.dumps(JsonLines(path)))) == ROWS


def test_half_a_million_lines_are_indexed_within_a_second(path):
    line = json_lines.to_line({"numbers": [12, 34, 56, 78], "target": 90})
    path.write_text(line * 500_000)
    began = time.monotonic()
    rows = JsonLines(path)
    assert len(rows) == 500_000 and rows[-1]["target"] == 90
    assert time.monotonic() - began < 1
