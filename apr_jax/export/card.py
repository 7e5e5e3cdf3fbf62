"""The model card of an export, its README.md."""

import json

from apr_jax.model.llama import Llama, parameter_count
from apr_jax.text.tokenizer import BOS, EOS

TAGS, IMPORTED_TAGS = "adaptive-parallel-reasoning, countdown, jax", "jax"
ABOUT = f"""\
A small Llama trained from scratch with apr_jax to search for Countdown solutions in threads (Adaptive Parallel
Reasoning). It knows the language of search traces, nothing else.

Every thread's prompt begins with the token `{BOS}`, which the tokenizer does not add by itself, and ends at the `]` of
`Operations: [...]`, without a line end. A thread ends with `{EOS}`; after `<End Calling Sub Searches>` the program that
drives the model has to run the child threads and put their results in its context."""
ABOUT_IMPORTED = "A Llama that apr_jax imported and exported again, without training it."


def model_card(model: Llama, name: str, meta: dict, dtype: str) -> str:
    """README.md: what the model is, how to start it, its sizes, and all of `meta`."""
    config = model.config
    total, inner = parameter_count(model)
    plain = {key: value for key, value in meta.items() if not isinstance(value, (dict, list))}
    rows = {
        "parameters": f"{total:,}, {inner:,} without embedding and head",
        "layers, width, feed-forward": f"{config.layers}, {config.width}, {config.hidden}",
        "heads, key/value heads, head size": f"{config.heads}, {config.kv}, {config.head_size}",
        "vocabulary": f"{config.vocab_size:,} tokens" + (", embedding and head tied" if config.tie_embeddings else ""),
        "context": f"{config.context:,} tokens",
        "stored as": dtype,
    } | {key.replace("_", " "): value for key, value in plain.items()}
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    details = json.dumps(meta, indent=2, default=str)
    tags, about = (IMPORTED_TAGS, ABOUT_IMPORTED) if meta.get("stage") == "imported" else (TAGS, ABOUT)
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [{tags}]
---

# {name}

{about}

|  |  |
|---|---|
{table}

What the checkpoint says of itself:

```json
{details}
```
"""
