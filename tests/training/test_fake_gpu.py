"""The GPU without values: what it takes for a wait, what it refuses, its autocast and its backward pass."""

import pytest
import torch
from cases import PAIR, batch, features, parts
from fake_gpu import FakeGpu, backward, gpu_machine
from torch import Tensor
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorDeviceMismatchError

from mgd_timm.criteria import CRITERIA

pytestmark = pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="torch was built without CUDA")


def to_gpu(*shape: int, pinned: bool = False, non_blocking: bool = False) -> Tensor:
    host = torch.ones(shape)
    return (host.pin_memory() if pinned else host).to("cuda", non_blocking=non_blocking)


WAITING = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x[0] > 0),
    "float": lambda x: float(x[0]),
    "tolist": lambda x: x[:1].tolist(),
    "cpu": lambda x: x.cpu(),
    "list": lambda x: torch.tensor([1.0, 2.0], device=x.device),
    "number": lambda x: x.new_tensor(2.0),
    "pageable": lambda x: to_gpu(3),
    "large and pageable": lambda x: to_gpu(1 << 16, non_blocking=True),
    "pinned but blocking": lambda x: to_gpu(3, pinned=True),
    "index on the host": lambda x: x[torch.tensor([0, 1])],
    "copy to the host": lambda x: torch.ones(4).copy_(x),
    "mask of several values": lambda x: x.__setitem__(x > 0, torch.ones(4, device=x.device)),
    "decomposition": lambda x: torch.linalg.svd(x.view(2, 2)),
}
NOT_WAITING = {
    "pinned": lambda x: to_gpu(1 << 16, pinned=True, non_blocking=True),
    "born pinned": lambda x: torch.empty(1 << 16, pin_memory=True).to("cuda", non_blocking=True),
    "small": lambda x: to_gpu(3, non_blocking=True),
    "constant": lambda x: torch.where(x > 0, torch.tensor(3.0), x + torch.tensor(1.0)),
    "mask of one value": lambda x: x.__setitem__(x > 0, 3.0),
    "index": lambda x: x[torch.arange(2, device=x.device)],
    "host alone": lambda _: torch.arange(4)[torch.arange(4) > 1].tolist(),
}


@pytest.mark.parametrize("name", [*WAITING, *NOT_WAITING])
def test_fake_gpu_counts_waits(name):
    with FakeGpu() as gpu:
        {**WAITING, **NOT_WAITING}[name](torch.zeros(4, device="cuda"))
    assert gpu.waits.total() == (name in WAITING)


def test_fake_gpu_refuses_other_devices_and_shapes_that_depend_on_values():
    with FakeGpu():
        x = torch.zeros(4, device="cuda")
        with pytest.raises(FakeTensorDeviceMismatchError):
            x + torch.zeros(4)
        for act in (torch.nonzero, lambda x: x[x > 0], lambda x: x.repeat_interleave(x.long()), torch.unique):
            with pytest.raises(DynamicOutputShapeException):
                act(x)


def test_fake_gpu_has_autocast():
    with gpu_machine("bf16") as (_, accelerator):
        x = torch.zeros(2, 2, device=accelerator.device)
        with accelerator.autocast():
            assert (x @ x).dtype == torch.bfloat16
            assert x.exp().dtype == torch.float32
            with torch.autocast("cuda", enabled=False):
                assert (x @ x).dtype == torch.float32


@pytest.mark.parametrize("name", ["kdsvd", "reviewkd", "crd"])
def test_the_loop_over_backward_functions_is_torchs_backward(name):
    """On the CPU, with values."""
    found = []
    for act in (torch.autograd.backward, backward):
        torch.manual_seed(0)
        criterion, student = CRITERIA[name](PAIR), features(PAIR.student, 1, torch.float32, grad=True)
        act(criterion(student, features(PAIR.teacher, 2, torch.float32), batch()))
        leaves = {**parts(student), **dict(criterion.named_parameters())}
        found.append({name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None})
    assert found[0]
    torch.testing.assert_close(found[0], found[1])
