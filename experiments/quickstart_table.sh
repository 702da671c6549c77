#!/usr/bin/env bash
# The paper's comparison on Emoji-R, which comes with the project: three learners, no distillation and five KD
# methods, three seeds, two runs at a time on two cores, then a report. Started again it goes on where it was.
#
#     bash experiments/quickstart_table.sh [options of table.sh] [-- more flags of run.py]
set -eu
case ${1:-} in -h | --help) exec bash "$(dirname "${BASH_SOURCE[0]}")/table.sh" --help ;; esac
exec bash "$(dirname "${BASH_SOURCE[0]}")/table.sh" emoji-r --seeds 1 2 3 --jobs 2 "$@"
