"""Any Hugging Face tokenizer in the place of ours, as Llama 2's where a user has it.

Text is encoded block by block (prompts, what a thread wrote, joins), in data and in rollouts alike, so that the ids
of a prompt never depend on what follows it, whatever the tokenizer would merge over its end.
"""

from collections.abc import Sequence
from pathlib import Path

from apr_jax.errors import UserError
from apr_jax.text.tokenizer import Tokenizer

FILE = "tokenizer.json"


class HubTokenizer:
    """The parts of `Tokenizer` that data and counting need, from a tokenizer of the transformers library."""

    def __init__(self, backend):
        self.backend = backend
        self.bos, self.eos = backend.bos_token_id, backend.eos_token_id
        if self.bos is None or self.eos is None:
            raise UserError(f"the tokenizer {backend.name_or_path} has no token for the beginning or end of a text")
        self.pad = self.eos if backend.pad_token_id is None else backend.pad_token_id

    def __len__(self) -> int:
        return len(self.backend)

    def encode(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False)

    def decode(self, ids: Sequence[int]) -> str:
        return self.backend.decode([int(index) for index in ids], skip_special_tokens=True)

    def token(self, text: str) -> int:
        """The id of a text that must be one token; raises ValueError where it is not."""
        ids = self.encode(text)
        if len(ids) != 1:
            raise UserError(f"{text!r} is {len(ids)} tokens of {self.backend.name_or_path}, rollouts need one: add it")
        return ids[0]


def load_tokenizer(name: str) -> Tokenizer | HubTokenizer:
    """Our tokenizer from its tokenizer.json, or any other by that file, its folder or its hub name. Raises
    UserError, and FileNotFoundError for a whole path that leads nowhere."""
    path = Path(name)
    if path.is_absolute() and not path.exists():
        raise FileNotFoundError(f"no tokenizer at {path}")
    if path.is_file():
        try:
            return Tokenizer.load(path)
        except UserError:
            if path.name != FILE or not path.with_name("tokenizer_config.json").is_file():
                raise
        name = str(path.parent)
    from transformers import AutoTokenizer  # here: it takes seconds

    try:
        backend = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # the libraries raise bare Exception for many kinds of broken files
        raise UserError(f"no tokenizer {name!r}: {str(error).strip().splitlines()[0]}") from None
    return HubTokenizer(backend)


def find_tokenizer(checkpoint: Path, above: int = 4) -> Path:
    """The nearest tokenizer.json in a folder's `above` parents. Raises FileNotFoundError."""
    for folder in (checkpoint, *checkpoint.parents[:above]):
        for path in (folder / FILE, folder / "data" / FILE):
            if path.is_file():
                return path
    raise FileNotFoundError(f"no {FILE} in {checkpoint} or above it: name it with --tokenizer=FILE")
