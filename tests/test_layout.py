"""Who may import whom, and how the folders lie: the rules of docs/architecture.md as a table and as code."""

import ast
import importlib.metadata
import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import jaxwan

ROOT = Path(__file__).parents[1]
ARRAYS = {"jax", "numpy", "jaxtyping"}
# heavy or optional: imported by the function that needs them, so that importing jaxwan stays quick
IN_FUNCTIONS = set(
    "transformers tokenizers huggingface_hub safetensors av PIL pillow_heif ftfy tqdm gguf sentencepiece".split()
)
# part of jaxwan -> (other parts it may import, other packages it may import), beside the standard library and itself
ALLOWED = {
    "geometry": (set(), set()),
    "config": (set(), set()),
    "flops": ({"config"}, set()),
    "kernels": (set(), ARRAYS),
    "sharding": ({"kernels"}, ARRAYS),
    "schedulers": (set(), ARRAYS),
    "models": ({"kernels", "sharding", "geometry", "config"}, ARRAYS | {"flax"}),
    "convert": ({"models", "config", "sharding"}, ARRAYS | {"flax", "safetensors", "gguf"}),
    "pipelines": (
        {"models", "schedulers", "sharding", "kernels", "convert", "geometry", "config", "flops"},
        ARRAYS | {"flax"} | IN_FUNCTIONS,
    ),
    "bench": (
        {"engine", "pipelines", "models", "schedulers", "sharding", "kernels", "convert", "geometry", "config"}
        | {"flops"},
        ARRAYS | {"flax", "PIL"},
    ),
    "engine": (
        {"pipelines", "models", "schedulers", "sharding", "geometry", "config"},
        ARRAYS | IN_FUNCTIONS,
    ),
    "tiny": (
        {"pipelines", "models", "schedulers", "sharding", "convert", "geometry", "config"},
        ARRAYS | {"flax", "optax", "orbax", "tokenizers", "tqdm"},
    ),
    "commands": ({"pipelines", "engine", "convert", "config", "sharding"}, IN_FUNCTIONS),
}
ONLY_IN_TESTS = {"torch", "diffusers"}
RIVALS = ROOT / "jaxwan/bench/torch_side.py"  # the process of the benchmark that runs Diffusers: in its functions too
LINKS = ("kernels", "sharding", "convert")
FILES = [*(ROOT / "jaxwan").rglob("*.py"), *(f for link in LINKS for f in (ROOT / link).rglob("*.py"))]
SCRIPTS = list((ROOT / "scripts").rglob("*.py"))


def imports(node, in_function=False):
    """(module, imported name or None, whether inside a function) of every import under `node`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name, None, in_function) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            module = "." * child.level + (child.module or "")
            yield from ((module, alias.name, in_function) for alias in child.names)
        yield from imports(child, in_function or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))


def part_of(path: Path) -> str:
    """Which row of ALLOWED a file answers to: its folder or module directly under jaxwan (or at the top)."""
    parts = path.relative_to(ROOT).parts
    return parts[1].removesuffix(".py") if parts[0] == "jaxwan" else parts[0]


def complaints(path: Path) -> list[str]:
    """What `path` imports and may not."""
    part, wrong = part_of(path), []
    parts, packages = ALLOWED.get(part, (set(), set()))
    for module, name, in_function in imports(ast.parse(path.read_text())):
        top = module.split(".")[0]
        inner = module.split(".")[1] if "." in module else name
        if (module, name) == ("jaxwan", "__version__"):
            continue
        if top in IN_FUNCTIONS and not in_function:
            wrong.append(f"{module} outside a function")
        if (top in ONLY_IN_TESTS and not (path == RIVALS and in_function)) or module.startswith(".."):
            wrong.append(f"{module} anywhere")
        if path == RIVALS and top in ONLY_IN_TESTS:
            continue
        if part not in ALLOWED or module.startswith(".") or top in sys.stdlib_module_names:
            continue
        if (top == "jaxwan" and inner not in parts | {part}) or (top != "jaxwan" and top not in packages):
            wrong.append(f"{module} in {part}")
    return wrong


def test_the_code_under_test_lies_beside_the_tests_in_their_processes_too(tmp_path):
    """Not that of another clone, which the environment's installation may point to."""
    find = "import importlib.util; print(importlib.util.find_spec('jaxwan').origin)"
    found = subprocess.run([sys.executable, "-c", find], cwd=tmp_path, capture_output=True, text=True, check=True)
    here = importlib.util.find_spec("jaxwan")
    assert here and here.origin == found.stdout.strip() == str(ROOT / "jaxwan" / "__init__.py")


