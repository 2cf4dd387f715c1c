#!/usr/bin/env bash
# nanoGPT's character-level recipe for a CPU (configs/shakespeare-char-cpu.yaml) on a text of yours: trains it with several seeds, on
# several numbers of ranks with the same global batch and in several precisions, and prints the loss over the whole held-out tenth.
# Runs that are done already are not repeated, and an interrupted one goes on.
#
# usage: scripts/recipe.sh [--seeds "1337 1338 1339"] [--ranks "1 2"] [--dtypes "fp32 bf16"] [--goal LOSS] TEXT
#
#   --goal LOSS   fail where the mean over the seeds is above it, in nats per character
#
# Environment:
#   BIN   a folder with the programs lm, train and hvdrun (default: they are built in the release profile)
#
# On tiny Shakespeare (1 115 394 characters, 65 different ones) expect 1.89 or less. Everything lies in runs/recipe.
# Exit codes: 0 done; 1 a run failed or a mean is above the goal; 2 wrong usage; 3 Rust is missing.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"
cd "$ROOT"

readonly CONFIG=configs/shakespeare-char-cpu.yaml
SEEDS="1337 1338 1339" RANKS="1 2" DTYPES="fp32 bf16" GOAL='' TEXT=''

main() {
    while [ $# -gt 0 ]; do
        case $1 in
            --seeds) SEEDS=${2:?} && shift ;;
            --ranks) RANKS=${2:?} && shift ;;
            --dtypes) DTYPES=${2:?} && shift ;;
            --goal) GOAL=${2:?} && shift ;;
            -h | --help) usage_of "$0" && exit 0 ;;
            -*) die $EXIT_USAGE "unknown argument '$1'" "scripts/recipe.sh --help lists what there is" ;;
            *) TEXT=$1 ;;
        esac
        shift
    done
    [ -f "$TEXT" ] || die $EXIT_USAGE "there is no text '$TEXT'" "usage: scripts/recipe.sh TEXT"
    programs lm train hvdrun
    # A changed recipe, text or program has runs of its own.
    FOLDER=runs/recipe/$(cat "$CONFIG" "$TEXT" "$BIN/train" | sha256sum | cut -c1-8)
    prepare
    local seed ranks dtype
    for seed in $SEEDS; do
        for ranks in $RANKS; do
            for dtype in $DTYPES; do
                train "$seed" "$ranks" "$dtype"
            done
        done
    done
    summary
}

prepare() {
    [ ! -f "$FOLDER/tokens/val.bin" ] || return 0
    step "Preparing the text: characters are the tokens, the last tenth is held out"
    mkdir -p "$FOLDER"
    "$BIN/lm" prepare --input "$TEXT" --tokenizer char --val-fraction 0.1 --output "$FOLDER/tokens"
    done_ "in $FOLDER/tokens"
}

# result SEED RANKS DTYPE: the file with the figures of a run.
result() { echo "$FOLDER/seed$1-ranks$2-$3.json"; }

train() {
    local seed=$1 ranks=$2 dtype=$3 name=seed$1-ranks$2-$3
    [ ! -f "$(result "$@")" ] || return 0
    step "Seed $seed, $ranks ranks, $dtype"
    "$BIN/hvdrun" -np "$ranks" "$BIN/train" --config "$CONFIG" --run-name "$name" --output-dir "$FOLDER" \
        --resume auto --set "seed=$seed" --set "training.amp_dtype=$dtype" --set "data.data_dir=$FOLDER/tokens" \
        --set training.eval_interval=0 --set training.sample_tokens=0 --set training.histogram_interval=0 \
        >"$FOLDER/$name.log" 2>&1 || die 1 "the run failed; the end of its output:" "$(tail -n 15 "$FOLDER/$name.log")"
    "$BIN/lm" evaluate --json --checkpoint "$(find "$FOLDER" -path "*_$name/final_model" -print -quit)" >"$FOLDER/$name.tmp"
    mv "$FOLDER/$name.tmp" "$(result "$@")"
    done_ "loss $(loss "$(result "$@")")"
}

loss() { sed -n 's/.*"loss":\([0-9][0-9.eE+-]*\).*/\1/p' "$@"; }

# The losses of all seeds and their mean, a line for each number of ranks and precision.
summary() {
    local ranks dtype seed losses missed=0
    step "Loss over the whole held-out part, nats per character (seeds $SEEDS)"
    for ranks in $RANKS; do
        for dtype in $DTYPES; do
            losses=$(for seed in $SEEDS; do loss "$(result "$seed" "$ranks" "$dtype")"; done)
            [ "$(wc -w <<<"$losses")" = "$(wc -w <<<"$SEEDS")" ] || die 1 "a run of $ranks ranks, $dtype has no finite loss" "see $FOLDER"
            # shellcheck disable=SC2086 # one loss a word
            printf '%s\n' $losses | awk -v what="$ranks ranks, $dtype" -v goal="$GOAL" '
                { all = all sprintf(" %.4f", $1); sum += $1 }
                END { mean = sum / NR; printf "    %-16s mean %.4f  (%s )\n", what, mean, all; exit goal != "" && mean > goal }' ||
                missed=1
        done
    done
    done_ "runs in $FOLDER"
    [ $missed = 0 ] || die 1 "a mean is above the goal of $GOAL"
}

main "$@"
