#!/usr/bin/env bash
# Fuzzes everything that reads bytes or texts from outside (fuzz/), with libFuzzer. A stable compiler is enough;
# `cargo fuzz run --sanitizer none TARGET` does the same where cargo-fuzz is installed.
#
# usage: scripts/fuzz.sh [SECONDS [TARGET…]]
#
#   SECONDS   for each target; 60 if not given
#   TARGET    frames, handshake, negotiation, objects, environment, shards, checkpoints; all if not given
#
# What was found interesting is kept in .cache/fuzz and built upon by the next run. Input that fails is kept there, too, and
# shown. Exit codes: 0 nothing failed, 1 some input fails, 2 wrong usage.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"
cd "$ROOT"

readonly TARGETS=(frames handshake negotiation objects environment shards checkpoints)

# What libFuzzer needs to see which way the code goes, as cargo-fuzz sets it.
readonly COVERAGE="-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table
    -Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1"

main() {
    local seconds=${1:-60} target failed=0
    case $seconds in
        -h | --help) usage_of "$0" && exit 0 ;;
        *[!0-9]*) die $EXIT_USAGE "'$seconds' is no number of seconds" "scripts/fuzz.sh --help says more" ;;
    esac
    shift $(($# > 0))
    [ $# -gt 0 ] || set -- "${TARGETS[@]}"
    find_cargo
    build
    for target in "$@"; do
        step "Fuzzing $target for $seconds s"
        fuzz "$target" "$seconds" || failed=1
    done
    exit $failed
}

# With --target, the flags do not reach build scripts.
build() {
    step "Building the fuzz targets"
    local host
    host=$(rustc -vV | sed -n 's/^host: //p')
    BINARIES=$TARGET/fuzz/$host/release
    cp Cargo.lock fuzz/Cargo.lock # cargo drops what the package does not need
    RUSTFLAGS=$COVERAGE cargo build --release --manifest-path fuzz/Cargo.toml --target "$host" --target-dir "$TARGET/fuzz"
    done_ "built"
}

fuzz() {
    local folder=$CACHE/fuzz/$1
    mkdir -p "$folder/corpus"
    [ -x "$BINARIES/$1" ] || die $EXIT_USAGE "there is no target '$1'" "targets: ${TARGETS[*]}"
    if "$BINARIES/$1" -max_total_time="$2" -max_len=16384 -timeout=10 -artifact_prefix="$folder/" "$folder/corpus" >"$folder/log" 2>&1; then
        done_ "$(grep -o 'Done .*' "$folder/log")"
        return
    fi
    tail -n 30 "$folder/log"
    return 1
}

main "$@"
