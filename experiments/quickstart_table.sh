#!/usr/bin/env bash
# The paper's comparison on Icon-R, which comes with the project: three learners, no distillation and five KD
# methods, three seeds, two runs at a time on two cores, then a report. Run it again to resume.
#
#     bash experiments/quickstart_table.sh [options of table.sh] [-- more flags of run.py]
set -eu
. "$(dirname -- "$0")/_setup.sh"
exec bash "$root/experiments/table.sh" icon-r --learners CODAPrompt DualPrompt L2P --seeds 1 2 3 --jobs 2 "$@"
