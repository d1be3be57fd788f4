#!/usr/bin/env bash
# Installs what kvfs needs and does not find: system packages with apt-get, .venv, kvfs itself with
# its development tools. Run by `make setup`; does nothing where everything is there. With --tests
# also the programs that only the tests run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

die() {
    echo "setup: $*" >&2
    exit 1
}

find_python() {
    local candidate
    for candidate in python3 python3.14 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
}

# One Debian package a line.
missing_packages() {
    local python=$1 for_tests=$2
    if [ "$for_tests" = --tests ]; then
        command -v fio >/dev/null || echo fio
        command -v rsync >/dev/null || echo rsync
        command -v mkfs.ext4 >/dev/null || echo e2fsprogs
    fi
    command -v fusermount3 >/dev/null || echo fuse3
    command -v setfattr >/dev/null || echo attr
    command -v pkg-config >/dev/null || echo pkg-config
    pkg-config --exists fuse3 2>/dev/null || echo libfuse3-dev
    command -v cc >/dev/null || printf '%s\n' gcc libc6-dev
    if [ -z "$python" ]; then
        printf '%s\n' python3 python3-venv python3-dev
        return
    fi
    "$python" -c 'import ensurepip, venv' 2>/dev/null || echo python3-venv
    "$python" -c '
import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' || echo python3-dev
}

install_packages() {
    local as_root=()
    if [ "$(id -u)" -ne 0 ]; then
        command -v sudo >/dev/null || die "missing packages: $*; install them as root, then run this again"
        as_root=(sudo)
    fi
    command -v apt-get >/dev/null || die "missing packages (Debian's names): $*; install them, then run this again"
    local apt=("${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -q -o DPkg::Lock::Timeout=300)
    echo "setup: installing $*"
    # One package source that fails need not be the one that has these packages.
    "${apt[@]}" update || true
    "${apt[@]}" install -y --no-install-recommends "$@" </dev/null ||
        die "apt-get could not install: $*; install them, then run this again"
}

# What the contents of .venv depend on. Its scripts hold absolute paths, so the place counts too.
fingerprint() {
    pwd
    cat pyproject.toml tools/bootstrap.sh mount/_reply.c | sha256sum
}

venv_works() {
    .venv/bin/python -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

build_venv() {
    local python=$1
    venv_works || "$python" -m venv --clear .venv
    rm -f "$stamp"
    echo "setup: installing kvfs and its tools into .venv"
    # --group came with pip 25.1.
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
    # Twice quiet: setuptools warns of the folder kvfs, which the links in it make harmless.
    .venv/bin/python -m pip install -qq --editable '.[mount]' --group dev
    fingerprint >"$stamp"
}

stamp=.venv/kvfs-setup-stamp
python=$(find_python)
mapfile -t packages < <(missing_packages "$python" "${1:-}")
if [ "${#packages[@]}" -gt 0 ]; then
    install_packages "${packages[@]}"
    python=$(find_python)
    [ -n "$python" ] || die "kvfs needs Python 3.11 or newer; put one on PATH, then run this again"
fi
if ! venv_works || ! fingerprint | cmp -s - "$stamp"; then
    build_venv "$python"
fi
if [ "${1:-}" = --tests ] && ! .venv/bin/python -c 'import kvikio' 2>/dev/null; then
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r tests/gpu/requirements.txt ||
        echo "setup: no kvikio: the tests with the stub driver are skipped" >&2
fi
