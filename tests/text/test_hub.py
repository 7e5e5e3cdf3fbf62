"""Hugging Face tokenizers, trained by the tests: a task's tokens survive decoding, a model may have several end ids,
and wrong ids are refused."""

import asyncio
import json
import random
import re
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import AddedToken, PreTrainedTokenizerFast

from apr_jax.errors import UserError
from apr_jax.tasks.countdown import CountdownProtocol, Problem, trace
from apr_jax.tasks.countdown.solver import SolverConfig, solve_apr
from apr_jax.text.hub import HubTokenizer, find_tokenizer, load_tokenizer
from apr_jax.text.tokenizer import Tokenizer
from apr_jax.threads import encode_tree
from apr_jax.threads.engine import Sampling
from apr_jax.threads.run import Budget, TreeRunner
from tests.threads.fake_engine import scripted, scripts_of
from tests.tiny import TOKENIZER

TASK = [trace.SPAWN_OPEN, trace.SPAWN_CLOSE, trace.JOIN_OPEN, trace.JOIN_CLOSE]
PROBLEM = Problem((7, 13, 10, 1), 16)
TREE = solve_apr(PROBLEM, SolverConfig.paper_apr(beam=(3, 3), sub_beam=(3, 3)), random.Random(1))
CORPUS = [thread.text for thread in TREE.threads()]


def trained(kind: str) -> tokenizers.Tokenizer:
    """Return a trained BPE tokenizer: of bytes, like Llama 3's ("bytes"), or of characters with a mark for spaces,
    like Llama 2's ("characters")."""
    special = ["<s>", "</s>", "<pad>", "<unk>"]
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    if kind == "bytes":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder, alphabet = decoders.ByteLevel(), pre_tokenizers.ByteLevel.alphabet()
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
        backend.decoder, alphabet = decoders.Metaspace(prepend_scheme="never"), [chr(code) for code in range(33, 127)]
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=[*alphabet, "\n"], show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def of_transformers(backend: tokenizers.Tokenizer, **changes) -> PreTrainedTokenizerFast:
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special | changes)


# Ways in which a user may add a task's tokens to a tokenizer of transformers.
ADD = {
    "further special": lambda theirs: theirs.add_special_tokens({"additional_special_tokens": TASK}),
    "special": lambda theirs: theirs.add_tokens([AddedToken(text, special=True, normalized=False) for text in TASK]),
    "plain": lambda theirs: theirs.add_tokens([AddedToken(text, special=False, normalized=False) for text in TASK]),
}


def with_task(kind: str, way: str) -> HubTokenizer:
    """Return a trained tokenizer with the task's tokens added in one of the ways of `ADD`."""
    theirs = of_transformers(trained(kind), clean_up_tokenization_spaces=True)
    ADD[way](theirs)
    return HubTokenizer(theirs)


TOKENIZERS = {(kind, way): with_task(kind, way) for kind in ("bytes", "characters") for way in ADD}
TEXTS = st.lists(
    st.sampled_from(TASK) | st.text(st.characters(min_codepoint=33, max_codepoint=126) | st.sampled_from(" \n")),
    max_size=8,
).map("".join)  # fmt: skip


@pytest.mark.parametrize("which", TOKENIZERS, ids=" ".join)
def test_decoding_keeps_a_tasks_tokens_and_leaves_out_begin_end_and_padding(which):
    tokenizer = TOKENIZERS[which]

    @settings(max_examples=40)
    @given(TEXTS, st.data())
    def holds(text, data):
        ids = tokenizer.encode(text)
        assert all(tokenizer.token(one) in ids for one in TASK if one in text)
        assert tokenizer.decode(ids) == text
        for role in (tokenizer.bos, tokenizer.eos, tokenizer.pad):
            at = data.draw(st.integers(0, len(ids)))
            ids = [*ids[:at], role, *ids[at:]]
        assert tokenizer.decode(ids) == text
        opened = [at for at, token in enumerate(ids) if token == tokenizer.token(trace.SPAWN_OPEN)]
        assert all(text.startswith(tokenizer.decode(ids[:at]) + trace.SPAWN_OPEN) for at in opened)

    holds()


@pytest.mark.parametrize("which", TOKENIZERS, ids=" ".join)
def test_rollouts_spawn_with_added_tokens(which):
    tokenizer = TOKENIZERS[which]
    tree = encode_tree(TREE, tokenizer.encode, tokenizer.bos, tokenizer.eos)
    engine = scripted(scripts_of(tree, (0,)), context=10**5)
    runner = TreeRunner(engine, CountdownProtocol(), tokenizer, Budget(10**5), Sampling(1.0))
    found = asyncio.run(runner.run(PROBLEM, (0,)))
    assert found.outcome.malformed == found.outcome.failures == {}
    assert len(found.root.children) == len(TREE.root.children) > 0 and found.outcome.correct


def test_our_tokenizer_with_added_tokens_is_loaded_as_one_of_transformers(tmp_path):
    theirs = of_transformers(tokenizers.Tokenizer.from_str(TOKENIZER.backend.to_str()))
    theirs.add_tokens(["<help>"], special_tokens=True)
    theirs.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="'<help>'"):
        Tokenizer.load(tmp_path / "tokenizer.json")
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.json"))
    text = "3+4=7<help>"
    assert tokenizer.encode(text) == [*TOKENIZER.encode("3+4=7"), tokenizer.token("<help>")]
    assert tokenizer.decode(tokenizer.encode(text)) == text


# ---------------------------------------------------------------------- end ids


