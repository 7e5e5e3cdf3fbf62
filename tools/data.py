"""Makes data sets, prints statistics of them, and reads and writes files of other programs.

    python -m tools.data make --config=experiments/configs/paper.py --out=data/paper
    python -m tools.data make --config=experiments/configs/paper.py --out=data/paper --shard=3/16
    python -m tools.data stats data/paper --plot=lengths.png
    python -m tools.data stats data/paper --tokenizer=FOLDER    # also counts the tokens of another tokenizer
    python -m tools.data import --task=countdown train_apr.json train_sosp.json --held_out=val.json --out=data/authors
    python -m tools.data export data/paper/apr_train --out=train_apr.json

`make` can be stopped and started again, with any number of processes, and makes the same bytes. With --shard=i/n it
makes part i of n (0 to n - 1) in a folder that all parts share; the part that ends last writes the manifest. A run
uses the data set if its folder is the run's data/ folder. `import` and `export` read and write the file formats that
the task supports: for Countdown these are the JSON files of traces of the paper's authors.
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from apr_jax.errors import UserError
from tools import command

COMMANDS = ("make", "stats", "import", "export")


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("config", None, "make: an experiment's config file.", flag_values=values)
    flags.DEFINE_multi_string("set", [], "make: A.B=VALUE, changes one setting; repeat it.", flag_values=values)
    flags.DEFINE_string("task", None, "import: whose files they are, NAME or package.module:Class.", flag_values=values)
    flags.DEFINE_string("out", None, "make, import, export: what to write.", flag_values=values)
    flags.DEFINE_integer("processes", 0, "make: how many at once; 0: one per core.", lower_bound=0, flag_values=values)
    flags.DEFINE_string("shard", "0/1", "make: share i of n, as 3/16.", flag_values=values)
    flags.DEFINE_string("plot", None, "stats: a PNG to draw.", flag_values=values)
    tokenizer = "stats: count in its tokens, too; import: in place of ours (a Hugging Face folder or name)."
    flags.DEFINE_string("tokenizer", None, tokenizer, flag_values=values)
    flags.DEFINE_string("held_out", None, "import: a file of problems that nothing may train on.", flag_values=values)
    flags.DEFINE_integer("window", 4096, "import: most tokens of a thread.", lower_bound=1, flag_values=values)
    flags.DEFINE_integer(
        "sample", 2000, "stats: trees of each kind looked at (evenly spread).", lower_bound=1, flag_values=values
    )


def _work(values: flags.FlagValues, arguments: Sequence[str]) -> None:
    if not arguments or arguments[0] not in COMMANDS:
        given = repr(arguments[0]) if arguments else "nothing"
        raise UserError(f"the first word is one of {', '.join(COMMANDS)}, was given {given}")
    if arguments[0] in ("make", "import", "export"):
        command.need(values, "out")
    if arguments[0] == "import":
        _import([Path(name) for name in arguments[1:]], values)
    elif arguments[0] == "export":
        command.check_arguments(arguments, ["export", "FOLDER"])
        _export(Path(arguments[1]), Path(values["out"].value))
    elif arguments[0] == "make":
        if len(arguments) > 1:
            raise UserError(f"no such argument: {arguments[1]!r}; settings are given as --set=A.B=VALUE")
        _make(values)
    else:
        command.check_arguments(arguments, ["stats", "FOLDER"])
        _stats(Path(arguments[1]), values)


def _make(values: flags.FlagValues) -> None:
    from experiments.command import change_settings, load_config
    from experiments.settings import read_settings
    from experiments.stages.data import make_data

    command.need(values, "config")
    shard = read_shard(values["shard"].value)
    settings = read_settings(change_settings(load_config(values["config"].value), values["set"].value))
    folder = Path(values["out"].value)
    manifest = make_data(settings, folder, values["processes"].value, shard)
    if manifest is None:
        print(f"share {shard[0]} of {shard[1]} is done; other shares of {folder} are missing")
        return
    _print_counts(manifest)
    print(f"{folder}: content {manifest['sha256']}")


def _print_counts(manifest: dict) -> None:
    for name, counts in manifest.items():
        if isinstance(counts, dict) and "trees" in counts:
            print(
                f"{name}: {counts['trees']} trees of {counts['problems']} problems "
                f"({counts['no_demonstration']} without a demonstration and {counts['too_long']} too long were dropped"
                + (f", {counts['held_out']} of held-out problems" if "held_out" in counts else "")
                + f"), {counts['tokens']} tokens"
            )


def _import(files: Sequence[Path], values: flags.FlagValues) -> None:
    from apr_jax.data.imported import import_dataset
    from apr_jax.tasks.task import load_task

    if not files:
        raise UserError("import takes one file of traces or more, none was given")
    for path in filter(None, (*files, values["held_out"].value)):  # before hours of reading those before it
        Path(path).open("rb").close()
    if not values["held_out"].value:
        raise UserError("--held_out=FILE is needed, problems that nothing may train on: evaluation is on them")
    if not values["task"].value:
        raise UserError("--task=NAME is needed: whose files they are")
    task = load_task(values["task"].value)
    held_out = task.read_problems(Path(values["held_out"].value))
    trees = (tree for path in files for tree in task.read_demonstrations(path))
    tokenizer, window = values["tokenizer"].value or "", values["window"].value
    _print_counts(import_dataset(task, trees, held_out, Path(values["out"].value), window=window, tokenizer=tokenizer))


def _export(folder: Path, out: Path) -> None:
    from apr_jax.data.dataset import read_manifest
    from apr_jax.data.store import TreeStore
    from apr_jax.tasks.task import load_task
    from apr_jax.text.hub import load_tokenizer
    from apr_jax.threads import decode_tree

    if (manifest := read_manifest(folder.parent)) is None:
        raise FileNotFoundError(f"no finished data set at {folder.parent}: it has no manifest.json")
    config = manifest["config"]
    task, store = load_task(config["task"], config["settings"]), TreeStore(folder)
    words = load_tokenizer(config["tokenizer"] or str(folder.parent / "tokenizer.json"))
    task.write_demonstrations(out, (decode_tree(tree, words.decode) for tree in store), words)
    print(f"written to {out}: {len(store)} trees")


def read_shard(text: str) -> tuple[int, int]:
    """Parse "i/n" and return (i, n). Raises UserError unless 0 <= i < n."""
    match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
    if not match or not int(match[1]) < int(match[2]):
        raise UserError(f"--shard is i/n with i from 0 to n - 1, was given {text!r}")
    return int(match[1]), int(match[2])


def _stats(folder: Path, values: flags.FlagValues) -> None:
    from apr_jax.text.hub import load_tokenizer
    from tools.statistics import describe, draw, table

    plot = values["plot"].value
    if plot and Path(plot).suffix.lower() != ".png":
        raise UserError(f"--plot is a PNG to draw, NAME.png, was given {plot}")
    other = load_tokenizer(values["tokenizer"].value) if values["tokenizer"].value else None
    found = describe(folder, values["sample"].value, other)
    print(table(found))
    if plot:
        draw(found, Path(plot))
        print(f"drawn to {plot}")


def main(argv: Sequence[str]) -> int:
    return command.run(__doc__, _define, _work, argv, takes=None)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
