"""Hugging Face tokenizers in place of our own, such as Llama 2's where a user has it.

Data and rollouts both encode text block by block: prompts, written blocks and joins. So the ids of a prompt never
depend on the text after it, even for a tokenizer that would merge tokens across the end of the prompt.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from apr_jax.errors import UserError
from apr_jax.text.tokenizer import Tokenizer, check_ids

FILE = "tokenizer.json"
ABOVE = 4  # levels from the folder of a saved step up to the parent folder of its run
GENERATION = "generation_config.json"
# The special tokens that `decode` leaves out. Others are text: a user may add a task's spawn tokens as special tokens.
ROLES = ("bos", "eos", "pad", "unk")


class HubTokenizer:
    """A tokenizer of the transformers library with the interface of `Tokenizer`.

    `ends` are all ids that end a text, `eos` included; a model may have several. Raises UserError for a tokenizer
    without a begin or end token, and for one with an id at or above its length.
    """

    def __init__(self, backend, ends: Sequence[int] = ()):
        self.backend = backend
        self.bos, self.eos = backend.bos_token_id, backend.eos_token_id
        if self.bos is None or self.eos is None:
            raise UserError(f"the tokenizer {backend.name_or_path} has no token for the beginning or end of a text")
        check_ids(backend.get_vocab(), len(backend), f"the tokenizer {backend.name_or_path}")
        self.pad = self.eos if backend.pad_token_id is None else backend.pad_token_id
        self.unknown = backend.unk_token_id  # None: every text has tokens
        self.ends = frozenset({self.eos, *ends})
        special = {index for index, token in backend.added_tokens_decoder.items() if token.special}
        self._hidden = {getattr(backend, f"{role}_token_id", None) for role in ROLES} | (self.ends & special)

    def __len__(self) -> int:
        return len(self.backend)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without begin and end tokens."""
        return self.backend.encode(text, add_special_tokens=False)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids. Begin, end, padding and unknown tokens are left out; other special tokens are
        text."""
        shown = [int(index) for index in ids if index not in self._hidden]
        return self.backend.decode(shown, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def token(self, text: str) -> int:
        """Return the id of a text that must be one token. Raises UserError where it is not."""
        ids = self.encode(text)
        if len(ids) != 1:
            raise UserError(f"{text!r} is {len(ids)} tokens of {self.backend.name_or_path}, rollouts need one: add it")
        return ids[0]


def load_tokenizer(name: str) -> Tokenizer | HubTokenizer:
    """Load our tokenizer from its tokenizer.json, or a Hugging Face tokenizer from its tokenizer.json, its folder or
    its name on the hub. The end ids of a model in the same folder (`read_ends`) are added to the tokenizer's `ends`.

    Raises FileNotFoundError for an absolute path that does not exist, and UserError where nothing can be loaded or an
    end id is wrong.
    """
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
    from transformers import AutoTokenizer  # imported here, because the import takes seconds

    try:
        backend = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # the libraries raise a bare Exception for many kinds of broken files
        raise UserError(f"no tokenizer {name!r}: {str(error).strip().splitlines()[0]}") from None
    tokenizer = HubTokenizer(backend)
    return with_ends(tokenizer, Path(name)) if Path(name).is_dir() else tokenizer


def with_ends(tokenizer: Tokenizer | HubTokenizer, folder: Path) -> Tokenizer | HubTokenizer:
    """Return the tokenizer with the end ids of the model in `folder` added to its `ends`. Raises UserError for an end
    id that the tokenizer does not have."""
    path, ends = read_ends(folder)
    if others := [index for index in ends if not 0 <= index < len(tokenizer)]:
        raise UserError(
            f"{path}: eos_token_id is {others[0]}, must be an id below {len(tokenizer)}, the tokenizer's length"
        )
    return type(tokenizer)(tokenizer.backend, tokenizer.ends.union(ends))


def read_ends(folder: Path) -> tuple[Path, tuple[int, ...]]:
    """Read the `eos_token_id` (one id or a list) of a model's folder: from generation_config.json, else from
    config.json, as transformers does. Returns (the file, its ids); no ids where neither file has the key. Raises
    UserError for a broken file or a value of another type."""
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
    """Return the absolute path of the tokenizer for `near`, a file or folder in a run's folder. The path is `given`
    where a user named one. Else it is the nearest tokenizer.json, searched in `near` and `ABOVE` levels upwards; each
    level's subfolder data/ is searched after the level itself. Raises FileNotFoundError where there is none."""
    if given:
        return Path(given).absolute()
    near = Path(os.path.abspath(near))
    for folder in (near, *near.parents[:ABOVE]):
        for path in (folder / FILE, folder / "data" / FILE):
            if path.is_file():
                return path
    raise FileNotFoundError(f"no {FILE} in {near} or above it: name it with --tokenizer=FILE")
