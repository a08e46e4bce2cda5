"""The task of timm's loop: step by step equal to a run's own training, and its checkpoints, moving average, heads and
refusals, with timm's own helpers."""

import copy

import pytest
import timm
import timm_loop
import torch
from forked import Ranks
from timm.optim import create_optimizer_v2
from timm.task import load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import CheckpointSaver
from torch import nn

from mgd_timm.criteria import CRITERIA, EntropyWeight
from mgd_timm.data.dataset import load_images
from mgd_timm.distiller import LiveTeachers
from mgd_timm.granularity import GranularityHeads
from mgd_timm.models.load import load_model
from mgd_timm.pipeline.connect import connect
from mgd_timm.pipeline.plan import accelerator_of, terms_of
from mgd_timm.recipe.heads import Heads
from mgd_timm.recipe.optim import Optim
from mgd_timm.recipe.recipe import make_recipe
from mgd_timm.task import MultiGranularityTask
from mgd_timm.training.report import means_of
from mgd_timm.training.step import Updater
from mgd_timm.training.update_plan import UpdatePlan

SIZE = (3, 32, 32)
# Without those that fit something first, take a step of their own, or teach each other.
IN_LOOP = [
    name
    for name, kind in CRITERIA.items()
    if name != "ce" and kind.fits is None and not kind.own_step and not kind.peers
]


@pytest.fixture(scope="module")
def data(small_data):
    recipe = make_recipe(data_dir=str(small_data))
    return load_images(recipe.data, recipe.seed)


def networks(**options) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    student = timm.create_model("test_vit", num_classes=10, img_size=32)
    return student, timm.create_model("test_resnet", num_classes=10, **options)


def make_task(*, criterion="kd", method="mas", seed: int = 0, **options) -> MultiGranularityTask:
    """A task of a transformer and a CNN with random weights; its heads are not fitted."""
    student, teacher = networks()
    torch.manual_seed(seed)
    heads = GranularityHeads(teacher.num_features, 10)
    return MultiGranularityTask(
        student, teacher, criterion, method, **{"heads": heads, "input_size": SIZE, "verbose": False, **options}
    )


