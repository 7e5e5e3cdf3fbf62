"""Settings: all presets are valid, changes are read as the setting's type, wrong values are refused in one line."""

import math

import pytest
from ml_collections import ConfigDict

from apr_jax.errors import UserError
from apr_jax.threads.engine import Sampling
from apr_jax.threads.run import Budget
from experiments.command import PRESETS, change_settings, load_config
from experiments.settings import default_config, read_settings, setting_types
from tests.experiments.conftest import has


@pytest.fixture
def config():
    return load_config(str(PRESETS / "smoke.py"))


def change_setting(config, change):
    change_settings(config, [change])


@pytest.mark.parametrize("name", ["laptop", "paper", "smoke", "workstation", "factors"])
def test_presets_are_valid(name):
    config = load_config(str(PRESETS / f"{name}.py"))
    assert read_settings(config).name == name


@pytest.mark.parametrize("file", ["factors.py:grpo", "sums.py:sequential", "sums.py:total"])
def test_presets_with_a_word_are_valid_and_refuse_other_words(file):
    assert read_settings(load_config(f"{PRESETS}/{file}")).name == file.replace(".py:", "_")
    with pytest.raises(UserError, match="'other'"):
        load_config(f"{PRESETS}/{file.partition(':')[0]}:other")


def test_changes_are_read_as_the_type_of_their_setting(config):
    for change in (
        "sft.steps=7", "sft.optimizer.peak_lr=1", "model.scan=true", "grpo.variants=apr,sos_plus", "name=a=b",
        "countdown.sos_plus.beam=(2, 3)",
    ):  # fmt: skip
        change_setting(config, change)
    assert config.sft.steps == 7 and config.model.scan is True and config.name == "a=b"
    assert config.sft.optimizer.peak_lr == 1.0 and isinstance(config.sft.optimizer.peak_lr, float)
    settings = read_settings(config)
    assert settings.grpo_variants == ("apr", "sos_plus") and settings.task.settings.sos_plus.beam == (2, 3)


def test_settings_of_budget_and_sampling_are_those_of_the_dataclasses(config):
    assert read_settings(config).budget.tokens is None
    for change in ("budget.tokens=900", "budget.min_children=2", "budget.malformed=fail", "evaluate.top_k=5",
                   "evaluate.top_p=0.9", "evaluate.temperature=0.7"):  # fmt: skip
        change_setting(config, change)
    settings = read_settings(config)
    assert settings.evaluate.sampling() == Sampling(0.7, 5, 0.9)
    assert settings.budget_of("apr") == Budget(settings.window, 64, 1, 900, 2, "fail")
    assert settings.budget_of("sos_plus").min_children == 0


@pytest.mark.parametrize(
    "change, parts",
    [
        ("sft.stepz=3", ("sft.stepz", "sft.steps", "batch_rows", "children", "log_every")),
        ("steps=3", ("steps", "sft.steps", "budget", "countdown")),
        ("sftt.steps=3", ("sftt.steps", "sft.steps")),
        ("sft.optimizer.nam=x", ("sft.optimizer.nam", "sft.optimizer.name", "beta2")),
        ("sft=3", ("sft", "sft.batch_rows", "sft.steps")),
        ("sft.steps", ("--config.sft.steps=VALUE",)),
        ("sft.steps=abc", ("sft.steps", "integer", "'abc'")),
        ("sft.steps=1.5", ("sft.steps", "integer", "'1.5'")),
        ("model.scan=maybe", ("model.scan", "true", "false", "'maybe'")),
        ("countdown.apr.promising=nan", ("countdown.apr.promising", "number", "'nan'")),
        ("countdown.apr.beam=4,x", ("countdown.apr.beam", "2,5", "'4,x'")),
        ("countdown.sos_plus.beam_weights=1,x", ("countdown.sos_plus.beam_weights", "numbers", "'1,x'")),
        ("evaluate.extra_temperatures=0.5,nan", ("evaluate.extra_temperatures", "1.0", "'0.5,nan'")),
    ],
)
def test_wrong_changes_are_refused(config, change, parts):
    with pytest.raises(ValueError) as refused:
        change_setting(config, change)
    assert has(str(refused.value), *parts) and "\n" not in str(refused.value), refused.value


