#!/usr/bin/env bash
# A training job under Slurm, one process per node:
#   sbatch --nodes=16 --time=24:00:00 tpu/slurm.sh glmjax train experiments/glm_10b.py --train.run RUN
#SBATCH --job-name=glmjax
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# Ten minutes before the time is up, SIGTERM asks every process to save.
#SBATCH --signal=TERM@600
set -uo pipefail

# When one process ends with an error, the others are ended too.
srun --kill-on-bad-exit=1 "$@"
status=$?
case "$status" in
    0 | 2) exit "$status" ;; # finished, or a mistake in the command line
    *) scontrol requeue "$SLURM_JOB_ID" ;;
esac
