#!/bin/sh
# Installs the packages of the project into the active conda or virtual environment:
#
#     sh install_requirements.sh [--tests]
#
# --tests adds what the tests need. What is there in a recent enough version is left as it is; with nothing to
# do it takes a fraction of a second. PYTHON=/path/to/python chooses another interpreter.
set -eu

python=${PYTHON:-}
if [ -z "$python" ]; then
    for candidate in "${VIRTUAL_ENV:-}/bin/python" "${CONDA_PREFIX:-}/bin/python" python python3; do
        case $candidate in /bin/python) continue ;; esac # no environment of that kind is active
        if "$candidate" -c '' 2>/dev/null; then
            python=$candidate
            break
        fi
    done
fi
if [ -z "$python" ]; then
    echo "install_requirements.sh: no Python found; install Python 3.10 or later" >&2
    exit 1
fi
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
    echo "install_requirements.sh: $("$python" -V 2>&1) is too old; activate an environment with Python 3.10 or later" >&2
    exit 1
fi

# One package a line: name, lowest version that serves, tested version ("-": pip may choose the newest).
# torch, torchvision and timm are pinned, as they decide the numbers.
packages="
torch       2.4   2.14.1
torchvision 0.19  0.29.1
timm        1.0.9 1.0.31
numpy       1.24  -
PyYAML      6.0   -
tqdm        4.60  -
Pillow      9.4   -
safetensors 0.4   -
matplotlib  3.6   -
"
if [ "${1:-}" = "--tests" ]; then
    packages="$packages
pytest      7.4   -
ruff        0.4   -
"
elif [ $# -gt 0 ]; then
    echo "install_requirements.sh: unknown argument $1; the only one is --tests" >&2
    exit 2
fi

# Prints pip's arguments, one a line: nothing when all is there. Reading the versions imports no package.
wanted=$("$python" - "$packages" <<'PYTHON'
import re
import sys
from importlib import metadata

keep, missing = [], []
for line in sys.argv[1].split("\n"):
    if not line.strip():
        continue
    name, lowest, tested = line.split()
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        version = None
    numbers = [int(number) for number in re.findall(r"\d+", (version or "0").split("+")[0])]
    if version and numbers >= [int(number) for number in lowest.split(".")]:
        keep.append("%s==%s" % (name, version))
    else:
        missing.append((name, lowest, tested))
if missing:
    # torchvision has to fit the torch that stays, so then pip chooses its version.
    keeps_torch = any(kept.startswith("torch==") for kept in keep)
    for name, lowest, tested in missing:
        pinned = tested != "-" and not (name == "torchvision" and keeps_torch)
        print("%s==%s" % (name, tested) if pinned else "%s>=%s" % (name, lowest))
    print("\n".join(keep))
PYTHON
)
[ -n "$wanted" ] || exit 0

if ! "$python" -m pip --version >/dev/null 2>&1 && ! "$python" -m ensurepip >/dev/null 2>&1; then
    echo "install_requirements.sh: $python has no pip; install it (Debian: apt install python3-pip)" >&2
    exit 1
fi
echo "Installing packages with $python (several GB and some minutes the first time) ..."
# The list is split at its line ends: no requirement contains a space.
# shellcheck disable=SC2086
if ! "$python" -m pip install --disable-pip-version-check --no-input --root-user-action=ignore \
    $wanted </dev/null; then
    echo "install_requirements.sh: pip could not install the packages; see its message above. Without network," \
        "install them from local files and run this again." >&2
    exit 1
fi
