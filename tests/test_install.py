"""What an installation gives from any folder: the package, its linked folders, the bundled model."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import pytest

pytestmark = pytest.mark.slow  # pip builds in a fresh environment, for which it fetches setuptools

ROOT = Path(__file__).parents[1]
NO_SOURCES = shutil.ignore_patterns(".*", "*.egg-info", "build", "dist", "outputs", "__pycache__", "venv", "env")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
IMPORT = "import jaxwan.convert.load, jaxwan.kernels.attention, jaxwan.sharding.ring; print(jaxwan.__file__)"


class Installed(NamedTuple):
    """A clone named jaxwan, installed in an environment of its own that sees this one's other packages."""

    clone: Path
    python: Path
    package: Path  # where jaxwan has to come from


@pytest.fixture(scope="module", params=["editable", "wheel"])
def installed(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    clone, python = folder / "jaxwan", folder / "venv" / "bin" / "python"
    shutil.copytree(ROOT, clone, symlinks=True, ignore=NO_SOURCES)
    venv.create(folder / "venv", symlinks=True)
    site = Path(run(folder, python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (site / "others.pth").write_text(sysconfig.get_path("purelib"))
    pip = sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--ignore-installed"
    run(folder, *pip, *["-e"] * (request.param == "editable"), clone)
    return Installed(clone, python, (clone if request.param == "editable" else site) / "jaxwan")


def run(folder, *command, told=""):
    """Standard output of a command that must succeed in `folder`, without this session's PYTHONPATH."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, cwd=folder, env=environment, input=told, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("where", ["beside a folder of its name", "above the clone", "in the clone"])
def test_the_package_is_imported_from_any_folder(installed, tmp_path, where):
    (tmp_path / "jaxwan").mkdir()
    folder = {"above the clone": installed.clone.parent, "in the clone": installed.clone}.get(where, tmp_path)
    script = tmp_path / "script.py"  # Python looks in a script's folder, and for the other two in the working folder
    script.write_text(IMPORT)
    package = installed.clone / "jaxwan" if where == "in the clone" else installed.package
    for command, told in (((script,), ""), (("-c", IMPORT), ""), (("-i",), f"{IMPORT}\n")):
        expected = installed.package if command == (script,) else package
        assert run(folder, installed.python, *command, told=told).strip() == str(expected / "__init__.py")


def test_the_linked_folders_and_the_bundled_model_are_there_whole(installed):
    def files(package):
        inside = (Path(root, name).relative_to(package) for root, _, names in os.walk(package, followlinks=True)
                  for name in names)  # fmt: skip
        return sorted(path for path in inside if path.suffix != ".pyc")

    assert files(installed.package) == files(ROOT / "jaxwan")


def test_the_script_runs_from_another_folder(installed, tmp_path):
    (tmp_path / "jaxwan").mkdir()
    script = installed.clone / "scripts" / "generate.py"
    assert "tokens" in run(tmp_path, installed.python, script, "--dry-run")


@pytest.mark.parametrize("theirs", [False, True])
def test_hugging_faces_kernels_are_seen_where_they_are_installed_and_never_ours(installed, tmp_path, theirs):
    """An editable install puts the clone on the path, and with it a folder `kernels`."""
    code = (
        "import jaxwan, diffusers.utils.import_utils as seen; from transformers import AutoTokenizer, "
        "CLIPImageProcessorPil; print(seen._kernels_available)"
    )
    if theirs:
        (tmp_path / "kernels.py").touch()
        (tmp_path / "kernels.dist-info").mkdir()
        (tmp_path / "kernels.dist-info" / "METADATA").write_text(
            "Metadata-Version: 2.1\nName: kernels\nVersion: 0.17\n"
        )
    assert run(tmp_path, installed.python, "-c", code).strip() == str(theirs)


# As many as are quick and touch every package
TELLING = [f"tests/pipelines/test_{name}.py" for name in "media request checkpoint prompt snapshot parity".split()]


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the lowest versions are for the lowest Python")
def test_the_lowest_versions_that_are_allowed_make_a_video_and_pass_tests():
    """All at once, which they must allow each other. What tests alone need is taken from this environment."""
    lowest = [need.replace(">=", "==") for need in PROJECT["dependencies"]]
    with TemporaryDirectory() as folder:  # a gigabyte, which pytest's own folders would keep
        python = Path(folder, "venv", "bin", "python")
        pip = sys.executable, "-m", "pip", "--python", python
        venv.create(Path(folder, "venv"), symlinks=True)
        run(folder, *pip, "install", "--quiet", *lowest)
        site = Path(run(folder, python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
        (site / "others.pth").write_text(f"{ROOT}\n{sysconfig.get_path('purelib')}")
        installed = run(folder, *pip, "list", "--path", site, "--format=freeze")
        for name, version in (need.split("==") for need in lowest):
            assert re.search(rf"^{name}=={re.escape(version)}(\.0)*$", installed, re.MULTILINE | re.IGNORECASE), name
        run(folder, python, ROOT / "scripts/generate.py", "--mesh", "pp=4", "--output", "first.mp4")
        assert Path(folder, "first.mp4").stat().st_size > 1000
        run(ROOT, python, "-m", "pytest", "-q", "-n", "0", *TELLING)
