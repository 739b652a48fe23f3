"""Models with fastnorm's norms and clipping under trainers, unchanged, against the originals with torch's."""

import copy
from collections.abc import Callable
from unittest import mock

import pytest
import torch
from torch import nn

import fastnorm
from fastnorm.clip import patch
from helpers.model_zoo import TIMM, TOKENS, TRANSFORMERS, Case, loss_of

pytestmark = [pytest.mark.models, pytest.mark.usefixtures("compiled_kernels")]
STEPS = 20


def check(model: nn.Module, run: Callable[[nn.Module], list[float]], rtol: float = 1e-3) -> None:
    """run: trains a model, and returns its losses. The converted one takes fastnorm's clipping, at every step."""
    converted = copy.deepcopy(model)
    assert fastnorm.convert(converted).swapped
    expected, calls = run(model), []
    replacement = patch._REPLACEMENTS["clip_grad_norm_"]

    def counted(*args, **kwargs):
        calls.append(1)
        return replacement(*args, **kwargs)

    with mock.patch.dict(patch._REPLACEMENTS, clip_grad_norm_=counted), fastnorm.patch_torch_clip():
        losses = run(converted)
    assert len(calls) == len(losses) == STEPS
    assert expected[-1] < expected[0], "it learns"
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=rtol, atol=rtol / 10)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("name", ["resnet18", "vit_tiny", "BERT"])
def test_lightning(name, precision, tmp_path):
    lightning = pytest.importorskip("lightning", reason="`make test-models` installs it")
    case = (TIMM | TRANSFORMERS)[name]

    class Task(lightning.LightningModule):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model, self.losses = model, []

        def training_step(self, batch, _):
            loss = loss_of(self.model, batch)
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.02, momentum=0.9)

    def run(model):
        task = Task(model)
        trainer = lightning_trainer(lightning, precision)
        trainer.fit(task, torch.utils.data.DataLoader(batches(case), batch_size=None))
        trainer.save_checkpoint(tmp_path / "checkpoint.ckpt")
        fresh = Task(case.make())  # an original takes what either wrote
        fresh.load_state_dict(torch.load(tmp_path / "checkpoint.ckpt", weights_only=True)["state_dict"])
        return task.losses

    # in bfloat16, the losses of two roundings of the same network part by a few per cent
    check(case.make(), run, rtol=5e-2 if precision == "bf16-mixed" else 1e-3)


def lightning_trainer(lightning, precision: str):
    return lightning.Trainer(
        max_epochs=1, accelerator="cpu", precision=precision, gradient_clip_val=0.5, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip


def batches(case: Case) -> list[dict[str, torch.Tensor]]:
    """The same one at every step."""
    return [case.batch(torch.Generator().manual_seed(1))] * STEPS


def test_hugging_face_trainer(tmp_path):
    transformers = pytest.importorskip("transformers", reason="`make test-models` installs it")
    pytest.importorskip("accelerate", reason="`make test-models` installs it")
    torch.manual_seed(0)
    rows = [{"input_ids": ids, "labels": ids.flip(0)} for ids in torch.randint(1, TOKENS, (8, 12))] * STEPS

    def run(model):
        arguments = transformers.TrainingArguments(
            output_dir=tmp_path, max_steps=STEPS, per_device_train_batch_size=8, max_grad_norm=0.1, learning_rate=1e-2,
            logging_steps=1, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True, seed=0,
        )  # fmt: skip
        trainer = transformers.Trainer(model, arguments, train_dataset=rows)
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    check(TRANSFORMERS["Llama"].make(), run)


def test_accelerate():
    accelerate = pytest.importorskip("accelerate", reason="`make test-models` installs it")
    torch.manual_seed(0)
    x = torch.randn(16, 8)

    def run(model):
        accelerator = accelerate.Accelerator(cpu=True)
        model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.1))
        losses = []
        for _ in range(STEPS):
            loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
            optimizer.zero_grad()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            losses.append(loss.item())
        return losses

    check(nn.Sequential(nn.Linear(8, 8), nn.RMSNorm(8), nn.Linear(8, 1)), run)


