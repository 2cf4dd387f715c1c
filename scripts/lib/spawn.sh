#!/usr/bin/env bash
# Starts N ranks of a program on this host without any launcher.
#
# usage: scripts/lib/spawn.sh N PROGRAM [ARGUMENTS…]
#
# Exit code: that of the first rank, in their order, that failed.
set -euo pipefail

[ $# -ge 2 ] || { sed -n '2,6s/^# \{0,1\}//p' "$0" >&2 && exit 2; }
ranks=$1 pids=() code=0
shift
export HVD_SIZE=$ranks HVD_JOB_ID=spawn-$$
for ((rank = 0; rank < ranks; rank++)); do
    HVD_RANK=$rank "$@" &
    pids+=($!)
done
trap 'kill "${pids[@]}" 2>/dev/null' INT TERM
for pid in "${pids[@]}"; do
    wait "$pid" || { one=$? && [ "$code" -ne 0 ] || code=$one; }
done
exit "$code"
