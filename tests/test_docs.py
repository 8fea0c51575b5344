"""The documentation: programs run, links lead somewhere, and every public name is described. `make docs` builds it."""

import ast
import importlib
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

from tests.processes import TIMEOUT

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MARKED = re.compile(r"<!-- runs -->\n```python\n(.*?)```", re.DOTALL)
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(\s*([^)\s]+)\s*\)")

# Modules whose names users import, and names of modules that list none.
PUBLIC = {
    "stamp_fast": None,
    "stamp_fast.budget": ["Budget", "Promise"],
    "stamp_fast.config": None,
    "stamp_fast.cost_table": ["CostTable"],
    "stamp_fast.early": None,
    "stamp_fast.early.lightning": ["EarlyPruning"],
    "stamp_fast.early.sharded": ["ShardedEarlyPruner"],
    "stamp_fast.early.transformers": ["EarlyPruning"],
    "stamp_fast.errors": None,
    "stamp_fast.graph": None,
    "stamp_fast.importance": None,
    "stamp_fast.layer_costs": ["LayerCosts"],
    "stamp_fast.metapruning": None,
    "stamp_fast.metapruning.spaces": ["mobilenet_v1", "mobilenet_v2", "resnet50"],
    "stamp_fast.methods": ["Ranking", "Request"],
    "stamp_fast.nn": None,
    "stamp_fast.ops": None,
    "stamp_fast.recalibrate": ["recalibrate"],
    "stamp_fast.reconstruct": ["reconstruct"],
    "stamp_fast.report": None,
    "stamp_fast.stamp": None,
    "stamp_fast.sweep": ["Point", "Sweep", "sweep"],
}


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", [p for p in PAGES if MARKED.search(p.read_text())], ids=name_of)
def test_programs_run(page, tmp_path):
    """What is marked on a page, as one program."""
    program = "\n".join(MARKED.findall(page.read_text()))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_on_a_page_is_python(page):
    for block in BLOCK.findall(page.read_text()):
        if "--8<--" not in block:
            ast.parse(block)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files(page):
    for target in LINK.findall(page.read_text()):
        path = target.partition("#")[0]
        if path and not path.startswith("http"):
            assert (page.parent / path).exists(), target
    for path in re.findall(r'--8<-- "(.*?)"', page.read_text()):
        assert (ROOT / path).is_file(), path


def test_every_page_is_in_the_navigation():
    listed = set(re.findall(r"^ +- ([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    written = {str(page.relative_to(ROOT / "docs")) for page in PAGES[1:]}
    made_by_a_benchmark = {"metapruning.md", "budget_promises.md"}
    assert written - listed == set() and listed - written <= made_by_a_benchmark


@pytest.fixture(scope="module")
def described() -> dict[str, object]:
    """What the API pages describe, by where they find it."""
    found = {}
    for page in (ROOT / "docs" / "api").glob("*.md"):
        for path in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE):
            module, _, name = path.rpartition(".")
            found[path] = getattr(importlib.import_module(module), name)
    return found


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_is_described(described, module):
    found = importlib.import_module(module)
    for name in PUBLIC[module] or found.__all__:
        value = getattr(found, name)
        if name == "__version__" or isinstance(value, types.ModuleType):
            continue
        # Some are found in the module that they come from.
        elsewhere = callable(value) and any(value is other for other in described.values())
        assert f"{module}.{name}" in described or elsewhere, f"{module}.{name}: no ':::' in docs/api"
