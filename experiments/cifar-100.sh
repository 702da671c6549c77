#!/usr/bin/env bash
# CIFAR-100 as in the paper: 10 tasks of 10 classes, ViT-Base teaches ViT-Small. Downloads CIFAR-100 to data/ in
# the project's folder. Run the same command again to resume.
#
#     bash experiments/cifar-100.sh [LEARNER] [KD_METHOD] [GPUIDS ...] [-- more flags of run.py]
#     bash experiments/cifar-100.sh DualPrompt KD 0 1 -- --random_s 2 --log_dir outputs/dual-2
#
# Defaults: CODAPrompt, KD_Token, GPU 0 if there is one (-1: CPU). ViT-Large as teacher: configs/cifar-100_prompt.yaml.
[ -n "${BASH_VERSION:-}" ] && ! shopt -oq posix || exec bash "$0" "$@" # for those who start it by sh
set -eu
. "$(dirname -- "$0")/_setup.sh"
run_paper cifar-100 cifar-100_prompt.yaml "$@"
