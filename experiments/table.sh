#!/usr/bin/env bash
# The paper's table for one data set: every learner, KD method and pair of models, then a report over all runs.
#
#     bash experiments/table.sh DATASET [--learners NAME ...] [--kd METHOD ...] [--pairs PAIR ...]
#         [--seeds NUMBER ...] [--jobs NUMBER] [--out FOLDER] [--check [FOLDER]] [-- more flags of run.py]
#     bash experiments/table.sh cifar-100 --learners L2P --kd none KD_Token:12,6 --pairs base-small -- --gpuid 0
#
# DATASET is cifar-100, imagenet-r, icon-r, or folder for images of your own, whose folder -- --dataroot FOLDER names;
# configs/folder.yaml has its settings. Without options the whole table is run, with seed 1:
#   --learners  CODAPrompt DualPrompt L2P APT
#   --kd        none KD DKD FitNets ReviewKD KD_Token:1,6 KD_Token:12,6; --kd_prompt_param follows the colon.
#               KD_Token:1,6 is the paper's column DeiT, KD_Token:12,6 is D-CDL. icon-r and folder: KD_Token:4,6.
#   --pairs     base-small large-base; icon-r and folder: mini
#   --jobs      runs at a time, with one thread each if there are several (1)
#   --check     compare the accuracies with those kept in a folder (experiments/results); a difference above 3 points,
#               or a run that is not kept, is exit code 1
#   --out       folder of runs and report (outputs/table/DATASET in the project's folder)
#
# KD methods with the same learner and seed share their teacher (--teacher_from). Run it again to resume: finished
# runs are skipped; runs with other flags need another folder. All runs are checked before the first one starts; a run
# that fails stops the table. The report is FOLDER/report/report.html.
set -eu
. "$(dirname -- "$0")/_setup.sh"
set_up
exec "$PYTHON" -u "$root/experiments/table.py" "$@"
