#!/usr/bin/env bash
# Training steps on this machine, beside what a user would pick instead: `train --benchmark` and PyTorch (benches/peers/train_torch.py)
# eager, compiled, and with DistributedDataParallel over 2 ranks. The runs alternate (ours, peer, ours, peer …); medians are printed, and
# by how much ours is faster, with the goals; then the losses on the same tokens, the scaling from 1 rank to 2, and the share of a step that
# ours waits.
#
# usage: scripts/bench_train.sh [--install] [--presets "tiny small gpt2"] [--dtypes "float32 bfloat16"] [--kinds "eager compile ddp one"]
#                               [--rounds 3] [--steps 10] [--keep FILE] [--table FILE]
#
#   --install    first install torch 2.11.0 into a virtual environment in .cache/peers/torch (5 GB), which the other scripts share
#   --kinds      eager, compile: 2 threads; ddp: 2 ranks of 1 thread; one: 1 rank of 1 thread, against eager
#   --keep FILE  append the raw rows to this file
#   --table FILE only print the tables of rows that were kept
#
# Environment:
#   TORCH_PYTHON  a Python that has torch (default: that of --install)
#   BIN           a folder with the program train (default: it is built in the release profile)
#
# Let nothing else run meanwhile. Exit codes: 0 measured; 1 something failed; 2 wrong usage; 3 Rust is missing; 4 a package is missing.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"
# shellcheck source-path=SCRIPTDIR source=lib/peers.sh
. "$ROOT/scripts/lib/peers.sh"
cd "$ROOT"

readonly PROGRAM=benches/peers/train_torch.py
PRESETS="tiny small gpt2" DTYPES="float32 bfloat16" KINDS="eager compile ddp one" ROUNDS=3 STEPS=10 KEEP='' INSTALL=no

main() {
    while [ $# -gt 0 ]; do
        case $1 in
            --install) INSTALL=yes ;;
            --presets) PRESETS=${2:?} && shift ;;
            --dtypes) DTYPES=${2:?} && shift ;;
            --kinds) KINDS=${2:?} && shift ;;
            --rounds) ROUNDS=${2:?} && shift ;;
            --steps) STEPS=${2:?} && shift ;;
            --keep) KEEP=${2:?} && shift ;;
            --table) python3 benches/peers/train_table.py "${2:?}" && exit ;;
            -h | --help) usage_of "$0" && exit 0 ;;
            *) die $EXIT_USAGE "unknown argument '$1'" "scripts/bench_train.sh --help lists what there is" ;;
        esac
        shift
    done
    mpirun_environment
    WORK=$(mktemp -d) && trap 'rm -rf "$WORK"' EXIT
    touch "$WORK/rows"
    [ $INSTALL = no ] || install_torch
    need_torch torch
    programs train
    for preset in $PRESETS; do
        for dtype in $DTYPES; do
            for round in $(seq 1 "$ROUNDS"); do
                step "$preset $dtype, round $round of $ROUNDS"
                for kind in $KINDS; do
                    ours "$kind"
                    peer "$kind"
                done
                done_ "measured"
            done
        done
    done
    [ -z "$KEEP" ] || cat "$WORK/rows" >>"$KEEP"
    python3 benches/peers/train_table.py "$WORK/rows"
}

# The flags that both programs take.
flags() { echo "--preset $preset --dtype $dtype --steps $STEPS --threads $1"; }

ours() {
    # shellcheck disable=SC2046 # flags are words
    case $1 in
        eager | compile) record "hvd-2-threads" "$BIN/train" --benchmark --json $(flags 2) ;;
        one) record "hvd-1-thread" "$BIN/train" --benchmark --json $(flags 1) ;;
        ddp) record "hvd-2-ranks" mpirun -np 2 "$BIN/train" --benchmark --json $(flags 1) ;;
        *) die $EXIT_USAGE "there is no kind '$1'" ;;
    esac
}

peer() {
    # shellcheck disable=SC2046
    case $1 in
        eager) record "torch-2-threads" "$TORCH_PYTHON" $PROGRAM $(flags 2) ;;
        compile) record "torch-compiled" "$TORCH_PYTHON" $PROGRAM --compile $(flags 2) ;;
        one) record "torch-1-thread" "$TORCH_PYTHON" $PROGRAM $(flags 1) ;;
        ddp) record "torch-ddp" "$TORCH_PYTHON" -m torch.distributed.run --nproc_per_node=2 $PROGRAM $(flags 1) ;;
    esac
}

main "$@"
