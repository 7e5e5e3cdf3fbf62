"""Settings: every preset is right, changes are read by type, wrong ones are refused in one line."""

import math

import pytest
from ml_collections import ConfigDict

from apr_jax.errors import UserError
from apr_jax.threads.engine import Sampling
from apr_jax.threads.run import Budget
from experiments.command import PRESETS, change_settings, load_config
from experiments.settings import default_config, read_settings, setting_types


@pytest.fixture
def config():
    return load_config(str(PRESETS / "smoke.py"))


def change_setting(config, change):
    change_settings(config, [change])


@pytest.mark.parametrize("name", ["laptop", "paper", "smoke", "workstation", "factors"])
def test_presets_are_right(name):
    config = load_config(str(PRESETS / f"{name}.py"))
    assert read_settings(config).name == name


@pytest.mark.parametrize("file", ["factors.py:grpo", "sums.py:sequential", "sums.py:total"])
def test_presets_with_a_word_are_right_and_refuse_another(file):
    assert read_settings(load_config(f"{PRESETS}/{file}")).name == file.replace(".py:", "_")
    with pytest.raises(UserError, match="was given 'other'"):
        load_config(f"{PRESETS}/{file.partition(':')[0]}:other")


def test_changes_are_read_as_the_type_of_what_they_replace(config):
    for change in (
        "sft.steps=7", "sft.optimizer.peak_lr=1", "model.scan=true", "grpo.variants=apr,sos_plus", "name=a=b",
        "countdown.sos_plus.beam=(2, 3)",
    ):  # fmt: skip
        change_setting(config, change)
    assert config.sft.steps == 7 and config.model.scan is True and config.name == "a=b"
    assert config.sft.optimizer.peak_lr == 1.0 and isinstance(config.sft.optimizer.peak_lr, float)
    settings = read_settings(config)
    assert settings.grpo_variants == ("apr", "sos_plus") and settings.task.settings.sos_plus.beam == (2, 3)


def test_budgets_and_sampling_reach_those_who_run_trees(config):
    assert read_settings(config).budget.tokens is None
    for change in ("budget.tokens=900", "budget.min_children=2", "budget.malformed=fail", "evaluate.top_k=5",
                   "evaluate.top_p=0.9", "evaluate.temperature=0.7"):  # fmt: skip
        change_setting(config, change)
    settings = read_settings(config)
    assert settings.evaluate_sampling == Sampling(0.7, 5, 0.9)
    assert settings.budget_of("apr") == Budget(settings.window, 64, 1, 900, 2, "fail")
    assert settings.budget_of("sos_plus").min_children == 0


