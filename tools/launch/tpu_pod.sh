#!/bin/bash
# Train on every host of a TPU VM slice: bash tools/launch/tpu_pod.sh NAME ZONE FLAGS OF cityrag_jax.train
# Each host has this checkout in ~/cityrag_jax with its environment: .venv/bin/pip install -e '.[tpu]'
set -euo pipefail

name=${1:?name of the TPU VM}
zone=${2:?its zone}
shift 2

command="cd ~/cityrag_jax && exec .venv/bin/python -m cityrag_jax.train $(printf '%q ' "$@")"
exec gcloud compute tpus tpu-vm ssh "${name}" --zone="${zone}" --worker=all --command="${command}"
