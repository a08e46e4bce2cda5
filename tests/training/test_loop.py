"""The loop: accumulation, learning rate, clipping, averaging, precision, non-finite losses, evaluation."""

import json
import math
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from timm.optim import list_optimizers
from timm.utils import ModelEmaV3
from torch import nn

from mgd_timm.features import Batch, Features
from mgd_timm.granularity import GranularityHeads, HeadFitting
from mgd_timm.recipe.granularity import Granularity
from mgd_timm.recipe.optim import Optim
from mgd_timm.training.evaluation import evaluate
from mgd_timm.training.loop import fit
from mgd_timm.training.optimizer import build_optimizer
from mgd_timm.training.options import FitOptions
from mgd_timm.training.report import NonFiniteError


class Rows:
    """A Source of vectors shown as 1x1 images, so that the reference below can read them too."""

    digest = "rows"

    def __init__(self, count: int, classes: int = 3, soft: bool = False) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(count, 4, 1, 1, generator=generator)
        self.labels = torch.randint(0, classes, (count,), generator=generator)
        if soft:
            self.labels = torch.rand(count, classes, generator=generator).softmax(1)
        self.ids = torch.arange(count)
        self.seen: list[torch.Tensor] = []

    def batches(self, micro_batches, epoch, device):
        for ids in micro_batches:
            self.seen.append(ids)
            yield Batch(self.images[ids], self.labels[ids], ids)


class Linear(nn.Module):
    def __init__(self, classes: int = 3, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layer, self.dropout = nn.Linear(4, classes), nn.Dropout(dropout)

    def forward(self, batch, teacher=None):
        logits = self.layer(self.dropout(batch.images.flatten(1)))
        return {"task": nn.functional.cross_entropy(logits, batch.labels)}, logits


@pytest.fixture
def accelerator():
    def make(steps: int = 1, precision: str | None = None) -> Accelerator:
        AcceleratorState._reset_state(reset_partial_state=False)
        return Accelerator(gradient_accumulation_steps=steps, mixed_precision=precision)

    return make


def train(accelerator, optim, source=None, module=None, batch_size=4, options=None, **more):
    module, source = module or Linear(), source or Rows(26)
    done = fit(
        module,
        source,
        optim,
        accelerator,
        seed=3,
        batch_size=batch_size,
        options=options or FitOptions(quiet=True),
        **more,
    )
    return module, source, done


OPTIM = Optim(epochs=2, lr=0.1, sched="cosine", warmup_epochs=1, warmup_lr=0.01)


def test_sgd_with_momentum_equals_a_bare_loop(accelerator):
    module, source, done = train(accelerator(), OPTIM)
    reference = Linear().double()
    buffers = [torch.zeros_like(p) for p in reference.parameters()]
    per_epoch = math.ceil(26 / 4)
    for update, ids in enumerate(source.seen):
        warm = update < per_epoch
        cosine = 0.1 * 0.5 * (1 + math.cos(math.pi * update / (2 * per_epoch)))
        lr = 0.01 + update * (0.1 - 0.01) / per_epoch if warm else cosine
        logits = reference.layer(source.images[ids].double().flatten(1))
        loss = nn.functional.cross_entropy(logits, source.labels[ids])
        reference.zero_grad()
        loss.backward()
        with torch.no_grad():
            for p, buffer in zip(reference.parameters(), buffers, strict=True):
                buffer.mul_(0.9).add_(p.grad + 5e-4 * p)
                p -= lr * buffer
    assert done.updates == 2 * per_epoch == len(source.seen)
    for ours, theirs in zip(module.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6)


def test_every_sample_once_an_epoch_in_another_order(accelerator):
    _, source, _ = train(accelerator(), OPTIM)
    first, second = torch.cat(source.seen[:7]), torch.cat(source.seen[7:])
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(26))
    assert first.tolist() != second.tolist()


@pytest.mark.slow
def test_a_compiled_step_has_the_same_gradients(accelerator):
    """26 samples in batches of 4: the last one, of 2, is not compiled."""
    plain, _, _ = train(accelerator(), OPTIM)
    compiled, _, done = train(accelerator(), OPTIM, compile=True)
    assert done.updates == 14
    torch.testing.assert_close(compiled.layer.weight, plain.layer.weight, rtol=1e-5, atol=1e-6)


def test_torchs_fused_optimizer_is_taken_where_there_is_one():
    for name, fused in (("momentum", True), ("adamw", True), ("lamb", False), ("rmsprop", False)):
        assert bool(build_optimizer(Linear(), Optim(opt=name)).defaults.get("fused")) is fused