@pytest.mark.parametrize(
    "change, parts",
    [
        ("sft.optimizer.name=adam", ("sft.optimizer", "name", "adamw", "muon", "'adam'")),
        ("sft.optimizer.beta2=1", ("sft.optimizer.beta2", 0, 1, 1.0)),
        ("devices=3", ("sft.batch_rows", "devices", 3, 4)),
        ("devices=0", ("devices", 1, 0)),
        ("fsdp=3", ("fsdp", "devices", 2, 3)),
        ("sft.microbatches=3", ("sft.batch_rows", "devices", "sft.microbatches", "2 x 3", 4)),
        ("sft.optimizer.frozen=(a", ("sft.optimizer", "frozen", "'(a'")),
        ("model.preset=huge", ("model.preset", "tiny", "small", "base", "'huge'")),
        ("model.remat=all", ("model", "remat", "none", "dots", "full", "'all'")),
        ("model.attention=cudnn", ("model", "attention", "cudnn", "bfloat16", "'float32'")),
        ("model.attention=flash", ("model", "attention", "auto", "blocked", "dense", "cudnn", "'flash'")),
        ("window=8", ("window", 32, 8)),
        ("sft.row_length=100", ("sft.row_length", 256, 100)),
        ("countdown.problems.max_target=5", ("countdown.problems", "targets", 2, 10, 5)),
        ("countdown.problems.max_target=1001", ("countdown.problems.max_target", 1000)),
        ("countdown.problems.count=7", ("countdown.problems", 2, 6, 7)),
        ("model.heads=3", ("model", "width 32", "3 heads")),
        ("model.heads=-1", ("model.heads", 1, -1)),
        ("grpo.group=1", ("grpo", "group", 2, 1)),
        ("grpo.prompts=201", ("grpo.prompts", "data.train", 200, 201)),
        ("grpo.validate_every=1", ("grpo.prompts", "data.train", 200, "grpo.validation", 2)),
        ("grpo.validation=0", ("grpo.validation", 1, 0)),
        ("grpo.kl_estimator=k2", ("grpo", "kl_estimator", "k1", "k3", "'k2'")),
        ("grpo.aggregate=mean", ("grpo", "aggregate", "tree", "sequence", "paper", "token", "constant", "'mean'")),
        ("grpo.penalties.child=-1", ("grpo.penalties", "child", 0, -1.0)),
        ("grpo.tis_clip=-1", ("grpo.tis_clip", 0, -1.0)),
        ("grpo.variants=apr,foo", ("grpo.variants", "apr", "sos_plus", "foo")),
        ("countdown.apr.beam=4", ("countdown.apr.beam", 2, "(4,)")),
        ("countdown.apr.beam=5,4", ("countdown.apr", "beam", "(5, 4)")),
        ("countdown.apr.promising=2", ("countdown.apr", "promising", 0, 1, 2.0)),
        ("evaluate.extra_temperatures=(1.0,1.0)", ("evaluate.extra_temperatures", "(1.0, 1.0)")),
        ("evaluate.extra_temperatures=(0.0,)", ("evaluate.extra_temperatures", "evaluate.temperature", 0, "(0.0,)")),
        ("evaluate.extra_temperatures=(-1.0,)", ("evaluate", "temperature", 0, -1.0)),
        ("evaluate.temperature=-1", ("evaluate", "temperature", 0, -1.0)),
        ("evaluate.top_p=0", ("evaluate", "top_p", 0, 1, 0.0)),
        ("evaluate.top_k=-1", ("evaluate", "top_k", 0, -1)),
        ("budget.malformed=ignore", ("budget", "malformed", "stop", "fail", "'ignore'")),
        ("budget.min_children=64", ("budget", "64 children", "64 threads")),
        ("budget.tokens=-1", ("budget.tokens", 1, -1)),
        ("export.dtype=int8", ("export.dtype", "float32", "bfloat16", "'int8'")),
        ("seed=-1", ("seed", 0, -1)),
        ("seed=2147483648", ("seed", "less than 2147483648", "given 2147483648")),
    ],
)
def test_wrong_values_are_refused(config, change, parts):
    change_setting(config, change)
    with pytest.raises(ValueError) as refused:
        read_settings(config)
    assert has(str(refused.value), *parts) and "\n" not in str(refused.value), refused.value


START = """from experiments.settings import default_config

def get_config(word=""):
    c = default_config("countdown")
"""


@pytest.mark.parametrize(
    "text, parts",
    [
        ("def get_config(:\n", ("line 1", "SyntaxError")),
        (START + "    c.sft.steps = 'abc'\n    return c\n", ("line 5", "TypeError")),
        (START + "    c.sft.stepz = 3\n    return c\n", ("sft.stepz", "sft.steps")),
        (START + "    del c.sft.steps\n    return c\n", ("sft.steps",)),
        (START, ("get_config()", "default_config(TASK)")),
        ("x = 1\n", ("get_config()",)),
        ("import nothing_of_this_name\n", ("line 1", "ModuleNotFoundError")),
    ],
)
def test_wrong_config_files_are_refused(tmp_path, text, parts):
    path = tmp_path / "wrong.py"
    path.write_text(text)
    with pytest.raises(ValueError) as refused:
        load_config(str(path))
    assert has(str(refused.value), str(path), *parts) and "\n" not in str(refused.value), refused.value


