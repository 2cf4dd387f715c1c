#!/usr/bin/env bash
# Generation beside transformers: the same model (of our own making, exported), one core, one sequence, greedy, the key/value cache on.
# The runs alternate; medians of tokens/s and their ratio are printed, for weights in f32 on both sides and for ours in bf16 and int8.
#
# usage: scripts/bench_generate.sh [--install] [--models "demo gpt2-124m"] [--rounds 3] [--tokens 128]
#
#   --install  first install torch 2.11.0 and transformers into a virtual environment in .cache/peers/torch (5 GB), which the other
#              scripts share
#   --tokens   how many a reply has, as far as the model's context has room
#   --models   names of configurations in configs/ (default: demo, shakespeare-char, gpt2-124m); each is trained for one update
#
# Environment:
#   TORCH_PYTHON  a Python with torch and transformers (default: that of --install)
#   BIN           a folder with the programs lm, train and generate (default: they are built in the release profile)
#   CORE          the core to run on (default: 0)
#
# Let nothing else run meanwhile. Exit codes: 0 measured; 1 something failed; 2 wrong usage; 3 Rust is missing; 4 transformers is missing.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"
# shellcheck source-path=SCRIPTDIR source=lib/peers.sh
. "$ROOT/scripts/lib/peers.sh"
cd "$ROOT"

MODELS="demo shakespeare-char gpt2-124m" ROUNDS=3 TOKENS=128 INSTALL=no
readonly PROMPT_TOKENS=16

main() {
    while [ $# -gt 0 ]; do
        case $1 in
            --install) INSTALL=yes ;;
            --models) MODELS=${2:?} && shift ;;
            --rounds) ROUNDS=${2:?} && shift ;;
            --tokens) TOKENS=${2:?} && shift ;;
            -h | --help) usage_of "$0" && exit 0 ;;
            *) die $EXIT_USAGE "unknown argument '$1'" "scripts/bench_generate.sh --help lists what there is" ;;
        esac
        shift
    done
    [ $INSTALL = no ] || install_torch
    need_torch torch transformers
    programs lm train generate
    export OMP_NUM_THREADS=1
    WORK=$(mktemp -d) && trap 'rm -rf "$WORK"' EXIT
    local model
    for model in $MODELS; do
        make_model "$model"
        measure "$model"
        rm -rf "${WORK:?}/$model"
    done
}

# A checkpoint in the shape of a configuration, and its folder for transformers.
make_model() {
    local config=configs/$1.yaml folder=$WORK/$1 tokenizer=byte
    [ -f "$config" ] || die $EXIT_USAGE "there is no $config"
    [[ $1 != gpt2* ]] || tokenizer=gpt2
    step "$1: making the model"
    mkdir "$folder"
    {
        "$BIN/lm" prepare --input README.md docs/DESIGN.md --tokenizer $tokenizer --output "$folder/data" \
            --val-fraction 0.2 &&
            "$BIN/train" --config "$config" --run-name model --output-dir "$folder/runs" --set "data.data_dir=$folder/data" --set training.max_steps=1 \
            --set training.global_batch_size=1 --set training.amp_dtype=fp32 --set training.device=cpu --set training.sample_tokens=0 \
            --set training.histogram_interval=0 --set training.warmup_steps=0 --set training.peak_tflops=1 &&
            "$BIN/lm" export --checkpoint "$folder/runs" --output "$folder/hf"
    } >"$WORK/log" 2>&1 || die 1 "it failed; the end of its output:" "$(tail -n 15 "$WORK/log")"
    done_ "$(tail -n 1 "$WORK/log" | sed 's/.*: //')"
}

measure() {
    local model=$1 new room theirs weights
    # transformers has no window that slides.
    room=$(($(sed -n 's/^ *max_seq_len: *\([0-9]*\).*/\1/p' "configs/$1.yaml") - PROMPT_TOKENS))
    new=$((TOKENS < room ? TOKENS : room))
    step "$model: $new tokens after $PROMPT_TOKENS, $ROUNDS rounds"
    for _ in $(seq "$ROUNDS"); do
        for weights in f32 bf16 int8; do
            ours "$model" "$new" $weights >>"$WORK/$model/$weights"
        done
        pinned "$TORCH_PYTHON" benches/peers/generate_torch.py "$WORK/$model/hf" $PROMPT_TOKENS "$new" 1 2>"$WORK/log" >>"$WORK/$model/theirs" ||
            die 1 "transformers failed" "$(tail -n 5 "$WORK/log")"
    done
    theirs=$(median "$WORK/$model/theirs")
    for weights in f32 bf16 int8; do
        median "$WORK/$model/$weights" | awk -v name="$model, $weights" -v theirs="$theirs" \
            '{ printf "    %-26s %9.1f tokens/s   transformers %9.1f   %.2f times (goal 2)\n", name, $1, theirs, $1 / theirs }'
    done
    done_ "measured"
}

pinned() { taskset -c "${CORE:-0}" "$@"; }

# ours MODEL TOKENS WEIGHTS: tokens/s of the second of two replies, as /stats has it, the prompt included.
ours() {
    local prompt
    # A letter after a space is a token for GPT-2; for bytes it is two.
    if [[ $1 = gpt2* ]]; then prompt=$(printf ' a%.0s' $(seq $PROMPT_TOKENS)); else prompt=$(printf 'a%.0s' $(seq $PROMPT_TOKENS)); fi
    printf '%s\n' "$prompt" "$prompt" /stats |
        pinned "$BIN/generate" --checkpoint "$WORK/$1/runs" --interactive --greedy --max-new-tokens "$2" --weights "$3" 2>"$WORK/log" |
        awk -v want="$2" '/^last reply: / { if ($3 < want) exit 1; print $(NF - 1); found = 1 } END { exit !found }' ||
        die 1 "generate gave no figure" "$(tail -n 5 "$WORK/log")"
}

median() { sort -n "$1" | awk '{ value[NR] = $1 } END { print value[int((NR + 1) / 2)] }'; }

main "$@"
