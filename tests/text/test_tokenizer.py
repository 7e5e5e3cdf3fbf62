"""Our tokenizer: prefix-stable at every end of a prompt or join, reversible on traces, and errors of its files."""

import json
import random

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from apr_jax.errors import UserError
from apr_jax.tasks.countdown import CountdownProtocol, Problem, ProblemRange, trace
from apr_jax.tasks.countdown.solver import SolverConfig, solve_apr, solve_sos_plus
from apr_jax.tasks.countdown.vocabulary import countdown_tokenizer
from apr_jax.text.tokenizer import Tokenizer
from apr_jax.threads import Spawn, encode_tree
from tests.tasks.countdown.conditioned import conditioned
from tests.tiny import TOKENIZER

LARGE = countdown_tokenizer(99)
VOCABULARIES = st.sampled_from([TOKENIZER, LARGE])
PROBLEMS = st.builds(
    Problem, st.lists(st.integers(1, 120), min_size=2, max_size=5).map(tuple), st.integers(2, 200)
)  # fmt: skip
# Texts after a prompt. A bad model may write any text.
CONTINUATIONS = st.one_of(
    st.text(max_size=30),
    st.text(st.sampled_from("]\n[',: #0123456789-<>="), max_size=20),
    st.lists(st.sampled_from([TOKENIZER.decode([i]) for i in range(4, len(TOKENIZER))]), max_size=8).map("".join),
)


@st.composite
def trees(draw):
    """Draw a solver's tree of either variant, with or without a condition in front of its prompt."""
    rng = random.Random(draw(st.integers(0, 2**32)))
    source = ProblemRange(count=draw(st.integers(2, 4)), max_number=draw(st.sampled_from([30, 120])), max_target=60)
    problem, budget = source.draw(rng), draw(st.none() | st.integers(0, 3000))
    apr = draw(st.booleans())
    protocol = CountdownProtocol("apr" if apr else "sos_plus")
    condition = "" if budget is None else protocol.condition(budget)
    if apr:
        config = SolverConfig.paper_apr(beam=(1, 4), sub_beam=(1, 4))
        return conditioned(solve_apr(problem, config, rng), condition)
    return conditioned(solve_sos_plus(problem, SolverConfig.paper_sos_plus(beam=(1, 3)), rng), condition)


def ids(tokenizer, blocks):
    return [token for block in blocks for token in tokenizer.encode(block.content)]


@settings(max_examples=40)
@given(trees(), VOCABULARIES)
def test_blocks_encoded_one_by_one_are_the_ids_of_the_whole_text(tree, tokenizer):
    for thread in tree.threads():
        assert ids(tokenizer, thread.context) == tokenizer.encode(thread.text)
        before = []
        for item in thread.blocks:
            if isinstance(item, Spawn):
                called = [*before, *item.call]
                assert ids(tokenizer, called) == tokenizer.encode("".join(block.content for block in called))
                item = item.join
            before.append(item)


@settings(max_examples=40)
@given(trees(), VOCABULARIES, CONTINUATIONS)
def test_the_ids_of_a_prompt_or_join_do_not_depend_on_the_text_after_it(tree, tokenizer, continuation):
    for thread in tree.threads():
        text = ""
        for index, item in enumerate(thread.blocks):
            block = item.join if isinstance(item, Spawn) else item
            text += block.content
            if index == 0 or isinstance(item, Spawn):
                fixed = tokenizer.encode(text)
                assert tokenizer.encode(text + continuation)[: len(fixed)] == fixed


@given(PROBLEMS, st.sampled_from(["apr", "sos_plus"]), st.none() | st.integers(0, 5000), VOCABULARIES, CONTINUATIONS)
def test_the_ids_of_a_root_prompt_do_not_depend_on_the_text_after_it(problem, variant, budget, tokenizer, continuation):
    protocol = CountdownProtocol(variant)
    prompt = ("" if budget is None else protocol.condition(budget)) + protocol.root_prompt(problem)
    fixed = tokenizer.encode(prompt)
    both = tokenizer.encode(prompt + continuation)
    assert both[: len(fixed)] == fixed
    assert both[len(fixed) :] == tokenizer.encode(continuation) or continuation.startswith("]")


@settings(max_examples=30)
@given(trees(), VOCABULARIES)
def test_child_prompts_and_joins_of_the_protocol_are_prefix_stable(tree, tokenizer):
    protocol = CountdownProtocol()
    for thread in tree.threads():
        before = ""
        for item in thread.blocks:
            if isinstance(item, Spawn):
                text = before + "".join(block.content for block in item.call)
                request = protocol.parse_spawn(text)
                for prompt, child in zip(request.children, item.children, strict=True):
                    fixed = tokenizer.encode(prompt)
                    assert tokenizer.encode(child.text)[: len(fixed)] == fixed
                block = protocol.join(request, [protocol.result(child.text) for child in item.children])
                assert tokenizer.encode(before + block) == tokenizer.encode(before) + tokenizer.encode(block)
                item = item.join
            before += item.content


@settings(max_examples=30)
@given(trees(), VOCABULARIES)
def test_traces_come_back_from_their_ids(tree, tokenizer):
    for thread in tree.threads():
        for text in (thread.text, *(block.content for spawn in thread.spawns for block in spawn.call)):
            encoded = tokenizer.encode(text)
            assert tokenizer.unknown not in encoded
            assert tokenizer.decode(encoded) == text


@given(st.text(st.characters(min_codepoint=32, max_codepoint=126) | st.just("\n"), max_size=60), VOCABULARIES)
def test_any_printable_ascii_comes_back_from_its_ids(text, tokenizer):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(st.text(max_size=40), VOCABULARIES)
def test_any_text_encodes_and_only_unknown_characters_are_lost(text, tokenizer):
    kept = "".join(c for c in text if 32 <= ord(c) < 127 or c == "\n")
    encoded = tokenizer.encode(text)
    assert tokenizer.decode(encoded) == kept
    assert (tokenizer.unknown in encoded) == (kept != text)


