#!/usr/bin/env bash
# CIFAR-100 as in the paper: 10 tasks of 10 classes, ViT-Base teaches ViT-Small. Downloads CIFAR-100 to data/ in
# the project's folder. Started again it goes on where it was.
#
#     bash experiments/cifar-100.sh [LEARNER] [KD_METHOD] [GPUIDS ...] [-- more flags of run.py]
#     bash experiments/cifar-100.sh DualPrompt KD 0 1 -- --random_s 2 --log_dir outputs/dual-2
#
# LEARNER is CODAPrompt if not given, KD_METHOD is KD_Token. GPUIDS: -1 is the CPU; if not given, GPU 0 if there is
# one. With ViT-Large as teacher:
#
#     bash experiments/cifar-100.sh CODAPrompt KD_Token 0 1 -- --t_model vit_large_patch16_224 \
#         --s_model vit_base_patch16_224 --batch_size 32 --log_dir outputs/cifar-100-large
set -eu
. "$(dirname "${BASH_SOURCE[0]}")/paper.sh"
run_one cifar-100 cifar-100_prompt.yaml "$@"
