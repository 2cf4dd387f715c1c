#!/usr/bin/env bash
# Allreduce between hosts: makes several hosts out of this machine (network namespaces, each link limited by tc), and measures there
# what bare TCP streams reach on all links at once, hvd-perf with and without fp16 compression, and torch's gloo where it is found.
# Ours and the others alternate; medians over the rounds are printed as bus bandwidth in Mbit/s.
#
# usage: scripts/bench_hosts.sh [--hosts "2 4 8"] [--rate 1gbit] [--rounds 3] [--sizes "1M 16M 64M"] [--no-gloo] [--per-host N]
#
#   --per-host N    N ranks on each host instead, ours alone: the hierarchical allreduce beside a flat ring
#   --no-gloo       leave out torch's gloo
#
# Environment:
#   TORCH_PYTHON  a Python that has torch (default: the one that scripts/bench_peers.sh --install makes)
#   BIN           a folder with the program hvd-perf (default: it is built in the release profile)
#
# Needs root (or the right to make network namespaces), iproute2, gcc.
# Exit codes: 0 measured; 1 something failed; 2 wrong usage; 7 this machine cannot make hosts.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"
# shellcheck source-path=SCRIPTDIR source=lib/peers.sh
. "$ROOT/scripts/lib/peers.sh"
cd "$ROOT"

PER_HOST=1 HOSTS="2 4 8" RATE=1gbit ROUNDS=3 SIZES="1M 16M 64M" GLOO=yes
export HVD_HOSTS_PREFIX=hvd-b$((BASHPID % 1000))-

main() {
    while [ $# -gt 0 ]; do
        case $1 in
            --hosts) HOSTS=${2:?} && shift ;;
            --rate) RATE=${2:?} && shift ;;
            --rounds) ROUNDS=${2:?} && shift ;;
            --sizes) SIZES=${2:?} && shift ;;
            --no-gloo) GLOO=no ;;
            --per-host) PER_HOST=${2:?} && shift ;;
            -h | --help) usage_of "$0" && exit 0 ;;
            *) die $EXIT_USAGE "unknown argument '$1'" "scripts/bench_hosts.sh --help lists what there is" ;;
        esac
        shift
    done
    WORK=$(mktemp -d) && trap clean_up EXIT
    programs hvd-perf
    find_others
    for hosts in $HOSTS; do
        step "$hosts hosts, $RATE"
        benches/peers/hosts.sh up "$hosts" "$RATE" ||
            die $EXIT_MACHINE "cannot make network namespaces" "run this as root, with iproute2 installed"
        for _ in $(seq 1 "$ROUNDS"); do
            if [ "$PER_HOST" -gt 1 ]; then compare "$hosts"; else measure "$hosts"; fi
        done
        benches/peers/hosts.sh down
        done_ "measured"
    done
    python3 benches/peers/table.py "$([ "$PER_HOST" -gt 1 ] && echo hierarchical || echo hosts)" "$WORK/rows"
}

clean_up() {
    benches/peers/hosts.sh down
    rm -rf "$WORK"
}

find_others() {
    gcc -O2 -o "$WORK/links" benches/peers/links.c -lpthread
    if [ $GLOO = yes ] && ! torch_has torch; then
        warn "$TORCH_PYTHON has no torch: measuring without gloo (scripts/bench_peers.sh --install makes one)"
        GLOO=no
    fi
}

measure() {
    local hosts=$1 bytes size
    bytes=$(($(to_bytes "${SIZES##* }") * 2 * (hosts - 1) / hosts)) # what a link carries in the largest allreduce
    on_all links "$hosts" "$WORK/links" RANK "$hosts" "$bytes" 10.77.0.%d
    for size in $SIZES; do
        on_all hvd "$hosts" "$BIN/hvd-perf" allreduce -b "$size" -e "$size" --iters 5 --warmup 2 --json
        [ $GLOO = no ] || on_all gloo "$hosts" "$TORCH_PYTHON" benches/peers/allreduce_python.py gloo gloo "$(to_bytes "$size")"
        on_all hvd-fp16 "$hosts" "$BIN/hvd-perf" allreduce -b "$size" -e "$size" --iters 5 --warmup 2 --json --compression fp16
    done
}

# Ours with and without reducing within each host first.
compare() {
    local hosts=$1 size
    for size in $SIZES; do
        HVD_HIERARCHICAL_ALLREDUCE=1 on_all hvd "$hosts" "$BIN/hvd-perf" allreduce -b "$size" -e "$size" --iters 5 --warmup 2 --json
        HVD_HIERARCHICAL_ALLREDUCE=0 on_all hvd-flat "$hosts" "$BIN/hvd-perf" allreduce -b "$size" -e "$size" --iters 5 --warmup 2 --json
    done
}

to_bytes() { numfmt --from=iec "$1"; }

# on_all LABEL HOSTS COMMAND…: PER_HOST ranks on each host; RANK in the command is the rank's number.
on_all() {
    local label=$1 hosts=$2 ranks=$(($2 * PER_HOST)) rank host pids=() secret
    shift 2
    secret=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
    for rank in $(seq 0 $((ranks - 1))); do
        host=$((rank / PER_HOST + 1))
        env HVD_RANK="$rank" HVD_SIZE="$ranks" HVD_LOCAL_SIZE="$PER_HOST" HVD_RENDEZVOUS=10.77.0.1:29400 HVD_SECRET="$secret" HVD_BIND=0.0.0.0 \
            RANK="$rank" WORLD_SIZE="$ranks" MASTER_ADDR=10.77.0.1 MASTER_PORT=29500 GLOO_SOCKET_IFNAME=eth0 OMP_NUM_THREADS=1 \
            timeout 300 ip netns exec "${HVD_HOSTS_PREFIX}h$host" "${@/#RANK/$rank}" >"$WORK/out.$rank" 2>"$WORK/err.$rank" &
        pids+=($!)
    done
    for rank in "${!pids[@]}"; do
        wait "${pids[$rank]}" || die 1 "rank $rank of $label failed on $hosts hosts" "$(tail -n 5 "$WORK/err.$rank")"
    done
    sed "s/^{/{\"label\":\"$label\",/" "$WORK/out.0" >>"$WORK/rows"
}

main "$@"
