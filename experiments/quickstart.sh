#!/usr/bin/env bash
# The quick start: sets up what is missing, then trains teacher and student on Icon-R, which comes with the
# project, in a few minutes on two cores. Further flags of run.py can be added:
#
#     bash experiments/quickstart.sh [--random_s 2] [--KD_method none] [--log_dir FOLDER] ...
set -eu
. "$(dirname -- "$0")/_setup.sh"
set_up
exec "$PYTHON" -u "$root/run.py" --config "$root/configs/icon-r_prompt.yaml" \
    --log_dir "$root/outputs/quickstart" --learner_type prompt --learner_name CODAPrompt --prompt_param 50 8 0.0 \
    --KD_method KD_Token --kd_prompt_param 4 6 "$@"