def test_an_overflow_in_the_first_update_leaves_no_trace():
    """torch's fused SGD would go on with momentum from memory that nothing was written to: with a scaler nothing is
    fused."""
    module = Linear()
    optimizer = build_optimizer(module, Optim(lr=0.1, weight_decay=0.0), scaled=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    before = module.layer.weight.detach().clone()
    for gradient in (float("inf"), 1.0):
        module.layer.weight.grad = torch.full_like(before, gradient * scaler.get_scale())
        module.layer.bias.grad = torch.zeros_like(module.layer.bias)
        scaler.scale(torch.ones(()))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    torch.testing.assert_close(module.layer.weight.detach(), before - 0.1)


@pytest.mark.parametrize("clip", [None, 0.05])
def test_accumulation_equals_the_large_batch(accelerator, clip):
    optim = replace(OPTIM, clip_grad=clip)
    large, _, _ = train(accelerator(), optim, batch_size=8)
    small, _, _ = train(accelerator(4), replace(optim, grad_accum_steps=4), batch_size=2)
    for a, b in zip(large.parameters(), small.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_clipping_bounds_the_step(accelerator):
    optim = Optim(epochs=1, lr=1.0, sched="constant", momentum=0.0, weight_decay=0.0, clip_grad=1e-3)
    before = Linear()
    after, _, done = train(accelerator(), optim)
    moved = sum((a - b).square().sum() for a, b in zip(after.parameters(), before.parameters(), strict=True)).sqrt()
    assert 0 < moved <= 1e-3 * done.updates * 1.001


def test_heads_fitted_together_are_those_fitted_alone(accelerator):
    """Also where gradients are clipped, as they are here in every update."""
    granularities = (Granularity("abstract", 2, 2.0), Granularity("detailed", 6, 8.0))

    def teach(batch):
        embedding = batch.images.flatten(1)
        return Features(5 * embedding[:, :3], embedding)

    def fitted(clip, *chosen):
        torch.manual_seed(2)
        whole, heads = GranularityHeads(4, 3, granularities), GranularityHeads(4, 3, chosen)
        heads.load_state_dict({name: whole.state_dict()[name] for name in heads.state_dict()})
        train(accelerator(), replace(OPTIM, clip_grad=clip), module=HeadFitting(heads), teach=teach)
        return heads.state_dict()

    together = fitted(0.1, *granularities)
    for granularity in granularities:
        alone = fitted(0.1, granularity)
        unclipped = fitted(None, granularity)
        for name, tensor in alone.items():
            torch.testing.assert_close(together[name], tensor, rtol=1e-5, atol=1e-7)
            assert not torch.allclose(unclipped[name], tensor, rtol=1e-2)


def test_accumulation_steps_from_the_environment_do_not_change_the_sum(accelerator, monkeypatch):
    plain, _, _ = train(accelerator(), OPTIM)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    overridden, _, _ = train(accelerator(), OPTIM)
    for a, b in zip(plain.parameters(), overridden.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_average_follows_the_weights(accelerator):
    module = Linear()
    _, _, done = train(
        accelerator(), replace(OPTIM, model_ema=True, model_ema_decay=0.5), module=module, averaged=module.layer
    )
    average = done.averaged.weight
    assert not torch.equal(average, module.layer.weight)
    start = (module.layer.weight - Linear().layer.weight).norm()
    assert (average - module.layer.weight).norm() < start


@pytest.mark.parametrize("warmup", [False, True])
def test_the_average_is_timms_after_every_update(accelerator, warmup):
    optim = Optim(epochs=12, lr=0.1, model_ema=True, model_ema_decay=0.8, model_ema_warmup=warmup)
    module, seen = Linear(), []
    reference = ModelEmaV3(Linear().layer, decay=0.8, use_warmup=warmup)

    def watch(average):
        reference.update(module.layer, step=len(seen) + 1)
        seen.append((average.weight.clone(), reference.module.weight.clone()))
        return {"top1": 0.0}

    train(accelerator(), optim, module=module, averaged=module.layer, evaluate=watch, batch_size=26)
    assert len(seen) == 12  # one update each
    for ours, theirs in seen:
        assert torch.equal(ours, theirs)


def test_dropout_is_a_function_of_seed_and_position(accelerator):
    one, _, _ = train(accelerator(), OPTIM, module=Linear(dropout=0.5))
    torch.rand(17)  # whatever else was drawn
    two, _, _ = train(accelerator(), OPTIM, module=Linear(dropout=0.5))
    assert torch.equal(one.layer.weight, two.layer.weight)
    assert not torch.equal(one.layer.weight, train(accelerator(), OPTIM)[0].layer.weight)


def test_soft_labels_and_bfloat16(accelerator):
    module, _, done = train(accelerator(precision="bf16"), OPTIM, source=Rows(26, soft=True))
    assert done.updates == 14
    assert all(p.dtype == torch.float32 and torch.isfinite(p).all() for p in module.parameters())


def test_a_module_is_fitted_again_at_the_same_precision(accelerator):
    """accelerate gives a module that it prepared before back bare: the second fit must not fall back to float32."""
    seen = []

    class Spy(Linear):
        def forward(self, batch, teacher=None):
            seen.append(self.layer(batch.images.flatten(1)).dtype)
            return super().forward(batch)

    module, shared = Spy(), accelerator(precision="bf16")
    for _ in range(2):
        train(shared, Optim(epochs=1), module=module)
    assert len(seen) == 14
    assert set(seen) == {torch.bfloat16}
    assert module.forward.__func__ is Spy.forward  # and is left as it was


def _runs(name: str) -> bool:
    """Whether the installed timm can step this optimizer here at all: some need a closure, a second gradient or a
    GPU."""
    module = Linear()
    try:
        optimizer = build_optimizer(module, replace(OPTIM, opt=name, lr=1e-3))
        for _ in range(2):
            module(Batch(torch.ones(4, 4, 1, 1), torch.tensor([0, 1, 2, 0]), torch.arange(4)))[0]["task"].backward()
            optimizer.step()
    except Exception:
        return False
    return True


QUICK = ("sgd", "adamw", "lamb")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in map(str, list_optimizers())],
)
def test_every_optimizer_goes_on_to_the_same_bits(accelerator, tmp_path, name):
    if not _runs(name):
        pytest.skip(f"timm's {name} does not step a plain linear layer on this machine")
    optim = Optim(epochs=2, opt=name, lr=1e-3)
    whole, _, _ = train(accelerator(), optim, source=Rows(10), module=Linear(dropout=0.2))

    class EndError(Exception):
        pass

    def stop(_):
        if len(calls) == 1:
            raise EndError
        calls.append(1)
        return {"top1": 0.0}

    calls: list[int] = []
    first = FitOptions(folder=tmp_path, quiet=True)
    with pytest.raises(EndError):
        train(accelerator(), optim, source=Rows(10), module=Linear(dropout=0.2), evaluate=stop, options=first)
    options = FitOptions(folder=tmp_path, resume=True, quiet=True)
    resumed, source, _ = train(accelerator(), optim, source=Rows(10), module=Linear(dropout=0.2), options=options)
    assert len(source.seen) == 3  # the second epoch
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_weights_that_are_not_finite_are_not_saved(accelerator, tmp_path):
    """The gradient of the epoch's last update is infinite, its loss is not: no later loss can tell."""

    class Late(Linear):
        calls = 0

        def forward(self, batch, teacher=None):
            terms, logits = super().forward(batch)
            self.calls += 1
            if self.calls == 7:
                terms["task"] = terms["task"] + 0 * torch.sqrt(self.layer.weight.sum() * 0)
            return terms, logits

    options = FitOptions(folder=tmp_path, quiet=True)
    with pytest.raises(NonFiniteError, match=r"is not finite after update 7 .*which is not saved"):
        train(accelerator(), OPTIM, module=Late(), options=options)
    assert not list((tmp_path / "checkpoints").glob("0*"))


def test_an_average_that_stays_the_initial_weights_is_warned_of(accelerator, capsys):
    module = Linear()
    train(accelerator(), replace(OPTIM, model_ema=True), module=module, averaged=module.layer)
    assert (
        "warning: 100 % of the moving average after 14 updates will be the weights after the first one: "
        "lower --model-ema-decay (0.9998), or give --model-ema-warmup.\n" in capsys.readouterr().out
    )


@pytest.mark.parametrize("warmup", [False, True])
@pytest.mark.parametrize("decay", [0.1, 0.7, 0.9, 0.9998])
@pytest.mark.parametrize("epochs", [1, 2, 5, 20])
def test_the_warning_tells_the_share_of_the_first_weights(accelerator, capsys, warmup, decay, epochs):
    """Weights of 1 after the first update and of 0 later: timm's average of them is the share."""
    optim = Optim(epochs=epochs, lr=0.1, model_ema=True, model_ema_decay=decay, model_ema_warmup=warmup)
    module = Linear()
    train(accelerator(), optim, source=Rows(26), module=module, averaged=module.layer, batch_size=26)
    layer = nn.Linear(1, 1).double().requires_grad_(False)
    average = ModelEmaV3(layer, decay=decay, use_warmup=warmup)
    for step in range(1, epochs + 1):
        layer.weight.fill_(step == 1)
        average.update(layer, step=step)
    share = average.module.weight.item()
    said = capsys.readouterr().out
    assert ("warning" in said) is (epochs > 1 and share > 0.01)
    if "warning" in said:
        assert f"warning: {100 * share:.0f} % of the moving average after {epochs} updates" in said
        assert ("--model-ema-warmup" in said) is not warmup


def test_a_last_batch_of_one_sample_is_left_out(accelerator):
    _, source, done = train(accelerator(), Optim(epochs=1), source=Rows(9))
    assert done.updates == 2
    assert [len(ids) for ids in source.seen] == [4, 4]


def test_too_few_samples(accelerator):
    with pytest.raises(ValueError, match="1 training images: expected at least 2"):
        train(accelerator(), OPTIM, source=Rows(1))


def test_non_finite_loss_names_update_and_term_and_keeps_the_state_before(accelerator, tmp_path):
    class Bad(Linear):
        calls = 0

        def forward(self, batch, teacher=None):
            terms, logits = super().forward(batch)
            self.calls += 1
            return {**terms, "kd": terms["task"] * (math.nan if self.calls == 10 else 1)}, logits

    options = FitOptions(folder=tmp_path, log_interval=3, quiet=True)
    with pytest.raises(NonFiniteError, match=r"the term 'kd' is nan at update 10 \(epoch 2.*Lower --lr"):
        train(accelerator(), OPTIM, module=Bad(), options=options)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["00000007"]  # the end of epoch 1


def test_metrics_hold_means_over_samples(accelerator, tmp_path):
    optim = Optim(epochs=1, lr=1e-9, weight_decay=0.0)
    module, source, _ = train(accelerator(), optim, options=FitOptions(folder=tmp_path, log_interval=2, quiet=True))
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    logits = module.layer(source.images.flatten(1))
    assert row["train"]["task"] == pytest.approx(nn.functional.cross_entropy(logits, source.labels).item(), rel=1e-4)
    assert row["train"]["top1"] == pytest.approx(100 * (logits.argmax(1) == source.labels).float().mean().item())


@pytest.mark.parametrize(("field", "value", "near"), [("opt", "adamv", "adam"), ("sched", "cosin", "cosine")])
def test_unknown_names_show_the_nearest(accelerator, field, value, near):
    with pytest.raises(ValueError, match=f"unknown .* '{value}': did you mean .*{near}"):
        train(accelerator(), replace(OPTIM, **{field: value}))


@pytest.mark.parametrize("soft", [False, True])
def test_evaluation_counts_each_image_once(accelerator, soft):
    source, module = Rows(23, classes=7, soft=soft), Linear(7)
    seen: list[int] = []

    def predict(batch):
        seen.extend(batch.sample_ids.tolist())
        return {"a": module.layer(batch.images.flatten(1)), "b": -module.layer(batch.images.flatten(1))}

    found = evaluate(predict, ("a", "b"), source, accelerator(), 5)
    assert sorted(seen) == list(range(23))
    logits = module.layer(source.images.flatten(1)).double()
    target = source.labels.argmax(1) if soft else source.labels
    assert found["a"]["n"] == 23
    assert found["a"]["top1"] == pytest.approx(100 * (logits.argmax(1) == target).double().mean().item())
    assert found["a"]["top5"] == pytest.approx(
        100 * (logits.topk(5).indices == target[:, None]).any(1).double().mean().item()
    )
    labels = source.labels.double() if soft else source.labels
    assert found["a"]["loss"] == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    assert found["b"] != found["a"]


def test_evaluating_nothing_is_refused(accelerator):
    with pytest.raises(ValueError, match="no image"):
        evaluate(lambda batch: {}, ("a",), Rows(0), accelerator(), 5)


class Short(Linear):
    """Memory for 4 samples."""

    def forward(self, batch, teacher=None):
        if len(batch.labels) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().forward(batch, teacher)


def test_a_smaller_batch_size_is_found_without_a_global_one(accelerator):
    """The first one is kept as the global one."""
    found, expected = Short(), Linear()
    options = {"seed": 0, "options": FitOptions(quiet=True)}
    fit(found, Rows(24), Optim(epochs=1, lr=0.1, find_batch_size=True), accelerator(), batch_size=8, **options)
    fit(expected, Rows(24), Optim(epochs=1, lr=0.1, global_batch_size=8), accelerator(2), batch_size=4, **options)
    assert torch.equal(found.layer.weight, expected.layer.weight)
