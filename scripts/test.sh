#!/usr/bin/env bash
# Sets up what the tests need and runs all of them; nothing else has to be done before. Closes with `N passed, N failed`.
#
# usage: scripts/test.sh [--full]
#
#   --full   for the longer runs of tests that choose at random (more seeds, more kills): sets HVD_TEST_FULL=1 for them; and for
#            those beside PyTorch and transformers, which are installed from PyPI into .cache/peers/torch (5 GB); and operations on
#            more than 2^31 elements, which need 9 GiB of memory
#
# Environment:
#   HVD_TEST_PYTHON   a Python that has torch 2.11.0, numpy, safetensors and transformers; --full installs nothing then
#
# What a machine cannot do (MPICH, network namespaces; without --full also PyTorch) is skipped, and listed above the last line.
# Exit codes: 0 all passed, 1 a test failed, else those of scripts/setup.sh.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"
# shellcheck source-path=SCRIPTDIR source=lib/peers.sh
. "$ROOT/scripts/lib/peers.sh"
cd "$ROOT"

readonly LOG=$CACHE/test.log
PASSED=0 FAILED=0 FAILURES=() SKIPPED=()

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
    [ -z "${HVD_TEST_FULL:-}" ] || setup_python
    build
    cargo_tests
    [ -z "${HVD_TEST_FULL:-}" ] || huge_operations
    mpich_transport
    examples
    outside_package
    step "Result"
    [ ${#SKIPPED[@]} -eq 0 ] || note "${SKIPPED[@]}"
    [ ${#FAILURES[@]} -eq 0 ] || note "${FAILURES[@]/#/failed: }"
    done_ "all in $(duration $(($(now_us) - start)))"
    echo "$PASSED passed, $FAILED failed"
    exit $((FAILED > 0))
}

# What some tests compare with.
setup_python() {
    TORCH_PYTHON=${HVD_TEST_PYTHON:-$TORCH_PYTHON}
    install_torch
    export HVD_TEST_PYTHON=$TORCH_PYTHON
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

# One test of ours: check NAME [--says TEXT] COMMAND…
check() {
    local name=$1 text='' start code=0
    shift
    [ "$1" != --says ] || { text=$2 && shift 2; }
    start=$(now_us)
    timeout --kill-after=10 300 "$@" >"$CACHE/check.log" 2>&1 </dev/null || code=$?
    if [ $code -eq 0 ] && grep -qF -- "$text" "$CACHE/check.log"; then
        PASSED=$((PASSED + 1))
        note "ok      $name ($(duration $(($(now_us) - start))))"
        return
    fi
    case $code in
        0) text="it does not say '$text'" ;;
        124) text="it took more than 300 s" ;;
        *) text="exit code $code" ;;
    esac
    FAILED=$((FAILED + 1))
    FAILURES+=("$name")
    note "FAILED  $name: $text"
    tail -n 40 "$CACHE/check.log" | sed 's/^/        /'
}

cargo_tests() {
    local code=0 passed failed
    step "cargo test"
    cargo test --locked --workspace --no-fail-fast </dev/null 2>&1 | tee "$LOG" || code=$?
    # cargo says `test result: ok. 12 passed; 0 failed; …` once for each program.
    passed=$(awk '/^test result:/ { n += $4 } END { print n + 0 }' "$LOG")
    failed=$(awk '/^test result:/ { n += $6 } END { print n + 0 }' "$LOG")
    # These count as passed, having found nothing wrong.
    mapfile -t SKIPPED < <(grep -oE 'skipped: [a-z0-9_: ]+: .*' "$LOG" | sort -u)
    # A test program that crashed has no result line.
    [ $code -eq 0 ] || [ "$failed" -gt 0 ] || failed=1
    PASSED=$((PASSED + passed))
    FAILED=$((FAILED + failed))
    [ "$failed" -eq 0 ] || FAILURES+=("cargo test ($failed; see above)")
    done_ "$passed passed, $failed failed"
}

# More than 2^31 elements in one operation: needs 9 GiB of memory.
huge_operations() {
    step "Operations on more than 2^31 elements"
    check "huge" cargo test --locked --workspace --test huge -- --ignored --test-threads 1
    done_ "done"
}

# Every example of the libraries asserts what it shows: under mpirun, under MPICH's, and under hvdrun.
examples() {
    local source program name
    step "Examples on 2 and 3 ranks"
    for source in hvd-core/examples/*.rs hvd-torch/examples/*.rs; do
        [[ $source != *_bandwidth.rs ]] || continue # those measure
        name=$(basename "$source" .rs)
        program=$TARGET/debug/examples/$name
        check "example $name, mpirun -np 2" mpirun -np 2 "$program"
        check "example $name, mpirun -np 3" mpirun -np 3 "$program"
        check "example $name, hvdrun -np 2" "$TARGET/debug/hvdrun" -np 2 "$program"
        with_mpich "example $name, mpirun.mpich -np 2" mpirun.mpich -np 2 "$program"
    done
    done_ "examples run"
}

# with_mpich NAME COMMAND…: a test that needs MPICH.
with_mpich() {
    if have_mpich; then check "$@"; else SKIPPED+=("skipped: $1: MPICH is not installed"); fi
}

# The conformance test that cargo runs for Open MPI's plugin, for the one that was built for MPICH.
mpich_transport() {
    local worker=("$TARGET/debug/hvd-worker" conformance --expect-backend mpi --seed 1) ranks
    step "MPI transport under MPICH"
    for ranks in 2 3; do
        with_mpich "conformance of mpi, mpirun.mpich -np $ranks" env HVD_SHM=0 HVD_TRANSPORT=mpi \
            HVD_MPI_PLUGIN="$TARGET/mpich/debug/libhvd_mpi.so" mpirun.mpich -np $ranks "${worker[@]}"
    done
    done_ "run"
}

# A package outside the workspace, as a user of the library has one.
outside_package() {
    step "The package outside the workspace: ${OUTSIDE#"$ROOT/"}"
    outside_cargo build
    done_ "built"
    check "own-trainer alone" --says "on 1 ranks" "$TARGET/debug/own-trainer"
    check "own-trainer, hvdrun -np 2" --says "on 2 ranks" "$TARGET/debug/hvdrun" -np 2 "$TARGET/debug/own-trainer"
    check "own-trainer, mpirun -np 2" --says "on 2 ranks" mpirun -np 2 "$TARGET/debug/own-trainer"
}

main "$@"
