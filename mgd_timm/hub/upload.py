"""Upload a student to the Hugging Face hub, once its folder verifies."""

import tempfile
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path

from huggingface_hub import HfApi, ModelCard, get_token
from huggingface_hub.utils import HfHubHTTPError, HFValidationError, validate_repo_id

from mgd_timm._version import __version__
from mgd_timm.hub.folder import FORMATS, PATTERNS, check_replaceable, write_folder
from mgd_timm.hub.metadata import license_of
from mgd_timm.hub.student import read_student
from mgd_timm.hub.verify import verify
from mgd_timm.pipeline.torch_defaults import torch_defaults
from mgd_timm.recipe.options import expand_home


@torch_defaults()
def publish(
    run: str | PathLike[str],
    repo_id: str,
    *,
    license: str | None = None,
    compare: Sequence[str | PathLike[str]] = (),
    folder: str | PathLike[str] | None = None,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    log: Callable[[str], None] = print,
) -> str:
    """Upload a student to the Hugging Face hub in timm's layout, with a model card, once its files verify.

    Args:
        run: Run folder or exported folder.
        repo_id: user/name; the repository is created if it is missing.
        license: Licence of the weights, as the hub spells it; by default the run's.
        compare: Other runs on the same data for the card's table, such as the student alone.
        folder: Write the files here and upload nothing, without a token.
        private: Make a new repository private.
        revision: Branch to commit to, created if it is missing; by default main.
        create_pr: Open a pull request in place of a commit.
        log: Logs one line.

    Returns:
        The folder, or the address of the commit or pull request.

    Raises:
        ValueError: A name, licence, run or token that is missing or wrong, or files that do not verify.
        FileExistsError: `folder` has files that are not those of a published student.
        OSError: The folder could not be written, or the upload failed.
    """
    check_repo_id(repo_id)
    if create_pr and revision is not None:
        raise ValueError("--create-pr opens its own branch: leave --revision out.")
    target = Path(expand_home(str(folder), "folder")) if folder is not None else None
    if target is not None:
        check_replaceable(target)
    elif get_token() is None:
        raise ValueError(
            "no token of the hub: log in with `hf auth login`, or set HF_TOKEN to a token that may write "
            "(https://huggingface.co/settings/tokens). --dry-run needs none."
        )
    student = read_student(expand_home(str(run), "run"))
    chosen = license_of(student, license)
    others = [expand_home(str(one), "compare") for one in compare]
    if target is not None:
        write_folder(target, student, repo_id, chosen, others, log)
        _check_verifies(target)
        return str(target)
    with tempfile.TemporaryDirectory(prefix="mgd_timm-publish-") as temporary:
        draft = Path(temporary) / "student"
        write_folder(draft, student, repo_id, chosen, others, log)
        _check_verifies(draft)
        return _upload(draft, repo_id, private, revision, create_pr, log)


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


def _upload(
    folder: Path, repo_id: str, private: bool, revision: str | None, create_pr: bool, log: Callable[[str], None]
) -> str:
    api = HfApi(library_name="mgd-timm", library_version=__version__)
    done, sending = "nothing was uploaded", False
    try:
        api.whoami()
        ModelCard.load(folder / "README.md").validate()  # before a repository is made for it
        if api.repo_exists(repo_id):
            if private and api.repo_info(repo_id).private is False:
                raise ValueError("--private is for a new repository, and this one is public: make it private first")
            log(f"{repo_id} exists: a commit is added, and its files of other names stay")
        else:
            api.create_repo(repo_id, private=private)
        done = f"{repo_id} is there, and its files were not changed"
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        sending = True
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message="Add a distilled student",
            revision=revision,
            create_pr=create_pr,
            allow_patterns=list(PATTERNS),
            delete_patterns=["onnx/*", FORMATS, "recipe.yaml"],  # of an earlier student
        )
    except Exception as error:  # the hub's client, and what it is built on, raise a dozen kinds
        words = " ".join(str(error).split())
        if sending and not isinstance(error, HfHubHTTPError):  # without a reply, the commit may have been made
            done = f"and it is not known whether its files were changed: look at https://huggingface.co/{repo_id}"
        raise OSError(f"publishing {repo_id} failed, {done} ({type(error).__name__}: {words}).") from error
    return str(commit.pr_url or commit.commit_url)
