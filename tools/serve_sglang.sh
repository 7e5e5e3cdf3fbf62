#!/usr/bin/env bash
# Installs SGLang 0.5.23, and serves an exported checkpoint (python -m tools.export_hf) with it.
#
#   tools/serve_sglang.sh install                       install SGLang in an environment of its own; can be resumed
#   tools/serve_sglang.sh serve CHECKPOINT PORT [...]   start a server on 127.0.0.1:PORT, with more SGLang arguments
#   tools/serve_sglang.sh where                         print the environment's folder, if it is installed
#
# On a machine with an NVIDIA GPU this is plain SGLang. Elsewhere SGLang runs on the CPU, in float32, with torch's own
# attention, which needs no AMX. APR_SGLANG_DEVICE=cuda or cpu overrides the choice. APR_SGLANG_ENV is the folder of the
# environment. A server takes a minute or two to start (then GET /health succeeds) and ends with SIGTERM. On a CPU it
# computes in one thread (OMP_NUM_THREADS=N: in N) and caches APR_SGLANG_TOKENS tokens (default: those that fit 512 MiB,
# at least 16384). For the CPU build of torch, set UV_TORCH_BACKEND=cpu, or PIP_FIND_LINKS to a folder with the wheel of
# torch 2.13.0+cpu.
set -euo pipefail

VERSION=0.5.23
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

die() {
  echo "error: $*" >&2
  exit 1
}

device() {
  local chosen=${APR_SGLANG_DEVICE:-}
  if [[ -z $chosen ]]; then
    if nvidia-smi -L >/dev/null 2>&1; then chosen=cuda; else chosen=cpu; fi
  fi
  case $chosen in
  cuda | cpu) echo "$chosen" ;;
  *) die "APR_SGLANG_DEVICE is cuda or cpu, was given $chosen" ;;
  esac
}

DEVICE=$(device)
FOLDER=${APR_SGLANG_ENV:-${XDG_CACHE_HOME:-${HOME:?no HOME: name a folder with APR_SGLANG_ENV}/.cache}/apr_jax/sglang-$VERSION-$DEVICE}
PYTHON=$FOLDER/bin/python
STAMP=$FOLDER/.installed # written last, so that an interrupted install does not count

installed() {
  [[ -f $STAMP && $(<"$STAMP") == "$VERSION $DEVICE" ]]
}

install() {
  if installed; then
    echo "SGLang $VERSION for $DEVICE is in $FOLDER"
    return
  fi
  local uv=${UV:-$HERE/../.venv/bin/uv}
  [[ -x $uv ]] || uv=$(command -v uv) || die "uv is needed: pip install uv"
  # Passes pip's environment variables on to uv, which has its own names for them.
  local links=${UV_FIND_LINKS:-${PIP_FIND_LINKS:-}}
  [[ -z $links ]] || export UV_FIND_LINKS=${links// /,}
  [[ -n ${SSL_CERT_FILE:-} || -z ${PIP_CERT:-} ]] || export SSL_CERT_FILE=$PIP_CERT
  export UV_HTTP_TIMEOUT=${UV_HTTP_TIMEOUT:-180}
  [[ -x $PYTHON ]] || "$uv" venv --quiet --python 3.11 "$FOLDER"
  # The lock files are complete. Resolving dependencies again would add CUDA packages to the CPU environment.
  "$uv" pip install --quiet --python "$PYTHON" --no-deps -r "$HERE/sglang/$DEVICE.lock"
  echo "$VERSION $DEVICE" >"$STAMP"
  echo "SGLang $VERSION for $DEVICE is in $FOLDER"
}

# Prints the number of tokens whose keys and values, in float32, fit into 512 MiB; at least 16384.
cached_tokens() {
  "$PYTHON" - "$1" <<'END'
import json, sys

config = json.load(open(f"{sys.argv[1]}/config.json"))
heads = config.get("num_key_value_heads") or config["num_attention_heads"]
size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
print(max(2**29 // (config["num_hidden_layers"] * 2 * heads * size * 4), 16384))
END
}

serve() {
  (($# >= 2)) || die "serve CHECKPOINT PORT, was given ${*:-nothing}"
  local checkpoint=$1 port=$2
  shift 2
  [[ -f $checkpoint/config.json ]] || die "$checkpoint is not an exported checkpoint: it has no config.json"
  [[ $port =~ ^[0-9]+$ ]] || die "a port is a number, was given $port"
  installed || die "SGLang $VERSION for $DEVICE is not in $FOLDER: $0 install"
  local -a flags=(
    --model-path "$checkpoint" --host 127.0.0.1 --port "$port"
    # lpm schedules children with a common prefix so that later ones find it in the cache. The metrics include how long
    # requests wait in the queue.
    --schedule-policy lpm --enable-metrics
  )
  export HF_HUB_OFFLINE=1
  if [[ $DEVICE == cpu ]]; then
    export SGLANG_USE_CPU_ENGINE=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    export PYTHONPATH=$HERE/sglang/cpu${PYTHONPATH:+:$PYTHONPATH}
    local tokens=${APR_SGLANG_TOKENS:-$(cached_tokens "$checkpoint")}
    flags+=(
      --device cpu --dtype float32 --attention-backend torch_native --sampling-backend pytorch --grammar-backend none
      --disable-overlap-schedule --skip-server-warmup
      # By default the cache would take most of the memory, and an idle server would keep a core busy.
      --max-total-tokens "$tokens" --sleep-on-idle
    )
  fi
  exec "$PYTHON" -m sglang.launch_server "${flags[@]}" "$@"
}

case ${1:-} in
install) install ;;
serve) shift && serve "$@" ;;
where) installed && echo "$FOLDER" ;;
*)
  sed -n '2,/^set /{/^set /!s/^# \{0,1\}//p}' "$0"
  exit 2
  ;;
esac
