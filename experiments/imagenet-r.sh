#!/usr/bin/env bash
# ImageNet-R as in the paper: 10 tasks of 20 classes, ViT-Base teaches ViT-Small. Expects the images in
# data/imagenet-r/ in the project's folder (else add --dataroot). Started again it goes on where it was.
#
#     bash experiments/imagenet-r.sh [LEARNER] [KD_METHOD] [GPUIDS ...] [-- more flags of run.py]
#     bash experiments/imagenet-r.sh DualPrompt KD 0 1 -- --random_s 2 --log_dir outputs/dual-2
#
# LEARNER is CODAPrompt if not given, KD_METHOD is KD_Token. GPUIDS: -1 is the CPU; if not given, GPU 0 if there is
# one. With ViT-Large as teacher:
#
#     bash experiments/imagenet-r.sh CODAPrompt KD_Token 0 1 -- --t_model vit_large_patch16_224 \
#         --s_model vit_base_patch16_224 --batch_size 32 --log_dir outputs/imagenet-r-large
set -eu
. "$(dirname "${BASH_SOURCE[0]}")/paper.sh"
run_one imagenet-r imnet-r_prompt.yaml "$@"