@given(CONTINUATIONS, VOCABULARIES)
def test_the_ids_of_any_text_are_those_of_the_tokenizers_library(text, tokenizer):
    """`Tokenizer.encode` is our own code; other programs load tokenizer.json by the tokenizers library."""
    assert tokenizer.encode(text) == tokenizer.backend.encode(text, add_special_tokens=False).ids


@settings(max_examples=20)
@given(trees(), VOCABULARIES)
def test_the_ids_of_traces_are_those_of_the_tokenizers_library(tree, tokenizer):
    for thread in tree.threads():
        assert tokenizer.encode(thread.text) == tokenizer.backend.encode(thread.text, add_special_tokens=False).ids


def test_a_number_is_one_token_up_to_the_largest_and_a_token_per_digit_above():
    assert len(TOKENIZER.encode("30")) == 1 and len(TOKENIZER.encode("31")) == 2 and len(LARGE.encode("99")) == 1
    assert TOKENIZER.encode("1234") == [TOKENIZER.token(digit) for digit in "1234"]
    assert TOKENIZER.token("7") not in TOKENIZER.encode("17")
    with pytest.raises(UserError, match="9.*5"):
        countdown_tokenizer(5)


@pytest.mark.parametrize("name", ["<s>", "</s>", "<pad>", "<unk>"])
def test_the_name_of_a_special_token_in_a_text_is_text(name, tmp_path):
    TOKENIZER.save(tmp_path / "tokenizer.json")
    for tokenizer in (TOKENIZER, Tokenizer.load(tmp_path / "tokenizer.json")):
        encoded = tokenizer.encode(name)
        assert not {tokenizer.bos, tokenizer.eos, tokenizer.pad, tokenizer.unknown} & set(encoded)
        assert tokenizer.decode([tokenizer.bos, *encoded, tokenizer.eos]) == name


def test_a_saved_tokenizer_gives_the_same_ids(tmp_path):
    LARGE.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert len(loaded) == len(LARGE)
    rng = random.Random(3)
    texts = ["", "é]\n", "12,3#0,3 400"]
    for _ in range(5):
        tree = solve_apr(ProblemRange().draw(rng), SolverConfig.paper_apr(beam=(1, 4), sub_beam=(1, 4)), rng)
        texts += [thread.text for thread in tree.threads()]
    assert [loaded.encode(text) for text in texts] == [LARGE.encode(text) for text in texts]
    assert (loaded.bos, loaded.eos, loaded.pad) == (LARGE.bos, LARGE.eos, LARGE.pad)
    assert len({LARGE.bos, LARGE.eos, LARGE.pad, LARGE.unknown}) == 4


def test_the_threads_of_an_encoded_tree_are_their_text_between_begin_and_end_tokens():
    rng = random.Random(4)
    tree = solve_apr(ProblemRange().draw(rng), SolverConfig.paper_apr(), rng)
    encoded = encode_tree(tree, LARGE.encode, LARGE.bos, LARGE.eos)
    for thread, own in zip(tree.threads(), encoded.threads(), strict=True):
        flat = [token for block in own.context for token in block.content]
        assert flat == [LARGE.bos, *LARGE.encode(thread.text), LARGE.eos]


def test_spawn_and_join_are_single_tokens():
    texts = [trace.SPAWN_OPEN, trace.SPAWN_CLOSE, trace.JOIN_OPEN, trace.JOIN_CLOSE]
    assert len({TOKENIZER.token(text) for text in texts}) == 4


@pytest.mark.parametrize("text", ["12 13", "", "é", "<s>"])
def test_a_text_that_is_not_one_token_is_refused_by_name(text):
    with pytest.raises(UserError) as caught:
        TOKENIZER.token(text)
    assert repr(text) in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(FileNotFoundError, match=str(path)):
            Tokenizer.load(path)


def test_a_broken_file_is_named(tmp_path):
    path = tmp_path / "tokenizer.json"
    TOKENIZER.save(path)
    whole = path.read_bytes()
    for content in (b"", b"{}", b"null", b"\xff\xfe\x00", whole[: len(whole) // 2], whole.replace(b"BPE", b"XYZ")):
        path.write_bytes(content)
        with pytest.raises(UserError, match=str(path)):
            Tokenizer.load(path)


def test_a_tokenizer_without_our_special_tokens_is_refused(tmp_path):
    path = tmp_path / "other.json"
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a")).save(str(path))
    with pytest.raises(UserError, match="<pad>"):
        Tokenizer.load(path)


def test_a_tokenizer_with_two_tokens_of_one_id_is_refused(tmp_path):
    path = tmp_path / "tokenizer.json"
    TOKENIZER.save(path)
    stored = json.loads(path.read_text())
    first, second = list(stored["model"]["vocab"])[5:7]
    stored["model"]["vocab"][first] = stored["model"]["vocab"][second]
    path.write_text(json.dumps(stored))
    with pytest.raises(UserError, match=rf"two.*\b{stored['model']['vocab'][first]}\b"):
        Tokenizer.load(path)


def test_a_tokenizer_that_does_not_split_text_by_one_expression_is_refused(tmp_path):
    path = tmp_path / "other.json"
    for cut in (None, tokenizers.pre_tokenizers.Whitespace()):
        backend = tokenizers.Tokenizer.from_str(TOKENIZER.backend.to_str())
        backend.pre_tokenizer = cut
        backend.save(str(path))
        with pytest.raises(UserError, match="regular expression"):
            Tokenizer.load(path)
