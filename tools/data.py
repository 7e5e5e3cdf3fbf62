"""Makes Countdown data sets, tells what is in them, and reads and writes the authors' files.

    python -m tools.data make --config=experiments/configs/paper.py --out=data/paper
    python -m tools.data make --config=experiments/configs/paper.py --out=data/paper --shard=3/16
    python -m tools.data stats data/paper --plot=lengths.png
    python -m tools.data stats data/paper --tokenizer=FOLDER    # counted in another tokenizer's tokens, too

`make` may be stopped and started again, with any number of processes, and ends in the same bytes. With
--shard=i/n it makes share i of n (0 to n - 1) in a folder that all shares see; whichever ends last writes the
manifest. A run reads the data set where its folder is the run's data/ folder.
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from tools import command

COMMANDS = ("make", "stats")


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("config", None, "make: an experiment's config file.", flag_values=values)
    flags.DEFINE_multi_string("set", [], "make: A.B=VALUE, changes one setting; repeat it.", flag_values=values)
    flags.DEFINE_string("out", None, "make: the folder to fill.", flag_values=values)
    flags.DEFINE_integer(
        "processes", 0, "make: how many at once; 0: one per core.", lower_bound=0, flag_values=values
    )
    flags.DEFINE_string("shard", "0/1", "make: share i of n, as 3/16.", flag_values=values)
    flags.DEFINE_string("plot", None, "stats: a PNG to draw.", flag_values=values)
    flags.DEFINE_string("tokenizer", None, "stats: count in its tokens, too (folder or name).", flag_values=values)
    flags.DEFINE_integer(
        "sample", 2000, "stats: trees of each kind looked at (evenly spread).", lower_bound=1, flag_values=values
    )


def _work(values: flags.FlagValues, arguments: Sequence[str]) -> None:
    if not arguments or arguments[0] not in COMMANDS:
        given = repr(arguments[0]) if arguments else "nothing"
        raise ValueError(f"the first word is one of {', '.join(COMMANDS)}, was given {given}")
    if arguments[0] == "make":
        if len(arguments) > 1:
            raise ValueError(f"no such argument: {arguments[1]!r}; settings are given as --set=A.B=VALUE")
        _make(values)
    else:
        if len(arguments) != 2:
            raise ValueError(f"stats takes one folder, {len(arguments) - 1} were given")
        _stats(Path(arguments[1]), values)


def _make(values: flags.FlagValues) -> None:
    from experiments.command import change_setting, load_config
    from experiments.dataset import make_data
    from experiments.settings import read_settings

    for name in ("config", "out"):
        if not values[name].value:
            raise ValueError(f"--{name} is needed, see --help")
    shard = read_shard(values["shard"].value)
    config = load_config(values["config"].value)
    for change in values["set"].value:
        change_setting(config, change)
    folder = Path(values["out"].value)
    manifest = make_data(read_settings(config), folder, values["processes"].value, shard)
    if manifest is None:
        print(f"share {shard[0]} of {shard[1]} is done; other shares of {folder} are missing")
        return
    for name, counts in manifest.items():
        if isinstance(counts, dict) and "trees" in counts:
            print(
                f"{name}: {counts['trees']} trees of {counts['problems']} problems "
                f"({counts['wrong']} wrong and {counts['too_long']} too long were dropped), {counts['tokens']} tokens"
            )
    print(f"{folder}: content {manifest['sha256']}")


def read_shard(text: str) -> tuple[int, int]:
    """(i, n) of "i/n". Raises ValueError."""
    match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
    if not match or not int(match[1]) < int(match[2]):
        raise ValueError(f"--shard is i/n with i from 0 to n - 1, was given {text!r}")
    return int(match[1]), int(match[2])


def _stats(folder: Path, values: flags.FlagValues) -> None:
    from apr_jax.text.hub import load_tokenizer
    from tools.statistics import describe, draw, table

    other = load_tokenizer(values["tokenizer"].value) if values["tokenizer"].value else None
    found = describe(folder, values["sample"].value, other)
    print(table(found))
    if values["plot"].value:
        draw(found, Path(values["plot"].value))
        print(f"drawn to {values['plot'].value}")


def main(argv: Sequence[str]) -> int:
    return command.run(__doc__, _define, _work, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
