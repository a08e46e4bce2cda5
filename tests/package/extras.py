"""Install the wheel with each extra alone into an empty environment, and run the tests that concern it: `make extras`.

.venv-wheel/bin/python tests/package/extras.py [EXTRA ...] [--python python3.13]
"""

import argparse
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
UV = str(Path(sys.executable).with_name("uv"))
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]

_FORMATS = "tests/export/test_formats.py"
TESTS: dict[str, tuple[str, ...]] = {
    "executorch": ("tests/export/test_executorch.py",),
    "heic": ("tests/data/places/test_images.py",),
    "int8": (_FORMATS,),
    "match": ("tests/teachers/test_channel_matching.py", "-m", "not slow"),
    "onnx": (_FORMATS, "tests/export/test_onnx_families.py"),
    "openvino": (_FORMATS,),
    "plot": ("tests/benchmarks/test_report.py",),
}
"""Of each extra the words that select its tests: files, or a keyword with -k."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("extras", nargs="*", help="by default all of pyproject.toml", choices=[*EXTRAS, []])
    parser.add_argument("--python", default=sys.executable)
    args = parser.parse_args()
    missing = set(EXTRAS) ^ set(TESTS)
    if missing:
        sys.exit(f"{', '.join(sorted(missing))}: name the tests of each extra of pyproject.toml in {__file__}.")
    (wheel,) = (ROOT / "dist").glob("*.whl")
    failed = [extra for extra in args.extras or EXTRAS if not check(extra, wheel, args.python)]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def check(extra: str, wheel: Path, python: str) -> bool:
    """Whether the tests of an extra pass where nothing but the wheel, the extra and pytest is installed."""
    place = ROOT / ".venv-wheel" / f"extra-{extra}"
    print(f"== {extra}: {' '.join(EXTRAS[extra])}", flush=True)
    subprocess.run([UV, "venv", "--quiet", "--clear", "--python", python, place], check=True)
    packages = [f"mgd-timm[{extra}] @ {wheel.as_uri()}", "pytest>=9.0"]
    subprocess.run([UV, "pip", "install", "--quiet", "--python", place, *packages], check=True)
    # The program, not `python -m pytest`, which would put the clone's package before the installed one.
    words = [place / "bin" / "pytest", "-o", "addopts=-q -rs --strict-markers", "-p", "no:cacheprovider"]
    return subprocess.run([*words, *TESTS[extra]], cwd=ROOT, check=False).returncode == 0


if __name__ == "__main__":
    main()
