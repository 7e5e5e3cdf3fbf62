"""Statistics of a data set: lengths, children, solve rates, tokens with and without shared prefixes."""

import dataclasses
from pathlib import Path

import numpy as np

from apr_jax.data.dataset import read_manifest
from apr_jax.data.demonstrations import unshared_tokens
from apr_jax.data.store import TreeStore
from apr_jax.text.hub import load_tokenizer
from apr_jax.threads.metrics import children, longest_context, sequential_tokens, total_tokens

QUANTITIES = {
    "total tokens": total_tokens,
    "total tokens, prefixes repeated": unshared_tokens,
    "sequential tokens": sequential_tokens,
    "longest context": longest_context,
    "children": children,
}


@dataclasses.dataclass(frozen=True)
class Described:
    """One part of a data set, such as "apr_train": the manifest's counts, and quantities of a sample of n trees."""

    name: str
    counts: dict[str, int]
    sample: dict[str, np.ndarray]  # key of `QUANTITIES` -> [n]
    characters: np.ndarray  # [n], in all threads of a tree
    other_tokens: np.ndarray | None  # [n], tokens of another tokenizer in all threads of a tree


def describe(folder: Path, most: int, other=None) -> list[Described]:
    """Return the statistics of each part of a data set, from at most `most` trees each, evenly spaced.

    If given, `other` is a second tokenizer whose tokens are counted, too. Raises FileNotFoundError if there is no
    finished data set, and UserError if it is broken.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise FileNotFoundError(f"no finished data set at {folder}: it has no manifest.json")
    own = manifest["config"]["tokenizer"]
    tokenizer = load_tokenizer(own or str(folder / "tokenizer.json"))
    found = []
    for name in sorted(name for name, counts in manifest.items() if isinstance(counts, dict) and "trees" in counts):
        store = TreeStore(folder / name)
        trees = [store[i] for i in np.unique(np.linspace(0, len(store) - 1, min(most, len(store)), dtype=int)).tolist()]
        sample = {title: np.array([count(tree) for tree in trees]) for title, count in QUANTITIES.items()}
        blocks = [
            [tokenizer.decode(block.content) for thread in tree.threads() for block in thread.context] for tree in trees
        ]
        characters = np.array([sum(map(len, texts)) for texts in blocks])
        counted = None if other is None else np.array([sum(len(other.encode(t)) for t in texts) for texts in blocks])
        found.append(Described(name, manifest[name], sample, characters, counted))
    return found


def table(found: list[Described]) -> str:
    """Return the statistics as text, some lines for each part."""
    lines = []
    for kind in found:
        c = kind.counts
        lines += [
            f"{kind.name}: {c['problems']} problems, solved by the solver {c['solved_by_solver'] / c['problems']:.1%}",
            f"  kept {c['trees']} trees, {c['solved'] / max(c['trees'], 1):.1%} of them solved; "
            f"dropped {c['too_long']} too long, {c['no_demonstration']} without a demonstration",
            f"  all kept trees: {c['tokens']} tokens; {c['unshared_tokens']} with prefixes repeated for every call "
            f"({c['unshared_tokens'] / max(c['tokens'], 1):.2f} times); {c['threads']} threads",
            f"  {'of ' + str(len(kind.characters)) + ' trees':<34} {'mean':>9} {'median':>9} {'95 %':>9} {'most':>9}",
        ]
        rows = dict(kind.sample) | {"characters": kind.characters}
        if kind.other_tokens is not None:
            rows["tokens of the other tokenizer"] = kind.other_tokens
        for title, values in rows.items():
            if not len(values):  # every tree was dropped
                continue
            numbers = (values.mean(), np.median(values), np.quantile(values, 0.95), values.max())
            lines.append(f"  {title:<34} " + " ".join(f"{number:>9.1f}" for number in numbers))
    return "\n".join(lines)


def draw(found: list[Described], path: Path) -> None:
    """Draw a PNG with a histogram of each quantity of training trees, one line per variant."""
    from matplotlib.figure import Figure

    from experiments.figures.style import COLOURS, LINES

    kinds = [kind for kind in found if kind.name.endswith("_train")]
    figure = Figure(figsize=(13, 7), layout="constrained")
    axes = figure.subplots(2, 3).flat
    for place, title in zip(axes, (*QUANTITIES, "solved")):
        if title not in QUANTITIES:
            bars = [kind.counts["solved"] / max(kind.counts["trees"], 1) for kind in kinds]
            for i, (kind, rate) in enumerate(zip(kinds, bars)):
                place.bar(i, 100 * rate, color=COLOURS[i], width=0.6)
                place.annotate(f"{100 * rate:.1f} %", (i, 100 * rate), ha="center", va="bottom")
            place.set_xticks(range(len(kinds)), [kind.name for kind in kinds])
            place.set(ylabel="kept trees that are solved (%)", ylim=(0, 110))
            continue
        top = max(kind.sample[title].max() for kind in kinds)
        edges = np.arange(-0.5, top + 1.5) if top <= 30 else np.linspace(0, top, 41)
        for i, kind in enumerate(kinds):
            values = kind.sample[title]
            weights = np.full(len(values), 100 / len(values))
            place.hist(
                values, edges, weights=weights, histtype="step", lw=1.8, label=kind.name,
                color=COLOURS[i % len(COLOURS)], ls=LINES[i % len(LINES)],
            )  # fmt: skip
        place.set(xlabel=f"{title} of a tree", ylabel="trees (%)")
    axes[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
