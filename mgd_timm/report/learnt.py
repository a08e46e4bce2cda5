"""The section of images that only the distilled student learnt, with where the networks look."""

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from mgd_timm.report.findings import NO_ALONE, NO_TEACHER, Findings, learnt_images
from mgd_timm.report.gradcam import Scores, grad_cam
from mgd_timm.report.markup import escape, missing, name, number, picture, section
from mgd_timm.report.measure import Student
from mgd_timm.report.runs import Group, baseline
from mgd_timm.report.teacher import MeasuredTeacher

SHOWN = 6
SIDE = 128
"""Pixels of the shown images' longer side, at least for small images and at most for large ones."""

Maps = list[tuple[str, Tensor]]
"""Grad-CAMs [images, height, width] with what they are of."""


def learnt_section(found: Findings) -> str:
    """Return some images that the best distilled student has right and the student alone has wrong."""
    title = ("learnt", "Learnt by distilling")
    best = found.best
    if best is None:
        return section(*title, missing(f"what only the distilled student learnt: {NO_TEACHER}"))
    alone = baseline(found.groups, best, kd=False)
    if alone is None:
        return section(*title, missing(f"what only the distilled student learnt: {NO_ALONE}"))
    ours, theirs = ([one.predictions for one in found.of(group)] for group in (best, alone))
    places, lost = learnt_images(ours, theirs), learnt_images(theirs, ours)
    seeds = " with every seed" if len(best.runs) > 1 or len(alone.runs) > 1 else ""
    about = (
        f"<p>{len(places):,} images are right{seeds} in {name(best.label)} and wrong{seeds} alone; {len(lost):,} the "
        "other way round. Shown are those whose class gained the most probability, of as many classes as there are. "
        "The warm areas are Grad-CAM's: they raise the score of the image's class in the last map.</p>"
    )
    if not len(places):
        return section(*title, about, missing("the images: there is none."))
    return section(*title, about, *_shots(found, best, alone, _of_many_classes(places, ours[0].labels)))


def _of_many_classes(places: Tensor, labels: Tensor) -> Tensor:
    """Return the places to show: the first of each class, then the others."""
    seen: dict[int, int] = {}
    rank = []
    for place in places.tolist():
        label = int(labels[place])
        rank.append(seen.get(label, 0))
        seen[label] = rank[-1] + 1
    return places[torch.tensor(rank).argsort(stable=True)[:SHOWN]]


def _shots(found: Findings, best: Group, alone: Group, places: Tensor) -> Iterator[str]:
    """Yield each image with its Grad-CAMs, then what could not be drawn."""
    student, other = found.first(best), found.first(alone)
    images, labels = student.at(places)
    maps, silent = _maps(found, best, alone, places)
    names = student.images.class_names
    for row, place in enumerate(places.tolist()):
        pixels = shown_pixels(images[row], student)
        said = [names[int(one.predictions.classes[place])] for one in (student, other)]
        sure = [100 * float(one.predictions.logits[place].softmax(0).max()) for one in (student, other)]
        heading = (
            f"<h3>{name(names[int(labels[row])])}</h3><p class='note'>{name(best.label)}: {name(said[0])} "
            f"({number(sure[0], 0)} %). Alone: {name(said[1])} ({number(sure[1], 0)} %).</p>"
        )
        shots = [_figure(pixels, "image"), *(_figure(overlay(pixels, cams[row]), what) for what, cams in maps)]
        yield f'<div class="together">{heading}<div class="shots">{"".join(shots)}</div></div>'
    yield from (missing(text) for text in silent)


def _figure(pixels: Float[Tensor, "3 h w"], what: str) -> str:
    image = Image.fromarray((255 * pixels).round().byte().permute(1, 2, 0).cpu().numpy().astype(np.uint8))
    return f"<figure>{picture(image, what)}<figcaption>{escape(what)}</figcaption></figure>"


def _maps(found: Findings, best: Group, alone: Group, places: Tensor) -> tuple[Maps, list[str]]:
    """Return the Grad-CAMs of all networks, and lines about those that cannot be had."""
    asked: list[tuple[str, nn.Module, Tensor, Tensor, Scores | None]] = []
    for what, group in (("distilled: logits", best), ("alone: logits", alone)):
        student = found.first(group)
        images, labels = student.at(places)
        asked.append((what, student.model, images, labels, None))
    silent = []
    if isinstance(found.teacher, str):
        silent.append(f"where the teacher looks: {found.teacher}")
    else:
        asked += _of_teacher(found.teacher, *found.students[found.teacher.run.folder].at(places))
        if found.teacher.no_heads is not None:
            silent.append(f"the abstract and the detailed view: {found.teacher.no_heads}")
    maps: Maps = []
    for what, model, images, labels, scores in asked:
        cams = grad_cam(model, images, labels, scores)
        if cams is None:
            silent.append(f"{what}: the scores do not depend on the positions of the network's last map.")
        else:
            maps.append((what, cams))
    return maps, silent


def _of_teacher(
    measured: MeasuredTeacher, images: Tensor, labels: Tensor
) -> Iterator[tuple[str, nn.Module, Tensor, Tensor, Scores | None]]:
    """Yield what is asked of the teacher: its logits, and the views of its heads."""
    teacher = measured.teacher
    adapted = teacher.input_adapter(images)
    if teacher.has_logits:
        yield "teacher: logits", teacher.tap.model, adapted, labels, None
    heads = teacher.heads
    for one in heads.granularities if heads is not None else ():

        def view(_: Tensor, embedding: Tensor, what: str = one.name) -> Tensor:
            assert heads is not None
            return heads.decode(heads.encode(embedding))[what]

        yield f"teacher: {one.name} view", teacher.tap.model, adapted, labels, view


def shown_pixels(image: Float[Tensor, "c h w"], student: Student) -> Float[Tensor, "3 h2 w2"]:
    """Return a normalised image as colours in [0, 1], at the size that the page shows it."""
    mean, std = (torch.tensor(values, device=image.device)[:, None, None] for values in _stats(student))
    pixels = (image.float() * std + mean).clamp(0, 1)
    if len(pixels) != 3:
        pixels = pixels.mean(0, keepdim=True).expand(3, -1, -1)
    longest = max(pixels.shape[1:])
    if longest >= SIDE:
        scale = SIDE / longest
        size = (max(1, round(pixels.shape[1] * scale)), max(1, round(pixels.shape[2] * scale)))
        return F.interpolate(pixels[None], size=size, mode="bilinear", antialias=True)[0].clamp(0, 1)
    return F.interpolate(pixels[None], scale_factor=float(-(-SIDE // longest)), mode="nearest")[0]


def _stats(student: Student) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return student.images.mean, student.images.std


def overlay(pixels: Float[Tensor, "3 h w"], cam: Float[Tensor, "h2 w2"]) -> Float[Tensor, "3 h w"]:
    """Return an image in grey under a Grad-CAM, scaled to its own maximum: nothing, yellow, red."""
    heat = F.interpolate(cam[None, None].float(), size=pixels.shape[1:], mode="bilinear", align_corners=False)[0, 0]
    heat = (heat / heat.max().clamp(min=torch.finfo(heat.dtype).tiny)).to(pixels.device)
    yellow, red = (torch.tensor(c, device=pixels.device)[:, None, None] for c in ((1.0, 0.85, 0.1), (0.85, 0.05, 0.2)))
    colour = yellow + (red - yellow) * heat
    strength = 0.7 * heat
    return pixels.mean(0, keepdim=True) * (1 - strength) + colour * strength
