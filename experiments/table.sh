#!/usr/bin/env bash
# The paper's table for one data set: every learner, KD method and pair of models, then a report over all runs.
#
#     bash experiments/table.sh DATASET [--learners NAME ...] [--kd METHOD ...] [--pairs PAIR ...]
#         [--seeds NUMBER ...] [--jobs NUMBER] [--out FOLDER] [-- more flags of run.py]
#     bash experiments/table.sh cifar-100 --learners L2P --kd none KD_Token:12,6 --pairs base-small -- --gpuid 0
#
# DATASET is cifar-100, imagenet-r or emoji-r. Without an option all of the table is run, with seed 1:
#   --learners  CODAPrompt DualPrompt L2P
#   --kd        none KD DKD FitNets ReviewKD KD_Token:1,6 KD_Token:12,6; after the colon stands --kd_prompt_param.
#               KD_Token:1,6 is the paper's column KD-Token, KD_Token:12,6 is KDP. emoji-r: KD_Token:4,6 instead.
#   --pairs     base-small large-base; emoji-r: mini
#   --jobs      runs at a time, with one thread each if there are several (1)
#   --out       folder of runs and report (outputs/table/DATASET in the project's folder)
#
# KD methods with the same learner and seed share their teacher (--teacher_from). Started again it skips the finished
# runs and goes on with the others; runs with other flags belong into another folder. All is checked before the first
# run; a run that fails stops the table. Ends with FOLDER/report/report.html.
set -eu
. "$(dirname "${BASH_SOURCE[0]}")/paper.sh"

fail() {
    echo "table.sh: $*" >&2
    exit 2
}

# set_cell CONFIG OUT PAIR LEARNER METHOD[:PARAM] SEED [FLAG ...]: sets command, the flags of that run less its
# teachers, with its folder, and what, its name in messages.
set_cell() {
    local config=$1 out=$2 pair=$3 learner=$4 method=${5%%:*} param=() seed=$6 name=${5//[:,]/-} models=()
    case $5 in *:*) IFS=, read -r -a param <<<"${5#*:}" && param=(--kd_prompt_param "${param[@]}") ;; esac
    case $pair in
    base-small) models=(--t_model vit_base_patch16_224 --s_model vit_small_patch16_224) ;;
    large-base) models=(--t_model vit_large_patch16_224 --s_model vit_base_patch16_224 --batch_size 32) ;;
    esac
    shift 6
    folder=$out/$pair/$learner/$name/seed-$seed
    what="$pair $learner $name, seed $seed"
    set_prompts "$learner"
    command=(--config "$root/configs/$config" --dataroot "$root/data"
        --learner_type prompt --learner_name "$learner" ${prompts[@]+"${prompts[@]}"}
        ${models[@]+"${models[@]}"} --KD_method "$method" ${param[@]+"${param[@]}"}
        --random_s "$seed" --log_dir "$folder" "$@")
}