@pytest.mark.parametrize(
    "change, says",
    [
        ("sft.stepz=3", "no setting sft.stepz (did you mean sft.steps?); sft has batch_rows, children, log_every, "),
        ("steps=3", "no setting steps (did you mean sft.steps?); the top has budget, countdown, "),
        ("sftt.steps=3", "no setting sftt.steps (did you mean sft.steps?)"),
        ("sft.optimizer.nam=x", "did you mean sft.optimizer.name?); sft.optimizer has beta2, "),
        ("sft=3", "sft is a section of settings, set one of sft.batch_rows, "),
        ("sft.steps", "--config.sft.steps needs a value"),
        ("sft.steps=abc", "sft.steps is an integer, was given 'abc'"),
        ("sft.steps=1.5", "sft.steps is an integer, was given '1.5'"),
        ("model.scan=maybe", "model.scan is true or false, was given 'maybe'"),
        ("countdown.apr.promising=nan", "countdown.apr.promising is a number, was given 'nan'"),
        ("countdown.apr.beam=4,x", "countdown.apr.beam is a list like 2,5, was given '4,x'"),
        ("countdown.sos_plus.beam_weights=1,x", "sos_plus.beam_weights is a list of numbers, was given '1,x'"),
        ("evaluate.extra_temperatures=0.5,nan", "evaluate.extra_temperatures is a list like 1.0, was given '0.5,nan'"),
    ],
)
def test_wrong_changes_are_refused(config, change, says):
    with pytest.raises(ValueError) as refused:
        change_setting(config, change)
    assert says in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "change, says",
    [
        ("sft.optimizer.name=adam", "sft.optimizer: optimizer name is adamw or muon, was given 'adam'"),
        ("sft.optimizer.beta2=1", "sft.optimizer.beta2 is from 0 to less than 1, was given 1.0"),
        ("devices=3", "sft.batch_rows is a multiple of devices (3), was given 4"),
        ("devices=0", "devices is at least 1, was given 0"),
        ("fsdp=3", "fsdp divides devices (2), was given 3"),
        ("sft.microbatches=3", "sft.batch_rows is a multiple of devices times sft.microbatches (2 x 3), was given 4"),
        ("sft.optimizer.frozen=(a", "sft.optimizer: frozen is a regular expression, was given '(a'"),
        ("model.preset=huge", "model.preset is one of tiny, small, base, was given 'huge'"),
        ("model.remat=all", "model: remat is one of none, dots, full, was given 'all'"),
        ("model.attention=cudnn", "model: attention cudnn needs dtype bfloat16, was given 'float32'"),
        ("model.attention=flash", "model: attention is one of auto, blocked, dense, cudnn, was given 'flash'"),
        ("window=8", "window is at least 32, was given 8"),
        ("sft.row_length=100", "sft.row_length is at least 256, was given 100"),
        ("countdown.problems.max_target=5", "problems: targets need 2 <= lowest <= highest, was given 10 to 5"),
        ("countdown.problems.max_target=1001", "countdown.problems.max_target is at most 1000, no more can be made of"),
        ("countdown.problems.count=7", "countdown.problems: numbers per problem are 2 to 6, was given 7"),
        ("model.heads=3", "model: width 32 over 3 heads must give an even head size"),
        ("model.heads=-1", "model.heads is at least 0, was given -1"),
        ("grpo.group=1", "grpo: a group needs at least 2 rollouts to compare, was given 1"),
        ("grpo.prompts=201", "grpo.prompts is at most data.train (200), was given 201"),
        ("grpo.validate_every=1", "at most data.train (200) less the 200 of grpo.validation, was given 2"),
        ("grpo.validation=0", "grpo.validation is at least 1, was given 0"),
        ("grpo.kl_estimator=k2", "grpo: kl_estimator is one of k1, k3, was given 'k2'"),
        ("grpo.aggregate=mean", "grpo: aggregate is one of tree, sequence, paper, token, constant, was given 'mean'"),
        ("grpo.penalties.child=-1", "grpo.penalties: a penalty is a number from 0 on, was given -1.0 for child"),
        ("grpo.tis_clip=-1", "grpo.tis_clip is at least 0, was given -1.0"),
        ("grpo.variants=apr,foo", "grpo.variants is a choice of apr, sos_plus, was given foo"),
        ("countdown.apr.beam=4", "countdown.apr.beam is a tuple of 2 integers, was given (4,)"),
        ("countdown.apr.beam=5,4", "countdown.apr: beam needs 1 <= lowest <= highest, was given (5, 4)"),
        ("countdown.apr.promising=2", "countdown.apr: promising is a probability from 0 to 1, was given 2.0"),
        ("evaluate.extra_temperatures=(1.0,1.0)", "evaluate.extra_temperatures has other temperatures"),
        ("evaluate.extra_temperatures=(0.0,)", "evaluate.extra_temperatures has other temperatures"),
        ("evaluate.extra_temperatures=(-1.0,)", "evaluate: temperature is 0 or more, was given -1.0"),
        ("evaluate.temperature=-1", "evaluate: temperature is 0 or more, was given -1.0"),
        ("evaluate.top_p=0", "evaluate: top_p is above 0 and at most 1, was given 0.0"),
        ("evaluate.top_k=-1", "evaluate: top_k is 0 (all) or more, was given -1"),
        ("budget.malformed=ignore", "budget: malformed is one of stop, fail, was given 'ignore'"),
        ("budget.min_children=64", "budget: 64 children at least need more than 64 threads"),
        ("budget.tokens=-1", "budget.tokens is at least 0, was given -1"),
        ("export.dtype=int8", "export.dtype is float32 or bfloat16, was given 'int8'"),
        ("seed=-1", "seed is at least 0, was given -1"),
        ("seed=2147483648", "seed is less than 2147483648, was given 2147483648"),
    ],
)
def test_wrong_values_are_refused(config, change, says):
    change_setting(config, change)
    with pytest.raises(ValueError) as refused:
        read_settings(config)
    assert says in str(refused.value) and "\n" not in str(refused.value)


START = """from experiments.settings import default_config

def get_config(word=""):
    c = default_config("countdown")
"""


@pytest.mark.parametrize(
    "text, says",
    [
        ("def get_config(:\n", "wrong.py, line 1: SyntaxError: invalid syntax"),
        (START + "    c.sft.steps = 'abc'\n    return c\n", "wrong.py, line 5: TypeError: "),
        (START + "    c.sft.stepz = 3\n    return c\n", "wrong.py: no setting sft.stepz (did you mean sft.steps?)"),
        (START + "    del c.sft.steps\n    return c\n", "wrong.py leaves out sft.steps"),
        (START, "wrong.py needs a function get_config() that returns a changed default_config(TASK)"),
        ("x = 1\n", "wrong.py needs a function get_config()"),
        ("import nothing_of_this_name\n", "wrong.py, line 1: ModuleNotFoundError: "),
    ],
)
def test_wrong_config_files_are_refused(tmp_path, text, says):
    path = tmp_path / "wrong.py"
    path.write_text(text)
    with pytest.raises(ValueError) as refused:
        load_config(str(path))
    assert says in str(refused.value) and "\n" not in str(refused.value)


