"""A small data set for the task `jsonl`: the last digit of a sum of four digits, each half summed by a child thread.

    python -m tests.tasks.jsonl.make tests/tasks/jsonl            # the three files of this folder
    python -m tests.tasks.jsonl.make runs/digits 4500 500         # 4500 problems, 500 of them held out; seed 0

Problem 3+9+4+8 has the answer 4. Its demonstration, in the form that `apr_jax/tasks/jsonl/inline.py` describes:

    <spawn><thread>3+9
    <return>2</return></thread><thread>4+8
    <return>2</return></thread></spawn><return>4</return>
"""

import json
import random
import sys
from pathlib import Path

HERE = Path(__file__).parent
NAMES = ("train", "held_out", "demonstrations")  # settings of the task, and names of its files


def main(_, folder: str, count: str = "200", held_out: str = "40", seed: str = "0") -> None:
    """Write the three files. Problems are drawn without repeats; the first `held_out` of them are held out."""
    problems, demonstrations = [], []
    for index, number in enumerate(random.Random(int(seed)).sample(range(10_000), int(count))):
        a, b, c, d = map(int, f"{number:04}")
        left, right = (a + b) % 10, (c + d) % 10
        children = [f"<thread>{text}\n<return>{result}</return></thread>" for text, result in
                    ((f"{a}+{b}", left), (f"{c}+{d}", right))]  # fmt: skip
        answer = (left + right) % 10
        problems.append({"id": index, "prompt": f"{a}+{b}+{c}+{d}", "answer": answer})
        text = f"<spawn>{''.join(children)}</spawn><return>{answer}</return>"
        demonstrations.append({"id": index, "text": text})
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, rows in zip(NAMES, (problems[int(held_out) :], problems[: int(held_out)], demonstrations)):
        (Path(folder) / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def settings(folder: Path = HERE, **others) -> dict:
    """The settings of the task with the files of a folder."""
    return {name: str(folder / f"{name}.jsonl") for name in NAMES} | others


def closeness(problem, answer, tree) -> float:
    """A reward: 1 for the right digit, 0 for the one that is farthest from it on a circle, 0 for no digit."""
    if answer is None or not answer.isdecimal():
        return 0.0
    away = abs(int(answer) - int(problem.answer)) % 10
    return 1 - min(away, 10 - away) / 5


if __name__ == "__main__":
    main(*sys.argv)
