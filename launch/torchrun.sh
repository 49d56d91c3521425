#!/bin/bash
# Starts the processes of one of several plain machines, by torchrun alone.
#
# When:     machines without a scheduler, when you want to see or change every option. The shorter
#           way is `disttrain launch`, which also finds the network interface, waits for the first
#           machine and gives exit codes that mean something.
# Command:  on each machine, R counted from 0, HOST0 the name or address of the first:
#             NODES=2 NODE_RANK=R RENDEZVOUS=HOST0:29500 NPROC=8 \
#               bash launch/torchrun.sh configs/lora.yaml train.max_steps=2000
# Expects:  disttrain installed and on PATH, the same config and a shared output_dir on all.
set -euo pipefail
: "${NODES:?how many machines}" "${NODE_RANK:?which of them this is, from 0}"
: "${RENDEZVOUS:?HOST0:PORT, which every machine can reach}" "${NPROC:?processes on each machine}"

# A restarted process must not read the addresses of the one before it.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(($(nproc) / NPROC > 0 ? $(nproc) / NPROC : 1))}

is_host=0
[[ $NODE_RANK -eq 0 ]] && is_host=1
exec torchrun --nnodes="$NODES" --nproc-per-node="$NPROC" --rdzv-backend=c10d \
  --rdzv-id=disttrain --rdzv-endpoint="$RENDEZVOUS" --rdzv-conf="is_host=$is_host" \
  -m disttrain train "$@"
