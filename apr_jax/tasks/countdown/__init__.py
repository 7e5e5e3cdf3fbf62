"""Countdown: its problems, solvers, trace language, verifier and thread protocol."""

from apr_jax.tasks.countdown.problem import Problem, ProblemRange
from apr_jax.tasks.countdown.protocol import SPAWN_ERRORS, CountdownProtocol, CountdownSpawn
from apr_jax.tasks.countdown.verify import Verdict, check_solution, operations
from apr_jax.threads import MalformedSpawn

__all__ = [
    "SPAWN_ERRORS", "CountdownProtocol", "CountdownSpawn", "MalformedSpawn", "Problem", "ProblemRange", "Verdict",
    "check_solution", "operations",
]  # fmt: skip
