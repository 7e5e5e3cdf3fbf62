"""The report stage: a table of every evaluated model, figures, and the numbers behind them."""

import json
from collections.abc import Mapping, Sequence, Set
from pathlib import Path

from apr_jax.data.folder import DataFolder
from apr_jax.errors import UserError
from apr_jax.evaluate.records import Record, read_records
from apr_jax.evaluate.statistics import paired_difference, summarise
from apr_jax.io.files import write_text
from apr_jax.io.paths import read_json
from apr_jax.tasks.task import Task
from apr_jax.train.checkpoint import fingerprint, last_step, load_model
from experiments.figures import accuracy, training
from experiments.figures.style import read_metrics
from experiments.stages import evaluate, export, models, trained
from experiments.stages.evaluate import records_name
from experiments.stages.run import Run
from experiments.workspace import NOTE

STAGES = {"sft": "SFT", "grpo": "SFT+GRPO"}  # training stages, with the titles of their models
FIGURES = ("accuracy", "accuracy_window", "accuracy_sequential", "accuracy_total", "sft_loss", "grpo_reward")
FILES = ("report.md", "summary.json", *(f"figures/{name}.png" for name in FIGURES))  # all that this stage writes
JOINT = "sft_joint"  # folder of the one supervised model of all variants, if sft.models is "joint"
HEADER = (
    "| model | accuracy (95 % interval) | answered | step accuracy | total tokens | sequential tokens | children |"
    " threads cut by the window | malformed spawns | tokens trained |"
)


def run(run: Run) -> None:
    """Link the results in the store for the run's settings and current weights, and report them."""
    unfinished, in_training = {}, set()
    for name, step in trained.saved(run, run.task.variants).items():
        reached, steps = models.reached(run, name, step.parent.parent)
        if reached < steps:
            in_training.add(name)
        weights = models.weights(run, step)
        for question in evaluate.questions(run, name.partition("_")[2]):
            output = evaluate.output(run, name, weights, question)
            run.workspace.connect(output)
            if (partial := output.path.with_name(output.path.name + ".partial")).exists():
                unfinished[question.records(name)] = partial
    if found := export.exported(run):
        name, step = found
        run.workspace.connect(export.output(run, name, models.weights(run, step)))
    asked = run.settings.evaluate
    temperatures, budgets = asked.extra_temperatures, asked.budgets
    print(write_report(run.dataset, run.workdir, temperatures, run.fingerprints, budgets, unfinished, in_training))


