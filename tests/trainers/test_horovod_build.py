"""What trainers/horovod.sh does where Horovod cannot be built, or cannot be loaded: nothing is built here."""

import hashlib
import os
import platform
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "trainers" / "horovod.sh"


def executable(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


class Host:
    """A host with programs of its own, and an environment with a torch that is a name, a version and a CUDA."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.prefix = folder / "venv"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", self.prefix], check=True)
        self.packages = next(self.prefix.glob("lib/*/site-packages"))
        # What TensorFlow's headers include, whether the host of the tests has it or not.
        (folder / "include/highwayhash").mkdir(parents=True)
        (folder / "include/highwayhash/highwayhash.h").touch()
        (folder / "include/farmhash.h").touch()

    def has_torch(self, cuda: str | None) -> None:
        (self.packages / "torch").mkdir()
        (self.packages / "torch/__init__.py").touch()
        # As torch writes it.
        (self.packages / "torch/version.py").write_text(f"cuda: Optional[str] = {cuda!r}\nhip: Optional[str] = None\n")
        (self.packages / "torch-2.13.0.dist-info").mkdir()
        (self.packages / "torch-2.13.0.dist-info/METADATA").write_text("Name: torch\nVersion: 2.13.0\n")

    def has_tensorflow(self, cuda: str | None) -> None:
        (self.packages / "tensorflow/python/platform").mkdir(parents=True)
        (self.packages / "tensorflow/__init__.py").touch()
        # As TensorFlow writes it.
        named = f"('cuda_version', '{cuda}'), ('cudnn_version', '9'), " if cuda else ""
        (self.packages / "tensorflow/python/platform/build_info.py").write_text(
            f"build_info = collections.OrderedDict([{named}('is_cuda_build', {bool(cuda)})])\n"
        )
        (self.packages / "tensorflow-2.21.0.dist-info").mkdir()
        (self.packages / "tensorflow-2.21.0.dist-info/METADATA").write_text("Name: tensorflow\nVersion: 2.21.0\n")

    def has_driver(self, cuda: str) -> None:
        executable(self.folder / "bin/nvidia-smi", f"#!/bin/sh\necho '| NVIDIA-SMI 1  CUDA Version: {cuda}  |'\n")

    def has_nvcc(self, cuda: str) -> None:
        told = f"Cuda compilation tools, release {cuda}, V{cuda}.1"
        executable(self.folder / "cuda/bin/nvcc", f"#!/bin/sh\necho '{told}'\n")
        (self.folder / "cuda/include").mkdir()
        (self.folder / "cuda/include/cublas_v2.h").touch()

    def has_nccl(self) -> None:
        (self.packages / "nvidia/nccl/include").mkdir(parents=True)
        (self.packages / "nvidia/nccl/include/nccl.h").write_text("#define NCCL_VERSION_CODE 23203\n")

    def build(self, **variables: str) -> "subprocess.CompletedProcess[str]":
        environ = {
            "PATH": f"{self.folder}/bin:{os.environ['PATH']}",
            "XDG_CACHE_HOME": str(self.folder / "cache"),
            # Only there: the host of the tests may have one.
            "HOROVOD_CUDA_HOME": str(self.folder / "cuda"),
            "CPATH": str(self.folder / "include"),
        }
        return subprocess.run(
            [SCRIPT, self.prefix / "bin/python"], capture_output=True, text=True, env=environ | variables, timeout=120
        )


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def lacking(host: Host) -> list[str]:
    """Build, and return the first words of all that is missing."""
    told = host.build()
    assert told.returncode == 3, told.stdout + told.stderr
    heading, *lines = told.stderr.splitlines()
    assert heading == f"Horovod cannot be built for GPUs in {host.prefix}, which lacks:"
    # The tests say why they did not test it.
    assert (host.prefix / ".horovod-missing").read_text() == told.stderr
    return [line.removeprefix("  * ").split(",")[0].split(".")[0] for line in lines if line.startswith("  * ")]


def test_all_that_a_gpu_host_lacks_is_told_at_once(host: Host) -> None:
    host.has_torch("13.0")
    host.has_driver("13.0")
    if Path("/usr/include/nccl.h").exists():
        pytest.skip("this host has NCCL where every compiler looks")
    assert lacking(host) == ["nvcc", "nccl"]
    assert "-m pip install nvidia-nccl-cu13" in (host.prefix / ".horovod-missing").read_text()


def test_frameworks_of_which_one_has_no_cuda_are_told_so(host: Host) -> None:
    host.has_torch("13.0")
    host.has_tensorflow(None)
    host.has_driver("13.0")
    host.has_nccl()
    host.has_nvcc("13.0")
    assert lacking(host) == ["CUDA in tensorflow 2"]


def test_tensorflow_with_cuda_is_built_for_gpus_too(host: Host) -> None:
    host.has_tensorflow("12.5.1")
    host.has_driver("13.0")
    assert "nvcc" in lacking(host)
    told = host.build(HOROVOD_NCCL_HOME=str(host.folder / "no-nccl"))
    assert Path("/usr/include/nccl.h").exists() or "-m pip install nvidia-nccl-cu12" in told.stderr


def test_nccl_of_the_pip_package_is_enough(host: Host) -> None:
    host.has_torch("13.0")
    host.has_driver("13.0")
    host.has_nccl()
    assert lacking(host) == ["nvcc"]


def test_a_compiler_that_the_driver_cannot_follow_is_found_before_the_build(host: Host) -> None:
    host.has_torch("12.6")
    host.has_driver("12.8")
    host.has_nccl()
    host.has_nvcc("13.0")
    assert lacking(host) == ["an nvcc for its driver: " + f"{host.folder}/cuda/bin/nvcc is of CUDA 13"]


def test_nccl_where_a_cluster_s_module_has_it_is_enough(host: Host) -> None:
    host.has_torch("13.0")
    host.has_driver("13.0")
    (host.folder / "modules/nccl/include").mkdir(parents=True)
    (host.folder / "modules/nccl/include/nccl.h").touch()
    told = host.build(CPATH=f"{host.folder}/include:{host.folder}/modules/nccl/include")
    assert "nvcc" in told.stderr
    assert "nccl.h" not in told.stderr


class CpuHost(Host):
    """One without a GPU, whose user is not root, and whose compiler looks for headers only where it is told."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.has_torch(None)
        executable(folder / "bin/id", "#!/bin/sh\necho 1000\n")
        executable(folder / "bin/c++", '#!/bin/sh\nexec g++ -nostdinc "$@"\n')

    def goes_without(self, **variables: str) -> str:
        told = self.build(**variables)
        assert told.returncode == 3, told.stdout + told.stderr
        note = (self.prefix / ".horovod-missing").read_text()
        # The tests say why they did not test it.
        assert told.stderr.endswith(note)
        return note


@pytest.fixture
def cpu_host(tmp_path: Path) -> CpuHost:
    return CpuHost(tmp_path)


def test_without_a_c_compiler_the_rest_goes_on(cpu_host: CpuHost) -> None:
    assert cpu_host.goes_without(CXX="no-such-compiler") == (
        f"Horovod cannot be built in {cpu_host.prefix}, which lacks:\n"
        "  * no-such-compiler, a C++ compiler. Install g++, or load the cluster's module and set CXX.\n"
    )


def test_both_headers_that_tensorflow_does_not_ship_are_asked_for(cpu_host: CpuHost) -> None:
    cpu_host.has_tensorflow(None)
    note = cpu_host.goes_without(CPATH="")
    assert [line.split(",")[0] for line in note.splitlines() if line.startswith("  *")] == [
        "  * highwayhash/highwayhash.h",
        "  * farmhash.h",
    ]
    assert "apt-get install libhighwayhash-dev libfarmhash-dev" in note


def test_headers_that_the_compiler_is_told_of_are_found(cpu_host: CpuHost) -> None:
    cpu_host.has_tensorflow(None)
    # On it goes, and asks for a pip.
    assert "No module named pip" in cpu_host.goes_without()


def test_packages_that_cannot_be_installed_are_told_of(cpu_host: CpuHost) -> None:
    cpu_host.has_tensorflow(None)
    executable(cpu_host.folder / "bin/id", "#!/bin/sh\necho 0\n")
    executable(cpu_host.folder / "bin/apt-get", f"#!/bin/sh\necho $1 >> {cpu_host.folder}/asked\nexit 100\n")
    assert "  * highwayhash/highwayhash.h" in cpu_host.goes_without(CPATH="")
    assert (cpu_host.folder / "asked").read_text().split()[:2] == ["update", "install"]


def test_with_all_there_is_to_build_with_what_pip_cannot_fetch_is_told(cpu_host: CpuHost) -> None:
    note = cpu_host.goes_without()
    assert note.startswith(
        f"Horovod cannot be built in {cpu_host.prefix}, since pip could not fetch what that takes:\n"
    )
    assert "No module named pip" in note


def test_a_build_that_fails_lets_the_rest_go_on(cpu_host: CpuHost) -> None:
    """A pip that downloads a Horovod, and whose build of it fails."""
    (cpu_host.packages / "pip").mkdir()
    (cpu_host.packages / "pip/__main__.py").write_text(
        "import sys, pathlib, tarfile\n"
        "if 'wheel' in sys.argv[:5] and 'install' not in sys.argv: sys.exit('error: command cmake failed')\n"
        "if 'download' in sys.argv:\n"
        "    folder = pathlib.Path(sys.argv[sys.argv.index('-d') + 1], 'horovod-0.28.1')\n"
        "    for name in ('CMakeLists.txt', 'horovod/torch/CMakeLists.txt', 'horovod/tensorflow/CMakeLists.txt',\n"
        "                 'horovod/tensorflow/mpi_ops.cc'):\n"
        "        (folder / name).parent.mkdir(parents=True, exist_ok=True)\n"
        "        (folder / name).touch()\n"
        "    with tarfile.open(f'{folder}.tar.gz', 'w:gz') as archive: archive.add(folder, folder.name)\n"
    )
    assert cpu_host.goes_without() == (
        f"Horovod's build in {cpu_host.prefix} failed, and said at its end:\nerror: command cmake failed\n"
    )


def test_torch_without_cuda_is_asked_for_only_where_a_gpu_build_is(host: Host) -> None:
    host.has_torch(None)
    host.has_driver("13.0")
    host.has_nccl()
    host.has_nvcc("13.0")
    told = host.build(HOROVOD_GPU_OPERATIONS="NCCL")
    assert told.returncode == 3
    assert "CUDA in torch 2.13.0, which is a CPU build" in told.stderr
    # Without it the host's build is begun, which needs a pip.
    told = host.build()
    assert "for GPUs" not in told.stderr
    assert "No module named pip" in told.stderr


def test_a_library_that_does_not_load_is_not_left_installed(host: Host) -> None:
    host.has_torch(None)
    python = host.prefix / "bin/python"
    subprocess.run([python, "-m", "ensurepip"], check=True, stdout=subprocess.DEVNULL)
    # A wheel as the cache has it, of a Horovod that asks for a symbol that nobody has.
    source, library = host.folder / "lib.c", host.folder / "lib.so"
    source.write_text("void gone(void);\nvoid horovod(void) { gone(); }\n")
    subprocess.run(["cc", "-shared", "-fPIC", "-Wl,-z,now", "-o", library, source], check=True)
    kept = host.folder / "cache/scalestudy/horovod-1"
    kept.mkdir(parents=True)
    with zipfile.ZipFile(kept / "horovod-0.28.1-py3-none-any.whl", "w") as wheel:
        wheel.write(library, "horovod/lib.so")
        wheel.writestr("horovod/__init__.py", "")
        wheel.writestr(
            "horovod/torch.py", "import ctypes, pathlib\nctypes.CDLL(pathlib.Path(__file__).with_name('lib.so'))\n"
        )
        info = "horovod-0.28.1.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: horovod\nVersion: 0.28.1\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    recipe = hashlib.sha256(SCRIPT.read_bytes()).hexdigest()
    (kept / "built-for").write_text(
        f"python {platform.python_version()}\nPYTORCH torch 2.13.0 CUDA none\noperations host\nrecipe {recipe}  -\n"
    )
    told = host.build()
    assert told.returncode == 1, told.stdout + told.stderr
    assert "undefined symbol: gone" in told.stderr
    assert told.stderr.endswith("Horovod does not load with torch 2.13.0 CUDA none, and was taken out again.\n"), (
        told.stderr
    )
    assert not (host.packages / "horovod").exists()


@pytest.mark.parametrize("noted", [True, False])
def test_tests_of_horovod_are_skipped_loudly_only_where_a_gpu_host_cannot_build_it(noted: bool, tmp_path: Path) -> None:
    suite = tmp_path / "suite"
    suite.mkdir()
    conftest = (ROOT / "tests/conftest.py").read_text()
    assert 'Path(sys.prefix, ".horovod-missing")' in conftest
    (suite / "conftest.py").write_text(conftest.replace("sys.prefix, ", f"{str(tmp_path)!r}, "))
    (suite / "pytest.ini").write_text("[pytest]\nmarkers = horovod\n")
    (suite / "test_it.py").write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('trainer', ['torch-ddp', 'horovod-tf'])\n"
        "def test_trainer(trainer): assert trainer == 'torch-ddp'\n"
        "@pytest.mark.horovod\n"
        "def test_marked(): assert False\n"
    )
    if noted:
        (tmp_path / ".horovod-missing").write_text("Horovod cannot be built: which lacks:\n  * nvcc\n")
    told = subprocess.run([sys.executable, "-m", "pytest", "-q", suite], capture_output=True, text=True, cwd=suite)
    assert ("1 passed, 2 skipped" if noted else "2 failed, 1 passed") in told.stdout
    assert ("HOROVOD'S TRAINERS WERE NOT TESTED" in told.stdout) == noted
    assert ("  * nvcc\n" in told.stdout) == noted


