#!/usr/bin/env bash
# Sets up what is missing, then runs the tests: bash tests/run.sh [pytest arguments]. Paths are relative to the
# project's folder.
set -eu
. "$(dirname -- "$0")/../experiments/_setup.sh"
set_up --tests
cd -- "$root"
exec "$PYTHON" -m pytest -n 2 --dist loadfile "$@" # each test process has one thread
