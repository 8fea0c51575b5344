"""Triton's kernels compile for the GPUs that we name, with none at hand; the interpreter would accept more."""

import importlib
import inspect
import os
import subprocess
import sys

import pytest

KERNELS = {
    "masked_conv2d": ["_forward_kernel_body", "_input_gradient_kernel_body", "_weight_gradient_kernel_body"],
    "norm_relu": ["_forward_kernel", "_backward_kernel"],
}
WIDE = {"norm_scale_ptr", "norm_shift_ptr", "partial_ptr", "grad_sum_ptr", "grad_square_ptr", "scale_ptr", "shift_ptr"}


def compile_all(capability: int) -> None:
    """In a process without the interpreter."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    for module, kernels in KERNELS.items():
        loaded = importlib.import_module(f"stamp_fast.kernels.triton.{module}")
        for kernel in kernels:
            function = getattr(loaded, kernel)
            names = list(inspect.signature(function.fn).parameters)
            for dtype, precision in (("bf16", "ieee"), ("fp32", "tf32")):
                sizes = {"KH": 3, "KW": 3, "BM": 64, "BN": 64, "BK": 32, "PRECISION": precision}
                flags = {n: True for n in names if n.startswith("HAS_") or n in ("NORM", "RESIDUAL", "STATISTICS")}
                constants = {n: v for n, v in (sizes | flags).items() if n in names}

                def kind(name: str, dtype: str = dtype, module: str = module, constants: dict = constants) -> str:
                    if name in constants:
                        return "constexpr"
                    if not name.endswith("_ptr"):
                        return "i32"
                    if name in ("rows_ptr", "cols_ptr"):
                        return "*i64"
                    wide = name in WIDE and not (module == "masked_conv2d" and name == "scale_ptr")
                    return "*fp32" if wide else f"*{dtype}"

                places = {(names.index(n),): v for n, v in constants.items()}
                source = ASTSource(fn=function, signature={n: kind(n) for n in names}, constexprs=places)
                options = {"num_warps": 4, "num_stages": 3}
                binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
                multiplies = "mma" in binary.asm["ptx"]
                print(module, kernel, dtype, len(binary.asm["cubin"]), "tensor cores" if multiplies else "")


@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile(capability, tmp_path):
    pytest.importorskip("triton")
    code = f"from test_ops.test_triton import compile_all; compile_all({capability})"
    tests = os.path.dirname(os.path.dirname(__file__))
    paths = os.pathsep.join([os.path.dirname(tests), tests])
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert len(lines) == 2 * sum(map(len, KERNELS.values()))
    assert all("tensor cores" in line for line in lines if line.startswith("masked_conv2d")), done.stdout
