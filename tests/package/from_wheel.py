"""What a user does with an installed wheel, from the demo to a student that timm loads: run by `make wheel`.

.venv-wheel/empty/bin/python tests/package/from_wheel.py .venv-wheel/empty/bin/mgd-timm
"""

import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# mgd_timm is not imported: the exported student needs timm alone.
LOAD = """
import sys, timm, torch
model = timm.create_model("local-dir:exported", pretrained=True).eval()
with torch.no_grad():
    logits = model(torch.zeros(2, *timm.models.get_model_input_config(model)["input_size"]))
assert logits.shape == (2, 10) and logits.isfinite().all(), logits
assert "mgd_timm" not in sys.modules
print(f"torch {torch.__version__}, timm {timm.__version__}: logits {tuple(logits.shape)}")
"""
EPOCH = ("--epochs", "1", "--workers", "2")
HEADS = ("--heads-epochs", "1", "--heads-augmentations", "1")
COMMANDS = (
    ("--version",),
    ("data",),
    ("demo", "--quick"),
    ("train", "--model", "test_resnet", *EPOCH, "--output", "teacher"),
    ("train", "--model", "test_efficientnet", *EPOCH, "--output", "alone"),
    ("distill", "--teacher", "teacher", "--student", "test_efficientnet", *EPOCH, *HEADS, "--output", "student"),
    ("evaluate", "student"),
    ("report", "student", "alone"),
    ("export", "student", "exported", "--license", "mit"),
)


def main() -> None:
    executable = Path(sys.argv[1]).absolute()
    package = subprocess.run(
        [sys.executable, "-c", "import mgd_timm; print(mgd_timm.__file__)"],
        cwd="/",
        capture_output=True,
        text=True,
        check=True,
    )
    print(f"Python {platform.python_version()}, {package.stdout.strip()}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for words in COMMANDS:
            step([str(executable), *words], folder)
        assert Path(folder, "student", "report.html").stat().st_size > 10_000
        step([sys.executable, "-c", LOAD], folder)


def step(words: list[str], folder: str) -> None:
    """Run a program in a folder, and print its time and its last line."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "MGD_TIMM_CACHE": f"{folder}/cache"}
    environment.pop("PYTHONPATH", None)
    start = time.monotonic()
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    name = " ".join(word for word in words[1:] if "\n" not in word)
    if done.returncode:
        sys.exit(f"{name}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}")
    print(f"{time.monotonic() - start:6.1f} s  {name}\n          {done.stdout.strip().splitlines()[-1]}", flush=True)
    for line in (line for line in done.stderr.splitlines() if "Warning" in line):
        print(f"          {line}", flush=True)


if __name__ == "__main__":
    main()
