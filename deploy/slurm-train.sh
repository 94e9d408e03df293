#!/bin/bash
# A training run on Slurm with torchrun, a rank a GPU; the run's folder is on a shared disk.
#
#   sbatch deploy/slurm-train.sh sit-xl --workspace /shared/ws --steps 400000
#
# Two minutes before the time limit, and when the job is preempted, ranks save and end: the same
# command goes on, so submit it several times (`--dependency=singleton` runs them one by one).
#SBATCH --job-name=repa-train
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export OMP_NUM_THREADS=8

exec srun --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_NNODES" --nproc-per-node gpu --max-restarts 3 \
    --rdzv-backend c10d --rdzv-endpoint "$head:29500" --rdzv-id "$SLURM_JOB_ID" \
    -m repa_pipeline train "$@"
