#!/bin/bash
# Make the videos of a list on every host of a TPU VM slice:
#   bash tools/launch/jobs_tpu.sh NAME ZONE FLAGS OF cityrag_jax.generate
# Each host works for itself, a job on all of its chips (--mesh=sequence:N, or
# --devices-per-job=1). JOINED=1 makes one job span all hosts instead.
# Each host has this checkout in ~/cityrag_jax with its environment: .venv/bin/pip install -e '.[tpu]'
set -euo pipefail

name=${1:?name of the TPU VM}
zone=${2:?its zone}
shift 2

# A host of a slice sees its own chips alone as one process of these bounds: 2,2,1 for four
# chips, 2,4,1 for eight (v5e, v6e). Not tried on TPUs here.
bounds=${HOST_BOUNDS:-2,2,1}
start=(env TPU_PROCESS_BOUNDS=1,1,1 TPU_CHIPS_PER_PROCESS_BOUNDS="${bounds}")
start+=(.venv/bin/python -m cityrag_jax.generate --independent)
if [ "${JOINED:-0}" = 1 ]; then
    start=(.venv/bin/python -m cityrag_jax.generate)
fi

command="cd ~/cityrag_jax && exec $(printf '%q ' "${start[@]}" "$@")"
exec gcloud compute tpus tpu-vm ssh "${name}" --zone="${zone}" --worker=all --command="${command}"
