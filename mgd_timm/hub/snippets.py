"""Python snippets of a card: classify an image, feature maps, embedding; a test runs them."""

import contextlib
from typing import Any, cast

import timm
import torch
from torch import Tensor, nn

from mgd_timm.hub.student import Student

_CLASSIFY = """{imports}

model = timm.create_model("hf-hub:{repo_id}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
{image}
with torch.inference_mode():
    probabilities = model({input}).softmax(dim=1)[0]

for probability, place in zip(*probabilities.topk({top})):
    print(f"{{{label}}}: {{100 * probability:.1f}} %")"""

_MAPS = """maps_of = timm.create_model("hf-hub:{repo_id}", pretrained=True, features_only=True).eval()
with torch.inference_mode():
    maps = maps_of({input})

for one in maps:
    print(tuple(one.shape))  # {shapes}"""

_LAST_MAP = """with torch.inference_mode():
    last = model.forward_features({input})

print(tuple(last.shape))  # {shapes}"""

_EMBEDDING = """embed = timm.create_model("hf-hub:{repo_id}", pretrained=True, num_classes=0).eval()
with torch.inference_mode():
    embedding = embed({input})

print(tuple(embedding.shape))  # {shapes}"""


def snippets(student: Student, repo_id: str) -> dict[str, str]:
    """Return the snippets by heading. The second and third go on from the first."""
    channels = student.input_size[0]
    image, shown = 'image = Image.open("image.jpg").convert("RGB")', "transform(image).unsqueeze(0)"
    if channels == 1:
        image = image.replace("RGB", "L")
    elif channels != 3:
        size = ", ".join(map(str, student.input_size))
        image, shown = f"images = torch.rand(1, {size})  # normalised as config.json says", "images"
    imports = ["import timm", "import torch", *(["from PIL import Image"] if channels in (1, 3) else [])]
    if student.architecture.startswith("cifar_"):
        imports.insert(0, "import mgd_timm.models  # pip install mgd-timm: registers the cifar_* networks in timm")
    classes = int(student.config["num_classes"])
    words = {"repo_id": repo_id, "input": shown}
    maps = _maps(student)
    label = "model.pretrained_cfg['label_names'][place]" if student.class_names else "int(place)"
    first = _CLASSIFY.format(imports="\n".join(imports), image=image, top=min(5, classes), label=label, **words)
    if channels not in (1, 3):
        first = "\n".join(line for line in first.splitlines() if not line.startswith("transform ="))
    middle = _LAST_MAP if isinstance(maps, Tensor) else _MAPS
    shapes = str(tuple(maps.shape)) if isinstance(maps, Tensor) else ", ".join(str(tuple(one.shape)) for one in maps)
    with torch.no_grad():
        embedding = _run(_rebuild(student, num_classes=0), student)
    return {
        "Classify an image": first,
        "Feature maps": middle.format(shapes=shapes, **words),
        "Embedding": _EMBEDDING.format(shapes=tuple(embedding.shape), **words),
    }


def _maps(student: Student) -> list[Tensor] | Tensor:
    """Return the maps of timm's features_only; the last features where the architecture has no such maps."""
    with torch.no_grad():
        with contextlib.suppress(Exception):  # an architecture may refuse in any way
            maps: list[Tensor] = _run(_rebuild(student, features_only=True), student)
            return maps
        last: Tensor = cast(Any, student.model).forward_features(torch.zeros(1, *student.input_size))
        return last


def _rebuild(student: Student, **options: Any) -> nn.Module:
    """Build the network as timm.create_model does from the hub."""
    return timm.create_model(f"local-dir:{student.folder.absolute()}", pretrained=True, **options).eval()


def _run(model: nn.Module, student: Student) -> Any:
    return model(torch.zeros(1, *student.input_size))
