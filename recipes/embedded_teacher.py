"""Put a trained teacher into the package, with its accuracy on the embedded test images: the last step of
embedded_teacher.yaml.

python recipes/embedded_teacher.py runs/embedded_teacher
"""

import argparse
import json
from pathlib import Path

from mgd_timm.api import evaluate
from mgd_timm.export.timm_folder import export_model
from mgd_timm.models.load import load_model
from mgd_timm.recipe.data import EMBEDDED


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    args = parser.parse_args()
    model = load_model(str(args.run))
    known = json.loads((args.run / "export" / "recipe.json").read_text())
    known = {name: value for name, value in known.items() if name != "model_sha256"}
    found = evaluate(model, "embedded")
    folder = export_model(model, EMBEDDED / "teacher", provenance={**known, "embedded_test": found}, overwrite=True)
    print(f"{folder}: top-1 {found['top1']:.2f} % on the {found['n']:.0f} embedded test images")


if __name__ == "__main__":
    main()
