"""The place of a task whose class is not written yet; to be deleted with its last caller."""

from apr_jax.tasks.task import Task


class StandIn(Task):
    """A task that is known by its spec and by dataclasses of problems alone."""

    name, variants = "stand_in", ("apr",)

    def __init__(self, spec: str):
        super().__init__()
        self.spec = spec

    def problems(self, seed, split, indices):
        raise NotImplementedError(self.spec)

    def read_problem(self, row):
        raise NotImplementedError(self.spec)

    def tokenizer(self):
        raise NotImplementedError(self.spec)

    def demonstration(self, problem, variant, seed, split, index):
        raise NotImplementedError(self.spec)

    def protocol(self, variant):
        raise NotImplementedError(self.spec)
