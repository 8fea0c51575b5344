"""Builds the native libraries of stamp_fast.

Environment:
    STAMP_CUDA=0|1        never build the CUDA library / fail where it cannot be (default: where it can)
    CUDA_HOME             the CUDA toolkit's folder, the one that holds bin/nvcc and include/cuda_runtime.h
    TORCH_CUDA_ARCH_LIST  GPU architectures (default: "8.0;9.0+PTX")
    DEBUG=1               -O0 with debug information
    MAX_JOBS              number of parallel compilers
"""

import os
from glob import glob
from pathlib import Path

import torch
from pybind11.setup_helpers import Pybind11Extension
from setuptools import find_packages, setup
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parent
DEBUG = os.environ.get("DEBUG") == "1"
OPTIMISE = ["-O0", "-g"] if DEBUG else ["-O3"]
# nvcc rejects -g0, so that flag is for the host compiler alone.
HOST_FLAGS = OPTIMISE + ([] if DEBUG else ["-g0"]) + ["-std=c++20", "-fvisibility=hidden", "-Wall", "-Wextra"]
# Error texts carry __FILE__: keep it relative, so that a build does not depend on where the checkout lies.
HOST_FLAGS.append(f"-fmacro-prefix-map={ROOT}/=")
# Sums are rounded alike whether or not the CPU fuses multiplications with additions.
HOST_FLAGS.append("-ffp-contract=off")
# nvcc only warns where device code calls a host function.
NVCC_FLAGS = ["-std=c++20", "-Werror", "all-warnings"]
# The operators use the LibTorch stable ABI of 2.11: one build serves every later torch and every Python.
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020b000000000000"]


def cuda_obstacle() -> str | None:
    """Says why the CUDA library cannot be built, or None where it can."""
    home = cpp_extension.CUDA_HOME
    if os.environ.get("STAMP_CUDA") == "0":
        return "STAMP_CUDA=0"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA"
    if home is None or not (Path(home) / "bin" / "nvcc").is_file():
        return f"no nvcc (CUDA_HOME={home})"
    # Where nvcc on PATH is a wrapper script, torch derives a folder without headers from it.
    if not (Path(home) / "include" / "cuda_runtime.h").is_file():
        return f"no include/cuda_runtime.h below CUDA_HOME={home}; set CUDA_HOME to the toolkit's folder"
    return None


def graph_extension():
    sources = sorted(glob("csrc/graph/*.cpp"))
    print(f"stamp_fast._graph: {len(sources)} sources")
    headers = sorted(glob("csrc/graph/*.h"))
    options = {"include_dirs": [str(ROOT)], "extra_compile_args": HOST_FLAGS, "depends": headers}
    return [Pybind11Extension("stamp_fast._graph", sources, cxx_std=20, **options)] if sources else []


def operators(extension, name, sources, flags):
    print(f"{name}: {len(sources)} sources")
    options = {"include_dirs": [str(ROOT)], "extra_compile_args": flags, "py_limited_api": True}
    return [extension(name, sorted(sources), **options)]


def cpu_extension():
    sources = ["csrc/schemas.cpp", *glob("csrc/cpu/*.cpp"), *glob("kernels/cpu/*.cpp")]
    flags = {"cxx": HOST_FLAGS + STABLE_ABI}
    return operators(cpp_extension.CppExtension, "stamp_fast._C", sources, flags)


def cuda_extension():
    obstacle = cuda_obstacle()
    if obstacle is not None:
        if os.environ.get("STAMP_CUDA") == "1":
            raise SystemExit(f"STAMP_CUDA=1, but the CUDA library cannot be built: {obstacle}")
        print(f"stamp_fast._C_cuda: not built ({obstacle})")
        return []
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    sources = [*glob("csrc/cuda/*.cpp"), *glob("kernels/cuda/*.cu")]
    flags = {"cxx": HOST_FLAGS + STABLE_ABI + ["-DUSE_CUDA"], "nvcc": OPTIMISE + NVCC_FLAGS}
    return operators(cpp_extension.CUDAExtension, "stamp_fast._C_cuda", sources, flags)


packages = find_packages(include=["stamp_fast", "stamp_fast.*"])
package_dir = {}
if Path("kernels/triton/__init__.py").is_file():
    # No top-level module may be called `kernels`: that name is taken on PyPI.
    packages.append("stamp_fast.kernels.triton")
    package_dir["stamp_fast.kernels.triton"] = "kernels/triton"

setup(
    packages=packages,
    package_dir=package_dir,
    ext_modules=cpu_extension() + cuda_extension() + graph_extension(),
    cmdclass={"build_ext": cpp_extension.BuildExtension},
)
