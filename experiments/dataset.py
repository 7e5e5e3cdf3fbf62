"""The data stage: problems, the solvers' traces as packed-ready pieces, and a manifest of what was dropped."""

import json
import os
import random
import zipfile
from pathlib import Path

import numpy as np

from apr_jax.countdown import Problem, split_problems
from apr_jax.countdown.solver import SOLVERS
from apr_jax.countdown.trace import NO_SOLUTION
from apr_jax.countdown.vocabulary import countdown_tokenizer
from apr_jax.text.tokenizer import Tokenizer
from apr_jax.threads import encode_tree
from apr_jax.threads.metrics import longest_context, total_tokens
from apr_jax.train.metrics import Progress
from apr_jax.train.pack import Piece, lay_out_tree
from experiments.settings import STYLES, Settings

VALIDATION_PROBLEMS = 64  # held-out problems whose solver traces measure the validation loss


def write_text(path: Path, text: str) -> None:
    """Whole or not at all: a kill or a full disk leaves what was there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)


def make_dataset(settings: Settings, folder: Path) -> dict:
    """Writes everything under `folder`; returns the manifest. A finished one is only read."""
    manifest_path = folder / "manifest.json"
    if manifest_path.exists():
        return load_manifest(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = countdown_tokenizer(settings.max_number)
    train, held_out = split_problems(settings.problems, settings.seed, settings.train, settings.held_out)
    for name, problems in (("train", train), ("held_out", held_out)):
        lines = [json.dumps({"numbers": p.numbers, "target": p.target}) for p in problems]
        write_text(folder / f"{name}.jsonl", "\n".join(lines) + "\n")
    manifest = {"train_problems": len(train), "held_out_problems": len(held_out), "vocabulary": len(tokenizer)}
    for style in STYLES:
        for name, problems in (("train", train), ("validation", held_out[:VALIDATION_PROBLEMS])):
            pieces, counts = _traces(settings, style, problems, tokenizer, f"data {style} {name}")
            save_pieces(folder / f"{style}_{name}.npz", pieces)
            manifest[f"{style}_{name}"] = counts
    part = folder / "tokenizer.part"
    tokenizer.save(part)
    os.replace(part, folder / "tokenizer.json")
    write_text(manifest_path, json.dumps(manifest, indent=1))
    return manifest


def load_manifest(folder: Path) -> dict:
    """Raises ValueError where the file is broken."""
    path = folder / "manifest.json"
    try:
        return json.loads(path.read_text())
    except ValueError:
        raise ValueError(broken(path, "data")) from None


def broken(path: Path, stage: str) -> str:
    """What to say of a file that cannot be read."""
    return f"{path} is broken: delete {path.parent} and run --stage={stage} again"


def _traces(settings: Settings, style: str, problems: list[Problem], tokenizer: Tokenizer, title: str):
    """Pieces of the problems' trees that fit the window, and counts of what was kept and dropped and why."""
    rng = random.Random(f"{settings.seed}/{title}")
    progress = Progress(title, len(problems), "trees")
    pieces: list[Piece] = []
    counts = dict.fromkeys(
        ("trees", "too_long", "threads", "tokens", "solved", "solved_in_window", "threads_left_out"), 0
    )
    for index, problem in enumerate(problems):
        text = SOLVERS[style](problem, settings.solvers[style], rng)
        tree = encode_tree(text, tokenizer.encode, tokenizer.bos, tokenizer.eos)
        counts["solved"] += text.info["solved"]
        laid = lay_out_tree(tree)
        if longest_context(tree) > settings.window or max(map(len, laid)) > settings.sft.row_length:
            counts["too_long"] += 1
        else:
            counts["trees"] += 1
            counts["solved_in_window"] += text.info["solved"]
            counts["tokens"] += total_tokens(tree)
            kept = laid
            if settings.children and len(laid) > 1 + settings.children:
                found = [not thread.text.endswith(NO_SOLUTION) for thread in text.threads()]
                drawn = rng.sample(range(1, len(laid)), len(laid) - 1)
                drawn.sort(key=lambda index: not found[index])  # those that found the target first
                kept = [laid[index] for index in (0, *drawn[: settings.children])]
            counts["threads"] += len(kept)
            counts["threads_left_out"] += len(laid) - len(kept)
            pieces += kept
        progress.update(index + 1)
    if not pieces:
        raise ValueError(f"none of {len(problems)} {style} trees fits a window of {settings.window} tokens")
    return pieces, counts


def save_pieces(path: Path, pieces: list[Piece]) -> None:
    """Pieces as flat arrays with their lengths; 16-bit where that holds them."""
    arrays = {
        "lengths": np.array([len(piece) for piece in pieces]),
        "nodes": np.array([piece.nodes for piece in pieces]),
    }
    for name in ("tokens", "positions", "predecessors", "enter", "exit", "sampled"):
        flat = np.concatenate([getattr(piece, name) for piece in pieces])
        arrays[name] = flat if name == "sampled" or flat.max() > np.iinfo(np.int16).max else flat.astype(np.int16)
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        np.savez(file, **arrays)
    os.replace(part, path)


def load_pieces(path: Path) -> list[Piece]:
    """Raises FileNotFoundError where the data stage has not run, ValueError where the file is broken."""
    if not path.exists():
        raise FileNotFoundError(f"no traces at {path}: run --stage=data first")
    try:
        with np.load(path) as arrays:
            ends = np.cumsum(arrays["lengths"])
            columns = {
                name: np.split(arrays[name] if name == "sampled" else arrays[name].astype(np.int32), ends[:-1])
                for name in ("tokens", "positions", "predecessors", "enter", "exit", "sampled")
            }
            nodes = arrays["nodes"].tolist()
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile):
        raise ValueError(broken(path, "data")) from None
    pieces = []
    for index, count in enumerate(nodes):
        own = {name: column[index] for name, column in columns.items()}
        n = len(own["tokens"])
        extra = {
            "logprobs": np.zeros(n, np.float32),
            "share": np.ones(n, np.float32),
            "advantage": np.zeros(n, np.float32),
        }
        pieces.append(Piece(**own, **extra, nodes=count))
    return pieces


def load_problems(path: Path) -> list[Problem]:
    """Raises FileNotFoundError where the data stage has not run, ValueError where the file is broken."""
    if not path.exists():
        raise FileNotFoundError(f"no problems at {path}: run --stage=data first")
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        return [Problem(tuple(row["numbers"]), row["target"]) for row in rows]
    except (ValueError, KeyError, TypeError):
        raise ValueError(broken(path, "data")) from None
