"""Every criterion compiled as one graph gives the loss, gradients and state that it gives eagerly; run by
test_criteria."""

import copy

import torch
from cases import PAIR, batch, features, parts
from torch._dynamo.backends.registry import lookup_backend

from mgd_timm.criteria import CRITERIA, KD, Criterion, EntropyWeight, Standardised, Weighted

INTERRUPTED = {"kdsvd"}  # a decomposition waits for the device, outside the graph


def waits_for_nothing(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
    """A backend that refuses what a graph may hold by now, but which has the host wait for the device."""
    waiting = {str(node.target) for node in graph.graph.nodes} & {"item", "tolist", "nonzero"}
    assert not waiting, waiting
    return lookup_backend("aot_eager")(graph, inputs)


def outcome(criterion: Criterion, *, compiled: bool, whole: bool) -> tuple[dict[str, torch.Tensor], ...]:
    """Loss, gradients and state of two steps."""
    call = torch.compile(criterion, fullgraph=whole, backend=waits_for_nothing) if compiled else criterion
    student = features(PAIR.student, 1, grad=True)
    found = {}
    for step in range(2):
        torch.manual_seed(step)
        found[f"loss {step}"] = loss = call(student, features(PAIR.teacher, 2), batch())
        loss.backward()
    tensors = {**parts(student), **dict(criterion.named_parameters())}
    grads = {name: tensor.grad for name, tensor in tensors.items() if tensor.grad is not None}
    return {name: loss.detach() for name, loss in found.items()}, grads, dict(criterion.state_dict())


def main() -> None:
    """Names, one after the other, as they agree."""
    torch.set_num_threads(1)
    for name in (*CRITERIA, "standardised", "weighted"):
        torch.manual_seed(0)
        kd = Standardised(KD(PAIR, divergence="bdd"))
        others = {"standardised": kd, "weighted": Weighted(kd, EntropyWeight())}
        criterion = (others[name] if name in others else CRITERIA[name](PAIR)).double()
        torch._dynamo.reset()  # of criteria that share a forward, the second one's numbers would become inputs
        eager = outcome(copy.deepcopy(criterion), compiled=False, whole=True)
        compiled = outcome(criterion, compiled=True, whole=name not in INTERRUPTED)
        for one, two in zip(compiled, eager, strict=True):
            assert one.keys() == two.keys(), (name, one.keys() ^ two.keys())
            torch.testing.assert_close(one, two, msg=lambda text, name=name: f"{name}: {text}")
        print(name, flush=True)


if __name__ == "__main__":
    main()
