"""Check that a model fits its role and the data, before the first update."""

from collections.abc import Sequence

import torch
from timm.models import get_model_input_config
from torch import nn


def check_module(module: nn.Module, role: str) -> None:
    """Check that a module from user code is a timm model with float32 weights.

    Raises:
        ValueError: It is not.
    """
    if not hasattr(module, "num_classes"):
        raise ValueError(
            f"{role}: a {type(module).__name__}, which has no num_classes: expected a model that timm.create_model "
            "built."
        )
    for name, weight in module.named_parameters():
        if weight.dtype != torch.float32:
            raise ValueError(
                f"{role}: its {name} is {weight.dtype}, expected torch.float32: give model.float(), and amp=True."
            )


def check_student(student: nn.Module, in_chans: int, num_classes: int) -> None:
    """Check that a student takes the images, has as many classes as the data, and can be trained.

    Raises:
        ValueError: It does not.
    """
    check_classifier(student)
    check_channels(student, "student", in_chans)
    count = getattr(student, "num_classes", 0)
    if count != num_classes:
        raise ValueError(f"the model has {count} classes, the data {num_classes}: build it with as many.")
    if not any(weight.requires_grad for weight in student.parameters()):
        raise ValueError("all of the student's weights are frozen: call student.requires_grad_(True) first.")


def check_classifier(student: nn.Module) -> None:
    """Check that a model that is to be trained has a classifier: without one its export could not be loaded back.

    Raises:
        ValueError: It has none.
    """
    if not getattr(student, "num_classes", 0):
        name = getattr(student, "pretrained_cfg", {}).get("architecture") or type(student).__name__
        raise ValueError(
            f"{name} has no classifier (num_classes=0), and only a teacher may lack one. Build it with num_classes=C; "
            "timm's encoders (*_enc) take none: choose an architecture that does."
        )


def check_channels(model: nn.Module, role: str, in_chans: int) -> None:
    """Check that a model takes images of `in_chans` channels.

    Raises:
        ValueError: It takes another number.
    """
    channels = get_model_input_config(model)["input_size"][0]
    if channels != in_chans:
        raise ValueError(f"the {role} takes {channels} channels, the images have {in_chans}: --in-chans {channels}.")


def check_class_names(model: nn.Module, role: str, class_names: Sequence[str]) -> None:
    """Check that weights and data that both name their classes have the same names in the same order.

    Raises:
        ValueError: They differ.
    """
    conflict = find_class_conflict(model, role, class_names)
    if conflict is not None:
        raise ValueError(
            f"{conflict}: both need the same classes in one order. Rename or reorder the data's, or use the data that "
            "it was trained on; a teacher's are put in the data's order by --teacher-classes auto."
        )


def find_class_conflict(model: nn.Module, role: str, class_names: Sequence[str]) -> str | None:
    """Describe the first class that weights and data name differently.

    Returns:
        None where there is none, or where weights or data have no names (or numbers for names).
    """
    names = (getattr(model, "pretrained_cfg", {}) or {}).get("label_names")
    numbers = [str(i) for i in range(len(class_names))]
    if not isinstance(names, list | tuple) or numbers in (list(names), list(class_names)):
        return None
    if len(names) != len(class_names):
        return f"the {role} names {len(names)} classes, the data {len(class_names)}"
    for index, (known, given) in enumerate(zip(names, class_names, strict=True)):
        if known != given:
            return f"class {index} is {known!r} to the {role} and {given!r} in the data"
    return None
