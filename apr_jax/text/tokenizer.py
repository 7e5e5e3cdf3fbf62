"""The tokenizer: one token per number and per phrase of a line, saved as a standard tokenizer.json.

It is prefix-stable by construction, so that the ids of a text never depend on what follows it: text is split into
pieces by one regular expression, a piece is looked up whole in the vocabulary or else spelled in characters, and no
piece reaches across a place where a prompt or a join can end. A task says where those are: after any line end
for most; for Countdown also before a line end that follows the ``]`` of a list.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from apr_jax.errors import UserError

PAD, BOS, EOS, UNKNOWN = "<pad>", "<s>", "</s>", "<unk>"
SPECIAL = (PAD, BOS, EOS, UNKNOWN)
CHARACTERS = tuple(chr(code) for code in range(32, 127)) + ("\n",)


def check_ids(vocabulary: Mapping[str, int], length: int, name: str) -> None:
    """Raises UserError for the largest id where it is at or past `length`: a model has a row for each id below its
    tokenizer's length and no other."""
    token, index = max(vocabulary.items(), key=lambda item: item[1], default=("", -1))
    if index >= length:
        raise UserError(
            f"{name} has {length} tokens, but {token!r} has the id {index}: number its tokens 0 to {length - 1}"
        )


class Tokenizer:
    """Ids of text and text of ids. Characters outside printable ASCII become the unknown token. `ends` are all ids that
    end a text, `eos` among them."""

    def __init__(self, backend: tokenizers.Tokenizer, ends: Iterable[int] = ()):
        self.backend = backend
        self.pad, self.bos, self.eos, self.unknown = (self._special(name) for name in SPECIAL)
        self.ends = frozenset({self.eos, *ends})
        ids = backend.get_vocab()
        check_ids(ids, backend.get_vocab_size(), "the tokenizer")
        if len({*ids.values()}) < len(ids):
            raise UserError("the tokenizer has two tokens of one id, of which `decode` knows one")
        stored = json.loads(backend.to_str())
        if added := [token["content"] for token in stored["added_tokens"] if token["content"] not in SPECIAL]:
            raise UserError(f"the tokenizer has an added token, {added[0]!r}, which `encode` would not find")
        self._vocabulary = stored["model"]["vocab"]
        try:
            self._cut = re.compile(stored["pre_tokenizer"]["pattern"]["Regex"]).findall
        except (KeyError, TypeError, re.error):  # re.error: an expression of another language, as \p{L}
            raise UserError("the tokenizer does not split text by one regular expression that Python reads") from None
        if not isinstance(self._vocabulary, dict):
            raise UserError("the tokenizer's model has no table of tokens by their text")

    def _special(self, name: str) -> int:
        found = self.backend.token_to_id(name)
        if found is None:
            raise UserError(f"the tokenizer has no {name} token")
        return found

    @classmethod
    def build(cls, phrases: Iterable[str], patterns: Iterable[str], words: Iterable[str]) -> "Tokenizer":
        """`phrases` are tokens wherever they stand; `words` are tokens where one of the regular
        expressions `patterns` cuts them out (numbers, node steps). The longest phrase wins."""
        phrases = sorted(dict.fromkeys(phrases), key=lambda phrase: (-len(phrase), phrase))
        vocabulary = {
            token: index for index, token in enumerate(dict.fromkeys((*SPECIAL, *CHARACTERS, *phrases, *words)))
        }
        model = models.BPE(vocab=vocabulary, merges=[], unk_token=UNKNOWN, ignore_merges=True)
        backend = tokenizers.Tokenizer(model)
        cut = "|".join([*(re.escape(phrase).replace("\\\n", "\n") for phrase in phrases), *patterns, r"[\s\S]"])
        backend.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(cut), behavior="isolated")
        backend.decoder = decoders.Fuse()
        backend.add_special_tokens(list(SPECIAL))
        backend.encode_special_tokens = True  # a "<s>" in text is text, never the token
        return cls(backend)

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Raises FileNotFoundError, or UserError where the file is no tokenizer of ours."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"no tokenizer at {path}")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for every kind of broken file
            raise UserError(f"{path} is no tokenizer.json: {error}") from None
        backend.encode_special_tokens = True
        return cls(backend)

    def save(self, path: str | Path) -> None:
        self.backend.save(str(path))

    def __len__(self) -> int:
        return self.backend.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """The ids that the backend gives, by its own expression and table, at 3 to 4 times its speed: a piece is
        one token or its characters, so nothing is left for the backend to merge."""
        find = self._vocabulary.get
        ids = [find(piece) for piece in self._cut(text)]
        if None not in ids:
            return ids
        ids = []
        for piece in self._cut(text):
            found = find(piece)
            ids.extend((found,) if found is not None else (find(one, self.unknown) for one in piece))
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Special tokens are left out."""
        return self.backend.decode([int(index) for index in ids], skip_special_tokens=True)

    def token(self, text: str) -> int:
        """The id of a text that must be one token; raises ValueError where it is not."""
        ids = self.encode(text)
        if len(ids) != 1 or ids[0] == self.unknown:
            raise UserError(f"{text!r} is {len(ids)} tokens here, must be one")
        return ids[0]