def write_report(
    dataset: DataFolder, workdir: Path, extra_temperatures: Sequence[float] = (), weights: Mapping[Path, str] = {},
    budgets: Mapping[str, Sequence[int]] = {}, unfinished: Mapping[str, Path] = {}, in_training: Set[str] = frozenset(),
) -> str:  # fmt: skip
    """Write report.md, summary.json and figures/ from the run folder, and return the report's text.

    The first table is of the main records. Further tables are for `extra_temperatures`, and for a variant's `budgets`
    after its first. `weights` has fingerprints of saved steps that the caller has read already. `unfinished` has the
    files of evaluations that were stopped, by the records' name. `in_training` has the names of models whose training
    has not ended: their records may be those of an earlier step.

    Raises UserError if records were made with other weights than the model has now, and FileNotFoundError if there are
    no records. If the weights of a model were deleted, its row stays, and the report says so.
    """
    task = dataset.task
    plain = {
        f"{stage}_{variant}": f"{task.title(variant)} {title}"
        for stage, title in STAGES.items()
        for variant in task.variants
    }
    present: dict[str, str | None] = {}  # fingerprints of the current weights; None: deleted
    first = {variant: (budgets.get(variant) or (None,))[0] for variant in task.variants}
    notes = {
        name: _read_note(workdir / "evaluate" / f"{records_name(name, None, first[name.partition('_')[2]])}.jsonl")
        for name in plain
    }
    titles = {name: title + _position(notes[name]) for name, title in plain.items()}

    def read(temperature: float | None = None, asked: Mapping[str, int | None] = first) -> dict[str, list[Record]]:
        found = {}
        for name, title in titles.items():
            variant = name.partition("_")[2]
            path = workdir / "evaluate" / f"{records_name(name, temperature, asked.get(variant))}.jsonl"
            if variant not in asked or not path.exists():
                continue
            found[title] = read_records(path)
            if name not in present:
                present[name] = _present(workdir / name, weights)
            if (
                name not in in_training
                and present[name]
                and {record.weights for record in found[title]} != {present[name]}
            ):
                raise UserError(f"{path} is of other weights than {name} has now: run --stage=evaluate again")
        return found

    records = read()
    if not records:
        raise FileNotFoundError(f"no records under {workdir / 'evaluate'}: run --stage=evaluate first")
    gone = [
        line for name, digest in present.items() if digest is None
        for line in ("", f"The weights of {titles[name]} are no longer in {name}/: its row is from records only.")
    ]  # fmt: skip
    joint = workdir / JOINT / "metrics.jsonl"  # variants have this model at step 0, without metrics of their own
    logs = {name: workdir / name / "metrics.jsonl" for name in plain}
    logs |= {name: joint for name, path in logs.items() if name.startswith("sft_") and not path.exists()}
    metrics = {titles[name]: read_metrics(path) for name, path in logs.items() if path.exists()}
    last = {name: float("inf") if logs[name] == joint else notes[name].get("step", float("inf")) for name in plain}
    trained = {titles[name]: _trained(metrics.get(titles[name], []), last[name]) for name in plain}
    summaries = {title: summarise(rows) for title, rows in records.items()}
    problems = dataset.manifest["held_out_problems"]
    lines = _table(task, records, summaries, trained, problems) + gone + _unfinished(unfinished, problems)
    further = [(temperature, first) for temperature in extra_temperatures]
    for variant, asked in budgets.items():
        temperatures = (None, *extra_temperatures)
        further += [(temperature, {variant: budget}) for budget in asked[1:] for temperature in temperatures]
    for temperature, asked in further:
        if at := read(temperature, asked):
            found = {title: summarise(rows) for title, rows in at.items()}
            where = [] if temperature is None else [f"at temperature {temperature:g}"]
            if asked is not first:
                where.append(f"with {next(iter(found.values()))['condition'].strip()}")
            where = ", ".join(where)
            lines += ["", f"{where[0].upper()}{where[1:]}:", "", *_table(task, at, found, trained, problems)]
            summaries |= {f"{title} {where}": one for title, one in found.items()}
    check = workdir / "export" / "check.json"
    if check.exists():
        mend = "delete it and run --stage=export again"
        found = read_json(check, mend)
        if found.get("model") not in plain:
            raise UserError(f"{check} is broken: {mend}")
        if found.get("weights") != (_present(workdir / found["model"], weights) or found.get("weights")):
            lines += ["", f"The export is of other weights than {found['model']} has now: run --stage=export again."]
        else:
            compared = ", ".join(
                f"{name.replace('_', ' ')} {value:.2g}" if isinstance(value, float)
                else f"{name.replace('_', ' ')} {value}"
                for name, value in found.items() if name not in ("model", "step", "weights")
            )  # fmt: skip
            if compared:
                lines += ["", f"Export of {found['model']} against transformers: {compared}"]
    for variant in task.variants:
        counts, title = dataset.manifest.get(f"{variant}_train", {}), task.title(variant)
        if not counts.get("trees"):
            continue  # an imported data set may lack a variant, and a variant may have none
        n = counts["problems"]
        lines.append(
            f"The {title} demonstrations of {n} training problems: "
            f"right within the window {counts['solved'] / n:.1%}, "
            f"right {counts['solved_by_solver'] / n:.1%}, kept {counts['trees']} trees "
            f"({counts['too_long']} too long, {counts['no_demonstration']} without one), "
            f"{counts['tokens'] / counts['trees']:.0f} tokens a tree."
        )
        if left_out := max(
            (row.get("threads_too_long", 0) for row in metrics.get(titles[f"sft_{variant}"], ())), default=0
        ):
            lines.append(f"SFT left out {left_out} {title} threads that are longer than a row.")
    folder = workdir / "figures"
    folder.mkdir(exist_ok=True)
    accuracy.accuracy_bars(records, folder / "accuracy.png")
    accuracy.accuracy_against_window(records, folder / "accuracy_window.png")
    accuracy.accuracy_against_sequential(records, folder / "accuracy_sequential.png")
    accuracy.accuracy_against_total(records, folder / "accuracy_total.png")
    for stage, draw, name in (("sft", training.sft_losses, "sft_loss"), ("grpo", training.grpo_rewards, "grpo_reward")):
        shown = {titles[f"{stage}_{variant}"] for variant in task.variants}
        if rows := {title: rows for title, rows in metrics.items() if title in shown}:
            draw(rows, folder / f"{name}.png")
    text = "\n".join(lines) + "\n"
    write_text(workdir / "summary.json", json.dumps(summaries, indent=1))
    write_text(workdir / "report.md", text)
    return text


def _read_note(records: Path) -> dict:
    """Return the note (made_of.json) on a file of records, with the step of the weights that were evaluated.

    Return {} if there are no records. Raises UserError if the note is broken.
    """
    path = records.resolve().parent / NOTE
    mend = "delete it and run --stage=evaluate again"
    note = read_json(path, mend) if records.exists() and path.exists() else {}
    if not all(isinstance(note.get(name, 0), int) for name in ("step", "steps")):
        raise UserError(f"{path} is broken: {mend}")
    return note


