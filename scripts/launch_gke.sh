#!/usr/bin/env bash
# A run as an XPK workload on a GKE cluster of TPU slices.
#
#   scripts/launch_gke.sh [--dry-run] NAME CLUSTER v5e-64 IMAGE -- \
#     pixelis_jax.rft --config=configs/rft.py:qwen2_5_vl_7b --workdir=/bucket/runs/one \
#     --config.model.path=/bucket/qwen2.5-vl-7b --config.data.file=/bucket/train.jsonl
#
# IMAGE holds this repository at /app, installed with `pip install '/app[tpu]'`; the cluster mounts
# a bucket at /bucket (Cloud Storage FUSE). A preempted workload starts again by itself and goes on
# where the run was. --dry-run prints the command and runs nothing.
set -euo pipefail

say() { printf '%q ' "$@"; printf '\n'; }
run=()
[[ ${1:-} == --dry-run ]] && { run=(say); shift; }
if (($# < 6)) || [[ $5 != -- ]]; then
  sed -n 's/^# \{0,1\}//p' "$0" | head -6 >&2
  exit 2
fi
name=$1 cluster=$2 slice=$3 image=$4
shift 5
case $slice in
  v5e-*) type=v5litepod-${slice#v5e-} ;;
  v5p-* | v6e-*) type=$slice ;;
  *) echo "slice $slice must be v5e-N, v5p-N or v6e-N" >&2; exit 2 ;;
esac
"${run[@]}" xpk workload create --cluster="$cluster" --workload="$name" --tpu-type="$type" \
  --docker-image="$image" --max-restarts=100 \
  --command="cd /app && python -m $(printf '%q ' "$@")--distributed"