@pytest.mark.parametrize("path", FILES + SCRIPTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_imports_only_what_the_table_allows(path):
    assert complaints(path) == []


def test_every_part_of_the_package_has_a_row_in_the_table():
    assert {part_of(path) for path in FILES} - {"__init__"} <= ALLOWED.keys()


def test_scripts_use_public_names_only():
    names = [part for path in SCRIPTS for module, name, _ in imports(ast.parse(path.read_text()))
             for part in (*module.split("."), name or "") if module.startswith("jaxwan")]  # fmt: skip
    assert names and not [name for name in names if name.startswith("_")]


def test_generating_takes_no_more_than_what_the_package_names():
    tree = ast.parse((ROOT / "scripts/generate.py").read_text())
    assert {module for module, _, _ in imports(tree) if module.split(".")[0] == "jaxwan"} == {
        "jaxwan", "jaxwan.commands.running", "jaxwan.commands.terminal"
    }  # fmt: skip
    names = {
        node.attr for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "jaxwan"
    }  # fmt: skip
    assert names and names <= {*jaxwan.__all__, "__version__"}


def test_what_the_package_names_is_there_and_importing_it_starts_nothing_heavy():
    assert set(dir(jaxwan)) == {*jaxwan.__all__, "__version__"}
    for name in jaxwan.__all__:
        assert getattr(jaxwan, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'WanPipelines'"):
        _ = jaxwan.WanPipelines
    code = "import sys, jaxwan; print(jaxwan.__version__, 'jax' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == [jaxwan.__version__, "False", "False"]


def test_the_version_is_told_once():
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"].get("version") is None
    assert importlib.metadata.version("jaxwan") == jaxwan.__version__


@pytest.mark.parametrize("name", LINKS)
def test_top_level_folders_are_reached_through_relative_links(name):
    link = ROOT / "jaxwan" / name
    assert link.is_symlink() and link.readlink() == Path("..") / name and (ROOT / name).is_dir()


@pytest.mark.parametrize("folder", [*LINKS, "tests"])
def test_folders_beside_the_package_are_no_packages(folder):
    assert list((ROOT / folder).rglob("__init__.py")) == []


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))])
def test_what_a_page_names_is_there(page):
    """Files, from the root or jaxwan/, and what it says is in them: `NAME` in `FILE.py`, `A` and `B` of `FILE.py`."""
    text = (ROOT / page).read_text()
    code = {path: "".join(f.read_text() for f in (ROOT / path, ROOT / "jaxwan" / path) if f.exists())
            for path in re.findall(r"`([\w/]+/\w+\.py)`", text)}  # fmt: skip
    assert [path for path, lines in code.items() if not lines] == []
    named = re.findall(r"`(\w+)`(?: and `(\w+)`)? (?:of|in)\s+`([\w/]+/\w+\.py)`", text)
    assert [(name, path) for *names, path in named for name in names if name not in code[path]] == []


@pytest.mark.parametrize("text, wrong", [
    ("import torch", ["torch anywhere"]),
    ("def f():\n    from diffusers.models import X", ["diffusers.models anywhere", "diffusers.models in kernels"]),
    ("import av.error", ["av.error outside a function", "av.error in kernels"]),
    ("from jaxwan.models import vae", ["jaxwan.models in kernels"]),
    ("from jaxwan import models", ["jaxwan in kernels"]),
    ("from ..models import vae", ["..models anywhere"]),
    ("import os, jax.numpy\nfrom jaxwan.kernels.attention import attention", []),
])  # fmt: skip
def test_the_rules_catch_what_they_are_for(tmp_path, monkeypatch, text, wrong):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "x.py").write_text(text)
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    assert [w for w in complaints(tmp_path / "kernels" / "x.py") if w in wrong] == wrong
