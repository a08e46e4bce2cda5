"""The sdist, the wheel that is built from it, and what users get from the wheel. `make wheel` installs it."""

import email
import os
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from email.message import Message
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def build(kind: str, tree: Path, output: Path) -> Path:
    code = f"import sys; from setuptools import build_meta; build_meta.build_{kind}(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", code, output], cwd=tree, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    (built,) = output.glob("*.tar.gz" if kind == "sdist" else "*.whl")
    return built


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist of this tree, which is not written to."""
    tree = tmp_path_factory.mktemp("tree")
    for path in ROOT.iterdir():
        if not path.name.startswith(".") and path.name not in ("build", "dist", "runs") and path.suffix != ".egg-info":
            (tree / path.name).symlink_to(path)
    return build("sdist", tree, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    tree = tmp_path_factory.mktemp("from sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tree, filter="data")
    return zipfile.ZipFile(build("wheel", next(tree.iterdir()), tmp_path_factory.mktemp("wheel")))


@pytest.fixture(scope="module")
def environment(wheel: zipfile.ZipFile, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site-packages of an environment that holds the wheel alone."""
    place = tmp_path_factory.mktemp("environment")
    venv.create(place)
    (packages,) = place.glob("lib/python*/site-packages")
    wheel.extractall(packages)
    return packages


def metadata(wheel: zipfile.ZipFile) -> Message:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return email.message_from_bytes(wheel.read(name))


def test_the_sdist_holds_what_the_wheel_is_built_from_and_no_more(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {Path(*Path(name).parts[1:]).as_posix() for name in archive.getnames()}
    first = {Path(name).parts[0] for name in names if name != "."}
    assert first == {
        *("LICENSE", "MANIFEST.in", "PKG-INFO", "README.md", "mgd_timm", "mgd_timm.egg-info"),
        *("pyproject.toml", "setup.cfg"),
    }


def test_the_wheel_holds_the_files_of_the_package_and_no_others(wheel: zipfile.ZipFile) -> None:
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "mgd_timm").rglob("*") if path.is_file()}
    found = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert found == {name for name in files if "__pycache__" not in name}
    for name in ("py.typed", "embedded/fashion_mnist/test.parquet", "embedded/teacher/model.safetensors"):
        assert f"mgd_timm/{name}" in found
        assert wheel.read(f"mgd_timm/{name}") == (ROOT / "mgd_timm" / name).read_bytes()


def test_the_metadata_say_what_pyproject_says(wheel: zipfile.ZipFile) -> None:
    found = metadata(wheel)
    assert (found["Name"], found["Requires-Python"]) == (PROJECT["name"], PROJECT["requires-python"])
    assert found["License-Expression"] == PROJECT["license"]
    for name in PROJECT["license-files"]:
        (inside,) = (one for one in wheel.namelist() if one.endswith(f".dist-info/licenses/{name}"))
        assert wheel.read(inside) == (ROOT / name).read_bytes()
    assert set(found.get_all("Provides-Extra", [])) == set(PROJECT["optional-dependencies"])
    required = found.get_all("Requires-Dist", [])
    assert sum("extra ==" not in line for line in required) == len(PROJECT["dependencies"])
    assert found["Description-Content-Type"] == "text/markdown"
    assert str(found.get_payload(decode=True), "utf-8") == (ROOT / "README.md").read_text()


def test_the_command_runs_from_the_wheel(environment: Path, tmp_path: Path) -> None:
    """The dependencies are those of this environment; the package is the wheel's."""
    (entry,) = (line for line in next(environment.glob("*.dist-info/entry_points.txt")).read_text().splitlines()[1:])
    assert entry == "mgd-timm = mgd_timm.cli.main:main"
    code = (
        "import sys, mgd_timm; from mgd_timm.cli.main import main; from mgd_timm.recipe.data import EMBEDDED;"
        "print(mgd_timm.__file__, EMBEDDED, main(['--version']), main(['list', 'data']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(environment)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    package = environment / "mgd_timm"
    assert done.stdout.split()[-4:] == [str(package / "__init__.py"), str(package / "embedded"), "0", "0"]
    assert metadata_version(environment) in done.stdout.split()


def metadata_version(environment: Path) -> str:
    (folder,) = environment.glob("*.dist-info")
    return folder.name.removeprefix("mgd_timm-").removesuffix(".dist-info")


def check_types(environment: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """mypy of a user's file, where mgd_timm is installed and its dependencies are not."""
    python = environment.parents[2] / "bin" / "python"
    words = ["--strict", "--config-file=", f"--cache-dir={folder}", f"--python-executable={python}"]
    consumer = str(Path(__file__).with_name("consumer.py"))
    return subprocess.run(
        [sys.executable, "-m", "mypy", *words, consumer],
        cwd=folder,
        env={name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MYPYPATH")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_type_checker_of_a_user_reads_the_types(environment: Path, tmp_path: Path) -> None:
    done = check_types(environment, tmp_path)
    assert done.returncode == 0, done.stdout
    (environment / "mgd_timm" / "py.typed").rename(tmp_path / "py.typed")
    try:
        done = check_types(environment, tmp_path)
    finally:
        (tmp_path / "py.typed").rename(environment / "mgd_timm" / "py.typed")
    assert "missing library stubs or py.typed marker" in done.stdout
