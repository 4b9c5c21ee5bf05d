"""Training with PyTorch Lightning, for tests. Heavy: imported by the tests that use it."""

from __future__ import annotations

import warnings

import torch
from torch import nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what it imports
    import pytorch_lightning as pl
    from lightning_fabric.plugins import TorchCheckpointIO
    from pytorch_lightning.callbacks import ModelCheckpoint
    from pytorch_lightning.plugins.io import AsyncCheckpointIO

from distckpt.integrations.lightning import DistckptIO
from tests.integrations.joined import joined

__all__ = ["AsyncCheckpointIO", "DistckptIO", "Net", "TorchCheckpointIO", "fit", "lives"]


class Net(pl.LightningModule):
    """Tied weights, a buffer, two optimizers' worth of states in one, a schedule."""

    def __init__(self, width=8):
        super().__init__()
        self.save_hyperparameters()
        self.up, self.norm = nn.Linear(4, width), nn.BatchNorm1d(width)
        self.down = nn.Linear(width, 4)
        self.again = self.up
        self.losses = []

    def training_step(self, batch, i):
        loss = (self.down(self.norm(self.again(batch[0]))) - batch[0]).square().mean()
        self.losses.append(loss.item())
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def fit(folder, steps, io, *, resume=None, **more):
    """Train, saving each 2 steps; the losses, and the Trainer."""
    torch.manual_seed(0)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(20, 4)), batch_size=4)
    options = {"filename": "{step}", "save_top_k": 2, "monitor": "step", "mode": "max", "save_last": True}
    saves = ModelCheckpoint(dirpath=folder, every_n_train_steps=2, **options)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(max_steps=steps, accelerator="cpu", plugins=[io], callbacks=[saves], **(quiet | more))
    net = Net()
    trainer.fit(net, data, ckpt_path=resume)
    return net.losses, trainer


def lives(folder):
    joined()
    two = {"strategy": "ddp", "devices": 2}
    losses = []
    for name, io in (("theirs", TorchCheckpointIO), ("ours", DistckptIO)):
        fit(folder / name, 3, io(), **two)
        losses.append(fit(folder / name, 6, io(), resume=str(folder / name / "last.ckpt"), **two)[0])
    return losses