def check_monitor(monitor: fastnorm.Monitor, norms: list[float], threshold: float) -> None:
    """norms: what the trainer itself says of the total norms before its clips."""
    found = monitor.to_numpy()
    assert found["total_norm"].tolist() == pytest.approx(norms, rel=1e-4)
    assert found["threshold"].tolist() == pytest.approx([threshold] * STEPS)
    assert found["clipped"].tolist() == [total > threshold for total in norms]
    assert (found["update_ratio"][::20] >= 0).all() and (found["input_rms"] > 0).all()
    monitor.close()


def test_monitor_of_lightning(tmp_path):
    lightning = pytest.importorskip("lightning", reason="`make test-models` installs it")
    case, norms = TRANSFORMERS["BERT"], []

    class Task(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = case.make()
            fastnorm.convert(self.model)

        def training_step(self, batch, _):
            return loss_of(self.model, batch)

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), 0.02, momentum=0.9)
            self.monitor = fastnorm.Monitor(self.model, optimizer)
            return optimizer

        def on_before_optimizer_step(self, optimizer):  # and before the clip
            norms.append(fastnorm.get_total_norm([p.grad for p in self.parameters() if p.grad is not None]).item())

    task = Task()
    with fastnorm.patch_torch_clip():
        lightning_trainer(lightning, "32-true").fit(task, torch.utils.data.DataLoader(batches(case), batch_size=None))
    check_monitor(task.monitor, norms, 0.5)


def test_monitor_of_hugging_face_trainer(tmp_path):
    transformers = pytest.importorskip("transformers", reason="`make test-models` installs it")
    pytest.importorskip("accelerate", reason="`make test-models` installs it")
    torch.manual_seed(0)
    rows = [{"input_ids": ids, "labels": ids.flip(0)} for ids in torch.randint(1, TOKENS, (8, 12))] * STEPS
    model = TRANSFORMERS["Llama"].make()
    fastnorm.convert(model)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    monitor = fastnorm.Monitor(model, optimizer)
    arguments = transformers.TrainingArguments(
        output_dir=tmp_path, max_steps=STEPS, per_device_train_batch_size=8, max_grad_norm=0.1, logging_steps=1,
        save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True, seed=0,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, None))
    with fastnorm.patch_torch_clip():
        trainer.train()
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    check_monitor(monitor, norms, 0.1)


@pytest.mark.parametrize("wrapped", [False, True])
def test_monitor_of_accelerate(wrapped):
    accelerate = pytest.importorskip("accelerate", reason="`make test-models` installs it")
    torch.manual_seed(0)
    x, norms = torch.randn(16, 8), []
    model = nn.Sequential(nn.Linear(8, 8), fastnorm.RMSNorm(8), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    accelerator = accelerate.Accelerator(cpu=True)
    model, prepared = accelerator.prepare(model, optimizer)
    monitor = fastnorm.Monitor(model, prepared if wrapped else optimizer)
    with fastnorm.patch_torch_clip():
        for _ in range(STEPS):
            loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
            prepared.zero_grad()
            accelerator.backward(loss)
            norms.append(accelerator.clip_grad_norm_(model.parameters(), 0.5).item())
            prepared.step()
    check_monitor(monitor, norms, 0.5)


def test_monitor_in_tensorboard(tmp_path):
    pytest.importorskip("tensorboard", reason="`make test-models` installs it")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    model = nn.Sequential(nn.Linear(8, 8), fastnorm.RMSNorm(8), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with fastnorm.Monitor(model, optimizer) as monitor, SummaryWriter(tmp_path) as writer:
        for _ in range(STEPS):
            optimizer.zero_grad()
            model(torch.randn(16, 8)).square().mean().backward()
            fastnorm.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            monitor.to_tensorboard(writer, wait=False)
    events = EventAccumulator(str(tmp_path)).Reload()
    found = monitor.to_numpy()
    weight, input_rms = found["gradient_norm"][:, 2], found["input_rms"][:, 0]
    for tag, expected in (
        ("total_norm", found["total_norm"]), ("gradient_norm/1.weight", weight), ("input_rms/1", input_rms)
    ):  # fmt: skip
        scalars = events.Scalars(f"fastnorm/{tag}")
        assert [event.step for event in scalars] == list(range(STEPS))
        assert [event.value for event in scalars] == pytest.approx(expected.tolist())
    assert [event.step for event in events.Scalars("fastnorm/update_ratio/1.weight")] == [0]  # every 50 steps
