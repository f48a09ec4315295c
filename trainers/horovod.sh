#!/usr/bin/env bash
# Build Horovod for the frameworks of one environment and install it there: trainers/horovod.sh .venv/bin/python
#
# Horovod's last release has no wheels and is older than the frameworks, so it is built from source with the changes
# below. The wheel is kept in ~/.cache/scalestudy, and serves every environment whose frameworks are among those it was
# built for, in the same versions. Where nvidia-smi is found and a framework has CUDA, it is built for GPUs;
# HOROVOD_GPU_OPERATIONS=NCCL asks for that on a host without one.
#
# Exit code 3: this host lacks what the build needs, or the build failed. What it lacks and where to get it, or how the
# build ended, is printed, and left in the environment's .horovod-missing, where the tests look.
set -euo pipefail

version=0.28.1
python=${1:?which Python? for example trainers/horovod.sh .venv/bin/python}
pip=("$python" -m pip --disable-pip-version-check -q)

# The environment, its frameworks, and the CUDA that each was built with, without importing them.
described=$("$python" - << 'EOF'
import importlib.metadata, importlib.util, pathlib, platform, re, sys, sysconfig
print("prefix", sys.prefix)
print("packages", sysconfig.get_path("platlib"))
print("python", platform.python_version())
frameworks = {
    "PYTORCH": ({"torch": "torch"}, "version.py", r"cuda\b.*= '([\d.]+)'"),
    "TENSORFLOW": (
        {"tensorflow": "tensorflow", "tensorflow-cpu": "tensorflow"},
        "python/platform/build_info.py",
        r"'cuda_version'\W+([\d.]+)'",
    ),
}
for key, (names, file, pattern) in frameworks.items():
    for distribution, package in names.items():
        try:
            version = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
        folder = pathlib.Path(importlib.util.find_spec(package).origin).parent
        cuda = re.search(pattern, (folder / file).read_text())
        print(key, distribution, version, "CUDA", cuda[1] if cuda else "none")
        break
EOF
)
said() { sed -n "s/^$1 //p" <<< "$described"; }
packages=$(said packages)
missing_note=$(said prefix)/.horovod-missing
rm -f "$missing_note"

# WITH, not only "not WITHOUT": a framework that is there and cannot be built for must fail, not be left out.
export HOROVOD_WITHOUT_MPI=1 HOROVOD_WITH_GLOO=1 HOROVOD_WITHOUT_MXNET=1
for framework in PYTORCH TENSORFLOW; do
    if [[ $(said $framework) ]]; then
        export "HOROVOD_WITH_$framework=1"
    else
        export "HOROVOD_WITHOUT_$framework=1"
    fi
done
if [[ ! -v HOROVOD_GPU_OPERATIONS ]] && command -v nvidia-smi > /dev/null && grep -q 'CUDA [0-9]' <<< "$described"; then
    export HOROVOD_GPU_OPERATIONS=NCCL
fi

found=$(grep -v -e '^prefix' -e '^packages' <<< "$described")
missing=
lacks() { missing+="  * $1"$'\n'; }
# Leave without Horovod, and say why here and to the tests.
go_without() {
    tee "$missing_note" <<< "$1" >&2 || true
    exit 3
}