class Checkout:
    """A folder to run our Makefile in, whose Python and pip note what they are asked for and do nothing."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        for name in ("pyproject.toml", "constraints.txt"):
            (folder / name).touch()
        noting = f'#!/bin/sh\necho "$@" >> {folder}/asked\n'
        executable(folder / "python", noting)
        for environment in (".venv", ".venvs/torch", ".venvs/tensorflow"):
            executable(folder / environment / "bin/pip", noting)
        executable(folder / "trainers/horovod.sh", f'{noting}echo "for $HOROVOD_GPU_OPERATIONS" >> {folder}/asked\n')

    def make(self, *words: str, **variables: str) -> "subprocess.CompletedProcess[str]":
        argv = ["make", "-f", str(ROOT / "Makefile"), *words, f"PYTHON={self._folder}/python"]
        environ = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "HOROVOD"))}
        return subprocess.run(argv, cwd=self._folder, capture_output=True, text=True, env=environ | variables)

    def asked(self, *words: str, **variables: str) -> str:
        (self._folder / "asked").write_text("")
        told = self.make(*words, **variables)
        assert told.returncode == 0, told.stderr
        return (self._folder / "asked").read_text()


def test_an_environment_is_made_anew_where_it_is_wanted_for_something_else(tmp_path: Path) -> None:
    """As on a login node whose environments were made for its CPUs, or a host that has got a driver since."""
    checkout = Checkout(tmp_path)
    assert "-e .[tensorflow-cpu]" in checkout.asked("envs", "TENSORFLOW=tensorflow-cpu")
    assert checkout.asked("envs", "TENSORFLOW=tensorflow-cpu") == ""
    anew = checkout.asked("envs", "TENSORFLOW=tensorflow", HOROVOD_GPU_OPERATIONS="NCCL")
    assert "-m venv --clear .venvs/tensorflow" in anew
    assert "-e .[tensorflow]" in anew
    # Of torch's environment Horovod alone was wanted for something else.
    assert "venv .venvs/torch" not in anew
    assert anew.count("for NCCL") == 2
    assert checkout.asked("envs", "TENSORFLOW=tensorflow", HOROVOD_GPU_OPERATIONS="NCCL") == ""
    # More to install is no other environment.
    os.utime(tmp_path / "pyproject.toml")
    again = checkout.asked("envs", "TENSORFLOW=tensorflow", HOROVOD_GPU_OPERATIONS="NCCL")
    assert "-e .[tensorflow]" in again
    assert "--clear" not in again


def test_the_extra_for_gpus_brings_their_libraries() -> None:
    """TensorFlow by itself sees no GPU: what CUDA's libraries it needs come by an extra of its own."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert any(need.startswith("tensorflow[and-cuda]") for need in extras["tensorflow"])
    assert not any("and-cuda" in need for need in extras["tensorflow-cpu"])


@pytest.mark.parametrize(
    ("target", "exit_code", "goes_on"),
    [("test", 0, True), ("test", 3, True), ("test", 1, False), ("horovod", 0, True), ("horovod", 3, False)],
)
def test_make_goes_on_without_horovod_only_where_it_cannot_be_built(
    tmp_path: Path, target: str, exit_code: int, goes_on: bool
) -> None:
    checkout = Checkout(tmp_path)
    executable(tmp_path / "trainers/horovod.sh", f"#!/bin/sh\nexit {exit_code}\n")
    executable(tmp_path / ".venv/bin/pytest", "#!/bin/sh\ntouch tested\n")
    # An earlier build's, before the recipe changed.
    (tmp_path / ".venv/.horovod").touch()
    os.utime(tmp_path / ".venv/.horovod", (1, 1))
    told = checkout.make(target)
    assert (told.returncode == 0) == goes_on, told.stdout + told.stderr
    assert (tmp_path / "tested").exists() == (goes_on and target == "test")
    assert (tmp_path / ".venv/.horovod").exists() == (exit_code == 0)
