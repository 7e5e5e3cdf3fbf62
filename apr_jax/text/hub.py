"""Any Hugging Face tokenizer in the place of ours, as Llama 2's where a user has it.

Text is encoded block by block (prompts, what a thread wrote, joins), in data and in rollouts alike, so that the ids
of a prompt never depend on what follows it, whatever the tokenizer would merge over its end.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from apr_jax.errors import UserError
from apr_jax.text.tokenizer import Tokenizer, check_ids

FILE = "tokenizer.json"
ABOVE = 4  # folders from a saved step up to the one that holds its run
GENERATION = "generation_config.json"
# Roles of tokens that are no text. Other special tokens are text: a task's spawn tokens may be added as special ones.
ROLES = ("bos", "eos", "pad", "unk")


class HubTokenizer:
    """The parts of `Tokenizer` that data and counting need, from a tokenizer of the transformers library.

    `ends` are all ids that end a text, `eos` among them: a model may have several. Raises UserError for a tokenizer
    without a token for the beginning or the end, with an id at or past its length, or with a wrong end.
    """

    def __init__(self, backend, ends: Sequence[int] = ()):
        self.backend = backend
        self.bos, self.eos = backend.bos_token_id, backend.eos_token_id
        if self.bos is None or self.eos is None:
            raise UserError(f"the tokenizer {backend.name_or_path} has no token for the beginning or end of a text")
        check_ids(backend.get_vocab(), len(backend), f"the tokenizer {backend.name_or_path}")
        self.pad = self.eos if backend.pad_token_id is None else backend.pad_token_id
        self.ends = frozenset({self.eos, *ends})
        special = {index for index, token in backend.added_tokens_decoder.items() if token.special}
        self._hidden = {getattr(backend, f"{role}_token_id", None) for role in ROLES} | (self.ends & special)

    def __len__(self) -> int:
        return len(self.backend)

    def encode(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False)

    def decode(self, ids: Sequence[int]) -> str:
        """Tokens for the beginning, the end, padding and the unknown are left out. Other special tokens are text."""
        shown = [int(index) for index in ids if index not in self._hidden]
        return self.backend.decode(shown, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def token(self, text: str) -> int:
        """The id of a text that must be one token; raises ValueError where it is not."""
        ids = self.encode(text)
        if len(ids) != 1:
            raise UserError(f"{text!r} is {len(ids)} tokens of {self.backend.name_or_path}, rollouts need one: add it")
        return ids[0]


def load_tokenizer(name: str) -> Tokenizer | HubTokenizer:
    """Our tokenizer from its tokenizer.json, or any other by that file, its folder or its hub name. The ends of a text
    that the model beside it names (`read_ends`) are taken over. Raises UserError, and FileNotFoundError for a whole
    path that leads nowhere."""
    path = Path(name)
    if path.is_absolute() and not path.exists():
        raise FileNotFoundError(f"no tokenizer at {path}")
    if path.is_file():
        try:
            tokenizer = Tokenizer.load(path)
        except UserError:
            if path.name != FILE or not path.with_name("tokenizer_config.json").is_file():
                raise
        else:
            return with_ends(tokenizer, path.parent)
        name = str(path.parent)
    from transformers import AutoTokenizer  # here: it takes seconds

    try:
        backend = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # the libraries raise bare Exception for many kinds of broken files
        raise UserError(f"no tokenizer {name!r}: {str(error).strip().splitlines()[0]}") from None
    tokenizer = HubTokenizer(backend)
    return with_ends(tokenizer, Path(name)) if Path(name).is_dir() else tokenizer


def with_ends(tokenizer: Tokenizer | HubTokenizer, folder: Path) -> Tokenizer | HubTokenizer:
    """The tokenizer with the further ends of a text that the model in `folder` has. Raises UserError for one that is no
    id of the tokenizer."""
    path, ends = read_ends(folder)
    if others := [index for index in ends if not 0 <= index < len(tokenizer)]:
        raise UserError(
            f"{path}: eos_token_id is {others[0]}, must be an id below {len(tokenizer)}, the tokenizer's length"
        )
    return type(tokenizer)(tokenizer.backend, tokenizer.ends.union(ends))


def read_ends(folder: Path) -> tuple[Path, tuple[int, ...]]:
    """(file, ids): the `eos_token_id` of a model's folder, one id or a list, from generation_config.json or else
    config.json, as transformers reads it; no ids where neither says any. Raises UserError."""
    for path in (folder / GENERATION, folder / "config.json"):
        try:
            content = json.loads(path.read_bytes()) if path.is_file() else None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is no JSON: {error}") from None
        ends = content.get("eos_token_id") if isinstance(content, dict) else None
        if ends is None:
            continue
        found = ends if isinstance(ends, list) else [ends]
        if any(isinstance(index, bool) or not isinstance(index, int) for index in found):
            raise UserError(f"{path}: eos_token_id is {json.dumps(ends)}, must be an id or a list of ids")
        return path, tuple(found)
    return folder / GENERATION, ()


def find_tokenizer(near: Path, given: str | None = None) -> Path:
    """The tokenizer of a file or folder of a run, as a whole path: the one that a user named, else the nearest
    tokenizer.json in `near`, in the `ABOVE` folders above it, or in the data/ of any of these. Raises
    FileNotFoundError."""
    if given:
        return Path(given).absolute()
    near = Path(os.path.abspath(near))
    for folder in (near, *near.parents[:ABOVE]):
        for path in (folder / FILE, folder / "data" / FILE):
            if path.is_file():
                return path
    raise FileNotFoundError(f"no {FILE} in {near} or above it: name it with --tokenizer=FILE")
