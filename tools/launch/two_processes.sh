#!/bin/bash
# One training in two processes of two simulated CPU devices each, on this machine:
#   bash tools/launch/two_processes.sh FLAGS OF cityrag_jax.train
set -euo pipefail

PYTHON=${PYTHON:-python3}
export JAX_PLATFORMS=cpu
export XLA_FLAGS="--xla_force_host_platform_device_count=2 ${XLA_FLAGS:-}"
export JAX_NUM_PROCESSES=2
port=$("$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
export JAX_COORDINATOR_ADDRESS="localhost:${port}"

JAX_PROCESS_ID=1 "$PYTHON" -m cityrag_jax.train --distributed "$@" >/dev/null &
other=$!
trap 'kill "${other}" 2>/dev/null || true' EXIT
JAX_PROCESS_ID=0 "$PYTHON" -m cityrag_jax.train --distributed "$@"
wait "${other}"