def test_a_config_file_gets_the_word_behind_its_colon(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(START + "    c.name = word\n    return c\n")
    assert load_config(f"{path}:there").name == "there"
    assert load_config(str(path)).name == ""


def test_default_settings_are_valid():
    assert read_settings(default_config("countdown")).config["name"] == "experiment"


# ---------------------------------------------------------------------- hostile values

HOSTILE = (
    None, math.nan, math.inf, -math.inf, -1, "", "x", (), [], {}, True, 1.5, 0, 10**400, b"x", (None,), (math.nan,),
    ("x",), (-1, -1), ((1, 2),), object(), {"a": 1}, "0\n1",
)  # fmt: skip


def put(config, key, value):
    """Return a config with another value of a setting or a section, of any type."""
    tree = holder = config.to_dict()
    *sections, last = key.split(".")
    for name in sections:
        holder = holder[name]
    holder[last] = value
    return ConfigDict(tree)


DEFAULT = default_config("countdown")


@pytest.mark.parametrize("section", ["", *(name for name, value in DEFAULT.items() if hasattr(value, "keys"))])
def test_any_value_of_any_setting_is_accepted_or_refused_in_one_line(section):
    """A config file may have any value. No error but UserError may follow."""
    names = [name for name in setting_types("countdown") if name.rpartition(".")[0].partition(".")[0] == section]
    accepted = 0
    for name in [*names, *([section, f"{section}.optimizer"] if section in ("sft", "grpo") else [section])]:
        for value in HOSTILE if name else ():
            try:
                read_settings(put(DEFAULT, name, value))
                accepted += 1
            except UserError as error:
                assert "\n" not in str(error) and len(str(error)) < 300
    assert accepted <= 6 * len(names)  # settings with texts or switches accept some of these values


@pytest.mark.parametrize("value", [math.nan, math.inf, None, "x", True, ()])
@pytest.mark.parametrize("name", ["sft.optimizer.peak_lr", "evaluate.top_p", "countdown.apr.promising"])
def test_a_wrong_number_is_refused_with_its_setting_and_value(config, name, value):
    with pytest.raises(UserError) as refused:
        read_settings(put(config, name, value))
    assert has(str(refused.value), name, "number", repr(value)) and "\n" not in str(refused.value)


def test_an_integer_is_a_number(config):
    values = {"sft.optimizer.peak_lr": 1, "evaluate.extra_temperatures": (1, 2), "countdown.apr.promising": 1}
    for name, value in values.items():
        config = put(config, name, value)
    settings = read_settings(config)
    assert settings.sft.optimizer.peak_lr == 1 and settings.evaluate.extra_temperatures == (1, 2)


def test_settings_with_empty_tuples_have_a_type_of_elements():
    types = setting_types("countdown")
    assert types["countdown.apr.beam_weights"] == types["evaluate.extra_temperatures"] == tuple[float, ...]
    assert types["countdown.apr.beam"] == tuple[int, int] and types["evaluate.budgets.apr"] == tuple[int, ...]
    assert types["countdown.sos_plus.strategies"] == types["grpo.variants"] == tuple[str, ...]


def test_lists_that_are_empty_by_default_are_read_as_numbers():
    config = load_config(str(PRESETS / "laptop.py"))
    change_setting(config, "evaluate.extra_temperatures=0.5,1")
    assert read_settings(config).evaluate.extra_temperatures == (0.5, 1.0)
    config = load_config(str(PRESETS / "paper.py"))
    change_setting(config, "countdown.apr.beam_weights=" + ",".join("1" * 10))
    assert read_settings(config).task.settings.apr.beam_weights == (1,) * 10
    change_setting(config, "countdown.apr.beam_weights=1,2")
    with pytest.raises(UserError, match=r"apr: beam_weights .*10.*\(1.0, 2.0\)"):
        read_settings(config)


def test_paths_in_settings_may_begin_with_a_home_folder(config, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for change in ("model.checkpoint=~/given", "tokenizer.name=~/words"):
        change_setting(config, change)
    settings = read_settings(config)
    assert (settings.checkpoint, settings.tokenizer) == (f"{tmp_path}/given", f"{tmp_path}/words")
    change_setting(config, "model.checkpoint=~nobody-of-this-name/given")
    with pytest.raises(UserError, match="~nobody-of-this-name"):
        read_settings(config)
