#!/usr/bin/env bash
# One machine, all of its GPUs:
#
#     launch/one_machine.sh configs/medium/dlcm.yaml parallel.strategy=fsdp
#
# A process that dies or hangs ends the others; then all are started again, RESTARTS times at most, and go on from the
# last checkpoint. SIGTERM or Ctrl-C: a checkpoint at the end of the step, and the end; the same command goes on.
# PROCESSES: as many as there are GPUs, or a number.
set -euo pipefail

# Otherwise processes that are started again may read where those before them were to be met (pytorch issue 135712).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}" # seconds for a step and a checkpoint

exec torchrun --standalone --nproc-per-node "${PROCESSES:-gpu}" --max-restarts "${RESTARTS:-3}" \
    -m train.pretrain "$@"
