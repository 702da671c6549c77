#!/bin/sh
# Installs the packages of the project into the active conda or virtual environment:
#
#     sh install_requirements.sh [--tests]
#
# --tests adds what the tests need. Packages in a recent enough version stay as they are. PYTHON=/path/to/python
# chooses another interpreter.
set -eu
fail() { echo "install_requirements.sh: $*" >&2 && exit 1; }

folder=$(dirname -- "$0")
case ${1:-} in
"") set -- -r "$folder/requirements.txt" ;;
--tests) set -- -r "$folder/requirements.txt" -r "$folder/tests/requirements.txt" ;;
*) echo "install_requirements.sh: unknown argument $1; the only one is --tests" >&2 && exit 2 ;;
esac

python=${PYTHON:-}
for candidate in "${VIRTUAL_ENV:-/nowhere}/bin/python" "${CONDA_PREFIX:-/nowhere}/bin/python" python python3; do
    if [ -z "$python" ] && "$candidate" -c '' 2>/dev/null; then python=$candidate; fi
done
[ -n "$python" ] || fail "no Python found; install Python 3.10 or later"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null ||
    fail "Python 3.10 or later is needed, not $python ($("$python" -V 2>&1)); activate another environment"

# Without an index and without pip's settings this succeeds only where nothing is missing.
if PIP_CONFIG_FILE=/dev/null PIP_FIND_LINKS='' "$python" -m pip install -q --no-index "$@" 2>/dev/null; then exit; fi

"$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip >/dev/null 2>&1 ||
    fail "$python has no pip; install it (Debian: apt install python3-pip)"
# torch, torchvision and timm decide the numbers: where they are missing, pip gets the tested versions. An installed
# torch stays, and torchvision is chosen to fit it.
pins=$("$python" -m pip list --format=freeze | grep -E '^(torch|timm)==' || true)
case $pins in *torch==*) ;; *) pins="$pins torch==2.14.1 torchvision==0.29.1" ;; esac
case $pins in *timm==*) ;; *) pins="$pins timm==1.0.31" ;; esac
echo "Installing packages with $python (several GB and some minutes the first time) ..."
# shellcheck disable=SC2086 # one word for each pin
"$python" -m pip install --disable-pip-version-check --no-input --root-user-action=ignore "$@" $pins </dev/null ||
    fail "pip could not install the packages; see its message above. An installed torch or timm is not replaced: if it" \
        "is too old, upgrade it yourself or use another environment."
