#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# A run on a Cloud TPU pod slice, from a machine with gcloud. Each host has the
# repository in ~/moejax (installed with '.[tpu]'); the workdir and the token
# store that `moejax data prepare` made lie on a disk that all share. The run ends
# with this command: start it in tmux.
#
#   experiments/pods/tpu_vm.sh my-slice us-east5-a \
#     configs/olmoe_1b_7b.py /mnt/shared/runs/olmoe \
#     --config.data.store=/mnt/shared/token_store \
#     --config.parallel.expert=8 --config.parallel.fsdp=8
set -euo pipefail

name="$1" zone="$2" config="$3" workdir="$4"
shift 4
command="cd ~/moejax && .venv/bin/moejax train --distributed"
command+=" --config=$(printf %q "$config") --workdir=$(printf %q "$workdir")"
for option in "$@"; do command+=" $(printf %q "$option")"; done
exec gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all \
  --command="$command"
