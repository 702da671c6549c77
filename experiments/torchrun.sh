#!/usr/bin/env bash
# Several processes on one machine: DistributedDataParallel, nccl on GPUs and gloo on CPUs.
#
#     bash experiments/torchrun.sh PROCESSES <flags of run.py>
#
# batch_size stays the global batch: it must divide by PROCESSES. A killed run goes on when called again.
set -eu
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

if ! [ "${1:-}" -gt 0 ] 2>/dev/null; then
    echo "torchrun.sh: the first word must be the number of processes, then the flags of run.py" >&2
    exit 2
fi
processes=$1
shift
set_up
exec "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$processes" "$root/run.py" "$@"
