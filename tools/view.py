"""Draws the thread tree of one evaluated problem: which thread spawned which, their texts and their tokens.

    python -m tools.view runs/laptop/evaluate/sft_apr.jsonl --index=3
    python -m tools.view runs/laptop/evaluate/sft_apr.jsonl --index=3 --html=tree.html

The file is an output of the evaluate stage, with one problem per line. Without --html the tree is printed: lines after
":" were inserted by the system (prompts, joins), lines after "|" were written by the model. With --html the tree is
written as a page for a browser, with threads as lanes over time.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import flags

from apr_jax.errors import UserError
from apr_jax.evaluate.records import Record
from apr_jax.io.files import write_text
from apr_jax.io.json_lines import read_lines
from apr_jax.io.paths import read_json
from apr_jax.tasks.task import Task, load_task
from apr_jax.text.hub import find_tokenizer, load_tokenizer
from apr_jax.threads import ThreadTree
from tools import command
from tools.draw import Drawing, own_blocks


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_integer("index", 0, "Number of the problem, from 0.", lower_bound=0, flag_values=values)
    flags.DEFINE_string("tokenizer", None, "A tokenizer.json. Default: that of the file's run.", flag_values=values)
    flags.DEFINE_string("html", None, "Write a page to this file instead of printing.", flag_values=values)
    flags.DEFINE_integer("lines", 8, "Most lines to print of each block; 0: all.", lower_bound=0, flag_values=values)


def _work(values: flags.FlagValues, arguments: Sequence[str]) -> None:
    path = Path(arguments[0])
    record = find_record(path, values["index"].value)
    task = find_task(record, path)
    title, verdict = describe(record, task), "right" if record.correct else "wrong"
    try:
        tree = record.thread_tree
    except UserError as error:
        raise UserError(f"{title}: {error}") from None
    if tree is None:
        raise UserError(f"{title}: no tree, its evaluation failed with {', '.join(record.failures)}")
    decode = None if _is_text(tree) else _decode(tree, path, values["tokenizer"].value)
    try:
        drawing = Drawing(tree, decode, task.protocol(record.variant).result)
        if values["html"].value:
            text = drawing.page(title, verdict, record.correct)
        else:
            text = f"{title}: {verdict}\n{drawing.costs()}\n\n{drawing.terminal(values['lines'].value)}"
    except RecursionError:
        raise UserError(f"{title}: threads are nested too deeply to be drawn") from None
    if values["html"].value:
        write_text(Path(values["html"].value), text)
        print(f"wrote {values['html'].value}")
    else:
        print(text, end="")


def find_record(path: Path, index: int) -> Record:
    """Return the record of problem number `index`. Raises FileNotFoundError, or UserError if there is none."""
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    count = 0
    for number, row in read_lines(path):
        try:
            record = Record.from_row(row)
        except UserError as error:
            raise UserError(f"{path}, line {number}: {error}") from None
        count += 1
        if record.index == index:
            return record
    raise UserError(f"{path} has no problem {index}, it holds {count} problems")


def find_task(record: Record, path: Path) -> Task:
    """Return the task of a record, with the settings of the file's run if they are found, else with its defaults.

    Raises UserError for an unknown task.
    """
    for folder in path.resolve().parents:
        manifest = folder / "data" / "manifest.json"
        if manifest.is_file():
            config = read_json(manifest, "give a copy of the records elsewhere").get("config", {})
            if config.get("task") == record.task:
                return load_task(record.task, config.get("settings"))
            break
    return load_task(record.task)


def describe(record: Record, task: Task) -> str:
    """Return the title of a record's drawing. Raises UserError if the record's problem does not fit the task."""
    return f"{record.name}, problem {record.index}: {task.describe(task.read_problem(record.problem))}"


def _decode(tree: ThreadTree, path: Path, given: str | None) -> Callable[[Sequence[int]], str]:
    """Return the `decode` of the given tokenizer, or else of the tokenizer of the run of the file at `path`.

    Raises FileNotFoundError if there is none, and UserError if the tree has an id that the tokenizer does not have.
    """
    tokenizer = load_tokenizer(str(find_tokenizer(path, given)))
    blocks = [block for thread in tree.threads() for item in thread.blocks for block in own_blocks(item)]
    largest = max((token for block in blocks for token in block.content), default=0)
    if largest >= len(tokenizer):
        raise UserError(
            f"the tree has the token {largest}, the tokenizer {len(tokenizer)} tokens: give the right --tokenizer=FILE"
        )
    return tokenizer.decode


def _is_text(tree: ThreadTree) -> bool:
    return isinstance(tree.root.blocks[0].content, str)


def main(argv: Sequence[str]) -> int:
    return command.run(__doc__, _define, _work, argv, takes=["RECORDS"])


if __name__ == "__main__":
    sys.exit(main(sys.argv))
