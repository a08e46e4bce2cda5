"""`mgd-timm verify`: check that the files of a student belong together."""

from collections.abc import Sequence

from mgd_timm.cli.parser import Parser


def main(arguments: Sequence[str]) -> None:
    """Run the command."""
    values = _parser().parse_args(list(arguments))
    from mgd_timm.hub.verify import verify  # after the flags are checked, as it loads torch

    checks = verify(values.folder, values.teacher)
    for check in checks:
        print(check)
    failed = [check.name for check in checks if check.passed is False]
    if failed:
        raise ValueError(f"{values.folder}: {len(failed)} of {len(checks)} checks failed: {'; '.join(failed)}.")


def _parser() -> Parser:
    about = "Check the weights, the card and the recipe of a student against the digests that were written with them."
    parser = Parser(prog="mgd-timm verify", description=about)
    parser.add_argument("folder", type=str, help="run folder, exported or published folder, or hf-hub:user/name")
    about = "its teacher (run folder, exported folder or name), to compare the weights"
    parser.add_flag("teacher", str | None, None, about, group="chain")
    return parser
