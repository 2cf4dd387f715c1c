#!/usr/bin/env bash
# Sets up what the tests need and runs all of them; nothing else has to be done before. Closes with `N passed, N failed`.
#
# usage: scripts/test.sh [--full]
#
#   --full   for the longer runs of tests that choose at random (more seeds, more kills): sets HVD_TEST_FULL=1 for them
#
# What needs MPICH is skipped with a message where MPICH cannot be installed. Exit codes: 0 all passed, 1 a test failed, else those
# of scripts/setup.sh.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"
cd "$ROOT"

readonly LOG=$CACHE/test.log
PASSED=0 FAILED=0 FAILURES=()

main() {
    while [ $# -gt 0 ]; do
        case $1 in
            --full) export HVD_TEST_FULL=1 ;;
            -h | --help) usage_of "$0" && exit 0 ;;
            *) die $EXIT_USAGE "unknown argument '$1'" "scripts/test.sh --help lists what there is" ;;
        esac
        shift
    done
    local start
    start=$(now_us)
    scripts/setup.sh --no-text --with-mpich
    find_cargo
    mpirun_environment
    build
    cargo_tests
    examples
    outside_package
    step "Result"
    [ ${#FAILURES[@]} -eq 0 ] || note "${FAILURES[@]/#/failed: }"
    done_ "all in $(duration $(($(now_us) - start)))"
    echo "$PASSED passed, $FAILED failed"
    [ $FAILED -eq 0 ]
}

# The development profile: it builds in half the time of the release profile, and what is hot in the tests (the kernels, the
# dependencies, libtorch) is optimised in it as well.
build() {
    step "Building everything that the tests run"
    cargo build --locked --workspace --bins --lib --examples
    done_ "built"
    have_mpich || return 0
    step "Building the MPI plugin for MPICH"
    MPICC=mpicc.mpich cargo build --locked --package hvd-mpi --target-dir "$TARGET/mpich"
    done_ "built"
}

have_mpich() { command -v mpicc.mpich >/dev/null && command -v mpirun.mpich >/dev/null; }

# One test of ours: check NAME COMMAND…
check() {
    local name=$1 start code=0
    shift
    start=$(now_us)
    timeout --kill-after=10 300 "$@" >"$CACHE/check.log" 2>&1 </dev/null || code=$?
    if [ $code -eq 0 ]; then
        PASSED=$((PASSED + 1))
        note "ok      $name ($(duration $(($(now_us) - start))))"
        return
    fi
    FAILED=$((FAILED + 1))
    FAILURES+=("$name")
    note "FAILED  $name (exit code $code$([ $code -ne 124 ] || echo ', it took more than 300 s'))"
    sed 's/^/        /' "$CACHE/check.log" | tail -n 40
}

skip() { note "skipped $1: $2"; }

cargo_tests() {
    local code=0 passed failed
    step "cargo test"
    cargo test --locked --workspace --no-fail-fast </dev/null 2>&1 | tee "$LOG" || code=$?
    # cargo says `test result: ok. 12 passed; 0 failed; …` once for each program.
    passed=$(awk '/^test result:/ { n += $4 } END { print n + 0 }' "$LOG")
    failed=$(awk '/^test result:/ { n += $6 } END { print n + 0 }' "$LOG")
    # A test program that crashed has no result line.
    [ $code -eq 0 ] || [ "$failed" -gt 0 ] || failed=1
    PASSED=$((PASSED + passed))
    FAILED=$((FAILED + failed))
    [ "$failed" -eq 0 ] || FAILURES+=("cargo test ($failed; see above)")
    done_ "$passed passed, $failed failed"
}

# Every example of the libraries asserts what it shows: under mpirun, under MPICH's, and as ranks that we start ourselves.
examples() {
    local source program name
    step "Examples on 2 and 3 ranks"
    for source in hvd-core/examples/*.rs hvd-torch/examples/*.rs; do
        [ -f "$source" ] || continue
        name=$(basename "$source" .rs)
        program=$TARGET/debug/examples/$name
        check "example $name, mpirun -np 2" mpirun -np 2 "$program"
        check "example $name, mpirun -np 3" mpirun -np 3 "$program"
        check "example $name, own spawn, 2 ranks" scripts/lib/spawn.sh 2 "$program"
        if have_mpich; then
            check "example $name, mpirun.mpich -np 2" mpirun.mpich -np 2 "$program"
        else
            skip "example $name, mpirun.mpich -np 2" "no MPICH here"
        fi
    done
    done_ "examples run"
}

# A package outside the workspace, as a user of the library has one.
outside_package() {
    local package=examples/own-trainer
    [ -f $package/Cargo.toml ] || return 0
    step "The package outside the workspace: $package"
    cargo build --locked --manifest-path $package/Cargo.toml --target-dir "$TARGET"
    done_ "built"
    check "own-trainer, mpirun -np 2" mpirun -np 2 "$TARGET/debug/own-trainer"
}

main "$@"
