"""Tests of the tag protocol: spawns, joins and results, and that no text raises any error but MalformedSpawn."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apr_jax.tasks.tagged.factors import PHRASES, Factors
from apr_jax.tasks.tagged.protocol import SPAWN_ERRORS, TAGS, TagProtocol, tag_tokenizer
from apr_jax.threads import MalformedSpawn

PROTOCOL = TagProtocol(Factors())
TOKENIZER = tag_tokenizer(PHRASES, 60)


def spawn(*threads):
    return "<spawn>" + "".join(f"<thread>{thread}</thread>" for thread in threads) + "</spawn>"


@pytest.mark.parametrize("inherit", [False, True])
def test_a_parsed_spawn_has_its_children_and_position(inherit):
    text = "60 in 2 to 9\nfirst " + spawn("a b", "c")
    request = TagProtocol(Factors(), inherit).parse_spawn(text)
    assert request.children == ("a b\n", "c\n") and text[request.position :] == spawn("a b", "c")
    assert request.inherit == inherit
    assert PROTOCOL.parse_spawn(text + " ") is None


@pytest.mark.parametrize(
    "text, kind",
    [
        ("</spawn>", "unopened"),
        (spawn("a") + "</spawn>", "unopened"),
        ("<spawn></spawn>", "empty"),
        ("<spawn>a</spawn>", "bad_thread"),
        ("<spawn><thread>a</thread> and <thread>b</thread></spawn>", "bad_thread"),
        ("<spawn><thread></thread></spawn>", "bad_thread"),
        ("<spawn><thread>a<join></thread></spawn>", "bad_thread"),
    ],
)
def test_a_malformed_spawn_has_its_kind(text, kind):
    with pytest.raises(MalformedSpawn) as caught:
        PROTOCOL.parse_spawn(text)
    assert caught.value.kind == kind and kind in SPAWN_ERRORS


def test_a_join_has_the_result_of_each_child():
    request = PROTOCOL.parse_spawn("x " + spawn("a", "b"))
    assert PROTOCOL.join(request, ["7", None]) == "<join><result>7</result><nothing/></join>"
    with pytest.raises(ValueError, match="2 .*1 "):
        PROTOCOL.join(request, ["7"])
    assert PROTOCOL.join_nothing() == "<join></join>"


def test_a_result_is_the_last_return():
    assert PROTOCOL.result("<return>3</return> no <return>5</return>") == "5"
    assert PROTOCOL.result("<return>") is PROTOCOL.result("<return></return>") is None


@given(st.integers(0, 10**9))
def test_texts_raise_no_other_error(seed):
    rng = random.Random(seed)
    text = "".join(rng.choice([*TAGS, *TAGS, *PHRASES, "12", "7", "\n", "\x00"]) for _ in range(rng.randrange(12)))
    try:
        request = PROTOCOL.parse_spawn(text)
    except MalformedSpawn as error:
        assert error.kind in SPAWN_ERRORS
    else:
        assert request is None or PROTOCOL.join(request, [None] * len(request.children)).endswith("</join>")
    assert PROTOCOL.result(text) != "" and PROTOCOL.steps(text)[0] >= 0


@given(st.integers(0, 10**9))
def test_the_tokens_of_prompts_and_joins_do_not_depend_on_the_text_after_them(seed):
    rng = random.Random(seed)
    prompt = f"{rng.randint(2, 99)} in {rng.randint(2, 9)} to {rng.randint(2, 30)}\n"
    for before in (prompt, prompt + "<join><result>7</result></join>"):
        after = "".join(rng.choice([*TAGS, *PHRASES, "12", "3"]) for _ in range(5))
        assert TOKENIZER.encode(before + after) == TOKENIZER.encode(before) + TOKENIZER.encode(after)
        assert TOKENIZER.decode(TOKENIZER.encode(before + after)) == before + after
