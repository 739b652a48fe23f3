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
