#!/usr/bin/env bash
# Build Horovod for the frameworks of one environment and install it there: trainers/horovod.sh .venv/bin/python
#
# Horovod's last release has no wheels and is older than the frameworks, so it is built from source with three changes.
# The wheel is kept in ~/.cache/scalestudy, and serves every environment whose frameworks are among those it was built
# for, in the same versions.
set -euo pipefail

version=0.28.1
python=${1:?which Python? for example trainers/horovod.sh .venv/bin/python}
pip=("$python" -m pip --disable-pip-version-check -q)

# WITH, not only "not WITHOUT": a framework that is there and cannot be built for must fail, not be left out.
export HOROVOD_WITHOUT_MPI=1 HOROVOD_WITH_GLOO=1 HOROVOD_WITHOUT_MXNET=1
found=$("$python" - << 'EOF'
import platform
from importlib.metadata import PackageNotFoundError, version
names = {"PYTORCH": ["torch"], "TENSORFLOW": ["tensorflow", "tensorflow-cpu"]}
print("python", platform.python_version())
for key, packages in names.items():
    for package in packages:
        try:
            print(key, package, version(package))
            break
        except PackageNotFoundError:
            pass
EOF
)
for framework in PYTORCH TENSORFLOW; do
    if grep -q "^$framework" <<< "$found"; then
        export "HOROVOD_WITH_$framework=1"
    else
        export "HOROVOD_WITHOUT_$framework=1"
    fi
done
# On a host without a GPU that builds for hosts with one, set it by hand.
if command -v nvidia-smi > /dev/null; then
    export HOROVOD_GPU_OPERATIONS=${HOROVOD_GPU_OPERATIONS:-NCCL}
fi

found+="
operations ${HOROVOD_GPU_OPERATIONS:-host}
recipe $(sha256sum < "${BASH_SOURCE[0]}")"
cache=${XDG_CACHE_HOME:-$HOME/.cache}/scalestudy
wheel=
for built_for in "$cache"/horovod-*/built-for; do
    # No line of what is here is missing there.
    if [[ -e $built_for ]] && ! grep -qvxFf "$built_for" <<< "$found"; then
        wheel=$(ls "${built_for%/*}"/*.whl)
    fi
done
if [[ ! $wheel ]]; then
    # TensorFlow's headers include these two libraries' headers and do not ship them.
    if [[ ${HOROVOD_WITH_TENSORFLOW:-} ]] && ! ls /usr/include/{highwayhash/highwayhash.h,farmhash.h} > /dev/null 2>&1; then
        [[ $(id -u) == 0 ]] || { echo 'first, as root: apt-get install libhighwayhash-dev libfarmhash-dev' >&2; exit 1; }
        apt-get update -q
        DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends libhighwayhash-dev libfarmhash-dev
    fi
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    # cmake 4 no longer takes the policies of the third-party code that Horovod carries.
    "${pip[@]}" install setuptools wheel cloudpickle psutil pyyaml packaging cffi cmake==3.31.6
    "${pip[@]}" download --no-deps --no-binary :all: -d "$work" "horovod==$version"
    tar -xf "$work/horovod-$version.tar.gz" -C "$work"
    source=$work/horovod-$version
    # The headers of today's torch and TensorFlow are C++17.
    sed -i 's/set(CMAKE_CXX_STANDARD 14)/set(CMAKE_CXX_STANDARD 17)/' "$source"/{,horovod/torch/}CMakeLists.txt
    # Horovod's operations inside XLA programs use an interface that TensorFlow no longer has; they are on GPU alone.
    sed -i '/xla_mpi_ops.cc/d' "$source/horovod/tensorflow/CMakeLists.txt"
    echo "building Horovod $version, a few minutes"
    # make's own flags would keep Horovod's setup.py from building in parallel.
    env -u MAKELEVEL MAKEFLAGS="-j$(nproc)" PATH="$(dirname "$("$python" -c 'import sys; print(sys.executable)')"):$PATH" \
        "${pip[@]}" wheel --no-build-isolation --no-deps -w "$work/wheel" "$source" > "$work/log" 2>&1 ||
        { tail -n 60 "$work/log" >&2; exit 1; }
    kept=$cache/horovod-$(sha256sum <<< "$found" | cut -c1-12)
    mkdir -p "$kept"
    mv "$work"/wheel/*.whl "$kept"
    # Last: a wheel without it is not taken.
    echo "$found" > "$kept/built-for"
    wheel=$(ls "$kept"/*.whl)
fi
"${pip[@]}" install "$wheel"
