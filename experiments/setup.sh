# To be sourced by other scripts. Sets root, the project's folder, and defines set_up.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# set_up [--tests]: sets PYTHON to an interpreter that has the packages of the project, installing what is
# missing: in the active conda or virtual environment, else in .venv in the project's folder, which is made, or
# made again after an interrupted set-up. Exits with a message where that is impossible.
set_up() {
    # One set-up at a time: two scripts started together in a fresh clone must not install into each other.
    exec 9<"$root/install_requirements.sh"
    if command -v flock >/dev/null && ! flock -n 9; then
        echo "Another set-up is at work; waiting for it ..."
        flock 9
    fi
    PYTHON=$(active_python)
    if [ -z "$PYTHON" ]; then
        venv_is_whole || make_venv || exit 1
        PYTHON=$root/.venv/bin/python
    fi
    PYTHON=$PYTHON sh "$root/install_requirements.sh" "$@" || exit 1
    exec 9<&-
}

# The interpreter of the active environment; nothing if none is active.
active_python() {
    local prefix
    for prefix in "${VIRTUAL_ENV:-}" "${CONDA_PREFIX:-}"; do
        if [ -n "$prefix" ] && "$prefix/bin/python" -c '' 2>/dev/null; then
            echo "$prefix/bin/python"
            return
        fi
    done
}

# Whether .venv works and, if it was made here, holds no half-installed package: pip writes RECORD and INSTALLER
# after all other files.
venv_is_whole() {
    "$root/.venv/bin/python" - "$root/.venv/made_by_setup" 2>/dev/null <<'PYTHON'
import glob, os, site, sys
folders = [f for path in site.getsitepackages() for f in glob.glob(glob.escape(path) + "/*.dist-info")]
whole = all(os.path.exists(f + "/RECORD") and os.path.exists(f + "/INSTALLER") for f in folders)
sys.exit(os.path.exists(sys.argv[1]) and not whole)
PYTHON
}

make_venv() {
    local base
    base=$(find_python) || return 1
    echo "Making the environment $root/.venv ..."
    if ! { rm -rf "$root/.venv" && mkdir "$root/.venv" && touch "$root/.venv/made_by_setup" &&
        "$base" -m venv "$root/.venv" </dev/null; }; then
        echo "${0##*/}: cannot make $root/.venv, see the message above; or activate an environment of your own" >&2
        return 1
    fi
}

# The first Python that can make an environment.
find_python() {
    local candidate
    for candidate in python3 python python3.{14,13,12,11,10} /usr/bin/python3; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "${0##*/}: no Python 3.10 or later with the module venv found; install one (Debian: apt install" \
        "python3-venv), or activate a conda or virtual environment that has it" >&2
    return 1
}
