"""Upload a student to the Hugging Face hub, once its folder verifies."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, ModelCard, get_token
from huggingface_hub.utils import HFValidationError, validate_repo_id

from mgd_timm._version import __version__
from mgd_timm.hub.folder import FORMATS, PATTERNS, check_replaceable, write_folder
from mgd_timm.hub.metadata import license_of
from mgd_timm.hub.student import read_student
from mgd_timm.hub.verify import verify


@dataclass(frozen=True)
class Target:
    """Where a student is uploaded to.

    Args:
        repo_id: user/name.
        private: Make a new repository private.
        revision: Branch, created where it is missing; by default main.
        create_pr: Open a pull request in place of a commit.
    """

    repo_id: str
    private: bool = False
    revision: str | None = None
    create_pr: bool = False


def publish(
    place: str,
    target: Target,
    *,
    license: str | None = None,
    compare: Sequence[str] = (),
    folder: Path | None = None,
    log: Callable[[str], None] = print,
) -> str:
    """Write the folder of a student and upload it in one commit.

    Args:
        place: Run folder or exported folder.
        target: Where to.
        license: Identifier of the licence; by default the run's.
        compare: Folders of runs to compare with, such as the student alone.
        folder: Write here and upload nothing, without network and token.
        log: Logs one line.

    Returns:
        The folder, or the address of the commit.

    Raises:
        ValueError: A name, licence, run or token that is missing or wrong, or files that do not verify.
        OSError: The folder cannot be written, or the upload failed.
    """
    check_repo_id(target.repo_id)
    if target.create_pr and target.revision is not None:
        raise ValueError("--create-pr opens its own branch: leave --revision out.")
    if folder is not None:
        check_replaceable(folder)
    elif get_token() is None:
        raise ValueError(
            "no token of the hub: log in with `hf auth login`, or set HF_TOKEN to a token that may write "
            "(https://huggingface.co/settings/tokens). --dry-run needs none."
        )
    student = read_student(place)
    chosen = license_of(student, license)
    if folder is not None:
        write_folder(folder, student, target.repo_id, chosen, compare, log)
        _check_verifies(folder)
        return str(folder)
    with tempfile.TemporaryDirectory(prefix="mgd_timm-publish-") as temporary:
        draft = Path(temporary) / "student"
        write_folder(draft, student, target.repo_id, chosen, compare, log)
        _check_verifies(draft)
        return _upload(draft, target, log)


def check_repo_id(repo_id: str) -> None:
    """Raise ValueError unless a name is user/name as the hub allows it."""
    try:
        validate_repo_id(repo_id)
        if repo_id.count("/") != 1:
            raise ValueError("there is no user or organisation in it")
    except (HFValidationError, ValueError) as error:
        raise ValueError(f"{repo_id!r}: expected user/name as the hub allows it ({error})") from error


def _check_verifies(folder: Path) -> None:
    failed = [f"{check.name} ({check.detail})" for check in verify(str(folder)) if check.passed is False]
    if failed:
        raise ValueError(f"{folder} does not verify, nothing was uploaded: {'; '.join(failed)}.")


def _upload(folder: Path, target: Target, log: Callable[[str], None]) -> str:
    api = HfApi(library_name="mgd-timm", library_version=__version__)
    repo, done = target.repo_id, "nothing was uploaded"
    try:
        api.whoami()
        ModelCard.load(folder / "README.md").validate()
        if api.repo_exists(repo):
            log(f"{repo} exists: a commit is added, and its files of other names stay")
        else:
            api.create_repo(repo, private=target.private)
        done = f"{repo} is there, and its files were not changed"
        if target.revision is not None:
            api.create_branch(repo, branch=target.revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            commit_message="Add a distilled student",
            revision=target.revision,
            create_pr=target.create_pr,
            allow_patterns=list(PATTERNS),
            delete_patterns=["onnx/*", *FORMATS],  # of an earlier student
        )
    except Exception as error:  # the hub's client, and what it is built on, raise a dozen kinds
        words = " ".join(str(error).split())
        raise OSError(f"publishing {repo} failed, {done} ({type(error).__name__}: {words}).") from error
    return str(commit.pr_url or commit.commit_url)
