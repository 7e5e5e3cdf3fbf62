#!/usr/bin/env bash
# SGLang 0.5.23 for an exported checkpoint (python -m tools.export_hf).
#
#   tools/serve_sglang.sh install                       its environment, apart from the project's; taken up again if cut
#   tools/serve_sglang.sh serve CHECKPOINT PORT [...]   a server on 127.0.0.1:PORT; further words go to SGLang
#   tools/serve_sglang.sh where                         the environment's folder, if it is installed
#
# On a machine with an NVIDIA GPU this is plain SGLang; elsewhere SGLang runs on the CPU, in float32, with torch's own
# attention, which needs no AMX. APR_SGLANG_DEVICE=cuda or cpu decides it by hand; APR_SGLANG_ENV names the folder.
# A server takes a minute or two to start (GET /health answers then) and ends with SIGTERM. On a CPU it computes in one
# thread (OMP_NUM_THREADS=N: more) and caches APR_SGLANG_TOKENS tokens (those of 512 MiB, 16384 at least).
# The CPU build of torch: UV_TORCH_BACKEND=cpu, or PIP_FIND_LINKS=folder-of-wheels that holds torch 2.13.0+cpu.
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
STAMP=$FOLDER/.installed # written last: an install that was cut short is not taken for one

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
  # uv goes by names of its own for what pip is told through the environment.
  local links=${UV_FIND_LINKS:-${PIP_FIND_LINKS:-}}
  [[ -z $links ]] || export UV_FIND_LINKS=${links// /,}
  [[ -n ${SSL_CERT_FILE:-} || -z ${PIP_CERT:-} ]] || export SSL_CERT_FILE=$PIP_CERT
  export UV_HTTP_TIMEOUT=${UV_HTTP_TIMEOUT:-180}
  [[ -x $PYTHON ]] || "$uv" venv --quiet --python 3.11 "$FOLDER"
  # The lists are whole: what follows from what must not be looked up again, or CUDA comes to the CPU's.
  "$uv" pip install --quiet --python "$PYTHON" --no-deps -r "$HERE/sglang/$DEVICE.lock"
  echo "$VERSION $DEVICE" >"$STAMP"
  echo "SGLang $VERSION for $DEVICE is in $FOLDER"
}

# How many tokens' keys and values, in float32, fit into 512 MiB.
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
  [[ -f $checkpoint/config.json ]] || die "$checkpoint holds no config.json: it is no exported checkpoint"
  [[ $port =~ ^[0-9]+$ ]] || die "a port is a number, was given $port"
  installed || die "SGLang $VERSION for $DEVICE is not in $FOLDER: $0 install"
  local -a flags=(
    --model-path "$checkpoint" --host 127.0.0.1 --port "$port"
    # Children that begin alike are scheduled so that the second finds what the first left in the cache; the server
    # tells how long requests waited.
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
      # Else the cache takes most of the memory, and an idle server a core.
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
