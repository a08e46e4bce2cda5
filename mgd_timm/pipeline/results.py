"""What a run leaves: summary.json, exports with their origin, and the last lines of its log."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn

from mgd_timm.data.dataset import Images
from mgd_timm.export.timm_folder import export_model
from mgd_timm.pipeline.connect import Networks, teachers_of
from mgd_timm.recipe.options import as_dict
from mgd_timm.recipe.recipe import Recipe, without_paths
from mgd_timm.storage.atomic_write import write_text_atomically
from mgd_timm.storage.versions import versions
from mgd_timm.training.evaluation import evaluate_model
from mgd_timm.training.loop import Fitted


def summarise(
    fitted: Fitted,
    trained: nn.Module,
    before: dict[str, Any],
    images: Images,
    recipe: Recipe,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """Return the numbers of summary.json: the test split's where a validation split was evaluated while training."""
    summary = {
        "top1": fitted.last.get("top1"),
        "best_top1": fitted.best if fitted.best_epoch else None,
        **before,
        "best_epoch": fitted.best_epoch,
        "last": fitted.last,
        "updates": fitted.updates,
        "seconds": round(fitted.seconds, 2),
    }
    summary |= _test_metrics(trained, summary["top1"], images, recipe, accelerator)
    return {**summary, "parameters": sum(p.numel() for p in trained.parameters())}


def _test_metrics(
    model: nn.Module, val_top1: float | None, images: Images, recipe: Recipe, accelerator: Accelerator
) -> dict[str, Any]:
    """Return the test split's metrics, which become the model's, where another split was evaluated while training."""
    if images.val is None or images.test is None:
        return {}
    test = evaluate_model(model, images.test, accelerator, recipe.data.validation_batch_size)
    return {"test": test, "val_top1": val_top1, "top1": test["top1"]}


def summarise_peer(
    model: nn.Module, fitted: Fitted, images: Images, recipe: Recipe, accelerator: Accelerator
) -> dict[str, Any]:
    """Return the peer's numbers, named as the student's in the summary."""
    last = {name.removeprefix("peer_"): value for name, value in fitted.last.items() if name.startswith("peer_")}
    found = {"top1": last.get("top1"), "last": last, "parameters": sum(p.numel() for p in model.parameters())}
    return found | _test_metrics(model, last.get("top1"), images, recipe, accelerator)


def provenance_of(
    recipe: Recipe, connected: Sequence[Networks], heads_sha256: list[str], images: Images
) -> dict[str, Any]:
    """Return what recipe.json says of the origin of the weights; of several teachers a list."""

    def one_or_list(values: list[str]) -> str | list[str]:
        return values[0] if len(values) == 1 else values

    start, trajectory = connected[0].fingerprint, connected[-1].trajectory
    found = {"recipe": without_paths(as_dict(recipe)), "precision": start["precision"]}
    found |= {"train_images": images.num_samples, "data_sha256": images.train.digest}
    evaluated = images.test if images.test is not None else images.val
    if evaluated is not None:
        found["evaluation_sha256"] = evaluated.digest
        split = recipe.data.eval_split
        if images.test is None or images.val is None:
            split = (images.description.get("eval") or {}).get("split", split)
        found["evaluation_split"] = split
    found["initial_sha256"] = start["student_sha256"]
    teachers = teachers_of(connected)
    if teachers:
        digests, loaded = [one.digest for one in teachers], [one for part in connected for one in part.loaded_sha256]
        found["teacher_architecture"] = one_or_list([one.tap.name for one in teachers])
        found["teacher_sha256"] = one_or_list(digests)
        if digests != loaded:
            found["teacher_loaded_sha256"] = one_or_list(loaded)
    if trajectory is not None:
        found["trajectory_sha256"] = trajectory.digests
    if heads_sha256:
        found["heads_sha256"] = one_or_list(heads_sha256)
    return found


def write_results(
    folder: Path, networks: Networks, trained: nn.Module, summary: dict[str, Any], provenance: dict[str, Any]
) -> None:
    """Write the exports and summary.json."""
    export_model(trained, folder / "export", provenance={**provenance, "metrics": summary}, overwrite=True)
    if networks.peer is not None:
        of_peer = {**provenance, "initial_sha256": networks.fingerprint["peer_sha256"], "metrics": summary["peer"]}
        export_model(networks.peer.model, folder / "export_peer", provenance=of_peer, overwrite=True)
    write_text_atomically(folder / "summary.json", json.dumps({**summary, "versions": versions()}, indent=2) + "\n")


def log_results(summary: dict[str, Any], folder: Path, name: str, log: Callable[[str], None]) -> None:
    """Log accuracies, where the exports are, and how to load them."""
    top1 = summary["top1"]
    if top1 is not None:
        best = summary["best_top1"]
        split = " on the validation split" if "val_top1" in summary else ""
        of_best = f"; best{split} {best:.2f} % in epoch {summary['best_epoch']}" if best is not None else ""
        log(f"top-1 {top1:.2f} % after the last epoch{of_best}")
    if summary.get("qat", {}).get("before", {}).get("float"):
        before, after = summary["qat"]["before"], summary["qat"]["after"]
        log(
            f"int8 (fake quantisation): top-1 {before['int8']['top1']:.2f} % before --qat and "
            f"{after['int8']['top1']:.2f} % after it; float {before['float']['top1']:.2f} and "
            f"{after['float']['top1']:.2f} %"
        )
    if summary.get("peer", {}).get("top1") is not None:
        log(f"peer: top-1 {summary['peer']['top1']:.2f} % after the last epoch")
    log(f"exported: {folder / 'export'}" + (f" and {folder / 'export_peer'}" if "peer" in summary else ""))
    first = "import mgd_timm.models; " if name.startswith("cifar_") else ""
    place = f"local-dir:{folder / 'export'}"
    log(f"load it: {first}timm.create_model({place!r}, pretrained=True)")