def saved(folder, ends, file="generation_config.json"):
    """Save a tokenizer of transformers that has a second end token, and a model's `file` with `ends` as end ids, in
    one folder. Returns the id of the second end token."""
    theirs = of_transformers(trained("bytes"))
    ADD["special"](theirs)
    theirs.add_special_tokens({"additional_special_tokens": ["<end of turn>"]})
    theirs.save_pretrained(folder)
    (folder / file).write_text(json.dumps({"eos_token_id": ends}))
    return theirs.convert_tokens_to_ids("<end of turn>")


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_all_ends_of_a_model_end_its_threads(tmp_path, file):
    second = saved(tmp_path, [1, 2], file)
    assert load_tokenizer(str(tmp_path)).ends == {1, 2}
    saved(tmp_path, [1, second], file)
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert tokenizer.ends == {tokenizer.eos, second} == {1, second}
    text = "Moving to Node #0"
    assert tokenizer.decode([*tokenizer.encode(text), second]) == text
    tree = encode_tree(TREE, tokenizer.encode, tokenizer.bos, second)  # threads that end with the second end token
    engine = scripted(scripts_of(tree, (0,)), context=10**5)
    runner = TreeRunner(engine, CountdownProtocol(), tokenizer, Budget(10**5), Sampling(1.0))
    found = asyncio.run(runner.run(PROBLEM, (0,)))
    assert found.outcome.failures == {} and found.outcome.correct
    assert {thread.blocks[-1].content[-1] for thread in found.threads()} == {second}


def test_without_further_ends_the_tokenizers_own_end_is_the_only_one(tmp_path):
    for ends in (1, [1], [], None):
        saved(tmp_path, ends)
        assert load_tokenizer(str(tmp_path)).ends == {1}
    (tmp_path / "generation_config.json").unlink()
    assert load_tokenizer(str(tmp_path)).ends == {1}


@pytest.mark.parametrize("ends", [9000, -1, [1, 9000], "</s>", [1, "x"], True, 1.5, {"a": 1}])
def test_an_end_that_is_no_id_is_refused_with_file_and_value(tmp_path, ends):
    saved(tmp_path, ends)
    wrong = next((end for end in ends if end != 1), None) if isinstance(ends, list) else ends
    with pytest.raises(UserError, match=f"generation_config.json.*eos_token_id.*{re.escape(json.dumps(wrong))}"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(UserError, match="generation_config.json"):
        load_tokenizer(str(tmp_path))


def test_our_tokenizer_has_the_ends_of_the_model_in_its_folder(tmp_path):
    TOKENIZER.save(tmp_path / "tokenizer.json")
    assert load_tokenizer(str(tmp_path / "tokenizer.json")).ends == TOKENIZER.ends == {TOKENIZER.eos}
    other = TOKENIZER.token("7")
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [TOKENIZER.eos, other]}))
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert tokenizer.ends == {TOKENIZER.eos, other}
    assert tokenizer.decode(tokenizer.encode("17 and 7")) == "17 and 7", "decoding left out an end that is text"


def test_a_token_of_the_task_as_an_end_is_refused():
    for text in (trace.SPAWN_OPEN, trace.SPAWN_CLOSE, trace.JOIN_OPEN):
        tokenizer = Tokenizer(TOKENIZER.backend, [TOKENIZER.token(text)])
        with pytest.raises(UserError, match="eos_token_id") as caught:
            TreeRunner(scripted({}), CountdownProtocol(), tokenizer, Budget(64), Sampling(1.0))
        assert repr(text) in str(caught.value)


# ---------------------------------------------------------------------- ids at or above the length


def renumbered(backend: tokenizers.Tokenizer, index: int) -> str:
    """Return the content of tokenizer.json with the id of the last token changed to `index`."""
    stored = json.loads(backend.to_str())
    vocabulary = stored["model"]["vocab"]
    vocabulary[max(vocabulary, key=vocabulary.get)] = index
    return json.dumps(stored)


def test_a_tokenizer_with_an_id_at_or_above_its_length_is_refused(tmp_path):
    ours, theirs = tmp_path / "ours.json", tmp_path / "theirs"
    length = len(TOKENIZER)
    for index in (length, length + 663):
        ours.write_text(renumbered(TOKENIZER.backend, index))
        for load in (Tokenizer.load, load_tokenizer):
            with pytest.raises(UserError, match=f"{length}.*{index}"):
                load(str(ours))
    of_transformers(trained("bytes")).save_pretrained(theirs)
    backend = tokenizers.Tokenizer.from_file(str(theirs / "tokenizer.json"))
    length = backend.get_vocab_size()
    assert len(load_tokenizer(str(theirs))) == length
    (theirs / "tokenizer.json").write_text(renumbered(backend, length + 1))
    for name in (theirs, theirs / "tokenizer.json"):
        with pytest.raises(UserError, match=f"{length}.*{length + 1}"):
            load_tokenizer(str(name))


def test_the_nearest_tokenizer_is_found(tmp_path):
    run = tmp_path / "run"
    step = run / "sft" / "checkpoints" / "10"
    step.mkdir(parents=True)
    (run / "data").mkdir()
    with pytest.raises(FileNotFoundError):
        find_tokenizer(step)
    (tmp_path / "tokenizer.json").touch()
    assert find_tokenizer(step) == tmp_path / "tokenizer.json"
    assert find_tokenizer(step.parent / ".." / "checkpoints" / "10") == tmp_path / "tokenizer.json"
    (run / "data" / "tokenizer.json").touch()
    assert find_tokenizer(step) == find_tokenizer(run / "a.jsonl") == run / "data" / "tokenizer.json"
    assert find_tokenizer(step, "given.json") == Path("given.json").absolute()
    far = step.joinpath("further", "down")
    far.mkdir(parents=True)
    with pytest.raises(FileNotFoundError):
        find_tokenizer(far)