def make_batch(count: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(count, *SIZE, generator=generator), torch.arange(count) % 10


def step(task: MultiGranularityTask, optimizer: torch.optim.Optimizer, *batch: torch.Tensor) -> dict[str, torch.Tensor]:
    result = task(*batch)
    optimizer.zero_grad()
    result["loss"].backward()
    optimizer.step()
    return result


@pytest.mark.parametrize(
    ("criterion", "method", "temperature"),
    [("ce", "none", None), ("kd", "mag", None), ("kd", "mas", 2.0), *((name, "mas", None) for name in IN_LOOP)],
)
def test_training_is_a_runs_own_step_by_step(data, criterion, method, temperature):
    """`connect` and `Updater` are what `distill` uses; the task gets the same networks and batches."""
    weighing = {} if temperature is None else {"sample_weight": "entropy", "sample_weight_temperature": temperature}
    recipe = make_recipe(teacher="embedded", method=method, criterion=(criterion,), criterion_options=(), **weighing)
    teacher, student = load_model("embedded"), timm.create_model("cifar_resnet8x05", num_classes=10)
    accelerator = accelerator_of(recipe)
    ours = connect(recipe, terms_of(recipe), data, accelerator, [teacher], student)
    trainee, frozen = ours.trainee(), ours.teachers[0]
    torch.manual_seed(1)
    heads = GranularityHeads(frozen.tap.embed_dim, 10)
    frozen = frozen.with_heads(copy.deepcopy(heads))

    task = MultiGranularityTask(
        copy.deepcopy(student),
        copy.deepcopy(teacher),
        criterion,
        method,
        heads,
        labels=data.trained_labels(),
        sample_weight=None if temperature is None else EntropyWeight(temperature),
    )
    task.distiller.load_state_dict(trainee.state_dict())
    optim = Optim(epochs=1, opt="momentum", lr=0.01, weight_decay=0.01, sched="constant")
    rule = {"opt": "momentum", "lr": 0.01, "momentum": 0.9, "weight_decay": 0.01, "filter_bias_and_bn": False}
    optimizer = create_optimizer_v2(task.get_trainable_module(), **rule, fused=True)

    plan = UpdatePlan(data.train, 0, "distil", 8, 8, accelerator)
    updater = Updater(trainee, optim, accelerator, plan, teach=LiveTeachers(frozen))
    trainee.train()
    task.get_trainable_module().train()
    for done, update in enumerate(plan.updates(0)[:2]):
        ids = [update[0].ids]
        sums = updater.run(update, data.train.batches(ids, 0, accelerator.device), done)
        batch = next(data.train.batches(ids, 0, accelerator.device))
        torch.manual_seed(update[0].seed)
        found = step(task, optimizer, *batch)
        weight, spread = (found.pop(f"sample_weight{suffix}", None) for suffix in ("", "_std"))
        assert (weight is None) is (temperature is None)
        if weight is not None:
            means = means_of({name: value.item() for name, value in sums.items()})[1]
            assert means == pytest.approx({"mean": weight.item(), "std": spread.item()}, rel=1e-3)
            assert 0 < means["mean"] < 1
        terms = {name: value for name, value in found.items() if name not in ("loss", "output")}
        assert terms.keys() <= sums.keys()
        for name, value in terms.items():
            torch.testing.assert_close(value * 8, sums[name], check_dtype=False)
        torch.testing.assert_close(found["loss"], torch.stack(list(terms.values())).sum())
    torch.testing.assert_close(task.distiller.state_dict(), trainee.state_dict())


def test_what_a_loop_does_not_pass_is_refused_before_it_starts():
    for name in ("ab", "ft", "fsp", "sskd"):
        with pytest.raises(ValueError, match=rf"criterion '{name}' fits .* use mgd_timm.distill"):
            make_task(criterion=name, method="none")
    with pytest.raises(ValueError, match="'krnet' takes a step of its own"):
        make_task(criterion="krnet", method="none")
    for name in ("dml", "ekd"):
        with pytest.raises(ValueError, match=f"'{name}' trains two networks .* use mgd_timm.distill"):
            make_task(criterion=("kd", f"{name}:1"))
    with pytest.raises(ValueError, match=r"'crd' stores every training sample: give labels="):
        make_task(criterion="crd")
    with pytest.raises(ValueError, match=r"warms up over 5 epochs.* give at:1000 alone"):
        make_task(criterion="at:1000:5")
    with pytest.raises(ValueError, match="unknown method 'mass': did you mean mas"):
        make_task(method="mass")
    with pytest.raises(ValueError, match=r"expected torch\.float32"):
        MultiGranularityTask(networks()[0].bfloat16(), networks()[1])


def test_crd_wants_sample_ids_and_single_images():
    task = make_task(criterion="crd", labels=torch.arange(20) % 10)
    images, target = make_batch()
    with pytest.raises(ValueError, match=r"task\(input, target, sample_ids\)"):
        task(images, target)
    ids = torch.arange(8)
    with pytest.raises(ValueError, match="without mixup"):
        task(images, torch.eye(10)[target], ids)
    assert task(images, target, ids)["crd"].isfinite()


def test_heads_are_fitted_on_a_loader(data):
    options = Heads(heads_epochs=10, heads_augmentations=1, heads_batch_size=16)
    images, target, _ = next(data.train.batches([data.train.ids], 0, torch.device("cpu")))
    loader = list(zip(images.split(160), target.split(160), strict=True))

    def build(heads: Heads | GranularityHeads, method: str = "mas") -> MultiGranularityTask:
        student = timm.create_model("cifar_resnet8x05", num_classes=10)
        images_are = {"input_size": data.input_size, "mean": data.mean, "std": data.std}
        return MultiGranularityTask(student, "embedded", method=method, heads=heads, verbose=False, **images_are)

    task = build(options)
    with pytest.raises(ValueError, match=r"call task.fit_heads\(loader\)"):
        task(images, target)
    before = torch.get_rng_state()
    heads = task.fit_heads(loader)
    assert torch.equal(torch.get_rng_state(), before)
    found = task.teacher(images)
    known = (found.logits.argmax(1) == target).float().mean()
    for view in found.views.values():
        assert (view.argmax(1) == target).float().mean() > known - 0.05
    other = build(heads)
    torch.testing.assert_close(other.teacher(images).views, found.views)
    for refused, reason in ((other, "fitted heads"), (build(options, "none"), "reads no heads")):
        with pytest.raises(ValueError, match=reason):
            refused.fit_heads(loader)


def test_a_generator_gives_no_second_pass_of_heads():
    images, target = make_batch()
    with pytest.raises(ValueError, match="no batch in pass 2 of 3"):
        make_task(heads=Heads(heads_augmentations=3)).fit_heads(iter([(images, target)]))


def test_the_teacher_is_frozen_and_not_trained():
    task = make_task()
    before = copy.deepcopy(task.teacher.state_dict())
    task.train()
    assert not any(module.training for module in task.teacher.modules())
    optimizer = create_optimizer_v2(task.get_trainable_module(), opt="sgd", lr=0.1)
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert not trained & {id(parameter) for parameter in task.teacher.parameters()}
    assert trained == {id(parameter) for parameter in task.get_clip_parameters()}
    assert len(task.get_clip_parameters(exclude_head=True)) == len(trained) - 2
    step(task, optimizer, *make_batch())
    torch.testing.assert_close(task.teacher.state_dict(), before, rtol=0, atol=0)
    assert not any(parameter.grad is not None for parameter in task.teacher.parameters())


def test_optimizer_groups_follow_the_student():
    """As of timm's own optimizer of the student alone; the objective's weights decay, at the last layer's rate."""
    task = make_task()
    student = task.get_eval_model()

    def groups(module: nn.Module) -> dict[int, tuple[float, float]]:
        optimizer = create_optimizer_v2(module, opt="adamw", lr=0.1, weight_decay=0.2, layer_decay=0.5)
        return {
            id(parameter): (group["weight_decay"], group.get("lr_scale", 1.0))
            for group in optimizer.param_groups
            for parameter in group["params"]
        }

    found, alone = groups(task.get_trainable_module()), groups(student)
    assert found.items() >= alone.items()
    for parameter in task.distiller.objective.parameters():
        assert found[id(parameter)] == (0.2 if parameter.ndim > 1 else 0.0, 1.0)


def test_a_checkpoint_holds_the_student_and_resumes(tmp_path):
    task = make_task(criterion="vid")
    batch = make_batch()
    task.setup_ema(decay=0.5)
    optimizer = create_optimizer_v2(task.get_trainable_module(), opt="momentum", lr=0.01)
    for number in (1, 2):
        step(task, optimizer, *batch)
        task.update_ema(step=number)
    path = tmp_path / "last.pth.tar"
    CheckpointSaver(task.get_trainable_module(), optimizer, checkpoint_dir=str(tmp_path), task=task)._save(path, 1)
    saved = torch.load(path, weights_only=True)
    student = networks()[0]
    assert saved["state_dict"].keys() == saved["state_dict_ema"].keys() == student.state_dict().keys()
    assert saved["task_state"].keys() == {"objective", "heads"}
    assert saved["task_state_ema"].keys() == {"objective"}
    student.load_state_dict(saved["state_dict_ema"])
    torch.testing.assert_close(student.eval()(batch[0]), task.get_eval_model(ema=True)(batch[0]))

    # Heads are in the task's state: a resumed task need not fit them again.
    fresh = MultiGranularityTask(*networks(), "vid", input_size=SIZE, verbose=False)
    new_optimizer = create_optimizer_v2(fresh.get_trainable_module(), opt="momentum", lr=0.01)
    with pytest.raises(RuntimeError, match="before setup_ema"):
        load_task_ema_checkpoint(fresh, path)
    assert resume_task_checkpoint(fresh, path, new_optimizer, log_info=False) == 2
    fresh.setup_ema(decay=0.5)
    load_task_ema_checkpoint(fresh, path)
    for one, rule in ((task, optimizer), (fresh, new_optimizer)):
        step(one, rule, *batch)
        one.update_ema(step=3)
    torch.testing.assert_close(fresh.distiller.state_dict(), task.distiller.state_dict(), rtol=0, atol=0)
    for key, value in task.get_checkpoint_state(ema=True)["state_dict_ema"].items():
        assert torch.equal(fresh.get_checkpoint_state(ema=True)["state_dict_ema"][key], value)


def test_plain_kd_has_no_task_state():
    assert "task_state" not in make_task(method="none").get_checkpoint_state()


def test_teachers_of_other_or_no_classes():
    """Views stand in for the logits of a teacher without a classifier; other classes serve what reads no logits."""
    batch = make_batch()
    mute = timm.create_model("test_resnet", num_classes=0)
    options = {"input_size": SIZE, "verbose": False, "heads": GranularityHeads(mute.num_features, 10)}
    assert "kd" in MultiGranularityTask(networks()[0], mute, **options)(*batch)
    other = timm.create_model("test_resnet", num_classes=7)
    with pytest.raises(ValueError, match="KD needs the same classes: the student has 10 classes, the teacher 7"):
        MultiGranularityTask(networks()[0], other, **options)
    found = MultiGranularityTask(networks()[0], other, "pkt", "mag", kd_weight=0.0, **options)(*batch)
    assert found.keys() == {"task", "pkt", "abstract", "detailed", "loss", "output"}


def test_soft_targets_and_images_of_other_statistics():
    """A teacher gets its own normalisation; distributions over classes are taken as labels are."""
    student, teacher = networks()
    raw = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    student.pretrained_cfg = {**student.pretrained_cfg, **raw}
    teacher.pretrained_cfg = {**teacher.pretrained_cfg, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
    task = MultiGranularityTask(student, teacher, method="none", input_size=SIZE, verbose=False)
    images, target = make_batch()
    normalised = (images - torch.tensor([0.5, 0.4, 0.3])[:, None, None]) / torch.tensor([0.2, 0.3, 0.4])[:, None, None]
    torch.testing.assert_close(task.teacher(images).logits, teacher(normalised), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(task(images, torch.eye(10)[target])["loss"], task(images, target)["loss"])
    student.pretrained_cfg = {}
    options = {"method": "none", "input_size": SIZE, "verbose": False}
    with pytest.raises(ValueError, match="give mean= and std="):
        MultiGranularityTask(student, teacher, **options)
    given = MultiGranularityTask(student, teacher, **options, **raw)
    torch.testing.assert_close(given.teacher(images).logits, task.teacher(images).logits)


@pytest.mark.slow
def test_a_loop_of_two_processes_is_that_of_one(tmp_path):
    """With DDP, a compiled step and heads fitted on both processes' images; what they keep is equal on both."""
    log = tmp_path / "log"
    run = Ranks([str(tmp_path)], log, processes=2, target=timm_loop.main)
    assert run.wait(300, grace=5) == [0, 0], "".join(path.read_text() for path in run.logs)
    alone = timm_loop.train(tmp_path, "kd", "mas")
    for name in timm_loop.CASES:
        one, two = (torch.load(tmp_path / f"{name}{rank}.pt") for rank in (0, 1))
        for part, tensors in one.items():
            torch.testing.assert_close(tensors, two[part], rtol=0, atol=0)
            if name == "mas":
                torch.testing.assert_close(tensors, alone[part], rtol=1e-3, atol=1e-4)
    fresh = timm_loop.make_task("kd", "mas").get_eval_model()
    codes = torch.load(tmp_path / "codes0.pt")["state_dict"]
    assert torch.equal(codes["head.weight"], fresh.head.weight), "no loss reads it: it must not even decay"
