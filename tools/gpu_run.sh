#!/usr/bin/env bash
# Runs the paper's task on one GPU, in two commands of some minutes each (experiments/configs/h200.py).
#
#   tools/gpu_run.sh train OUT SECONDS [--config.x=y ...]   data, SFT for SECONDS, its evaluation, then GRPO of APR
#   tools/gpu_run.sh finish OUT [--config.x=y ...]          evaluation of GRPO; SFT and GRPO with enforced children
#
# The tokens that SECONDS of SFT can train on are measured first, on other problems, while the data set is made. Runs
# are stored under runs/. OUT gets reports, metrics, records without log-probabilities, and bfloat16 weights in parts of
# 15 MB; `cat OUT/weights_* | tar x` restores a Hugging Face folder for tools.import_hf. GRPO ends after GRPO_SECONDS
# (120). Engines run one after the other: with these slots two do not fit a GPU of 80 GB (tried).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PART=$1 OUT=$2
shift 2
PYTHON=${PYTHON:-python3}
CONFIG=experiments/configs/h200.py
RUN=runs/h200
STORE=runs/store # one for all runs here: they share data and models
export XLA_PYTHON_CLIENT_PREALLOCATE=false PYTHONUNBUFFERED=1
export XLA_FLAGS="${XLA_FLAGS---xla_gpu_enable_triton_gemm=false --xla_gpu_autotune_level=0}"

mkdir -p "$OUT" runs
began=$SECONDS

say() { echo "[$((SECONDS - began)) s] $*" | tee -a "$OUT/log.txt"; }

run() { # LOG arguments: runs the preset
  local log=$OUT/$1.txt
  shift
  "$PYTHON" -m experiments.run --config=$CONFIG --store=$STORE "$@" >"$log" 2>&1 || { say "failed ($?): $*"; tail -n 5 "$log"; return 1; }
}

rate() { # ROWS: prints the useful tokens per second of the probe with ROWS rows, without its compilation
  "$PYTHON" - "runs/probe$1/sft_joint/metrics.jsonl" <<'PY'
import json, sys
rows = [row for row in map(json.loads, open(sys.argv[1])) if "tokens_per_second" in row]
tokens = sum(row["tokens"] for row in rows) / len(rows)
first, last = rows[0], rows[-1]
seconds = [row["step"] * tokens / row["tokens_per_second"] for row in (first, last)]
print(round(tokens * (last["step"] - first["step"]) / (seconds[1] - seconds[0])))
PY
}

weights() { # CHECKPOINTS NAME: writes bfloat16 weights in parts
  local folder
  folder=$(mktemp -d)
  "$PYTHON" -m tools.export_hf --checkpoint="$1" --out="$folder/$2" --dtype=bfloat16 --check=0
  tar c -C "$folder" "$2" | split -b 15m - "$OUT/weights_$2_"
}

results() { # NAME FOLDER: copies the small files of a run
  "$PYTHON" - "$2" <<'PY'
import json, pathlib, sys
for path in pathlib.Path(sys.argv[1], "evaluate").glob("*.jsonl"):  # as published: ids, but no log-probabilities
    def bare(x):
        if isinstance(x, dict):
            return {k: bare(v) for k, v in x.items() if k not in ("logprobs", "model_logprobs")}
        return [bare(v) for v in x] if isinstance(x, list) and x and isinstance(x[0], dict) else x
    path.with_suffix(".bare").write_text("".join(json.dumps(bare(json.loads(line))) + "\n" for line in path.open()))
PY
  (cd "$2" && tar ch --exclude=tensorboard $(ls -d config.json versions.json report.md summary.json figures \
    data/manifest.json data/tokenizer.json evaluate/*.bare */metrics.jsonl 2>/dev/null)) |
    xz -T0 -3 >"$OUT/$1.tar.xz"
  cp "$2/report.md" "$OUT/report_$1.md"
}

train() { # SECONDS arguments
  local seconds=$1 rows=16 few many
  shift
  run small "$@" --stage=data --workdir=runs/probe16 --config.data.train=3000 --config.data.held_out=100
  nice -n 10 "$PYTHON" -m experiments.run --config=$CONFIG --store=$STORE "$@" --stage=data --workdir=${RUN}_data \
    >"$OUT/data.txt" 2>&1 &
  local data=$!
  for probed in 16 32; do
    run probe$probed "$@" --stage=sft --workdir=runs/probe$probed --config.data.train=3000 --config.data.held_out=100 \
      --config.sft.batch_rows=$probed --config.sft.steps=${PROBE_STEPS:-160} --config.sft.tokens=0 \
      --config.sft.log_every=${PROBE_EVERY:-20}
  done
  few=$(rate 16) many=$(rate 32)
  if ((few * 100 < many * 85)); then rows=32; fi # smaller steps learn more per token
  local per_second=$few
  if ((rows == 32)); then per_second=$many; fi
  say "useful tokens a second: 16 rows $few, 32 rows $many; takes $rows rows"
  wait $data
  say "data"
  set -- "$@" --config.sft.batch_rows=$rows --config.sft.tokens=$((per_second * seconds))
  printf '%s\n' "$@" >runs/arguments
  run sft "$@" --stage=sft --workdir=$RUN
  say "sft"
  weights $RUN/sft_apr/checkpoints sft &
  run evaluate_sft "$@" --stage=evaluate,report --workdir=$RUN
  results train $RUN
  say "evaluated"
  timeout -s TERM "${GRPO_SECONDS:-120}" "$PYTHON" -m experiments.run --config=$CONFIG --store=$STORE "$@" --stage=grpo --workdir=$RUN \
    >"$OUT/grpo.txt" 2>&1 || say "grpo ended with $?"
  wait
  results train $RUN
  say "done"
}

enforced() { # NAME CHECKPOINTS arguments: evaluates APR with at least ten children
  local name=$1 checkpoints=$2
  shift 2
  run "$name" "$@" --workdir="runs/$name" --variants=apr --config.model.checkpoint="$checkpoints" \
    --config.sft.models=separate --config.sft.steps=0 --config.sft.tokens=0 --config.grpo.steps=0 \
    --config.budget.min_children=10 --stage=sft,evaluate,report
  results "$name" "runs/$name"
  say "$name"
}

finish() { # arguments
  mapfile -t given <runs/arguments
  set -- "${given[@]}" "$@"
  weights $RUN/grpo_apr/checkpoints grpo &
  run evaluate_grpo "$@" --stage=evaluate,report --workdir=$RUN
  results finish $RUN
  say "evaluated"
  enforced sft_enforced $RUN/sft_apr/checkpoints "$@"
  enforced grpo_enforced $RUN/grpo_apr/checkpoints "$@"
  wait
  say "done"
}

case $PART in
train | finish) $PART "$@" ;;
*) echo "error: train or finish, was given $PART" >&2; exit 1 ;;
esac
