"""PyTorch Lightning through DistckptIO, against the same Lightning through files of torch.save."""

from __future__ import annotations

import importlib.util
import warnings

import pytest
import torch

from distckpt import Checkpointer, TrainState
from distckpt.errors import Corrupt, NotACheckpoint, Untrusted
from distckpt.signing import REQUIRE_SIGNATURE
from tests import ranks

if importlib.util.find_spec("pytorch_lightning") is None:
    pytest.skip("PyTorch Lightning is not installed", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice on workers, loggers and SLURM


@pytest.fixture(scope="module")
def pl():
    from tests.integrations import lightnings

    return lightnings


def kept(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def theirs(pl, tmp_path_factory):
    """Folder of a run saved by torch.save, and the losses of steps 5 to 8 once it is resumed."""
    folder = tmp_path_factory.mktemp("theirs")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pl.fit(folder, 4, pl.TorchCheckpointIO())
        losses, _ = pl.fit(folder, 8, pl.TorchCheckpointIO(), resume=str(folder / "step=4.ckpt"))
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
def test_a_run_is_resumed_as_from_torch_save(pl, tmp_path, theirs, background):
    def io():
        return pl.AsyncCheckpointIO(pl.DistckptIO()) if background else pl.DistckptIO()

    pl.fit(tmp_path, 4, io())
    losses, _ = pl.fit(tmp_path, 8, io(), resume=str(tmp_path / "step=4.ckpt"))
    assert losses == theirs[1]
    assert kept(tmp_path) == kept(theirs[0])  # what ModelCheckpoint removes is removed
    again, _ = pl.fit(tmp_path, 9, io(), resume=str(tmp_path / "last.ckpt"))
    assert len(again) == 1


def test_what_is_loaded_is_what_lightning_would_have_loaded(pl, tmp_path):
    _, trainer = pl.fit(tmp_path, 3, pl.DistckptIO())
    trainer.save_checkpoint(tmp_path / "ours.ckpt")
    trainer.strategy.checkpoint_io = pl.TorchCheckpointIO()
    trainer.save_checkpoint(tmp_path / "theirs.ckpt")
    ours, theirs = pl.DistckptIO().load_checkpoint(tmp_path / "ours.ckpt"), torch.load(tmp_path / "theirs.ckpt")
    assert ours.keys() == theirs.keys()
    wrong = [key for key in theirs if not same(theirs[key], ours[key])]
    assert not wrong, [(theirs[key], ours[key]) for key in wrong]
    assert same(pl.DistckptIO().load_checkpoint(tmp_path / "theirs.ckpt"), theirs)  # and a file of Lightning's own


def test_the_weights_are_read_by_a_checkpointer(pl, tmp_path):
    _, trainer = pl.fit(tmp_path, 2, pl.DistckptIO())
    bare = pl.Net()
    with Checkpointer(tmp_path / "other") as checkpointer:
        checkpointer.load(TrainState(model=bare), source=tmp_path / "step=2.ckpt", only=("model",))
    assert all(map(torch.equal, bare.state_dict().values(), trainer.model.state_dict().values()))


def test_what_is_not_there_or_damaged_is_one_clear_error(pl, tmp_path):
    with pytest.raises(NotACheckpoint, match="does not exist"):
        pl.DistckptIO().load_checkpoint(tmp_path / "none.ckpt")
    io = pl.DistckptIO()
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


@pytest.mark.full
def test_under_ddp_rank_0_saves_and_every_rank_loads(pl, tmp_path):
    for theirs, ours in ranks.run(2, pl.lives, tmp_path):
        assert ours == theirs


def test_a_file_of_torch_save_is_not_read_where_signatures_are_required(pl, theirs, monkeypatch):
    monkeypatch.setenv(REQUIRE_SIGNATURE, "keys")
    with pytest.raises(Untrusted, match=r"step=4\.ckpt: is no checkpoint of distckpt"):
        pl.DistckptIO().load_checkpoint(theirs[0] / "step=4.ckpt")


def test_a_run_that_torch_save_began_goes_on_in_its_folder(pl, tmp_path):
    """Its files are replaced (last.ckpt) and removed (save_top_k) as if they were ours."""
    pl.fit(tmp_path, 2, pl.TorchCheckpointIO())
    assert (tmp_path / "last.ckpt").is_file()
    pl.fit(tmp_path, 4, pl.DistckptIO(), resume=str(tmp_path / "last.ckpt"))
    assert (tmp_path / "last.ckpt").is_dir()
    assert not [name for name in kept(tmp_path) if name.startswith(".")]
    old = tmp_path / "old.ckpt"
    old.write_bytes(b"")
    pl.DistckptIO().remove_checkpoint(old)
    assert not old.exists()
