"""Check that a model fits its role and the data, before training."""

from collections.abc import Sequence

import torch
from timm.models import get_model_input_config
from torch import nn

from mgd_timm.features.tap import model_name


def check_module(module: nn.Module, role: str) -> None:
    """Raise ValueError unless a module from user code is a timm model with float32 weights."""
    if not hasattr(module, "num_classes"):
        raise ValueError(
            f"{role}: a {type(module).__name__}, which has no num_classes: expected a model of timm.create_model."
        )
    for name, weight in module.named_parameters():
        if weight.dtype != torch.float32:
            raise ValueError(
                f"{role}: its {name} is {weight.dtype}, expected torch.float32: pass model.float(), with amp=True."
            )


def check_trainable(module: nn.Module, role: str) -> None:
    """Raise ValueError for a module from user code whose weights torch cannot train in place."""
    for name, weight in module.named_parameters():
        if weight.is_inference():
            raise ValueError(
                f"{role}: its {name} was made under torch.inference_mode(), where weights cannot be trained: build the "
                "model outside of it."
            )
        if weight.is_meta:
            raise ValueError(f"{role}: its {name} is on the device meta and has no values: build the model on the CPU.")


def check_student(student: nn.Module, in_chans: int, num_classes: int) -> None:
    """Raise ValueError unless a student takes the images, has the data's number of classes, and can be trained."""
    check_classifier(student)
    check_channels(student, "student", in_chans)
    count = getattr(student, "num_classes", 0)
    if count != num_classes:
        raise ValueError(f"the model has {count} classes, the data {num_classes}: use num_classes={num_classes}.")
    if not any(weight.requires_grad for weight in student.parameters()):
        raise ValueError("all of the student's weights are frozen: call student.requires_grad_(True) first.")


def check_classifier(student: nn.Module) -> None:
    """Raise ValueError unless a model to train has a classifier: without one its export could not be loaded."""
    if not getattr(student, "num_classes", 0):
        name = model_name(student)
        raise ValueError(
            f"{name} has no classifier (num_classes=0), and only a teacher may lack one. Build it with num_classes=C; "
            "timm's encoders (*_enc) take none: choose an architecture that does."
        )


def check_channels(model: nn.Module, role: str, in_chans: int) -> None:
    """Raise ValueError unless a model takes images of `in_chans` channels."""
    channels = get_model_input_config(model)["input_size"][0]
    if channels != in_chans:
        raise ValueError(f"the {role} takes {channels} channels, the images have {in_chans}: --in-chans {channels}.")


def check_class_names(model: nn.Module, role: str, class_names: Sequence[str]) -> None:
    """Raise ValueError if weights and data both name their classes, and names or order differ."""
    conflict = find_class_conflict(model, role, class_names)
    if conflict is not None:
        raise ValueError(
            f"{conflict}: both need the same classes in one order. Rename or reorder the data's classes, or use the "
            f"data that the {role} was trained on. --teacher-classes auto reorders a teacher's classes."
        )


def find_class_conflict(model: nn.Module, role: str, class_names: Sequence[str]) -> str | None:
    """Describe the first class that weights and data name differently.

    Returns:
        None if there is none, or if weights or data have no names, or numbers for names.
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
