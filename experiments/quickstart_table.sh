#!/usr/bin/env bash
# The paper's comparison on Icon-R, which comes with the project: four learners, no distillation and six KD methods,
# five seeds, two runs at a time on two cores (about 2.5 hours), then a report. Run it again to resume.
#
#     bash experiments/quickstart_table.sh [options of table.sh] [-- more flags of run.py]
set -eu
. "$(dirname -- "$0")/_setup.sh"
exec bash "$root/experiments/table.sh" icon-r --seeds 4 5 6 7 8 --jobs 2 "$@"
