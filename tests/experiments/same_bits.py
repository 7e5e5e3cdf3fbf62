"""Hashes of what runs produce, to see whether a change of the code changed any result.

    python -m tests.experiments.same_bits record FILE     # runs the presets and writes FILE
    python -m tests.experiments.same_bits compare FILE    # runs them again, and prints what differs from FILE

Data sets have the same bytes on every machine. Weights and trees have the same bits only on one kind of processor. On
another kind than the recorded one, record with the old code first: `git worktree add ../old 2f24e3c`, and this command
there. (In that commit files had just been moved, nothing else had changed.)
"""

import hashlib
import io
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from apr_jax.train.checkpoint import fingerprint, load_model

ROOT = Path(__file__).resolve().parents[2]
# After so few steps a model never answers right. A penalty on tokens gives GRPO something to learn.
SMOKE = {"grpo.penalties.token": 0.001}
LAPTOP = {"sft.steps": 40, "grpo.steps": 2, "grpo.prompts": 2, "grpo.group": 3, "data.held_out": 20, **SMOKE}
# Settings of data that no preset has: other solvers, orders and splits.
OTHER_DATA = {
    "countdown.sos_plus.search": "sos", "countdown.apr.shuffle": True, "countdown.apr.distinct": False,
    "countdown.sos_plus.shuffle": True, "countdown.problems.count": 4, "data.repeats": False,
    "countdown.unseen_targets": 0.2, "countdown.problems.max_number": 20, "seed": 3,
}  # fmt: skip


def record() -> dict:
    """Return the hashes by name, and the processor that they are valid for."""
    found = {"processor": processor()}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        _run("smoke", place / "smoke", SMOKE, "data,sft,grpo,evaluate")
        _run("smoke", place / "other", OTHER_DATA, "data")
        _run("laptop", place / "laptop", {}, "data")
        _run("laptop", place / "few", LAPTOP, "data,sft,grpo,evaluate")
        for name in ("smoke", "other", "laptop", "few"):
            found[f"{name} data"] = _data(place / name / "data")
        for name in ("smoke", "few"):
            for stage in ("sft_sos_plus", "sft_apr", "grpo_apr"):
                model, _ = load_model(place / name / stage / "checkpoints")
                found[f"{name} {stage}"] = fingerprint(model)
            for path in sorted((place / name / "evaluate").glob("*.jsonl")):
                found[f"{name} evaluate {path.stem}"] = _trees(path)
    return found


def _run(preset: str, workdir: Path, changes: dict, stages: str) -> None:
    """Run stages of a preset with changed settings."""
    command = [sys.executable, "-m", "experiments.run", f"--config=experiments/configs/{preset}.py"]
    command += [
        f"--workdir={workdir}",
        f"--stage={stages}",
        *(f"--config.{key}={value}" for key, value in changes.items()),
    ]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def _data(folder: Path) -> str:
    """Return the hash of a Countdown data set.

    The problems of a split are hashed as one array of numbers, the form of the first data sets, so that data sets of
    all forms can be compared.
    """
    digest = hashlib.sha256()
    for variant in ("sos_plus", "apr"):
        for part in ("validation", "train"):
            for shard in sorted((folder / f"{variant}_{part}").iterdir()):
                digest.update(json.loads((shard / "shard.json").read_text())["sha256"].encode())
    for split in ("train", "held_out"):
        rows = [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]
        file = io.BytesIO()
        np.save(file, np.array([[*row["numbers"], row["target"]] for row in rows], np.int32))
        digest.update(file.getvalue())
    return digest.hexdigest()


def _trees(path: Path) -> str:
    """Return the hash of the trees in a file of records: tokens, log-probabilities, failures and whether they are
    right."""
    digest = hashlib.sha256()
    for line in path.read_text().splitlines():
        row = json.loads(line)
        kept = [row[key] for key in ("index", "problem", "condition", "correct", "sequential_tokens", "steps_right")]
        digest.update(json.dumps([*kept, row["tree"]["root"]], sort_keys=True).encode())
    return digest.hexdigest()[:16]


def processor() -> str:
    """Return the processor's family and vector instructions, which decide the bits of a matrix product."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines())
    except (OSError, ValueError):
        return platform.processor() or platform.machine()
    fields = {key.strip(): value.strip() for key, value in lines.items()}
    flags = {flag for flag in fields.get("flags", "").split() if flag.startswith(("avx", "amx", "fma"))}
    return f"{fields.get('vendor_id')} {fields.get('cpu family')}/{fields.get('model')}: {' '.join(sorted(flags))}"


def differences(before: dict, after: dict) -> list[str]:
    """Return one line for each hash that changed.

    On another processor only the hashes of data sets are compared.
    """
    same_machine = before["processor"] == after["processor"]
    before = {name.replace("sosp", "sos_plus"): value for name, value in before.items()}  # the variant's old name
    names = [name for name in before if name != "processor" and (same_machine or name.endswith(" data"))]
    return [
        f"{name}: {before[name]} before, {after.get(name)} now" for name in names if before[name] != after.get(name)
    ]


if __name__ == "__main__":
    action, file = sys.argv[1:]
    if action == "record":
        Path(file).write_text(json.dumps(record(), indent=1) + "\n")
    else:
        found = differences(json.loads(Path(file).read_text()), record())
        print("\n".join(found) or "all the same")
        sys.exit(bool(found))
