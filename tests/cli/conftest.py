"""The command line, called in an empty folder; and the folder of a short run."""

import pytest
from small import SHORT

from mgd_timm.cli.main import main


@pytest.fixture
def mgd(capsys, tmp_path, monkeypatch):
    """Call the command line in an empty folder; gives exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> tuple[int, str, str]:
        try:
            code = main([str(word) for word in words])
        except SystemExit as end:
            code = int(end.code or 0)
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


@pytest.fixture(scope="module")
def trained(small_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert main(["distill", *SHORT, "--data-dir", str(small_data), "--output", str(folder), "--license", "mit"]) == 0
    return folder
