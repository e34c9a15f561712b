#!/usr/bin/env bash
# A run on the GPUs of several machines under Slurm: one process a GPU.
#
#   scripts/launch_slurm.sh [--dry-run] NAME NODES GPUS_A_NODE -- \
#     pixelis_jax.rft --config=configs/rft.py:qwen2_5_vl_7b --workdir=/shared/runs/one \
#     --config.model.path=/shared/qwen2.5-vl-7b --config.data.file=/shared/train.jsonl
#
# Run it in the repository, on a file system that all machines share, after `pip install '.[cuda12]'`
# into .venv. A job that is preempted is queued again and goes on where the run was. --dry-run prints
# the job and submits nothing.
set -euo pipefail

dry=false
[[ ${1:-} == --dry-run ]] && { dry=true; shift; }
if (($# < 5)) || [[ $4 != -- ]]; then
  sed -n 's/^# \{0,1\}//p' "$0" | head -6 >&2
  exit 2
fi
name=$1 nodes=$2 gpus=$3
shift 4
job=$(cat <<JOB
#!/usr/bin/env bash
#SBATCH --job-name=$name --nodes=$nodes --ntasks-per-node=$gpus --gpus-per-node=$gpus
#SBATCH --requeue --open-mode=append --output=$name.log --signal=TERM@120
srun --kill-on-bad-exit=1 .venv/bin/python -m $(printf '%q ' "$@")--distributed
JOB
)
if $dry; then echo "$job"; else sbatch <<<"$job"; fi
