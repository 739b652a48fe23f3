"""patch_torch_clip under trainers that clip by torch's function: they take fastnorm's, and train as before."""

import copy
from unittest import mock

import pytest
import torch
from model_zoo import TOKENS, TRANSFORMERS
from torch import nn

import fastnorm
from fastnorm.clip import patch

pytestmark = pytest.mark.models
STEPS = 20


def losses_with_and_without(run) -> None:
    """run: trains a copy, and returns losses; it is given a list to fill with the calls of fastnorm's function."""
    expected = run()
    calls = []
    replacement = patch._REPLACEMENTS["clip_grad_norm_"]

    def counted(*args, **kwargs):
        calls.append(1)
        return replacement(*args, **kwargs)

    with mock.patch.dict(patch._REPLACEMENTS, clip_grad_norm_=counted), fastnorm.patch_torch_clip():
        losses = run()
    assert len(calls) == STEPS
    assert expected[-1] < expected[0]
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-3, atol=1e-4)


def test_lightning():
    lightning = pytest.importorskip("lightning", reason="`make test-models` installs it")
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 1))
    fastnorm.convert(network)
    data = [(x, x.sum(1, keepdim=True) * 5) for x in torch.randn(STEPS, 16, 8)]

    class Task(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network, self.losses = copy.deepcopy(network), []

        def training_step(self, batch, _):
            loss = (self.network(batch[0]) - batch[1]).square().mean()
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.05)

    def run():
        task = Task()
        trainer = lightning.Trainer(
            max_epochs=1, accelerator="cpu", gradient_clip_val=0.5, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(task, torch.utils.data.DataLoader(data, batch_size=None))
        return task.losses

    losses_with_and_without(run)


def test_hugging_face_trainer(tmp_path):
    transformers = pytest.importorskip("transformers", reason="`make test-models` installs it")
    pytest.importorskip("accelerate", reason="`make test-models` installs it")
    model = TRANSFORMERS["Llama"].make()
    fastnorm.convert(model)
    rows = [{"input_ids": ids, "labels": ids.flip(0)} for ids in torch.randint(1, TOKENS, (8, 12))] * STEPS

    def run():
        arguments = transformers.TrainingArguments(
            output_dir=tmp_path, max_steps=STEPS, per_device_train_batch_size=8, max_grad_norm=0.1, learning_rate=1e-2,
            logging_steps=1, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True, seed=0,
        )  # fmt: skip
        trainer = transformers.Trainer(copy.deepcopy(model), arguments, train_dataset=rows)
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    losses_with_and_without(run)


def test_accelerate():
    accelerate = pytest.importorskip("accelerate", reason="`make test-models` installs it")
    torch.manual_seed(0)
    network, x = nn.Sequential(nn.Linear(8, 8), nn.RMSNorm(8), nn.Linear(8, 1)), torch.randn(16, 8)

    def run():
        accelerator = accelerate.Accelerator(cpu=True)
        model = copy.deepcopy(network)
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

    losses_with_and_without(run)
