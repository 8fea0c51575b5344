import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from stamp_fast import _load

ROOT = Path(__file__).resolve().parents[1]


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Runs a command and returns what it printed; fails the test with it when the command fails."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **environment},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_operators_use_the_stable_abi_only():
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    libraries = sorted((ROOT / "stamp_fast").glob("_C*.so"))
    assert libraries
    for library in libraries:
        symbols = run("nm", "-DC", "--undefined-only", library, cwd=ROOT)
        assert not re.findall(r"^.*\b(?:c10|at)::.*$", symbols, re.MULTILINE), library.name
        assert "_Py" not in symbols and " Py" not in symbols, library.name


def test_missing_operators_name_the_cure(tmp_path):
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "stamp_fast", tmp_path / "stamp_fast", ignore=ignored)
    code = "try:\n import stamp_fast\nexcept ImportError as error:\n print(error)"
    text = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert "stamp_fast/_C is missing" in text
    assert "python setup.py build_ext" in text and "pip install --no-build-isolation -e ." in text


def test_missing_graph_engine_names_the_cure(monkeypatch):
    monkeypatch.setitem(sys.modules, "stamp_fast._graph", None)
    with pytest.raises(ImportError, match=r"cannot load stamp_fast/_graph.*python setup.py build_ext"):
        _load.graph_core()


def test_import_is_lean():
    code = "import sys, torch, stamp_fast; print('triton' in sys.modules, torch.cuda.is_initialized())"
    assert run(sys.executable, "-c", code, cwd=ROOT).split()[-2:] == ["False", "False"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel built from an sdist of a copy of the checkout, so that the checkout stays as it is."""
    folder = tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "*.so", "__pycache__", "results")
    shutil.copytree(ROOT, folder / "checkout", ignore=ignored)
    run(sys.executable, "setup.py", "-q", "sdist", "--dist-dir", folder, cwd=folder / "checkout")
    (sdist,) = folder.glob("*.tar.gz")
    build = ["wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", folder, sdist]
    run(sys.executable, "-m", "pip", *build, cwd=folder, STAMP_CUDA="0")
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.mark.slow
def test_wheel_holds_one_package(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (top_level,) = [name for name in names if name.endswith("top_level.txt")]
        assert archive.read(top_level).decode().split() == ["stamp_fast"]
    assert {name.split("/")[0].split("-")[0] for name in names} == {"stamp_fast"}
    assert any(re.fullmatch(r"stamp_fast/_C\..*so", name) for name in names)


@pytest.mark.slow
def test_wheel_works_beside_another_package_named_kernels(wheel, tmp_path):
    site = tmp_path / "site"
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--target", site, wheel, cwd=tmp_path)
    (site / "kernels").mkdir()
    (site / "kernels" / "__init__.py").write_text("NAME = 'rival'\n")
    code = (
        "import kernels, torch, stamp_fast, stamp_fast.kernels\n"
        "from stamp_fast.ops import pack_weights\n"
        "(out,) = pack_weights([torch.eye(3)], [torch.tensor([2])], [None], [None])\n"
        "print(kernels.NAME, stamp_fast.__file__, len(stamp_fast.kernels.__path__), out.tolist())"
    )
    text = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(site))
    assert text.strip() == f"rival {site}/stamp_fast/__init__.py 1 [[0.0, 0.0, 1.0]]"


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=f"{home}/bin" if home else None)


@pytest.mark.skipif(nvcc() is None, reason="nvcc is not installed")
@pytest.mark.parametrize("source", sorted((ROOT / "kernels" / "cuda").glob("*.cu")), ids=lambda path: path.stem)
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_cuda_kernels_compile(source, architecture, tmp_path):
    flags = ["-std=c++20", "-Werror", "all-warnings", f"-arch={architecture}", "-I", ROOT]
    run(nvcc(), *flags, "-c", source, "-o", tmp_path / "kernel.o", cwd=tmp_path)
