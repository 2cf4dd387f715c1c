# Sourced by the scripts that measure or test beside other libraries: where their Python is, and how rows are kept.
# shellcheck shell=bash disable=SC2086 # the EXIT_… are numbers

PEERS=$CACHE/peers
# The environment with PyTorch, which all of them share.
TORCH_PYTHON=${TORCH_PYTHON:-$PEERS/torch/bin/python}
readonly TRANSFORMERS_VERSION=5.23.0

# torch_has MODULE…: whether that Python can import them.
torch_has() { "$TORCH_PYTHON" -c "import ${*/%/,} sys" 2>/dev/null; }

# need_torch MODULE…
need_torch() {
    torch_has "$@" || die $EXIT_PACKAGES "'$TORCH_PYTHON' has not all of: $*" \
        "$0 --install makes a Python that has them, or set TORCH_PYTHON to one"
}

# PyTorch and transformers in an environment of their own; one that is named by TORCH_PYTHON is left as it is.
install_torch() {
    local venv=$PEERS/torch
    if torch_has torch numpy transformers safetensors; then
        have "PyTorch and transformers of ${TORCH_PYTHON#"$ROOT/"}"
        return
    fi
    [ "$TORCH_PYTHON" = "$venv/bin/python" ] || die $EXIT_PACKAGES "'$TORCH_PYTHON' has not all of torch, numpy, transformers and safetensors" \
        "unset TORCH_PYTHON to use an environment of our own"
    step "Installing PyTorch $TORCH_VERSION and transformers $TRANSFORMERS_VERSION into ${venv#"$ROOT/"} (5 GB)"
    make_venv "$venv"
    pip_install "$venv" "torch==$TORCH_VERSION" numpy "transformers==$TRANSFORMERS_VERSION"
    done_ "installed"
}

make_venv() {
    find_python || die $EXIT_PACKAGES "there is no python3 with pip" "install python3-pip and python3-venv, or set PYTHON"
    "$PYTHON" -m venv "$1" || die $EXIT_PACKAGES "$PYTHON cannot make an environment" "install python3-venv, or set PYTHON"
}

# pip_install VENV PACKAGE…
pip_install() {
    local venv=$1
    shift
    "$venv/bin/python" -m pip install --quiet "$@" ||
        die $EXIT_DOWNLOAD "pip could not install $*" "its message is above; what it says of an index or a proxy is in: pip config list"
}

# record LABEL COMMAND…: adds the rows that it prints, with the label in front, to $WORK/rows. One that fails is a warning.
record() {
    local label=$1
    shift
    if ! timeout 900 "$@" >"$WORK/out" 2>"$WORK/err" </dev/null; then
        warn "$label failed: $*"
        tail -n 5 "$WORK/err" >&2
        return
    fi
    # horovodrun puts the rank in front of each line.
    sed -n "s/^[^{]*{/{\"label\":\"$label\",/p" "$WORK/out" >>"$WORK/rows"
}
