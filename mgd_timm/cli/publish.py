"""`mgd-timm publish`: upload a student to the Hugging Face hub with a model card, or write the folder of it."""

import sys
from collections.abc import Sequence

from mgd_timm.cli.parser import Parser


def main(arguments: Sequence[str]) -> None:
    """Run the command."""
    values = _parser().parse_args(list(arguments))
    if values.output is not None and not values.dry_run:
        raise ValueError(f"--output {values.output} is where --dry-run writes: give --dry-run, or leave --output out.")
    folder = (values.output or f"hub/{values.repo_id}") if values.dry_run else None
    from mgd_timm.hub.upload import publish  # after the flags are checked, as it loads torch

    place = publish(
        values.run,
        values.repo_id,
        license=values.license,
        compare=values.compare or (),
        folder=folder,
        private=values.private,
        revision=values.revision,
        create_pr=values.create_pr,
        log=lambda line: print(line, file=sys.stderr),
    )
    print(f"wrote {place}; nothing was uploaded" if values.dry_run else f"published {place}")


def _parser() -> Parser:
    about = "Upload a student to the Hugging Face hub in timm's layout, with a model card, once its files verify."
    parser = Parser(prog="mgd-timm publish", description=about)
    parser.add_argument("run", type=str, help="run folder or exported folder")
    parser.add_argument("repo_id", metavar="user/name", type=str, help="repository, which is created if it is missing")
    about = "licence of the weights, as the hub spells it, such as mit or apache-2.0; default: the run's"
    parser.add_flag("license", str | None, None, about, group="card")
    about = "other runs on the same data for the card's table, such as the student alone"
    parser.add_flag("compare", tuple[str, ...] | None, None, about, group="card", value="RUN")
    about = "write the folder and upload nothing, without a token"
    parser.add_flag("dry_run", bool, False, about, group="upload")
    about = "folder to write with --dry-run; default: hub/user/name"
    parser.add_flag("output", str | None, None, about, group="upload", value="FOLDER")
    parser.add_flag("private", bool, False, "make a new repository private", group="upload")
    about = "branch to commit to, created if it is missing; default: main"
    parser.add_flag("revision", str | None, None, about, group="upload", value="BRANCH")
    parser.add_flag("create_pr", bool, False, "open a pull request in place of a commit", group="upload")
    return parser
