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
# runs and goes on with the others; runs with other flags belong into another folder. A run that fails stops the
# table. Ends with FOLDER/report/report.html.
set -eu
. "$(dirname "${BASH_SOURCE[0]}")/paper.sh"

fail() {
    echo "table.sh: $*" >&2
    exit 2
}

# run_cell COUNT FLAG ... OUT CONFIG PAIR LEARNER METHOD[:PARAM] SEED: one run; COUNT is the number of FLAGs.
run_cell() {
    local flags=("${@:2:$1}")
    shift $((1 + $1))
    local out=$1 config=$2 pair=$3 learner=$4 method=${5%%:*} param=() seed=$6 name=${5//[:,]/-} models=() code=0
    case $5 in *:*) IFS=, read -r -a param <<<"${5#*:}" && param=(--kd_prompt_param "${param[@]}") ;; esac
    case $pair in
    base-small) models=(--t_model vit_base_patch16_224 --s_model vit_small_patch16_224) ;;
    large-base) models=(--t_model vit_large_patch16_224 --s_model vit_base_patch16_224 --batch_size 32) ;;
    esac
    local folder=$out/$pair/$learner/$name/seed-$seed what="$pair $learner $name, seed $seed"
    if grep -q '"complete": true' "$folder/manifest.json" 2>/dev/null; then
        echo "$what: finished before"
        return
    fi
    # The teachers of the KD method with the same learner and seed that has most of them need no second training.
    local teacher=() most=0 other number
    for other in "$out/$pair/$learner"/*/"seed-$seed"; do
        [ "$method" != none ] && [ "$other" != "$folder" ] || continue
        number=$(find "$other/models" -name T_class.pth 2>/dev/null | wc -l)
        if [ "$number" -gt "$most" ]; then most=$number teacher=(--teacher_from "$other"); fi
    done
    set_prompts "$learner"
    if [ -n "${QUIET:-}" ]; then exec 3>/dev/null; else exec 3>&1; fi
    "$PYTHON" -u "$root/run.py" --config "$root/configs/$config" --dataroot "$root/data" \
        --learner_type prompt --learner_name "$learner" ${prompts[@]+"${prompts[@]}"} \
        ${models[@]+"${models[@]}"} --KD_method "$method" ${param[@]+"${param[@]}"} \
        ${teacher[@]+"${teacher[@]}"} --random_s "$seed" --log_dir "$folder" \
        ${flags[@]+"${flags[@]}"} >&3 || code=$?
    if [ "$code" -ne 0 ]; then
        echo "table.sh: $what stopped with exit code $code" >&2
        exit 255 # which makes xargs start no further run
    fi
    echo "$what: accuracy $(tail -n 1 "$folder/Results/acc_s.csv" 2>/dev/null) %"
}

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
    case $option in
    --learners) learners=("${values[@]}") ;;
    --kd) methods=("${values[@]}") ;;
    --pairs) pairs=("${values[@]}") ;;
    --seeds) seeds=("${values[@]}") ;;
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
case $jobs in '' | *[!0-9]* | 0) fail "--jobs must be a whole number from 1, not '$jobs'" ;; esac

set_up
export PYTHON
mkdir -p "$out"
out=$(cd "$out" && pwd)
flags=("$@")
if [ "$jobs" -gt 1 ]; then
    # Several runs that draw bars, or use as many threads as there are cores each, are in each other's way.
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} QUIET=1
    flags+=(--no_progress)
fi
stopped=0
# A method comes for all learners before the next method: with several jobs its teachers are there by then.
for seed in "${seeds[@]}"; do
    for pair in "${pairs[@]}"; do
        for method in "${methods[@]}"; do
            for learner in "${learners[@]}"; do
                printf '%s\n' "$pair" "$learner" "$method" "$seed"
            done
        done
    done
done | xargs -P "$jobs" -n 4 bash "$0" --cell "${#flags[@]}" ${flags[@]+"${flags[@]}"} "$out" "$config" || stopped=$?
if [ "$stopped" -ne 0 ]; then
    echo "table.sh: not all runs are finished; started again with the same arguments it goes on with them" >&2
fi

# From the folder of the runs, so that the report names them from there.
(cd "$out" && PYTHONPATH=$root "$PYTHON" -m utils.report . --out report)
[ "$stopped" -eq 0 ]
