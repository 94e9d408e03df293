#!/bin/bash
# The cache on Slurm: a Ray cluster that lives as long as the job, a worker a GPU.
#
#   sbatch deploy/slurm-encode.sh --source /shared/images --workspace /shared/ws
#
# What is done stays done: submit the same command again after a time limit. Nodes share the home
# folder, where Ray keeps the token that its processes show each other.
#SBATCH --job-name=repa-encode
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00
set -euo pipefail

export RAY_USAGE_STATS_ENABLED=0 RAY_AUTH_MODE=token
ray get-auth-token --generate > /dev/null
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address="$head:6379"
trap 'kill $(jobs -p) 2> /dev/null || true' EXIT

srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" \
    ray start --head --port=6379 --include-dashboard=false --disable-usage-stats --block &
until ray status --address "$address" > /dev/null 2>&1; do sleep 2; done
if (( SLURM_NNODES > 1 )); then
    srun --overlap --nodes=$((SLURM_NNODES - 1)) --ntasks=$((SLURM_NNODES - 1)) --exclude="$head" \
        ray start --address "$address" --block &
fi

srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" repa encode --address "$address" "$@"
