#!/bin/bash
# A training on several nodes under Slurm, which resumes after preemption and after the time limit.
#
# Launch:    sbatch recipes/cluster/slurm.sh RECIPE [KEY=VALUE …] [--strategy fsdp2]
# Hardware:  as asked for below; change it there, or on the command line: sbatch --nodes=4 …
# Needs:     one file system for all nodes, with this folder, the environment, the run folder and the caches
# Stopping:  before the time limit Slurm sends SIGTERM, the step that is running is saved, and the job is queued again;
#            the same command resumes from there. `scancel` saves too, where its grace (KillWait, 30 s) is enough
# Tried:     bash -n and shellcheck; not on a cluster
#SBATCH --job-name=instructft
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

[ $# -gt 0 ] || { echo "usage: sbatch $0 RECIPE [KEY=VALUE …] [--strategy ddp|fsdp2|zero2|zero3]" >&2; exit 2; }

# shellcheck source=/dev/null
[ ! -f .venv/bin/activate ] || source .venv/bin/activate

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MAIN_ADDRESS="${nodes[0]}"
export MAIN_PORT=$((20000 + SLURM_JOB_ID % 20000)) # two jobs may share a node

# One launcher on each node; it starts a process for each GPU. A node that fails ends the others, which would wait.
code=0
# shellcheck disable=SC2016 # the node's own number is known on the node only
srun --kill-on-bad-exit=1 bash -c 'exec instructft launch "$@" --machines "$SLURM_NNODES" \
  --machine-rank "$SLURM_NODEID" --main-address "$MAIN_ADDRESS" --main-port "$MAIN_PORT"' launch "$@" || code=$?

# 143: stopped by a signal, with a checkpoint. A job that was cancelled is no longer RUNNING, and stays cancelled.
if [ "$code" -eq 143 ] && [ "$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %T)" = RUNNING ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
