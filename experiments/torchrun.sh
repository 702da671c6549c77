#!/usr/bin/env bash
# One run divided among several processes of this machine: a GPU each with nccl, or the CPU's cores with gloo.
#
#     bash experiments/torchrun.sh PROCESSES [flags of run.py]
#     bash experiments/torchrun.sh 2 --config configs/icon-r_prompt.yaml --gpuid -1 --log_dir outputs/icon-r
#
# batch_size is that of all processes together and must be divisible by PROCESSES. Run the same command again to
# resume, also with another number of processes.
set -eu
. "$(dirname -- "$0")/_setup.sh"
processes=${1:-}
if ! [[ $processes =~ ^[1-9][0-9]*$ ]]; then
    echo "torchrun.sh: the first argument must be the number of processes, not '$processes'; see --help" >&2
    exit 2
fi
shift
set_up
# A thread for every core in each process would slow all of them down.
cores=$(getconf _NPROCESSORS_ONLN)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > processes ? cores / processes : 1))}
# Time to finish a step and to save after Ctrl-C or SIGTERM.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-120}
exec "$PYTHON" "$root/experiments/torchrun.py" --standalone --nproc-per-node "$processes" "$root/run.py" "$@"