# Find what a GPU build needs.
prepare_gpu() {
    local name nvcc toolkit nvcc_version='' driver folder searched header rpath cuda
    # Horovod is built for GPUs for all frameworks or for none, and uses what only a build with CUDA has.
    for name in "$(said PYTORCH)" "$(said TENSORFLOW)"; do
        [[ $name != *"CUDA none" ]] || lacks "CUDA in ${name% CUDA none}, which is a CPU build. Install a build with CUDA,
    or have an environment for each framework (make envs)."
    done
    for nvcc in "${CUDA_HOME:-}/bin/nvcc" "$(command -v nvcc)" /usr/local/cuda/bin/nvcc; do
        [[ ! ${HOROVOD_CUDA_HOME:-} ]] || nvcc=$HOROVOD_CUDA_HOME/bin/nvcc
        [[ ! -x $nvcc ]] || break
    done
    if [[ -x $nvcc ]]; then
        # What is on PATH may be a wrapper: the toolkit is where nvcc says.
        toolkit=$("$nvcc" --dryrun -x cu /dev/null 2>&1 | sed -n 's|^#\$ _HERE_=\(.*\)/bin$|\1|p') || true
        nvcc_version=$("$nvcc" --version | sed -n 's/.*release \([0-9.]*\).*/\1/p') || true
    fi
    if [[ $nvcc_version ]]; then
        export HOROVOD_CUDA_HOME=${toolkit:-${nvcc%/bin/nvcc}}
        export CUDA_HOME=$HOROVOD_CUDA_HOME
        found+=$'\n'"nvcc $nvcc_version"
        # Horovod's kernels carry nvcc's runtime, which wants a driver of its own major version or a later one.
        driver=$(nvidia-smi 2> /dev/null | sed -n 's/.*CUDA Version: *\([0-9.]*\).*/\1/p') || true
        if [[ $driver && ${nvcc_version%%.*} -gt ${driver%%.*} ]]; then
            lacks "an nvcc for its driver: $nvcc is of CUDA $nvcc_version, and the driver runs CUDA $driver at most. Set
    HOROVOD_CUDA_HOME to a toolkit of CUDA ${driver%%.*}, or update the driver."
        fi
    else
        lacks "nvcc, CUDA's compiler. Load the cluster's CUDA module or install the CUDA toolkit
    (https://developer.nvidia.com/cuda-downloads), and put nvcc on PATH or set HOROVOD_CUDA_HOME."
    fi
    # The NCCL that the framework itself loads: two of them in one process would be one too many.
    if [[ ! ${HOROVOD_NCCL_HOME:-}${HOROVOD_NCCL_INCLUDE:-} && -e $packages/nvidia/nccl/include/nccl.h ]]; then
        export HOROVOD_NCCL_INCLUDE=$packages/nvidia/nccl/include HOROVOD_NCCL_LIB=$work/nccl HOROVOD_NCCL_LINK=SHARED
        # The package has no name to link by.
        mkdir "$work/nccl"
        ln -s "$packages/nvidia/nccl/lib/libnccl.so.2" "$work/nccl/libnccl.so"
        # shellcheck disable=SC2016  # $ORIGIN is the loader's
        rpath='$ORIGIN/../../nvidia/nccl/lib'
    else
        # A cluster's modules tell the compilers, to which CMake does not listen.
        IFS=: read -ra searched <<< "${CPATH:-}:${CPLUS_INCLUDE_PATH:-}"
        for folder in "${searched[@]}"; do
            [[ ${HOROVOD_NCCL_HOME:-}${HOROVOD_NCCL_INCLUDE:-} || ! -e $folder/nccl.h ]] ||
                export HOROVOD_NCCL_HOME=${folder%/include}
        done
        rpath=${HOROVOD_NCCL_LIB:-${HOROVOD_NCCL_HOME:+$HOROVOD_NCCL_HOME/lib}}
    fi
    export HOROVOD_RPATH="$rpath;${CUDA_HOME:-}/lib64"
    for folder in "${HOROVOD_NCCL_INCLUDE:-}" {"${HOROVOD_NCCL_HOME:-}","${CUDA_HOME:-}",/usr}/include; do
        header=$folder/nccl.h
        [[ ! -e $header ]] || break
    done
    if [[ -e $header ]]; then
        found+=$'\n'"NCCL $(sed -n 's/^#define NCCL_VERSION_CODE *//p' "$header")"
    else
        cuda=$(sed -n 's/.* CUDA \([0-9]*\).*/\1/p' <<< "$described" | tail -n 1)
        lacks "nccl.h, NCCL's header. $python -m pip install nvidia-nccl-cu${cuda:-12} brings it, or install NCCL
    and set HOROVOD_NCCL_HOME to where it is."
    fi
    # torch's headers include those of CUDA's mathematics, which a toolkit may lack and torch's packages have. On a path
    # that is searched last: the other headers must be those of the compiler.
    if [[ $(said PYTORCH) && $nvcc_version && ! -e $CUDA_HOME/include/cublas_v2.h ]]; then
        if compgen -G "$packages/nvidia/*/include/cublas_v2.h" > /dev/null; then
            CPLUS_INCLUDE_PATH=${CPLUS_INCLUDE_PATH:-}$(printf ':%s' "$packages"/nvidia/*/include)
            export CPLUS_INCLUDE_PATH=${CPLUS_INCLUDE_PATH#:}
        else
            lacks "cublas_v2.h and the other headers of CUDA's mathematics. Install the whole CUDA toolkit."
        fi
    fi
}

# What every build needs.
prepare_host() {
    local compiler=${CXX:-c++} header needed=()
    if ! command -v "$compiler" > /dev/null; then
        lacks "$compiler, a C++ compiler. Install g++, or load the cluster's module and set CXX."
        return
    fi
    # TensorFlow's headers include these two libraries' headers and do not ship them.
    [[ ! ${HOROVOD_WITH_TENSORFLOW:-} ]] || needed=(highwayhash/highwayhash.h farmhash.h)
    for header in "${needed[@]}"; do
        ! "$compiler" -E -x c++ - <<< "#include <$header>" > /dev/null 2>&1 || continue
        if [[ ! $missing && $(id -u) == 0 ]] && command -v apt-get > /dev/null; then
            apt-get update -q || true
            DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends \
                libhighwayhash-dev libfarmhash-dev && return || true
        fi
        lacks "$header, which TensorFlow's headers include. As root: apt-get install libhighwayhash-dev libfarmhash-dev
    (elsewhere the packages of highwayhash and farmhash), or unpack them and set CPATH to where their headers are."
    done
}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
[[ ! ${HOROVOD_GPU_OPERATIONS:-} ]] || prepare_gpu

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
[[ $wheel ]] || prepare_host
if [[ $missing ]]; then
    go_without "Horovod cannot be built ${HOROVOD_GPU_OPERATIONS:+for GPUs }in $(said prefix), which lacks:
${missing%$'\n'}"
fi
if [[ ! $wheel ]]; then
    # cmake 4 no longer takes the policies of the third-party code that Horovod carries.
    { "${pip[@]}" install setuptools wheel cloudpickle psutil pyyaml packaging cffi cmake==3.31.6 &&
        "${pip[@]}" download --no-deps --no-binary :all: -d "$work" "horovod==$version"; } 2> "$work/log" ||
        go_without "Horovod cannot be built in $(said prefix), since pip could not fetch what that takes:
$(tail -n 20 "$work/log")"
    tar -xf "$work/horovod-$version.tar.gz" -C "$work"
    source=$work/horovod-$version
    # The headers of today's torch and TensorFlow are C++17.
    sed -i 's/set(CMAKE_CXX_STANDARD 14)/set(CMAKE_CXX_STANDARD 17)/' "$source"/{,horovod/torch/}CMakeLists.txt
    # Horovod's operations inside XLA programs use an interface that TensorFlow no longer has; they are on GPU alone.
    sed -i '/xla_mpi_ops.cc/d' "$source/horovod/tensorflow/CMakeLists.txt"
    # Horovod declares a function of TensorFlow's that is gone, which only the loader would notice: a stream tells its
    # handle itself now.
    sed -i '\|^#include "tensorflow/compiler/xla/stream_executor/stream.h"|a namespace stream_executor::gpu {\
GpuStreamHandle AsGpuStreamValue(Stream* stream) {\
  return static_cast<GpuStreamHandle>(stream->platform_specific_handle().stream);\
}\
}' "$source/horovod/tensorflow/mpi_ops.cc"
    # TensorFlow exports the functions of its CUDA's runtime. Horovod's kernels need those of their compiler's, so these
    # are linked first.
    sed -i '0,/APPEND TF_LINKER_LIBS horovod_cuda_kernels/s//PREPEND TF_LINKER_LIBS horovod_cuda_kernels CUDA::cudart_static/' \
        "$source/horovod/tensorflow/CMakeLists.txt"
    # What the framework has not loaded by itself is found where it was linked, NCCL's package beside Horovod's.
    # shellcheck disable=SC2016  # $ENV is CMake's
    sed -i '/^project(horovod CXX)/a set(CMAKE_BUILD_WITH_INSTALL_RPATH ON)\
set(CMAKE_INSTALL_RPATH "$ENV{HOROVOD_RPATH}")' "$source/CMakeLists.txt"
    echo "building Horovod $version, a few minutes"
    # make's own flags would keep Horovod's setup.py from building in parallel.
    env -u MAKELEVEL MAKEFLAGS="-j$(nproc)" PATH="$(dirname "$("$python" -c 'import sys; print(sys.executable)')"):$PATH" \
        "${pip[@]}" wheel --no-build-isolation --no-deps -w "$work/wheel" "$source" > "$work/log" 2>&1 ||
        go_without "Horovod's build in $(said prefix) failed, and said at its end:
$(tail -n 60 "$work/log")"
    wheel=$(ls "$work"/wheel/*.whl)
fi
# Another build of the same version would not be replaced.
"${pip[@]}" uninstall -y horovod 2> /dev/null
"${pip[@]}" install "$wheel"
# The linker lets an undefined symbol pass. The loader does not, since Horovod's libraries have all of theirs bound at
# once; neither a GPU nor its driver is needed for that.
for framework in PYTORCH:torch TENSORFLOW:tensorflow; do
    name=$(said "${framework%:*}")
    [[ $name ]] || continue
    if ! loaded=$("$python" -c "
import horovod.${framework#*:} as hvd
assert hvd.gloo_built(), 'Gloo is missing'
assert '${HOROVOD_GPU_OPERATIONS:-}' != 'NCCL' or hvd.nccl_built(), 'NCCL is missing'" 2>&1); then
        "${pip[@]}" uninstall -y horovod
        printf '%s\nHorovod does not load with %s, and was taken out again.\n' "$loaded" "$name" >&2
        exit 1
    fi
    echo "Horovod $version for ${HOROVOD_GPU_OPERATIONS:-the host} loads with $name"
done
if [[ $wheel == "$work"/* ]]; then
    kept=$cache/horovod-$(sha256sum <<< "$found" | cut -c1-12)
    mkdir -p "$kept"
    mv "$wheel" "$kept"
    # Last: a wheel without it is not taken.
    echo "$found" > "$kept/built-for"
fi
