#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# A run on GPU nodes under Slurm: one process a GPU. From the repository's root:
#
#   sbatch --nodes=4 --gpus-per-node=8 experiments/pods/slurm.sh \
#     configs/olmoe_1b_7b.py /shared/runs/olmoe \
#     --config.parallel.expert=8 --config.parallel.fsdp=4
#
# Needs an environment with '.[cuda]' (MOEJAX names its moejax), and data that
# `moejax data prepare` made once, in a folder that all nodes see. With 4 GPUs a
# node: --gpus-per-node=4 --ntasks-per-node=4.
#
# The product of the parallel sizes is the number of GPUs. Submitted again, also
# with other nodes and sizes, the run goes on from its newest checkpoint.
#SBATCH --job-name=moejax
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --signal=TERM@120
#SBATCH --requeue
set -euo pipefail

config="$1" workdir="$2"
shift 2
# Slurm sends TERM two minutes before the end: the run saves and exits with 75.
# srun does not take the CPUs of a task from sbatch since Slurm 22.05.
exec srun --kill-on-bad-exit=0 --cpus-per-task="${SLURM_CPUS_PER_TASK:-12}" \
  "${MOEJAX:-.venv/bin/moejax}" train --distributed \
  --config="$config" --workdir="$workdir" "$@"
