"""The observer of a runner: a viewer learns of every thread and its tokens while the tree is still being written."""

from collections.abc import Sequence

from apr_jax.threads.tree import Thread


class Observer:
    """Watches the threads of a `TreeRunner`. Each method does nothing; a viewer overrides the methods that it needs.

    `name` identifies a thread. A root has the name that `TreeRunner.run` was given; a child has its parent's name and
    two more numbers. All methods are called on the event loop, in the order of events. They get copies, so they cannot
    change what is decoded. An error that a method raises ends the run, as any bug does.

    A thread's own context is its prompt and the tokens after it, without the context that it inherits. The events give
    it completely: it begins with `prompt`; `decoded` replaces everything from index `at` on by `ids`; `replaced`
    replaces the last token; `joined` replaces the last `call` tokens by `ids`.
    """

    def started(self, name: tuple[int, ...], depth: int, prompt: Sequence[int]) -> None:
        """A thread begins. `depth` is its number of ancestors, 0 for a root."""

    def decoded(self, name: tuple[int, ...], at: int, ids: Sequence[int]) -> None:
        """The model sampled `ids`, from index `at` of the thread's own context on. `at` is the end of the context,
        unless the engine has to sample the last tokens again, as after a broken connection to a server."""

    def replaced(self, name: tuple[int, ...], token: int) -> None:
        """The runner replaced the thread's last sampled token by `token`, the opening of a spawn."""

    def spawned(self, name: tuple[int, ...], call: int, children: int) -> None:
        """The thread's last `call` tokens are a spawn. The runner now runs `children` children, or none if the spawn is
        malformed."""

    def joined(self, name: tuple[int, ...], call: int, ids: Sequence[int]) -> None:
        """All children have ended. The join `ids` replaces the thread's last `call` tokens."""

    def ended(self, name: tuple[int, ...], thread: Thread) -> None:
        """A thread ended. Is not called where an error ends the run."""
