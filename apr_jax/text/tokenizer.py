"""Our own tokenizer: one token per number and per phrase of a trace's lines, saved as a standard tokenizer.json.

The tokenizer is prefix-stable by construction: the ids of a prompt or a join never depend on the text after it. One
regular expression splits text into pre-tokens. A pre-token is one token where the vocabulary has it, else one token per
character. No pre-token spans a place where a prompt or a join can end. A task's phrases must keep to this: for most
tasks these places are after every line end; for Countdown also before a line end that follows the ``]`` of a list.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from apr_jax.errors import UserError

PAD, BOS, EOS, UNKNOWN = "<pad>", "<s>", "</s>", "<unk>"
SPECIAL = (PAD, BOS, EOS, UNKNOWN)
CHARACTERS = tuple(chr(code) for code in range(32, 127)) + ("\n",)


def check_ids(vocabulary: Mapping[str, int], length: int, name: str) -> None:
    """Raise UserError where the largest id of a vocabulary is at or above `length`, the tokenizer's length. A model
    has one embedding row for each id below that length and no other. `name` names the tokenizer in the message."""
    token, index = max(vocabulary.items(), key=lambda item: item[1], default=("", -1))
    if index >= length:
        raise UserError(
            f"{name} has {length} tokens, but {token!r} has the id {index}: number its tokens 0 to {length - 1}"
        )


class Tokenizer:
    """An encoder of text into ids and decoder of ids into text. Characters other than printable ASCII and the line end
    become the unknown token. `ends` are all ids that end a text, `eos` included.

    `backend` is a tokenizer of the tokenizers library. Raises UserError where it lacks a special token, has an id at or
    above its length or twice, has added tokens, or does not split text by one regular expression. `encode` uses the
    backend's expression and vocabulary alone, so it would give other ids than such a backend.
    """

    def __init__(self, backend: tokenizers.Tokenizer, ends: Iterable[int] = ()):
        self.backend = backend
        self.pad, self.bos, self.eos, self.unknown = (self._special(name) for name in SPECIAL)
        self.ends = frozenset({self.eos, *ends})
        ids = backend.get_vocab()
        check_ids(ids, backend.get_vocab_size(), "the tokenizer")
        if len({*ids.values()}) < len(ids):
            ((index, _),) = Counter(ids.values()).most_common(1)
            raise UserError(f"the tokenizer has two tokens of the id {index}, and `decode` would return one of them")
        stored = json.loads(backend.to_str())
        if added := [token["content"] for token in stored["added_tokens"] if token["content"] not in SPECIAL]:
            raise UserError(f"the tokenizer has an added token, {added[0]!r}, which `encode` would not find")
        self._vocabulary = stored["model"]["vocab"]
        try:
            self._cut = re.compile(stored["pre_tokenizer"]["pattern"]["Regex"]).findall
        except (KeyError, TypeError, re.error):  # re.error: syntax that Python's `re` does not have, such as \p{L}
            raise UserError("the tokenizer does not split text by one regular expression that Python reads") from None
        if not isinstance(self._vocabulary, dict):
            raise UserError("the tokenizer's model has no table of tokens by their text")

    def _special(self, name: str) -> int:
        found = self.backend.token_to_id(name)
        if found is None:
            raise UserError(f"the tokenizer has no {name} token")
        return found

    @classmethod
    def build(cls, phrases: Iterable[str], patterns: Iterable[str], tokens: Iterable[str]) -> "Tokenizer":
        """Build a tokenizer whose vocabulary has the special tokens, the characters, `phrases` and `tokens`. A phrase
        is a token wherever it occurs; of several phrases at one place the longest is taken. A text in `tokens`, such as
        a number, is a token only where one of the regular expressions `patterns` matches exactly this text."""
        phrases = sorted(dict.fromkeys(phrases), key=lambda phrase: (-len(phrase), phrase))
        vocabulary = {
            token: index for index, token in enumerate(dict.fromkeys((*SPECIAL, *CHARACTERS, *phrases, *tokens)))
        }
        model = models.BPE(vocab=vocabulary, merges=[], unk_token=UNKNOWN, ignore_merges=True)
        backend = tokenizers.Tokenizer(model)
        cut = "|".join([*(re.escape(phrase).replace("\\\n", "\n") for phrase in phrases), *patterns, r"[\s\S]"])
        backend.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(cut), behavior="isolated")
        backend.decoder = decoders.Fuse()
        backend.add_special_tokens(list(SPECIAL))
        backend.encode_special_tokens = True  # the characters "<s>" in a text are text, not the begin token
        return cls(backend)

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Load a tokenizer.json. Raises FileNotFoundError where there is no file, and UserError where the file is
        broken or is a tokenizer that this class does not support."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"no tokenizer at {path}")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises a bare Exception for every kind of broken file
            raise UserError(f"{path} is no tokenizer.json: {error}") from None
        backend.encode_special_tokens = True
        return cls(backend)

    def save(self, path: str | Path) -> None:
        """Write the tokenizer as a tokenizer.json, which the tokenizers library can load, too."""
        self.backend.save(str(path))

    def __len__(self) -> int:
        return self.backend.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """Return the same ids as the backend, 3 to 4 times as fast, by the backend's own expression and vocabulary. A
        pre-token is either one token or its characters, so no merges are needed."""
        find = self._vocabulary.get
        ids = [find(pre_token) for pre_token in self._cut(text)]
        if None not in ids:
            return ids
        ids = []
        for pre_token in self._cut(text):
            found = find(pre_token)
            ids.extend((found,) if found is not None else (find(character, self.unknown) for character in pre_token))
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, without special tokens."""
        return self.backend.decode([int(index) for index in ids], skip_special_tokens=True)

    def token(self, text: str) -> int:
        """Return the id of a text that must be one token. Raises UserError where it is not."""
        ids = self.encode(text)
        if len(ids) != 1 or ids[0] == self.unknown:
            raise UserError(f"{text!r} is {len(ids)} tokens here, must be one")
        return ids[0]
