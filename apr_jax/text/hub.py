"""Any Hugging Face tokenizer in the place of ours, as Llama 2's where a user has it.

Text is encoded block by block (prompts, what a thread wrote, joins), in data and in rollouts alike, so that the ids
of a prompt never depend on what follows it, whatever the tokenizer would merge over its end.
"""

from collections.abc import Sequence
from pathlib import Path

from apr_jax.text.tokenizer import Tokenizer


class HubTokenizer:
    """The parts of `Tokenizer` that data and counting need, from a tokenizer of the transformers library."""

    def __init__(self, backend):
        self.backend = backend
        self.bos, self.eos = backend.bos_token_id, backend.eos_token_id
        if self.bos is None or self.eos is None:
            raise ValueError(f"the tokenizer {backend.name_or_path} has no token for the beginning or end of a text")
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
            raise ValueError(f"{text!r} is {len(ids)} tokens of {self.backend.name_or_path}, rollouts need one: add it")
        return ids[0]


def load_tokenizer(name: str) -> Tokenizer | HubTokenizer:
    """Our tokenizer from its tokenizer.json, or any other by folder or hub name. Raises ValueError."""
    if Path(name).is_file():
        return Tokenizer.load(name)
    from transformers import AutoTokenizer  # here: it takes seconds

    try:
        return HubTokenizer(AutoTokenizer.from_pretrained(name))
    except (OSError, ImportError) as error:
        raise ValueError(f"no tokenizer {name!r}: {str(error).strip().splitlines()[0]}") from None
