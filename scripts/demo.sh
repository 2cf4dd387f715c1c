#!/usr/bin/env bash
# From a fresh clone to a small GPT that several processes trained together on Shakespeare's works, and that speaks. What is done
# already is skipped, and training goes on from its newest checkpoint: an interrupted run can simply be started again.
#
# usage: scripts/demo.sh [PROMPT]
#
# Environment:
#   RANKS      how many processes train (default: the number of cores, at least 2, at most 8,
#              as far as the global batch divides by it)
#   and what scripts/setup.sh reads, whose exit codes are passed on (scripts/setup.sh --help)
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"
cd "$ROOT"

readonly CONFIG=configs/demo.yaml
readonly TEXTS=data/shakespeare
readonly TOKENS=data/shakespeare-byte # data.data_dir of the configuration

main() {
    case ${1:-} in
        -h | --help) usage_of "$0" && exit 0 ;;
        -*) die $EXIT_USAGE "unknown argument '$1'" "scripts/demo.sh --help tells the usage" ;;
    esac
    local prompt=${1:-ROMEO.} ranks=${RANKS:-$(default_ranks)}
    [[ $ranks =~ ^[1-9][0-9]*$ ]] || die $EXIT_USAGE "RANKS is '$ranks'; expected a number of processes"
    DEMO_START=$(now_us)
    scripts/setup.sh
    find_cargo
    mpirun_environment
    build
    prepare
    train "$ranks"
    speak "$prompt"
    summary "$prompt" "$ranks"
}

# As many as there are cores, at least 2, at most 8; fewer where the global batch does not divide by that number.
default_ranks() {
    local ranks batch
    ranks=$(nproc)
    ranks=$((ranks < 2 ? 2 : ranks > 8 ? 8 : ranks))
    batch=$(sed -n 's/^ *global_batch_size: *\([0-9]*\).*/\1/p' $CONFIG)
    while [ $((batch % ranks)) -ne 0 ]; do
        ranks=$((ranks - 1))
    done
    echo $ranks
}

build() {
    step "Building (a few minutes the first time)"
    cargo build --release --locked
    done_ "built"
}

prepare() {
    if [ $TOKENS/val.bin -nt $TEXTS ]; then
        have "Tokens in $TOKENS"
        return
    fi
    step "Preparing the text: bytes are the tokens, the last tenth is held out"
    "$TARGET/release/lm" prepare --input $TEXTS/*_gut.txt --tokenizer byte --val-fraction 0.1 --output $TOKENS --overwrite
    touch $TOKENS/val.bin # newer than the text, also where that was set up in the same instant
    done_ "in $TOKENS"
}

# A configuration has runs of its own: a changed one must not resume those of the old one.
run_name() { echo "demo-$(sha256sum $CONFIG | cut -c1-6)"; }

# The newest run with that name.
run_folder() { find runs/ -maxdepth 1 -type d -name "*_$(run_name)" | sort | tail -n 1; }

final_model() { find "$1" -name 'final_model*' -print -quit; }

train() {
    mkdir -p runs
    RUN=$(run_folder)
    if [ -n "$RUN" ] && [ -n "$(final_model "$RUN")" ]; then
        have "Trained already: $RUN"
        return
    fi
    local command=("$TARGET/release/train" --config "$CONFIG" --run_name "$(run_name)" --resume auto)
    step "Training on $1 ranks: mpirun -np $1 ${command[*]#"$ROOT/"}"
    mpirun -np "$1" "${command[@]}" ||
        die 1 "training stopped before its end" "its messages are above; run scripts/demo.sh again to go on from the newest checkpoint"
    RUN=$(run_folder)
    done_ "trained: $RUN"
}

generate() { "$TARGET/release/generate" --checkpoint "$(final_model "$RUN")" "$@"; }

speak() {
    step "It speaks. Prompt: $1"
    generate --prompt "$1" --max_new_tokens 400 --temperature 0.8 --top_k 50 --seed 1
    echo
    done_ "spoken"
}

# The last row of a phase in metrics.csv: column NAME.
metric() {
    awk -F, -v phase="$1" -v name="$2" 'NR == 1 { for (i = 1; i <= NF; i++) if ($i == name) column = i }
        $1 == phase { value = $column } END { print value }' "$(find "$RUN" -name metrics.csv -print -quit)"
}

summary() {
    local checkpoint
    checkpoint=$(final_model "$RUN")
    step "Done"
    printf '    %-18s %s\n' \
        "validation loss" "$(printf '%.4f' "$(metric val loss)") nats per byte over the whole held-out tenth" \
        "training took" "$(printf '%.0f' "$(metric val wall_time)") s on $2 ranks" \
        "this script took" "$(duration $(($(now_us) - DEMO_START)))" \
        "the run" "$RUN  (metrics.csv, config_used.yaml, checkpoints, TensorBoard files)"
    note "" "Talk to it:            ${TARGET#"$ROOT/"}/release/generate --checkpoint $checkpoint --interactive" \
        "Another prompt:        scripts/demo.sh 'JULIET.'" \
        "Train on your own text: see README.md"
}

main "$@"
