"""Writes the model card of an export, its README.md."""

import json
import re

from apr_jax.model.family import Model, family_of, parameter_count
from apr_jax.text.tokenizer import BOS, EOS

ABOUT = """\
A small {family} trained with apr_jax to reason in threads (Adaptive Parallel Reasoning), on the task `{task}`, variant
`{variant}`. It was trained on demonstrations of that task and on no other text.

Every thread's prompt begins with the token `{bos}`, which the tokenizer does not add by itself. A thread ends with
`{eos}`. When the model spawns child threads, the program that runs it has to decode these threads and insert their
results into the parent's context; apr_jax does this with the task's protocol."""
ABOUT_IMPORTED = "A {family} that apr_jax imported and exported again without training it."


def model_card(model: Model, name: str, meta: dict, dtype: str) -> str:
    """Return the text of README.md: what the model is, how to run it, its sizes, and all of the checkpoint's `meta`."""
    config = model.config
    total, inner = parameter_count(model)
    family = family_of(config).title
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
    if "task" in meta and meta.get("stage") != "imported":
        about = ABOUT.format(family=family, task=meta["task"], variant=meta.get("variant"), bos=BOS, eos=EOS)
        tags = f"adaptive-parallel-reasoning, {re.sub('[^a-z0-9-]+', '-', meta['task'].lower())}, jax"
    else:
        about, tags = ABOUT_IMPORTED.format(family=family), "jax"
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

The checkpoint's metadata:

```json
{details}
```
"""
