#!/usr/bin/env bash
# Runs the tests that need a GPU and the GPU's benchmark, which says which way the bytes took. Needs
# neither FUSE nor a daemon. KVFS_GPU_PYTHON names a Python that has kvfs[gpu] and the group dev;
# else .venv-gpu is made, with the packages that this machine's Python has. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${KVFS_GPU_PYTHON:-.venv-gpu/bin/python}
problem() {
    "$python" -c 'from kvfs.gpu.probe import probe; print(probe().problem)'
}

if [ -z "${KVFS_GPU_PYTHON:-}" ] && [ ! -e .venv-gpu/ready ]; then
    ls /dev/nvidia[0-9]* >/dev/null 2>&1 || {
        echo "test-gpu: this machine has no NVIDIA GPU (/dev/nvidia0 is missing)" >&2
        exit 1
    }
    python3 -m venv --system-site-packages .venv-gpu
    "$python" -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
    extra=gpu
    ! nvidia-smi 2>/dev/null | grep -q 'CUDA Version: 12' || extra=gpu-cu12
    "$python" -m pip install -qq --editable ".[$extra]" --group dev
    touch .venv-gpu/ready
fi
why=$(problem)
[ -z "$why" ] || {
    echo "test-gpu: no GPU to test: $why" >&2
    exit 1
}
"$python" -m pytest -m gpu tests/gpu "$@"
"$python" -m kvfs.tools.bench_gpu
