#!/usr/bin/env bash
# One run shared out among several processes of this machine: a GPU each with nccl, or the CPU's cores with gloo.
#
#     bash experiments/torchrun.sh PROCESSES [flags of run.py]
#     bash experiments/torchrun.sh 4 --config configs/cifar-100_prompt.yaml --log_dir outputs/cifar-100
#     bash experiments/torchrun.sh 2 --config configs/emoji-r_prompt.yaml --gpuid -1 --log_dir outputs/emoji-r
#
# batch_size is that of all processes together and must divide by PROCESSES. Started again, also with another number
# of processes, it goes on where it was.
set -eu
. "$(dirname "${BASH_SOURCE[0]}")/paper.sh"

case ${1:-} in
-h | --help) usage && exit ;;
'' | *[!0-9]* | 0)
    echo "torchrun.sh: the first argument must be the number of processes, not '${1:-}'; --help says more" >&2
    exit 2
    ;;
esac
processes=$1
shift
set_up

# Cores are shared out, too: processes with a thread for every core each would be in each other's way.
cores=$(getconf _NPROCESSORS_ONLN)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > processes ? cores / processes : 1))}
# Time to finish a step and to save after Ctrl-C or SIGTERM.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-120}
exec "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$processes" "$root/run.py" "$@"
