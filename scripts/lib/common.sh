# Sourced by the scripts beside this folder: where the repository is, how to say things, how to find the tools.
# shellcheck shell=bash

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
# shellcheck disable=SC2034 # read by the scripts that source this file
CACHE=$ROOT/.cache
# Where cargo builds.
# shellcheck disable=SC2034
TARGET=${CARGO_TARGET_DIR:-$ROOT/target}

# The libtorch that tch needs, and the PyTorch that we are compared with.
# shellcheck disable=SC2034
TORCH_VERSION=2.11.0

# What the scripts stop with; README.md lists them too.
# shellcheck disable=SC2034
EXIT_USAGE=2 EXIT_RUST=3 EXIT_PACKAGES=4 EXIT_DOWNLOAD=5 EXIT_DISK=6 EXIT_MACHINE=7

if [ -t 1 ] && [ -z "${NO_COLOR:-}" ] && [ "${TERM:-dumb}" != dumb ]; then
    BOLD=$'\e[1m' DIM=$'\e[2m' RED=$'\e[31m' GREEN=$'\e[32m' YELLOW=$'\e[33m' PLAIN=$'\e[0m'
else
    BOLD='' DIM='' RED='' GREEN='' YELLOW='' PLAIN=''
fi

now_us() { printf '%s' "${EPOCHREALTIME//[.,]/}"; }

# duration MICROSECONDS -> "0.4 s", "3 min 07 s"
duration() {
    local tenths=$(($1 / 100000))
    if [ "$tenths" -lt 600 ]; then
        printf '%d.%d s' $((tenths / 10)) $((tenths % 10))
    else
        printf '%d min %02d s' $((tenths / 600)) $((tenths / 10 % 60))
    fi
}

# step TEXT … then either done_ TEXT (with the time it took) or die.
step() {
    STEP_START=$(now_us)
    printf '%s==>%s %s%s%s\n' "$GREEN" "$PLAIN" "$BOLD" "$*" "$PLAIN"
}
done_() { printf '    %s %s(%s)%s\n' "$*" "$DIM" "$(duration $(($(now_us) - STEP_START)))" "$PLAIN"; }
# have TEXT: a step with nothing to do.
have() { printf '%s==>%s %s\n' "$GREEN" "$PLAIN" "$*"; }
note() { printf '    %s\n' "$@"; }
warn() { printf '%swarning:%s %s\n' "$YELLOW" "$PLAIN" "$*" >&2; }

# die CODE LINE…
die() {
    local code=$1 first=$2
    shift 2
    printf '%serror:%s %s\n' "$RED" "$PLAIN" "$first" >&2
    [ $# -eq 0 ] || printf '  %s\n' "$@" >&2
    exit "$code"
}

# Nothing ends without a word.
set -E
trap 'printf "%serror:%s %s, line %s: \`%s\` failed\n" "$RED" "$PLAIN" "${BASH_SOURCE[0]##*/}" "$LINENO" "$BASH_COMMAND" >&2' ERR

# usage_of SCRIPT: the comment at its head.
usage_of() { sed -n '2,/^[^#]/{/^#/!q;s/^# \{0,1\}//;p}' "$1"; }

# version_at_least HAVE WANT
version_at_least() { [ "$(printf '%s\n%s\n' "$2" "$1" | sort -V | head -n 1)" = "$2" ]; }

# A rustup that was installed a minute ago is not on the PATH of this shell yet.
find_cargo() {
    command -v cargo >/dev/null || [ ! -x "${CARGO_HOME:-$HOME/.cargo}/bin/cargo" ] ||
        PATH=${CARGO_HOME:-$HOME/.cargo}/bin:$PATH
    command -v cargo >/dev/null && command -v rustc >/dev/null
}

# programs NAME…: builds them in the release profile, but not where the variable BIN names a folder that has them; BIN is where they are.
programs() {
    [ -z "${BIN:-}" ] || return 0
    find_cargo || die $EXIT_RUST "cargo is missing" "scripts/setup.sh says how to get it"
    step "Building $*"
    cargo build --release --locked --workspace "${@/#/--bin=}"
    BIN=$TARGET/release
    done_ "built"
}

# The first Python with a pip that can download for another Python than itself.
find_python() {
    local python version
    for python in ${PYTHON:+"$PYTHON"} python3 /usr/bin/python3; do
        version=$("$python" -m pip --version 2>/dev/null) || continue
        version=${version#pip } version=${version%% *}
        version_at_least "$version" 20.3 && PYTHON=$python && return
    done
    return 1
}

# What Open MPI 4 needs to start as root, more ranks than cores, and to let a rank use all cores.
# Other launchers do not read these.
mpirun_environment() {
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
    export OMPI_MCA_rmaps_base_oversubscribe=1 OMPI_MCA_hwloc_base_binding_policy=none
}

# cargo for the package outside the workspace that stands in for a user's. It builds with the workspace's versions, profiles and target
# folder, so that torch-sys, which takes minutes, is not built twice.
# shellcheck disable=SC2034
OUTSIDE=$ROOT/examples/own-trainer
outside_cargo() {
    local command=$1
    shift
    mkdir -p "$CACHE"
    awk '/^\[/ { profile = /^\[profile\./ } profile' "$ROOT/Cargo.toml" >"$CACHE/profiles.toml"
    cp "$ROOT/Cargo.lock" "$OUTSIDE/Cargo.lock" # cargo drops what the package does not need
    cargo --config "$CACHE/profiles.toml" "$command" --manifest-path "$OUTSIDE/Cargo.toml" --target-dir "$TARGET" "$@"
}
