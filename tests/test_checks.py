"""Dataclasses of settings check their own values: bounds, types, and numbers that are not finite."""

import dataclasses
import math
from fractions import Fraction

import numpy as np
import pytest

from apr_jax.checks import FieldError, at_least, between, check_fields, check_values
from apr_jax.data.dataset import DataConfig
from apr_jax.errors import UserError
from apr_jax.model.llama import LlamaConfig
from apr_jax.tasks.countdown.problem import ProblemRange
from apr_jax.tasks.countdown.search import SolverConfig
from apr_jax.tasks.countdown.task import CountdownSettings
from apr_jax.tasks.task import NoSettings
from apr_jax.threads.engine import Sampling
from apr_jax.threads.run import Budget
from apr_jax.train.objective import GrpoConfig
from apr_jax.train.optimizer import OptimizerConfig
from apr_jax.train.reward import Penalties
from apr_jax.train.sft import SftConfig

RIGHT = {
    GrpoConfig: {
        "steps": 1, "prompts": 1, "group": 2, "optimizer": OptimizerConfig(), "batch_rows": 1, "row_length": 1,
    },
    SftConfig: {"steps": 1, "batch_rows": 1, "row_length": 1, "optimizer": OptimizerConfig()},
    OptimizerConfig: {}, LlamaConfig: {"vocab_size": 8}, Budget: {"context": 9}, Sampling: {}, Penalties: {},
    ProblemRange: {}, SolverConfig: {"beam": (1, 3)}, CountdownSettings: {},
    DataConfig: {"task": "sums", "settings": NoSettings(), "train": 1, "held_out": 1, "window": 9},
}  # fmt: skip


@pytest.mark.parametrize(
    "kind, name, value",
    [
        (GrpoConfig, "kl", -1), (GrpoConfig, "clip_low", 2), (GrpoConfig, "clip_low", -0.1), (GrpoConfig, "steps", -1),
        (GrpoConfig, "clip_high", -0.1), (GrpoConfig, "prompts", 0), (GrpoConfig, "group", 1),
        (GrpoConfig, "temperature", 0), (GrpoConfig, "tis_clip", -1), (GrpoConfig, "seed", 2**31),
        (GrpoConfig, "save_every", 0), (GrpoConfig, "validation", 0), (GrpoConfig, "inner_steps", 0),
        (SftConfig, "batch_rows", 0), (SftConfig, "microbatches", 0), (SftConfig, "log_every", 0),
        (SftConfig, "tokens", -1), (SftConfig, "seed", -1), (SftConfig, "loss_tokens", "none"),
        (OptimizerConfig, "peak_lr", -1e-3), (OptimizerConfig, "beta2", 1), (OptimizerConfig, "max_grad_norm", -1),
        (OptimizerConfig, "warmup_steps", -1), (LlamaConfig, "layers", 0), (LlamaConfig, "width", -128),
        (LlamaConfig, "heads", 0), (LlamaConfig, "rope_theta", 0), (LlamaConfig, "context", 0),
        (Budget, "threads", 0), (Budget, "tokens", 0), (Sampling, "temperature", -1), (Sampling, "top_p", 0),
        (Penalties, "child", -1), (ProblemRange, "max_number", 0),
        (SolverConfig, "max_value", -1), (SolverConfig, "beam", (1, 2, 3)), (DataConfig, "window", 0),
        (DataConfig, "train", 0), (CountdownSettings, "largest_token", 8), (CountdownSettings, "unseen_targets", 1),
    ],
)  # fmt: skip
def test_values_out_of_bounds_are_refused_in_python(kind, name, value):
    kind(**RIGHT[kind])
    with pytest.raises(UserError, match=name):
        kind(**RIGHT[kind] | {name: value})


@pytest.mark.parametrize("kind", RIGHT, ids=lambda kind: kind.__name__)
def test_every_field_refuses_other_types_and_numbers_that_are_not_finite(kind):
    for field in dataclasses.fields(kind):
        optional = "None" in str(field.type)
        for value in (math.nan, math.inf, -math.inf, *(() if optional else (None,)), object(), b"x", {"a": 1}, [1]):
            with pytest.raises(UserError):
                kind(**RIGHT[kind] | {field.name: value})


def test_numbers_of_numpy_and_integers_for_floats_pass():
    assert OptimizerConfig(peak_lr=1, max_grad_norm=np.float32(0.5), warmup_steps=np.int64(3)).peak_lr == 1
    for wrong in ({"warmup_steps": 1.0}, {"warmup_steps": True}, {"peak_lr": True}, {"peak_lr": "1"}):
        with pytest.raises(UserError):
            OptimizerConfig(**wrong)


@dataclasses.dataclass(frozen=True)
class Config:
    count: int = 1
    rate: float = 0.5
    names: tuple[str, ...] = ()
    pair: tuple[int, int] = (1, 2)
    limit: int | None = None
    BOUNDS = (at_least(1, "count", "limit"), between(0, 1, "rate"))

    def __post_init__(self):
        check_fields(self)


@pytest.mark.parametrize(
    "wrong",
    [
        {"count": 0}, {"count": None}, {"rate": 1.5}, {"rate": 10**400}, {"names": ("a", 1)}, {"names": ["a"]},
        {"pair": (1,)}, {"pair": (1, 2.0)}, {"limit": 0}, {"limit": "x"}, {"limit": 1.5},
    ],
)  # fmt: skip
def test_a_message_is_one_line_with_field_and_value(wrong):
    (name, value), *_ = wrong.items()
    with pytest.raises(FieldError) as refused:
        Config(**wrong)
    text = str(refused.value)
    assert text.startswith(f"{name} is ") and refused.value.field == name and "\n" not in text and len(text) < 150
    with pytest.raises(FieldError):
        check_values(Config, **wrong)


def test_right_values_pass():
    for right in ({"rate": Fraction(1, 2)}, {"rate": 0}, {"names": ("a", "b")}, {"limit": 3}, {"limit": None}):
        assert getattr(Config(**right), next(iter(right))) == next(iter(right.values()))
    check_values(Config, count=3)
