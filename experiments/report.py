"""The report stage: a table of every evaluated model, figures, and the numbers behind them."""

import json
from collections.abc import Sequence
from pathlib import Path

from apr_jax.countdown.dataset import write_text
from apr_jax.evaluate.evaluate import Record, paired_difference, read_records, summarise
from apr_jax.paths import read_json
from experiments import figures
from experiments.dataset import load_manifest

TITLES = {"sft_sosp": "SoS+ SFT", "sft_apr": "APR SFT", "grpo_sosp": "SoS+ SFT+GRPO", "grpo_apr": "APR SFT+GRPO"}
HEADER = (
    "| model | accuracy (95 % interval) | claimed | right operations | total tokens | sequential tokens | children |"
    " threads cut by the window | malformed spawns | tokens trained |"
)


def records_name(name: str, temperature: float | None = None) -> str:
    """Of a model's records: the run's own, or those of a temperature that it was also evaluated at."""
    return name if temperature is None else f"{name}@{temperature:g}"


def write_report(workdir: Path, also_at: Sequence[float] = ()) -> str:
    """Writes report.md, summary.json and figures/ from what the run folder holds; returns the table, followed by those
    of the further temperatures `also_at`."""

    def read(temperature: float | None = None) -> dict[str, list[Record]]:
        names = {title: records_name(name, temperature) for name, title in TITLES.items()}
        paths = {title: workdir / "evaluate" / f"{name}.jsonl" for title, name in names.items()}
        return {title: read_records(path) for title, path in paths.items() if path.exists()}

    records = read()
    if not records:
        raise FileNotFoundError(f"no records under {workdir / 'evaluate'}: run --stage=evaluate first")
    metrics = {
        title: figures.read_metrics(path)
        for name, title in TITLES.items()
        if (path := workdir / name / "metrics.jsonl").exists()
    }
    trained = {TITLES[name]: _trained(metrics.get(TITLES[name], []), _step(workdir, name)) for name in TITLES}
    summaries = {title: summarise(rows) for title, rows in records.items()}
    lines = _table(records, summaries, trained)
    for temperature in also_at:
        if at := read(temperature):
            found = {title: summarise(rows) for title, rows in at.items()}
            lines += ["", f"At temperature {temperature:g}:", "", *_table(at, found, trained)]
            summaries |= {f"{title} at temperature {temperature:g}": one for title, one in found.items()}
    check = workdir / "export" / "check.json"
    if check.exists():
        found = read_json(check, "delete it and run --stage=export again")
        lines += ["", f"Export of {found['model']} against transformers: " + ", ".join(
            f"{name.replace('_', ' ')} {value:.2g}" if isinstance(value, float) else f"{name.replace('_', ' ')} {value}"
            for name, value in found.items() if name not in ("model", "step")
        )]  # fmt: skip
    manifest = load_manifest(workdir / "data")
    for style in ("sosp", "apr"):
        counts = manifest[f"{style}_train"]
        n = counts["problems"]
        lines.append(
            f"The {style} solver on {n} training problems: "
            f"right within the window {counts['solved'] / n:.1%}, "
            f"right {counts['solved_by_solver'] / n:.1%}, kept {counts['trees']} trees "
            f"({counts['too_long']} too long, {counts['wrong']} wrong), "
            f"{counts['tokens'] / counts['trees']:.0f} tokens a tree."
        )
    folder = workdir / "figures"
    folder.mkdir(exist_ok=True)
    figures.accuracy_bars(records, folder / "accuracy.png")
    figures.accuracy_against_window(records, folder / "accuracy_window.png")
    figures.accuracy_against_sequential(records, folder / "accuracy_sequential.png")
    figures.accuracy_against_total(records, folder / "accuracy_total.png")
    if sft := {title: rows for title, rows in metrics.items() if "GRPO" not in title}:
        figures.sft_losses(sft, folder / "sft_loss.png")
    if grpo := {title: rows for title, rows in metrics.items() if "GRPO" in title}:
        figures.grpo_rewards(grpo, folder / "grpo_reward.png")
    text = "\n".join(lines) + "\n"
    write_text(workdir / "summary.json", json.dumps(summaries, indent=1))
    write_text(workdir / "report.md", text)
    return text


# What GRPO changed in the paper (figures 5 and 7): 6.1 to 8.2 children, 1,471 to 1,796 tokens a sequence; SoS+ is one.
PAPER_CHANGES = {"APR": {"children": 0.344, "tokens a sequence": 0.221}, "SoS+": {"tokens a sequence": 2660 / 2201 - 1}}


def _table(records: dict[str, list[Record]], summaries: dict[str, dict], trained: dict[str, float]) -> list[str]:
    """A row for each model, and what GRPO changed on the same problems."""
    lines = [HEADER, "|" + " --- |" * HEADER.count(" | ") + " --- |"]
    lines += [_row(title, summaries[title], trained.get(title, 0.0)) for title in records]
    for style in ("SoS+", "APR"):
        before, after = f"{style} SFT", f"{style} SFT+GRPO"
        if {before, after} <= records.keys():
            mean, low, high, gained, lost = paired_difference(records[before], records[after])
            lines += ["", f"GRPO over {before} on the same problems: {100 * mean:+.1f} points "
                      f"({100 * low:+.1f} to {100 * high:+.1f}), {gained} gained, {lost} lost. "
                      + _changes(style, summaries[before], summaries[after])]  # fmt: skip
    return lines


def _changes(style: str, before: dict, after: dict) -> str:
    """What GRPO changed in the shape of trees, beside what it changed in the paper."""
    quantities = {
        "children": lambda s: s["children"],
        "tokens a sequence": lambda s: s["total_tokens"] / (1 + s["children"]),
    }
    parts = []
    for name, theirs in PAPER_CHANGES[style].items():
        old, new = quantities[name](before), quantities[name](after)
        change = f"{100 * (new / old - 1):+.1f} %" if old else "from none"
        parts.append(f"{name} {old:.1f} to {new:.1f} ({change}; paper {100 * theirs:+.1f} %)")
    return "; ".join(parts).capitalize() + "."


def _row(title: str, s: dict, trained: float) -> str:
    malformed = ", ".join(f"{kind} {count}" for kind, count in s["malformed"].items()) or "none"
    return (
        f"| {title} | {s['accuracy']:.1%} ({s['accuracy_low']:.1%} to {s['accuracy_high']:.1%}), n={s['n']}"
        f" | {s['claimed']:.1%} | {s['operations_right']:.1%} | {s['total_tokens']:.0f} | {s['sequential_tokens']:.0f}"
        f" | {s['children']:.1f} | {s['failures'].get('length', 0)} | {malformed} | {trained / 1e6:.2f} M |"
    )


def _step(workdir: Path, name: str) -> float:
    """The step of the weights that were evaluated: the last, or with validation the best."""
    stamp = workdir / "evaluate" / f"{name}.stamp.json"
    return read_json(stamp, "delete it and run --stage=evaluate again")["step"] if stamp.exists() else float("inf")


def _trained(rows: list[dict], last: float) -> float:
    """Tokens that went through training up to a step: SFT logs those of one step every few, GRPO of every step."""
    rows = [row for row in rows if row["step"] <= last]
    steps = [row for row in rows if "tokens" in row]
    if steps:
        return steps[-1]["step"] * sum(row["tokens"] for row in steps) / len(steps)
    return sum(row.get("train/tokens", 0) for row in rows)
