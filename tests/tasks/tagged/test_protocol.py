"""Tags: what a spawn means, what a join gives back, and that no text raises anything but MalformedSpawn."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apr_jax.tasks.tagged.factors import WORDS, Factors
from apr_jax.tasks.tagged.protocol import SPAWN_ERRORS, TAGS, TagProtocol, tag_tokenizer
from apr_jax.threads import MalformedSpawn

PROTOCOL = TagProtocol(Factors())
TOKENIZER = tag_tokenizer(WORDS, 60)


def spawn(*threads):
    return "<spawn>" + "".join(f"<thread>{thread}</thread>" for thread in threads) + "</spawn>"


@pytest.mark.parametrize("inherit", [False, True])
def test_a_spawn_names_its_children_and_where_it_begins(inherit):
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
def test_malformed_spawns_have_a_kind(text, kind):
    with pytest.raises(MalformedSpawn) as caught:
        PROTOCOL.parse_spawn(text)
    assert caught.value.kind == kind and kind in SPAWN_ERRORS


def test_a_join_takes_the_place_of_the_spawn():
    request = PROTOCOL.parse_spawn("x " + spawn("a", "b"))
    assert PROTOCOL.join(request, ["7", None]) == "<join><result>7</result><nothing/></join>"
    with pytest.raises(ValueError, match="2 children were spawned, 1 results"):
        PROTOCOL.join(request, ["7"])
    assert PROTOCOL.join_nothing() == "<join></join>"


def test_a_result_is_the_last_return():
    assert PROTOCOL.result("<return>3</return> no <return>5</return>") == "5"
    assert PROTOCOL.result("<return>") is PROTOCOL.result("<return></return>") is None


@given(st.integers(0, 10**9))
def test_no_text_raises_anything_else(seed):
    rng = random.Random(seed)
    text = "".join(rng.choice([*TAGS, *TAGS, *WORDS, "12", "7", "\n", "\x00"]) for _ in range(rng.randrange(12)))
    try:
        request = PROTOCOL.parse_spawn(text)
    except MalformedSpawn as error:
        assert error.kind in SPAWN_ERRORS
    else:
        assert request is None or PROTOCOL.join(request, [None] * len(request.children)).endswith("</join>")
    assert PROTOCOL.result(text) != "" and PROTOCOL.steps(text)[0] >= 0


@given(st.integers(0, 10**9))
def test_the_tokenizer_is_stable_at_every_prompt_and_join(seed):
    rng = random.Random(seed)
    prompt = f"{rng.randint(2, 99)} in {rng.randint(2, 9)} to {rng.randint(2, 30)}\n"
    for before in (prompt, prompt + "<join><result>7</result></join>"):
        after = "".join(rng.choice([*TAGS, *WORDS, "12", "3"]) for _ in range(5))
        assert TOKENIZER.encode(before + after) == TOKENIZER.encode(before) + TOKENIZER.encode(after)
        assert TOKENIZER.decode(TOKENIZER.encode(before + after)) == before + after