def _position(note: dict) -> str:
    """Return " (step 20 of 40)" for a model that was evaluated before the end of its training, and "" for any other."""
    return "" if note.get("finished", True) else f" (step {note['step']} of {note['steps']})"


def _present(stage: Path, weights: Mapping[Path, str]) -> str | None:
    """Return the fingerprint of the last weights in a stage's folder, or None if it has no weights."""
    if (step := last_step(stage)) is None:
        return None
    return weights.get(step.resolve()) or fingerprint(load_model(step.parent)[0])


def _unfinished(partial: Mapping[str, Path], problems: int) -> list[str]:
    """Return a line for each evaluation that was stopped, since it has no row yet."""
    lines = []
    for name, path in sorted(partial.items()):
        ran = path.read_text(errors="replace").count("\n")
        lines += ["", f"The evaluation of {name} is not finished: {ran} of {problems} problems ran."]
    return lines


def _table(
    task: Task, records: dict[str, list[Record]], summaries: dict[str, dict], trained: dict[str, float], problems: int
) -> list[str]:
    """Return the lines of a table with a row for each model, and of what GRPO changed on the same problems."""
    lines = [HEADER, "|" + " --- |" * HEADER.count(" | ") + " --- |"]
    lines += [_row(title, summaries[title], trained.get(title, 0.0), problems) for title in records]
    for condition in dict.fromkeys(s["condition"] for s in summaries.values() if s["condition"]):
        those = ", ".join(title for title, s in summaries.items() if s["condition"] == condition)
        lines += ["", f"Prompts of {those} began with {condition.strip()!r}."]
    for variant in task.variants:
        before, after = (
            next((title for title in records if _is_of(title, f"{task.title(variant)} {stage}")), None)
            for stage in STAGES.values()
        )
        if before and after:
            if [record.problem for record in records[before]] != [record.problem for record in records[after]]:
                raise UserError(
                    f"the records of {before} and {after} are of other problems: run --stage=evaluate again"
                )
            mean, low, high, gained, lost = paired_difference(records[before], records[after])
            lines += ["", f"GRPO over {before} on the same problems: {100 * mean:+.1f} points "
                      f"({100 * low:+.1f} to {100 * high:+.1f}), {gained} gained, {lost} lost. "
                      + _changes(task.published_changes(variant), summaries[before], summaries[after])]  # fmt: skip
    return lines


def _is_of(title: str, plain: str) -> bool:
    """Return whether a title is the plain title, alone or followed by a step as in `_position`."""
    return title == plain or title.startswith(f"{plain} (step ")


def _changes(published: Mapping[str, float], before: dict, after: dict) -> str:
    """Return how GRPO changed the number of children and the tokens per sequence, beside published changes.

    A sequence is one thread. `published` has the paper's changes as fractions, by quantity.
    """
    quantities = {
        "children": lambda s: s["children"],
        "tokens a sequence": lambda s: s["total_tokens"] / (1 + s["children"]),
    }
    parts = []
    for name, quantity in quantities.items():
        old, new = quantity(before), quantity(after)
        if old == new == 0:
            continue  # a model that has no children
        change = f"{100 * (new / old - 1):+.1f} %" if old else "from none"
        theirs = f"; paper {100 * published[name]:+.1f} %" if name in published else ""
        parts.append(f"{name} {old:.1f} to {new:.1f} ({change}{theirs})")
    return "; ".join(parts).capitalize() + "."


def _row(title: str, s: dict, trained: float, problems: int) -> str:
    """Return the row of a model."""
    malformed = ", ".join(f"{kind} {count}" for kind, count in s["malformed"].items()) or "none"
    steps = "-" if s["step_accuracy"] is None else f"{s['step_accuracy']:.1%}"  # a task may not have steps
    return (
        f"| {title} | {s['accuracy']:.1%} ({s['accuracy_low']:.1%} to {s['accuracy_high']:.1%}),"
        f" n={s['n']} of {problems}"
        f" | {s['answered']:.1%} | {steps} | {s['total_tokens']:.0f} | {s['sequential_tokens']:.0f}"
        f" | {s['children']:.1f} | {s['failures'].get('length', 0)} | {malformed} | {trained / 1e6:.2f} M |"
    )


def _trained(rows: list[dict], last: float) -> float:
    """Return the number of tokens that went through training up to the step `last`.

    GRPO logs the tokens of every step. SFT logs the tokens of single steps, so their mean is multiplied by the steps.
    """
    rows = [row for row in rows if row["step"] <= last]
    steps = [row for row in rows if "tokens" in row]
    if steps:
        return steps[-1]["step"] * sum(row["tokens"] for row in steps) / len(steps)
    return sum(row.get("train/tokens", 0) for row in rows)
