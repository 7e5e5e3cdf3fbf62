"""A task of one's own in one file: the largest of eight numbers. The root gives each half of them to a child thread.

4 17 2 9                                                    the root's prompt (here of four numbers)
<spawn><thread>4 17</thread><thread>2 9</thread></spawn>    the root writes
4:4 17:17 <return>17</return>                               a child writes each number and the largest one so far
<join><result>17</result><result>9</result></join>          replaces the spawn
17:17 9:17 <return>17</return>                              the root writes
"""

import dataclasses
import random
import re

from apr_jax.errors import UserError
from apr_jax.tasks.tagged.protocol import TagProtocol, tag_spawn, tag_tokenizer
from apr_jax.tasks.task import Task
from apr_jax.threads.tree import Block, Thread, ThreadTree
from experiments.settings import default_config


@dataclasses.dataclass(frozen=True)
class LargestSettings:
    most: int = 99  # numbers are from 0 to this; --config.largest.most=50 changes it


class Largest(Task):
    name, variants, Settings = "largest", ("halves",), LargestSettings

    def problems(self, seed, split, indices):  # a problem is a tuple of numbers
        draws = [random.Random(f"{seed} {split} {index}") for index in indices]
        return [tuple(draw.choices(range(self.settings.most + 1), k=8)) for draw in draws]

    def problem_json(self, problem):
        return {"numbers": problem}

    def read_problem(self, row):
        numbers = row.get("numbers")
        if not isinstance(numbers, list) or len(numbers) != 8 or not all(isinstance(n, int) for n in numbers):
            raise UserError(f"a problem has numbers, a list of 8 integers, was given {str(row)[:60]}")
        return tuple(numbers)

    def tokenizer(self):  # one token for each tag, each number, and for ":"
        return tag_tokenizer((":",), self.settings.most)

    def demonstration(self, problem, variant, seed, split, index):
        halves = problem[:4], problem[4:]
        best = [max(half) for half in halves]
        children = [Thread((self.prompt(half), written(half))) for half in halves]
        return ThreadTree(Thread((self.prompt(problem), tag_spawn(children, map(str, best)), written(best))))

    def prompt(self, numbers):
        return Block(self.root_prompt(numbers), sampled=False)

    def protocol(self, variant):  # what a spawn means and, by the three methods below, what a root is asked and answers
        self.check_variant(variant)
        return TagProtocol(self)

    def root_prompt(self, problem):
        return " ".join(map(str, problem)) + "\n"

    def correct(self, problem, result):
        return result == str(max(problem))

    def steps(self, text):  # (right ones, all) of the steps that a thread wrote
        found = re.findall(r"(\d+):(\d+) ", text)
        return sum(int(best) >= int(number) for number, best in found), len(found)


def written(numbers):
    steps = "".join(f"{number}:{max(numbers[: i + 1])} " for i, number in enumerate(numbers))
    return Block(f"{steps}<return>{max(numbers)}</return>", sampled=True)


def get_config():  # --config=tests/own_task.py
    c = default_config("tests.own_task:Largest")
    c.update(name="largest", window=96, model={"width": 64, "layers": 2, "heads": 4})
    c.data.update(train=4000, held_out=500)
    c.sft.update(steps=180, optimizer={"name": "muon", "peak_lr": 3e-3})
    c.grpo.update(steps=40, prompts=16, group=8, optimizer={"name": "muon", "peak_lr": 2e-4, "muon_lr": 1e-3})
    return c
