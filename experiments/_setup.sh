# To be sourced by the other scripts. Prints the comment at the top of the calling script for --help, sets root, the
# project's folder, and defines set_up and run_paper.

case " $* " in
*" -h "* | *" --help "*) awk 'NR > 1 && !/^#/ { exit } NR > 1 && !/^#SBATCH/ { sub(/^# ?/, ""); print }' "$0" && exit ;;
esac
root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)

# set_up [--tests]: sets PYTHON to the interpreter of the active virtual or conda environment, else of .venv in the
# project's folder, and installs the packages that it lacks; exits with a message if it cannot.
set_up() {
    # Two scripts started together in a fresh clone must not install into each other.
    if { exec 9>>"$root/requirements.txt"; } 2>/dev/null && command -v flock >/dev/null && ! flock -n 9; then
        echo "Another set-up is running; waiting for it ..."
        flock 9 || true
    fi
    local prefix=${VIRTUAL_ENV:-${CONDA_PREFIX:-$root/.venv}}
    PYTHON=$prefix/bin/python
    # .venv is marked from its first moment to the end of the installation: an interrupted set-up is repeated.
    if [ "$prefix" = "$root/.venv" ] && { [ -e "$prefix/set_up_incomplete" ] || ! "$PYTHON" -c '' 2>/dev/null; }; then
        make_venv "$prefix"
    fi
    PYTHON=$PYTHON sh "$root/install_requirements.sh" "$@" || exit 1
    rm -f "$prefix/set_up_incomplete"
    exec 9>&-
}

make_venv() {
    local base
    echo "Making the environment $1 ..."
    for base in python3 python python3.{14,13,12,11,10} /usr/bin/python3; do
        "$base" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || continue
        rm -rf "$1" && mkdir "$1" && touch "$1/set_up_incomplete" && "$base" -m venv "$1" && return
    done
    echo "${0##*/}: cannot make $1, which needs Python 3.10 or later with the module venv (Debian: apt install" \
        "python3-venv); or activate a conda or virtual environment of your own" >&2
    exit 1
}

# run_paper DATA CONFIG [LEARNER] [KD_METHOD] [GPUIDS ...] [-- more flags of run.py]: one run of the paper.
run_paper() {
    local data=$1 config=$2 words=()
    shift 2
    while [ $# -gt 0 ] && [ "$1" != -- ]; do words+=("$1") && shift; done
    [ $# -eq 0 ] || shift
    local learner=${words[0]:-CODAPrompt} method=${words[1]:-KD_Token}
    local flags=(--config "$root/configs/$config" --dataroot "$root/data"
        --learner_type prompt --learner_name "$learner" --KD_method "$method" --kd_prompt_param 12 6
        --t_model vit_base_patch16_224 --s_model vit_small_patch16_224
        --log_dir "$root/outputs/$data/$learner/$method")
    [ "$learner" != APT ] || flags+=(--ema_coeff 0.7)
    if [ ${#words[@]} -gt 2 ]; then flags+=(--gpuid "${words[@]:2}"); fi
    set_up
    exec "$PYTHON" -u "$root/run.py" "${flags[@]}" "$@"
}
