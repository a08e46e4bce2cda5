"""`mgd-timm export`: write a run's student as a folder that timm loads, with another tag or licence."""

import json
from collections.abc import Sequence
from pathlib import Path

from mgd_timm.cli.parser import Parser
from mgd_timm.recipe.options import expand_home


def main(arguments: Sequence[str]) -> None:
    """Run the command."""
    values = _parser().parse_args(list(arguments))
    from mgd_timm.export.timm_folder import export_model  # after the flags are checked, as it loads torch
    from mgd_timm.models.load import load_model

    run, folder = expand_home(values.run, "RUN"), expand_home(values.folder, "FOLDER")
    model = load_model(run, verify=values.verify)
    given = {name: value for name in ("license", "tag") if (value := getattr(values, name)) is not None}
    model.pretrained_cfg = {**model.pretrained_cfg, **given}  # type: ignore[dict-item, assignment]
    exported = next((one for one in (Path(run) / "export", Path(run)) if (one / "recipe.json").is_file()), None)
    provenance = json.loads((exported / "recipe.json").read_text()) if exported is not None else {}
    for name in ("versions", "model_sha256", "files_sha256"):  # export_model writes them, or they are of other files
        provenance.pop(name, None)
    print(f"wrote {export_model(model, folder, provenance=provenance)}")


def _parser() -> Parser:
    about = "Write a run's student as a folder that timm loads, with another tag or licence."
    parser = Parser(prog="mgd-timm export", description=about)
    parser.add_argument("run", type=str, help="run folder, exported folder, or 'embedded'")
    parser.add_argument("folder", type=str, help="folder to write; must not exist")
    for name, about in (("license", "licence of the weights"), ("tag", "timm's tag of the weights")):
        parser.add_flag(name, str | None, None, f"{about}; default: the run's", group="labels")
    about = "refuse weights that are not those that recipe.json has the digest of"
    parser.add_flag("verify", bool, True, about, group="labels")
    return parser
