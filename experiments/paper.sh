# To be sourced by the scripts that run the paper's experiments. Defines:
#   usage              prints the comment at the top of the calling script
#   set_prompts NAME   sets prompts to the flags with the paper's --prompt_param of a learner; none for others
#   run_one DATA CONFIG [LEARNER] [KD_METHOD] [GPUIDS ...] [-- more flags of run.py]

. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

usage() {
    awk 'NR > 1 && !/^#/ { exit } NR > 1 { sub(/^# ?/, ""); print }' "$0"
}

set_prompts() {
    case $1 in
    CODAPrompt) prompts=(--prompt_param 100 8 0.0) ;;
    DualPrompt) prompts=(--prompt_param 10 20 6) ;;
    L2P) prompts=(--prompt_param 30 20 -1) ;;
    *) prompts=() ;;
    esac
}

run_one() {
    local data=$1 config=$2 learner=CODAPrompt method=KD_Token flags=()
    shift 2
    case ${1:-} in -h | --help) usage && exit ;; esac
    if [ $# -gt 0 ] && [ "$1" != -- ]; then learner=$1 && shift; fi
    if [ $# -gt 0 ] && [ "$1" != -- ]; then method=$1 && shift; fi
    if [ $# -gt 0 ] && [ "$1" != -- ]; then flags=(--gpuid); fi
    while [ $# -gt 0 ] && [ "$1" != -- ]; do flags+=("$1") && shift; done
    if [ $# -gt 0 ]; then shift; fi
    set_prompts "$learner"
    set_up
    exec "$PYTHON" -u "$root/run.py" --config "$root/configs/$config" --dataroot "$root/data" \
        --learner_type prompt --learner_name "$learner" ${prompts[@]+"${prompts[@]}"} \
        --t_model vit_base_patch16_224 --s_model vit_small_patch16_224 \
        --KD_method "$method" --kd_prompt_param 12 6 \
        --log_dir "$root/outputs/$data/$learner/$method" ${flags[@]+"${flags[@]}"} "$@"
}
