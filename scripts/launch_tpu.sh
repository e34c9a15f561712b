#!/usr/bin/env bash
# A run on all hosts of a TPU slice: asks for the slice, installs this commit, starts, watches.
#
#   scripts/launch_tpu.sh [--dry-run] NAME ZONE v5e-64 gs://BUCKET -- \
#     pixelis_jax.rft --config=configs/rft.py:qwen2_5_vl_7b --workdir=BUCKET/runs/one \
#     --config.model.path=BUCKET/qwen2.5-vl-7b --config.data.file=BUCKET/train.jsonl
#
# BUCKET in the arguments is where the bucket is mounted: weights, questions and the run's directory
# lie there, so that every host sees them and nothing is lost with the slice. The same command again
# goes on where the run was, after a preemption too. --dry-run prints the commands and runs none.
set -euo pipefail

say() { printf '%q ' "$@"; printf '\n'; }
run=()
[[ ${1:-} == --dry-run ]] && { run=(say); shift; }
if (($# < 6)) || [[ $5 != -- ]]; then
  sed -n 's/^# \{0,1\}//p' "$0" | head -6 >&2
  exit 2
fi
name=$1 zone=$2 slice=$3 bucket=$4
shift 5

case $slice in # The seller's names of the slice and of the software on its hosts.
  v5e-*) type=v5litepod-${slice#v5e-} software=v2-alpha-tpuv5-lite ;;
  v5p-*) type=$slice software=v2-alpha-tpuv5 ;;
  v6e-*) type=$slice software=v2-alpha-tpuv6e ;;
  *) echo "slice $slice must be v5e-N, v5p-N or v6e-N" >&2; exit 2 ;;
esac
commit=$(git rev-parse HEAD)
origin=${REPO:-$(git remote get-url origin)}
mount='$HOME/bucket'
arguments=$(printf '%q ' "${@//BUCKET/__mount__}")
arguments=${arguments//__mount__/$mount}

everywhere() {
  "${run[@]}" gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$1"
}

if [[ ${run[*]:-} ]] || ! gcloud compute tpus queued-resources describe "$name" --zone="$zone" >/dev/null 2>&1; then
  "${run[@]}" gcloud compute tpus queued-resources create "$name" --node-id="$name" --zone="$zone" \
    --accelerator-type="$type" --runtime-version="$software" --spot
fi
if [[ ! ${run[*]:-} ]]; then
  until [[ $(gcloud compute tpus queued-resources describe "$name" --zone="$zone" --format='value(state.state)') == ACTIVE ]]; do
    echo "waiting for $name" && sleep 30
  done
fi
everywhere "test -d pixelis_jax || git clone --quiet $origin pixelis_jax; cd pixelis_jax && git fetch --quiet && git checkout --quiet $commit && python3 -m venv .venv && .venv/bin/pip install --quiet '.[tpu]'"
everywhere "mkdir -p $mount && (mountpoint -q $mount || gcsfuse --implicit-dirs ${bucket#gs://} $mount)"
everywhere "cd pixelis_jax && .venv/bin/python -m $arguments --distributed"
