"""Measures the speed and memory of making a data set: problems, SoS+ traces and APR trees, tokenized and stored.

    python -m tools.benchmarks.dataset --problems=20000 --processes=2
    python -m tools.benchmarks.dataset --problems=500000 --processes=2 --out=experiments/results/data/speed.json

All settings are the paper's: 4 numbers from 1 to 99, targets from 10 to 100, the solvers' settings, a window of 4,096.
Memory is the proportional set size of all processes together, sampled twice a second; the largest sample is reported.
"""

import os
import platform
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from tools import command


class MemoryWatch(threading.Thread):
    """A thread that samples the memory of this process and its children. `stop` returns the largest sum, in bytes."""

    def __init__(self):
        super().__init__(daemon=True)
        self.most, self._over = 0, threading.Event()

    def run(self) -> None:
        import psutil

        me = psutil.Process()
        while not self._over.wait(0.5):
            total = 0
            for process in (me, *me.children(recursive=True)):
                try:
                    total += process.memory_full_info().pss
                except psutil.Error:  # the process has just ended
                    continue
            self.most = max(self.most, total)

    def stop(self) -> int:
        self._over.set()
        self.join()
        return self.most


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_integer("problems", 20_000, "Training problems.", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("processes", os.cpu_count(), "Processes.", lower_bound=1, flag_values=values)
    folder = "Folder of the data set, which is kept. Default: a temporary folder."
    flags.DEFINE_string("folder", None, folder, flag_values=values)
    flags.DEFINE_string("out", None, "JSON file to write the measurements to.", flag_values=values)


def _work(values: flags.FlagValues, arguments: Sequence[str]) -> None:

    from apr_jax.data.dataset import DataConfig, make_dataset
    from apr_jax.io.progress import Progress
    from experiments.command import load_config
    from experiments.settings import read_settings

    count, processes = values["problems"].value, values["processes"].value
    settings = read_settings(load_config("experiments/configs/paper.py")).task.settings
    config = DataConfig("countdown", settings, count, 1000, window=4096)
    folder = Path(values["folder"].value or tempfile.mkdtemp(prefix="apr_data_"))
    marks = {}

    def progress(title, total, unit):
        marks.setdefault(title, time.monotonic())
        return Progress(title, total, unit)

    watch = MemoryWatch()
    watch.start()
    began = time.monotonic()
    manifest = make_dataset(config, folder, processes=processes, progress=progress)
    seconds = time.monotonic() - began
    memory = watch.stop()
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    tokens = sum(manifest[f"{variant}_train"]["tokens"] for variant in ("apr", "sos_plus"))
    found = {
        "problems": count,
        "processes": processes,
        "seconds": round(seconds, 1),
        "seconds_of_problems": round(marks["data trees"] - began, 1),
        "problems_per_second": round(count / seconds, 1),
        "tokens": tokens,
        "tokens_per_second": round(tokens / seconds),
        "minutes_for_500000": round(500_000 / count * seconds / 60, 1),
        "peak_memory_MiB": round(memory / 2**20),
        "bytes_on_disk": size,
        "bytes_per_token": round(size / tokens, 3),
        "sha256": manifest["sha256"],
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
        "date": time.strftime("%Y-%m-%d"),
    }
    for name, value in found.items():
        print(f"{name.replace('_', ' '):<24} {value}")
    command.write_json(values["out"].value, found)
    if not values["folder"].value:
        shutil.rmtree(folder)


def main(argv: Sequence[str]) -> int:
    return command.run(__doc__, _define, _work, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
