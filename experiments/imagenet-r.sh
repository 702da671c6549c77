#!/usr/bin/env bash
# ImageNet-R as in the paper: 10 tasks of 20 classes, ViT-Base teaches ViT-Small. Expects the images in
# data/imagenet-r/ in the project's folder (else add --dataroot). Run the same command again to resume.
#
#     bash experiments/imagenet-r.sh [LEARNER] [KD_METHOD] [GPUIDS ...] [-- more flags of run.py]
#
# Defaults: CODAPrompt, KD_Token, GPU 0 if there is one (-1: CPU). ViT-Large as teacher: configs/imnet-r_prompt.yaml.
[ -n "${BASH_VERSION:-}" ] && ! shopt -oq posix || exec bash "$0" "$@" # for those who start it by sh
set -eu
. "$(dirname -- "$0")/_setup.sh"
run_paper imagenet-r imnet-r_prompt.yaml "$@"