def test_a_config_file_gets_the_word_behind_its_colon(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(START + "    c.name = word\n    return c\n")
    assert load_config(f"{path}:there").name == "there"
    assert load_config(str(path)).name == ""


def test_the_defaults_are_right():
    assert read_settings(default_config("countdown")).config["name"] == "experiment"


# ---------------------------------------------------------------------- hostile values

HOSTILE = (
    None, math.nan, math.inf, -math.inf, -1, "", "x", (), [], {}, True, 1.5, 0, 10**400, b"x", (None,), (math.nan,),
    ("x",), (-1, -1), ((1, 2),), object(), {"a": 1}, "0\n1",
)  # fmt: skip


def put(config, key, value):
    """A config with another value of a setting or a section, whatever its type."""
    tree = holder = config.to_dict()
    *sections, last = key.split(".")
    for name in sections:
        holder = holder[name]
    holder[last] = value
    return ConfigDict(tree)


DEFAULT = default_config("countdown")


@pytest.mark.parametrize("section", ["", *(name for name, value in DEFAULT.items() if hasattr(value, "keys"))])
def test_any_value_of_any_setting_is_accepted_or_refused_in_one_line(section):
    """Whatever a config file holds: no other error."""
    names = [name for name in setting_types("countdown") if name.rpartition(".")[0].partition(".")[0] == section]
    accepted = 0
    for name in [*names, *([section, f"{section}.optimizer"] if section in ("sft", "grpo") else [section])]:
        for value in HOSTILE if name else ():
            try:
                read_settings(put(DEFAULT, name, value))
                accepted += 1
            except UserError as error:
                assert "\n" not in str(error) and len(str(error)) < 300
    assert accepted <= 6 * len(names)  # texts and switches take some of them


@pytest.mark.parametrize("value", [math.nan, math.inf, None, "x", True, ()])
@pytest.mark.parametrize("name", ["sft.optimizer.peak_lr", "evaluate.top_p", "countdown.apr.promising"])
def test_a_wrong_number_is_refused_by_setting_value_and_what_is_allowed(config, name, value):
    with pytest.raises(UserError) as refused:
        read_settings(put(config, name, value))
    assert str(refused.value) == f"{name} is a number, was given {value!r}"


def test_an_integer_is_a_number(config):
    values = {"sft.optimizer.peak_lr": 1, "evaluate.extra_temperatures": (1, 2), "countdown.apr.promising": 1}
    for name, value in values.items():
        config = put(config, name, value)
    settings = read_settings(config)
    assert settings.sft.optimizer.peak_lr == 1 and sorted(settings.evaluate_also) == [1, 2]


def test_every_empty_tuple_has_elements_of_a_type():
    types = setting_types("countdown")
    assert types["countdown.apr.beam_weights"] == types["evaluate.extra_temperatures"] == tuple[float, ...]
    assert types["countdown.apr.beam"] == tuple[int, int] and types["evaluate.budgets.apr"] == tuple[int, ...]
    assert types["countdown.sos_plus.strategies"] == types["grpo.variants"] == tuple[str, ...]


def test_lists_that_are_empty_by_default_are_read_as_numbers():
    config = load_config(str(PRESETS / "laptop.py"))
    change_setting(config, "evaluate.extra_temperatures=0.5,1")
    assert list(read_settings(config).evaluate_also) == [0.5, 1.0]
    config = load_config(str(PRESETS / "paper.py"))
    change_setting(config, "countdown.apr.beam_weights=" + ",".join("1" * 10))
    assert read_settings(config).task.settings.apr.beam_weights == (1,) * 10
    change_setting(config, "countdown.apr.beam_weights=1,2")
    with pytest.raises(UserError, match=r"apr: beam_weights are none or 10, .* was given \(1.0, 2.0\)"):
        read_settings(config)


def test_paths_in_settings_begin_at_a_home_folder(config, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for change in ("model.checkpoint=~/given", "tokenizer.name=~/words"):
        change_setting(config, change)
    settings = read_settings(config)
    assert (settings.checkpoint, settings.tokenizer) == (f"{tmp_path}/given", f"{tmp_path}/words")
    change_setting(config, "model.checkpoint=~nobody-of-this-name/given")
    with pytest.raises(UserError, match="~nobody-of-this-name has no home folder"):
        read_settings(config)
