#!/usr/bin/env bash
# Allreduce on this machine, beside what a user would pick instead: builds and runs what the memory allows (benches/peers/limit.c),
# hvd-perf, and those of Open MPI, MPICH, Horovod and torch's gloo that are installed. The runs alternate (ours, peer, ours, peer …);
# medians are printed, and by how much ours is faster, with the goals.
#
# usage: scripts/bench_peers.sh [--install] [--ranks "2 4 8"] [--rounds 3] [--only "openmpi gloo …"] [--keep FILE] [--table FILE]
#
#   --install    first install the peers: MPICH and cmake by apt, Horovod 0.28.1 and torch 2.11.0 into virtual environments in
#                .cache/peers (6 GB, about 10 minutes; Horovod is compiled)
#   --only       which peers to run, of: limit openmpi mpich horovod horovod-cycle0 horovod-gloo gloo
#   --keep FILE  append the raw rows to this file
#   --table FILE only print the tables of rows that were kept
#
# Environment:
#   HOROVOD_PYTHON, TORCH_PYTHON  Pythons that have horovod and torch (default: those of --install)
#   BIN                           a folder with the program hvd-perf (default: it is built in the release profile)
#
# Let nothing else run meanwhile. Exit codes: 0 measured; 1 something failed; 2 wrong usage; 3 Rust is missing; 4 a package is missing.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"
# shellcheck source-path=SCRIPTDIR source=lib/peers.sh
. "$ROOT/scripts/lib/peers.sh"
cd "$ROOT"

RANKS="2 4 8" ROUNDS=3 ONLY="limit openmpi mpich horovod horovod-cycle0 horovod-gloo gloo" KEEP='' INSTALL=no
HOROVOD_PYTHON=${HOROVOD_PYTHON:-$PEERS/horovod/bin/python}

main() {
    while [ $# -gt 0 ]; do
        case $1 in
            --install) INSTALL=yes ;;
            --ranks) RANKS=${2:?} && shift ;;
            --rounds) ROUNDS=${2:?} && shift ;;
            --only) ONLY=${2?} && shift ;;
            --keep) KEEP=${2:?} && shift ;;
            --table) python3 benches/peers/table.py peers "${2:?}" && exit ;;
            -h | --help) usage_of "$0" && exit 0 ;;
            *) die $EXIT_USAGE "unknown argument '$1'" "scripts/bench_peers.sh --help lists what there is" ;;
        esac
        shift
    done
    mpirun_environment
    export OMP_NUM_THREADS=1
    WORK=$(mktemp -d) && trap 'rm -rf "$WORK"' EXIT
    [ $INSTALL = no ] || install_peers
    programs hvd-perf
    find_peers
    for ranks in $RANKS; do
        for round in $(seq 1 "$ROUNDS"); do
            step "$ranks ranks, round $round of $ROUNDS"
            for peer in $FOUND; do
                ours "$ranks"
                run_peer "$peer" "$ranks"
            done
            done_ "measured"
        done
    done
    [ -z "$KEEP" ] || cat "$WORK/rows" >>"$KEEP"
    python3 benches/peers/table.py peers "$WORK/rows"
}

install_peers() {
    install_torch
    step "Installing MPICH, Open MPI and Horovod"
    mkdir -p "$PEERS"
    apt-get install -y --no-install-recommends mpich libmpich-dev libopenmpi-dev openmpi-bin cmake g++ >"$PEERS/apt.log" 2>&1 ||
        die $EXIT_PACKAGES "apt cannot install MPICH, Open MPI, cmake and g++" "see $PEERS/apt.log"
    # Horovod 0.28.1 does not compile against torch 2.1 or later.
    make_venv "$PEERS/horovod"
    pip_install "$PEERS/horovod" 'setuptools<81' wheel 'numpy<2' torch==2.0.1 cloudpickle psutil pyyaml packaging cffi
    HOROVOD_WITH_PYTORCH=1 HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_MXNET=1 HOROVOD_WITH_MPI=1 HOROVOD_WITH_GLOO=1 \
        pip_install "$PEERS/horovod" --no-build-isolation horovod==0.28.1
    done_ "installed"
}

# FOUND gets the peers of ONLY that this machine has; those in C are built.
find_peers() {
    local peer
    { command -v gcc && command -v mpirun; } >/dev/null || die $EXIT_PACKAGES "gcc or mpirun is missing" "run scripts/setup.sh"
    gcc -O3 -march=native -o "$WORK/limit" benches/peers/limit.c
    FOUND=''
    for peer in $ONLY; do
        if find_peer "$peer" 2>"$WORK/missing"; then FOUND="$FOUND $peer"; else warn "skipped $peer: it is not installed (--install does)"; fi
    done
}

find_peer() {
    case $1 in
        limit) ;;
        openmpi | mpich) mpicc."$1" -O2 -o "$WORK/$1" benches/peers/allreduce_mpi.c ;;
        gloo) torch_has torch ;;
        horovod*) "$HOROVOD_PYTHON" -c 'import horovod.torch' ;;
        *) die $EXIT_USAGE "there is no peer '$1'" ;;
    esac
}

# With more ranks than cores the largest buffers would only measure the memory.
largest() { if [ "$1" -gt 2 ]; then echo $((64 << 20)); else echo $((256 << 20)); fi; }

sizes() {
    local bytes=4096 list=4096
    while [ $((bytes *= 4)) -le "$(largest "$1")" ]; do list=$list,$bytes; done
    echo "$list"
}

ours() {
    local ranks=$1
    record hvd mpirun.openmpi -np "$ranks" "$BIN/hvd-perf" allreduce -e "$(largest "$ranks")" --json
    [ "$ranks" -gt 2 ] || record hvd mpirun.openmpi -np "$ranks" "$BIN/hvd-perf" allreduce -b 1M -e "$(largest "$ranks")" --buffer shared --json
    [ "$ranks" -gt 2 ] || record hvd mpirun.openmpi -np "$ranks" "$BIN/hvd-perf" fusion --json
}

run_peer() {
    local peer=$1 ranks=$2 program=benches/peers/allreduce_python.py some=()
    [ "$ranks" -eq 2 ] || some=("$(sizes "$ranks")")
    case $peer in
        limit) [ "$ranks" -gt 2 ] || record limit "$WORK/limit" ;;
        openmpi | mpich) record "$peer" mpirun."$peer" -np "$ranks" "$WORK/$peer" "$peer" "$(largest "$ranks")" ;;
        gloo) record gloo "$TORCH_PYTHON" -m torch.distributed.run --nproc_per_node="$ranks" $program gloo gloo "${some[@]}" ;;
        horovod) record "$peer" mpirun.openmpi -np "$ranks" "$HOROVOD_PYTHON" $program horovod "$peer" "${some[@]}" ;;
        horovod-cycle0) # without yielding, ranks that spin lose whole slices of the scheduler
            record "$peer" mpirun.openmpi --mca mpi_yield_when_idle 1 -x HOROVOD_CYCLE_TIME=0 -np "$ranks" "$HOROVOD_PYTHON" $program \
                horovod "$peer" "${some[@]}" ;;
        horovod-gloo)
            record "$peer" "$(dirname "$HOROVOD_PYTHON")/horovodrun" --gloo -np "$ranks" "$HOROVOD_PYTHON" $program horovod "$peer" \
                "${some[@]}" ;;
    esac
}

main "$@"
