"""Images adapted from the student's normalisation and size to the teacher's."""

import pytest
import timm
import torch
from torch import Tensor

from mgd_timm.models.input_adapter import InputAdapter, build_input_adapter


def triangle(inputs: int, outputs: int) -> Tensor:
    """Weights [outputs, inputs] of an antialiased bilinear resize, by its definition."""
    scale = inputs / outputs
    support = max(scale, 1.0)
    rows = []
    for i in range(outputs):
        row = [max(0.0, 1 - abs(j + 0.5 - (i + 0.5) * scale) / support) for j in range(inputs)]
        rows.append([weight / sum(row) for weight in row])
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("size", [None, (8, 8), (4, 6), (16, 12)])
def test_adapted_images_are_normalised_and_resized_as_the_teachers(size):
    mean, std, its_mean, its_std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    pixels = torch.rand(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    column = [torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (mean, std, its_mean, its_std)]
    expected = (pixels - column[2]) / column[3]
    if size:
        expected = torch.einsum("ih,bchw,jw->bcij", triangle(8, size[0]), expected, triangle(8, size[1]))
    adapter = InputAdapter(mean, std, its_mean, its_std, size)
    torch.testing.assert_close(
        adapter(((pixels - column[0]) / column[1]).float()).double(), expected, rtol=0, atol=3e-6
    )
    assert not adapter.state_dict()


def test_images_in_the_teachers_own_form_are_not_changed():
    x = torch.rand(2, 3, 8, 8)
    assert InputAdapter((0.5,) * 3, (0.2,) * 3, (0.5,) * 3, (0.2,) * 3)(x) is x


def test_another_number_of_channels_is_refused():
    with pytest.raises(ValueError, match="one value per channel"):
        InputAdapter((0.5,), (0.2,), (0.5,) * 3, (0.2,) * 3)


@pytest.mark.parametrize("name", ["mean", "std"])
def test_a_teacher_whose_statistics_are_of_pixels_up_to_255_is_refused(name):
    model = timm.create_model("test_resnet")
    model.pretrained_cfg = {**model.pretrained_cfg, name: (123.7, 116.3, 103.5)}
    with pytest.raises(ValueError, match=rf"weights of test_resnet: {name}=.*: --{name} 0\.4851 0\.4561 0\.4059"):
        build_input_adapter(model, (0.5,) * 3, (0.5,) * 3, (3, 32, 32))
