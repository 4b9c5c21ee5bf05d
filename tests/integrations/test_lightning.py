"""PyTorch Lightning through DistckptIO, against the same Lightning through files of torch.save."""

from __future__ import annotations

import importlib.util
import warnings

import pytest
import torch
from torch import nn

from tests import ranks
from tests.integrations.together import joined

if importlib.util.find_spec("pytorch_lightning") is None:
    pytest.skip("PyTorch Lightning is not installed", allow_module_level=True)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what it imports
    import pytorch_lightning as pl
    from lightning_fabric.plugins import TorchCheckpointIO
    from pytorch_lightning.callbacks import ModelCheckpoint
    from pytorch_lightning.plugins.io import AsyncCheckpointIO

from distckpt import Checkpointer, TrainState
from distckpt.errors import Corrupt, NotACheckpoint
from distckpt.integrations.lightning import DistckptIO

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice on workers, loggers and SLURM


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


def kept(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """Folder of a run saved by torch.save, and the losses of steps 5 to 8 once it is resumed."""
    folder = tmp_path_factory.mktemp("theirs")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(folder, 4, TorchCheckpointIO())
        losses, _ = fit(folder, 8, TorchCheckpointIO(), resume=str(folder / "step=4.ckpt"))
    assert kept(folder) == ["last.ckpt", "step=4.ckpt", "step=6.ckpt", "step=8.ckpt"]
    return folder, losses


def same(a, b):
    """Whether two checkpoints say the same, in whatever order and wherever they lie."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return a == b or (isinstance(a, str) and a.endswith(".ckpt"))


@pytest.mark.parametrize("background", [False, True])
def test_a_run_is_resumed_as_from_torch_save(tmp_path, theirs, background):
    def io():
        return AsyncCheckpointIO(DistckptIO()) if background else DistckptIO()

    fit(tmp_path, 4, io())
    losses, _ = fit(tmp_path, 8, io(), resume=str(tmp_path / "step=4.ckpt"))
    assert losses == theirs[1]
    assert kept(tmp_path) == kept(theirs[0])  # what ModelCheckpoint removes is removed
    again, _ = fit(tmp_path, 9, io(), resume=str(tmp_path / "last.ckpt"))
    assert len(again) == 1


def test_what_is_loaded_is_what_lightning_would_have_loaded(tmp_path):
    _, trainer = fit(tmp_path, 3, DistckptIO())
    trainer.save_checkpoint(tmp_path / "ours.ckpt")
    trainer.strategy.checkpoint_io = TorchCheckpointIO()
    trainer.save_checkpoint(tmp_path / "theirs.ckpt")
    ours, theirs = DistckptIO().load_checkpoint(tmp_path / "ours.ckpt"), torch.load(tmp_path / "theirs.ckpt")
    assert ours.keys() == theirs.keys()
    wrong = [key for key in theirs if not same(theirs[key], ours[key])]
    assert not wrong, [(theirs[key], ours[key]) for key in wrong]
    assert same(DistckptIO().load_checkpoint(tmp_path / "theirs.ckpt"), theirs)  # and a file of Lightning's own


def test_the_weights_are_read_by_a_checkpointer(tmp_path):
    _, trainer = fit(tmp_path, 2, DistckptIO())
    bare = Net()
    with Checkpointer(tmp_path / "other") as checkpointer:
        checkpointer.load(TrainState(model=bare), source=tmp_path / "step=2.ckpt", only=("model",))
    assert all(map(torch.equal, bare.state_dict().values(), trainer.model.state_dict().values()))


def test_what_is_not_there_or_damaged_is_one_clear_error(tmp_path):
    with pytest.raises(NotACheckpoint, match="does not exist"):
        DistckptIO().load_checkpoint(tmp_path / "none.ckpt")
    io = DistckptIO()
    io.save_checkpoint(
        {"state_dict": {"w": torch.arange(1000.0)}, "pytorch-lightning_version": "2"}, tmp_path / "a.ckpt"
    )
    (file,) = (tmp_path / "a.ckpt").glob("step-*/rank-*")
    data = bytearray(file.read_bytes())
    data[5000] ^= 1
    file.write_bytes(data)
    with pytest.raises(Corrupt, match="rank-00000"):
        io.load_checkpoint(tmp_path / "a.ckpt")
    io.remove_checkpoint(tmp_path / "a.ckpt")
    assert not (tmp_path / "a.ckpt").exists()
    io.remove_checkpoint(tmp_path / "a.ckpt")


def _rank(folder):
    joined()
    two = {"strategy": "ddp", "devices": 2}
    losses = []
    for name, io in (("theirs", TorchCheckpointIO), ("ours", DistckptIO)):
        fit(folder / name, 3, io(), **two)
        losses.append(fit(folder / name, 6, io(), resume=str(folder / name / "last.ckpt"), **two)[0])
    return losses


@pytest.mark.full
def test_under_ddp_rank_0_saves_and_every_rank_loads(tmp_path):
    for theirs, ours in ranks.run(2, _rank, tmp_path):
        assert ours == theirs