# run_cell COUNT FLAG ... CONFIG OUT PAIR LEARNER METHOD[:PARAM] SEED: one run; COUNT is the number of FLAGs.
run_cell() {
    local flags=("${@:2:$1}") code=0
    shift $((1 + $1))
    local command folder what
    set_cell "$@" ${flags[@]+"${flags[@]}"}
    # The teachers of the KD method with the same learner and seed that has most of them need no second training.
    local teacher=() most=0 other number
    for other in "$2/$3/$4"/*/"seed-$6"; do
        [ "${5%%:*}" != none ] && [ "$other" != "$folder" ] || continue
        number=$(find "$other/models" -name T_class.pth 2>/dev/null | wc -l)
        if [ "$number" -gt "$most" ]; then most=$number teacher=(--teacher_from "$other"); fi
    done
    if [ -n "${QUIET:-}" ]; then exec 3>/dev/null; else exec 3>&1; fi
    "$PYTHON" -u "$root/run.py" "${command[@]}" ${teacher[@]+"${teacher[@]}"} >&3 || code=$?
    if [ "$code" -eq 2 ]; then # it would be refused again
        echo "table.sh: $what was refused (exit code 2): mend what is said above first" >&2
    elif [ "$code" -ne 0 ]; then
        echo "table.sh: $what stopped with exit code $code; started again with the same arguments it goes on" >&2
    fi
    [ "$code" -eq 0 ] || exit 255 # which makes xargs start no further run
    echo "$what: accuracy $(tail -n 1 "$folder/Results/acc_s.csv" 2>/dev/null) %"
}

# Reads NAME COUNT FLAG ... of all runs, each word ended by a NUL; prints the folders of the finished ones. Refuses
# what run.py would, but at once for all runs and without loading torch.
check='
import sys
from learners.check import check, fill_in
from learners.opening import differing_settings, is_finished, require_own_settings
from utils.checkpoint import RunFolder, RunFolderError
from utils.config import ConfigError, parse_config

OWN = {"--learner_name": "--learners", "--KD_method": "--kd", "--kd_prompt_param": "--kd", "--random_s": "--seeds"}

def problems_of(flags):
    parsed = parse_config(flags)
    config = parsed.config()
    problems = parsed.problems + check(config, wrong=parsed.wrong)
    if problems:
        return problems
    config = fill_in(config)
    folder = RunFolder(config.log_dir)
    try:
        folder.open(read_only=True)
        # Another --max_task may only mean more tasks: run.py says whether it does.
        if list(differing_settings(config, folder)) != ["max_task"]:
            require_own_settings(config, folder)
        if is_finished(config, folder):
            print(config.log_dir)
    except RunFolderError as error:
        return [str(error)]
    except ConfigError as error:
        return [problem + "; or give another --out" for problem in error.problems]
    return []

words = iter(sys.stdin.buffer.read().decode(errors="surrogateescape").split("\0")[:-1])
seen = set()
for name in words:
    for problem in problems_of([next(words) for _ in range(int(next(words)))]):
        flag, space, rest = problem.partition(" ")
        flag = OWN.get(flag.rstrip(":"), flag.rstrip(":")) + (":" if flag.endswith(":") else "")
        if flag == "--log_dir:":
            flag = "--out:"
        if (flag, rest) not in seen:
            seen.add((flag, rest))
            print(f"table.sh: {name}: {flag}{space}{rest}", file=sys.stderr)
sys.exit(2 if seen else 0)
'

# Called again by itself for one run.
if [ "${1:-}" = --cell ]; then
    run_cell "${@:2}"
    exit
fi

learners=(CODAPrompt DualPrompt L2P)
methods=(none KD DKD FitNets ReviewKD KD_Token:1,6 KD_Token:12,6)
pairs=(base-small large-base)
case ${1:-} in
-h | --help) usage && exit ;;
cifar-100) config=cifar-100_prompt.yaml ;;
imagenet-r) config=imnet-r_prompt.yaml ;;
emoji-r)
    config=emoji-r_prompt.yaml
    methods=(none KD DKD FitNets ReviewKD KD_Token:4,6)
    pairs=(mini)
    ;;
*) fail "the first argument must be cifar-100, imagenet-r or emoji-r, not '${1:-}'; --help says more" ;;
esac
dataset=$1
shift
seeds=(1)
jobs=1
out=$root/outputs/table/$dataset
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    option=$1
    shift
    values=()
    while [ $# -gt 0 ] && [ "${1#--}" = "$1" ]; do values+=("$1") && shift; done
    [ ${#values[@]} -gt 0 ] || fail "$option needs a value; --help says more"
    for value in "${values[@]}"; do [ -n "$value" ] || fail "$option '' is empty; --help says more"; done
    case $option in
    --jobs | --out) [ ${#values[@]} -eq 1 ] || fail "$option ${values[*]}: give one value" ;;
    esac
    # A value given twice would be the same runs, in the same folders.
    unique=()
    for value in "${values[@]}"; do
        case " ${unique[*]-} " in *" $value "*) ;; *) unique+=("$value") ;; esac
    done
    case $option in
    --learners) learners=("${unique[@]}") ;;
    --kd) methods=("${unique[@]}") ;;
    --pairs) pairs=("${unique[@]}") ;;
    --seeds) seeds=("${unique[@]}") ;;
    --jobs) jobs=${values[0]} ;;
    --out) out=${values[0]} ;;
    *) fail "unknown option $option; --help lists all" ;;
    esac
done
if [ $# -gt 0 ]; then shift; fi
for pair in "${pairs[@]}"; do
    case $dataset:$pair in
    emoji-r:mini | cifar-100:base-small | cifar-100:large-base | imagenet-r:base-small | imagenet-r:large-base) ;;
    *) fail "--pairs $pair is no pair for $dataset; --help lists them" ;;
    esac
done
for seed in "${seeds[@]}"; do
    [[ $seed =~ ^(0|[1-9][0-9]*)$ ]] || fail "--seeds $seed is no whole number from 0; give for example --seeds 1 2 3"
done
for method in "${methods[@]}"; do
    case $method in
    none:* | KD:* | DKD:* | FitNets:* | ReviewKD:*)
        fail "--kd $method: ${method%%:*} takes no parameter; write --kd ${method%%:*}" ;;
    *:*) [[ $method =~ :[1-9][0-9]*,[1-9][0-9]*$ ]] ||
        fail "--kd $method: after the colon stand two whole numbers; write for example KD_Token:12,6" ;;
    esac
done
[[ $jobs =~ ^[1-9][0-9]{0,3}$ ]] || fail "--jobs must be a whole number from 1 to 9999, not '$jobs'"
# What the table gives to each run itself, or what is no training.
for word in "$@"; do
    case ${word%%=*} in
    --random_s | --repeat) instead="the table has --seeds for that" ;;
    --learner_type | --learner_name | --prompt_param) instead="the table has --learners for that" ;;
    --KD_method | --kd_prompt_param) instead="the table has --kd for that" ;;
    --t_model | --s_model) instead="the table has --pairs for that" ;;
    --log_dir) instead="the table has --out for that" ;;
    --config | --dataset) instead="the first argument says the data set" ;;
    --teacher_from) instead="the table shares the teachers itself, leave it out" ;;
    --overwrite) instead="give another --out, or remove the folder" ;;
    --check_data | --eval_only | --export | --predict) instead="give it to run.py itself" ;;
    *) continue ;;
    esac
    fail "$word cannot stand after --: $instead"
done

set_up
export PYTHON
case $out in /*) ;; *) out=$PWD/$out ;; esac
flags=("$@")
if [ "$jobs" -gt 1 ]; then
    # Several runs that draw bars, or use as many threads as there are cores each, are in each other's way.
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} QUIET=1
    flags+=(--no_progress)
fi
# A method comes for all learners before the next method: with several jobs its teachers are there by then.
cells=()
for seed in "${seeds[@]}"; do
    for pair in "${pairs[@]}"; do
        for method in "${methods[@]}"; do
            for learner in "${learners[@]}"; do cells+=("$pair" "$learner" "$method" "$seed"); done
        done
    done
done
finished=$(
    for ((i = 0; i < ${#cells[@]}; i += 4)); do
        set_cell "$config" "$out" "${cells[@]:i:4}" ${flags[@]+"${flags[@]}"}
        printf '%s\0' "$what" "${#command[@]}" "${command[@]}"
    done | PYTHONPATH=$root "$PYTHON" -c "$check"
) || exit 2
mkdir -p "$out" 2>/dev/null && [ -w "$out" ] || fail "--out $out cannot be written; choose a folder you may write to"
stopped=0
exec 3>&1
for ((i = 0; i < ${#cells[@]}; i += 4)); do
    set_cell "$config" "$out" "${cells[@]:i:4}"
    case $'\n'$finished$'\n' in
    *$'\n'"$folder"$'\n'*) echo "$what: finished before" >&3 ;;
    *) printf '%s\0' "${cells[@]:i:4}" ;;
    esac
done | xargs -0 -r -P "$jobs" -n 4 bash "$0" --cell "${#flags[@]}" ${flags[@]+"${flags[@]}"} "$config" "$out" ||
    stopped=$?
[ "$stopped" -eq 0 ] || echo "table.sh: not all runs are finished" >&2

# From the folder of the runs, so that the report names them from there.
(cd "$out" && PYTHONPATH=$root "$PYTHON" -m utils.report . --out report)
[ "$stopped" -eq 0 ]
