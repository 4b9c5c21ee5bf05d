"""Signed checkpoints: who has no key writes nothing that is resumed from, whatever else he may write."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from cryptography.hazmat.primitives import serialization as form
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa

from distckpt import Checkpointer, TrainState
from distckpt.adapters.dcp import StorageWriter
from distckpt.cli import NOTHING
from distckpt.cli import main as cli
from distckpt.errors import Corrupt, FormatError, StoreError, Untrusted
from distckpt.format import manifest
from distckpt.format.checksum import BLOCK, SHA256, algorithm_of, digest
from distckpt.format.datafile import decode_header
from distckpt.format.layout import StepDir, ack_file, data_file
from distckpt.format.manifest import FileInfo
from distckpt.format.sealed import seal
from distckpt.loading.open import open_checkpoint
from distckpt.run.launches import open_launch
from distckpt.run.source import open_source
from distckpt.saving.commit import Attempt, read_ack, write_ack, write_refusal
from distckpt.signing import REQUIRE_SIGNATURE, SIGN_KEY, fingerprint, signer
from distckpt.store.local import LocalStore
from distckpt.tools.copy import Change, Source
from distckpt.tools.copy import _Plan as Plan
from distckpt.tools.copy import _Request as Request
from distckpt.tools.formats import Distckpt
from tests import layouts, ranks
from tests.faults.failpoints import FaultyStore, Fuse
from tests.faults.sharded import Sharded, on_threads
from tests.run.test_frozen import Tuning, train


def key_pair(folder, name):
    """Files of a private and a public key, as ssh-keygen makes them."""
    key = ed25519.Ed25519PrivateKey.generate()
    private, public = folder / name, folder / f"{name}.pub"
    private.write_bytes(key.private_bytes(form.Encoding.PEM, form.PrivateFormat.OpenSSH, form.NoEncryption()))
    public.write_bytes(
        key.public_key().public_bytes(form.Encoding.OpenSSH, form.PublicFormat.OpenSSH) + b" who@where\n"
    )
    return str(private), str(public)


@pytest.fixture
def keys(tmp_path, monkeypatch):
    """Sign with the key `ours`; (what is to be set to require it, what an adversary has)."""
    private, public = key_pair(tmp_path, "ours")
    monkeypatch.setenv(SIGN_KEY, private)
    return public, key_pair(tmp_path, "theirs")


@pytest.fixture
def require(keys, monkeypatch):
    monkeypatch.setenv(REQUIRE_SIGNATURE, keys[0])
    return keys[0]


def _save(root, *steps, key=None, **options):
    """A launch of one rank that saves these steps, signed with another key than this process's if one is given."""
    with pytest.MonkeyPatch.context() as patch:
        if key is not None:
            patch.delenv(REQUIRE_SIGNATURE, raising=False)
            patch.delenv(SIGN_KEY, raising=False)
            if key:
                patch.setenv(SIGN_KEY, key)
        state = Sharded(0, 1)
        with layouts.quiet(), Checkpointer(root, timeout=5, **options) as c:
            c.resume(state)
            for step in steps:
                state.set(step)
                c.save(step, state)


def _resumed(root):
    state = Sharded(0, 1)
    with layouts.quiet(), Checkpointer(root, timeout=5, wait=True) as c:
        report = c.resume(state)
    assert state.is_at(report.step)
    return report


def _sealed(root):
    return sorted(
        p
        for p in Path(root).rglob("*.json")
        if p.name == "commit.json" or p.match("launches/[0-9][0-9][0-9][0-9].json")
    )


# -- what is signed ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wait", [True, False], ids=["waited for", "by the writer process"])
def test_all_that_decides_is_signed_and_all_below_is_summed_with_sha256(tmp_path, require, wait):
    _save(tmp_path / "run", 1, 2, wait=wait)
    assert len(_sealed(tmp_path / "run")) == 3
    for path in _sealed(tmp_path / "run"):
        assert fingerprint(json.loads(path.read_text())["signature"]), path
    for directory in (tmp_path / "run").glob("step-*[0-9]"):
        content = manifest.decode((directory / "commit.json").read_bytes(), None)
        assert content.is_strong
        assert {algorithm_of(i.digest) for i in (*content.files, *content.objects.values())} == {SHA256}
        data = (directory / content.files[0].name).read_bytes()
        chunk = decode_header(data[: content.files[0].header], len(data))["__checksums__"]
        assert data[chunk.start :].startswith(b"sha256\0\0\0\0\0\0")
    assert _resumed(tmp_path / "run").step == 2


def test_two_ranks_sign_alike_and_a_signed_run_is_read_without_any_key(tmp_path, require, monkeypatch):
    def work(comm):
        state = Sharded(comm.rank, 2, 1)
        with Checkpointer(tmp_path / "run", comm=comm, wait=True) as c:
            c.save(1, state)
            state.set(0)
            c.load(state)
        return state.is_at(1)

    assert on_threads(2, work) == [True, True]
    monkeypatch.delenv(SIGN_KEY)
    monkeypatch.delenv(REQUIRE_SIGNATURE)
    assert _resumed(tmp_path / "run").step == 1


def _save_where_one_has_no_key(root, key, has):
    if dist.get_rank() == has:
        os.environ[SIGN_KEY] = key
    state = TrainState(model=torch.nn.Linear(2, 2), rng=False)
    with Checkpointer(root, timeout=10, wait=True) as c:
        return ranks.expect_error(lambda: c.save(1, state), Untrusted)


@pytest.mark.parametrize(("has", "wanted"), [(0, "ack-00001.*not signed"), (1, "other ranks have signed")])
def test_a_rank_without_the_key_is_told_of_on_every_rank(tmp_path, keys, has, wanted):
    del os.environ[SIGN_KEY]
    told = ranks.run(2, _save_where_one_has_no_key, str(tmp_path / "run"), str(tmp_path / "ours"), has)
    assert re.search(wanted, told[0])
    assert told[0] == told[1]
    assert not list((tmp_path / "run").glob("step-*/commit.json"))


def test_the_key_is_found_after_a_change_of_directory(tmp_path, keys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(SIGN_KEY, "ours")
    with Checkpointer(tmp_path / "run") as c:
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        c.save(1, Sharded(0, 1, 1))
    assert manifest.decode(next((tmp_path / "run").glob("step-*1/commit.json")).read_bytes(), None).signature


def test_copies_are_signed_by_who_copies(tmp_path, require, capsys):
    _save(tmp_path / "run", 1, wait=True)
    assert cli(["cp", str(tmp_path / "run"), str(tmp_path / "copy")]) == 0
    assert cli(["reshard", str(tmp_path / "run"), str(tmp_path / "two"), "--world-size", "2"]) == 0
    assert [_resumed(tmp_path / name).step for name in ("copy", "two")] == [1, 1]


def test_replicas_of_a_tier_have_the_signature_of_the_checkpoint(tmp_path, require):
    _save(tmp_path / "far", 1, local=tmp_path / "near")
    (near,), (far,) = ((tmp_path / n).glob("step-*1/commit.json") for n in ("near", "far"))
    assert near.read_bytes() == far.read_bytes()
    shutil.rmtree(tmp_path / "near")
    assert _resumed(tmp_path / "far").step == 1


@pytest.mark.filterwarnings("ignore:torch.distributed is (disabled|unavailable)")
def test_what_dcp_saves_through_us_is_signed(tmp_path, require):
    with layouts.quiet():
        dcp.save({"w": torch.ones(3), "n": {"a": 1}}, storage_writer=StorageWriter(tmp_path / "run" / "step-1"))
    assert manifest.decode(next(tmp_path.rglob("commit.json")).read_bytes(), None).is_strong


def test_frozen_weights_of_a_checkpoint_that_is_not_signed_are_written_anew(tmp_path, keys, monkeypatch):
    key = os.environ[SIGN_KEY]
    monkeypatch.delenv(SIGN_KEY)
    train(tmp_path, [1, 2])
    monkeypatch.setenv(SIGN_KEY, key)
    with layouts.quiet():
        tuning = train(tmp_path, [3, 4])
    monkeypatch.setenv(REQUIRE_SIGNATURE, keys[0])
    contents = [manifest.decode(p.read_bytes(), None) for p in sorted(tmp_path.glob("step-*[0-9]/commit.json"))]
    assert [{f.name.partition("/")[0] for f in c.files if "/" in f.name} for c in contents] == [
        set(), {"step-00000001"}, set(), {"step-00000003"}
    ]  # fmt: skip
    other = Tuning(seed=5)
    with layouts.quiet(), Checkpointer(tmp_path) as c:
        assert c.resume(other.state).step == 4
    assert all(torch.equal(a, b) for a, b in zip(other.content(), tuning.content(), strict=True))


# -- what an adversary may do ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("who", ["nobody", "theirs"])
def test_what_no_trusted_key_signed_is_passed_over(tmp_path, require, keys, who):
    _save(tmp_path / "run", 1, wait=True)
    _save(tmp_path / "run", 7, key=keys[1][0] if who == "theirs" else "", wait=True)
    report = _resumed(tmp_path / "run")
    assert (report.step, list(report.fell_back_from)) == (1, [7])
    told = report.fell_back_from[7]
    assert "signed" in told
    assert "key of" in told
    state = Sharded(0, 1)
    with (
        layouts.quiet(),
        pytest.raises(Corrupt, match=r"step-00000007/commit\.json: it is .*signed"),
        Checkpointer(tmp_path / "run") as c,
    ):
        c.load(state, step=7)


def test_where_nothing_is_signed_that_is_an_error_and_no_fresh_start(tmp_path, require):
    _save(tmp_path / "run", 1, 2, key="", wait=True)
    with pytest.raises(Corrupt, match="not signed"):
        _resumed(tmp_path / "run")
    assert len(list((tmp_path / "run").glob("step-*[0-9]/commit.json"))) == 2


def _same_crc(data, at):
    """Other bytes with the same CRC-32C: the generator polynomial is added, in the order of its bits."""
    value = int.from_bytes(data[at : at + 5], "little") ^ ((0x82F63B78 << 1 | 1) & (1 << 33) - 1)
    made = data[:at] + value.to_bytes(5, "little") + data[at + 5 :]
    assert made != data
    return made


@pytest.mark.parametrize("signed", [False, True])
def test_a_forged_crc_is_found_where_it_is_signed_and_only_there(tmp_path, keys, signed):
    """That a CRC is no protection from people is why there are signatures: the first case shows it."""
    _save(tmp_path / "run", 1, key=None if signed else "", wait=True)
    (path,) = (tmp_path / "run").glob("step-*1/rank-*")
    path.write_bytes(_same_crc(path.read_bytes(), 4096 + 8))
    state = Sharded(0, 1)
    with Checkpointer(tmp_path / "run") as c:
        if signed:
            with pytest.raises(Corrupt, match=r"hold .*model\.rows"):
                c.load(state)
        else:
            c.load(state)
            assert not state.is_at(1)


def _resealed(path, change):
    """Change the text of a commit, and make its digest (not its signature) anew."""
    text, _, _ = path.read_bytes().rpartition(b',"digest"')
    made = change(text)
    path.write_bytes(made + f',"digest":"{digest(made)}"}}\n'.encode())


def _rebuilt(root, sign=None):
    """Other bits, and every sum above them made anew, up to the commit's digest; its old signature kept."""
    (commit,) = root.glob("step-*[0-9]/commit.json")
    content = manifest.decode(commit.read_bytes(), None)
    path = commit.parent / content.files[0].name
    data = bytearray(path.read_bytes())
    chunk = decode_header(bytes(data[: content.files[0].header]), len(data))["__checksums__"]
    data[4096] ^= 1
    for number, start in enumerate(range(0, chunk.start, BLOCK)):
        at = chunk.start + 16 + 32 * number
        data[at : at + 32] = SHA256.sum_of([memoryview(data)[start : min(start + BLOCK, chunk.start)]])
    path.write_bytes(data)
    forged = SHA256.digest(bytes(data[: content.files[0].header]), bytes(data[chunk.start :]))
    _resealed(commit, lambda text: text.replace(content.files[0].digest.encode(), forged.encode()))


def _signed_by(key, text):
    private = form.load_ssh_private_key(Path(key).read_bytes(), None)
    public = private.public_key().public_bytes_raw().hex()
    return f',"signature":"ed25519:{public}:{private.sign(text).hex()}"'.encode()


FORGERIES = {
    "every sum made anew": (_rebuilt, "is not one of its content"),
    "another step": (lambda text: text.replace(b'"step":1', b'"step":1 ', 1), "is not one of its content"),
    "no signature": (lambda text: text[: text.index(b',"signature"')], "it is not signed"),
    "a signature of another kind": (lambda text: text.replace(b"ed25519:", b"rsa:"), "signed by nobody known"),
    "a signature that is cut": (lambda text: text[:-2] + b'"', "signed by nobody known"),
    "members after the signature": (lambda text: text + b',"keep":"x"', "it is not signed"),
    "a second signature before it": (
        lambda text: text.replace(b'{"format"', b'{"signature":"ed25519:00:00","format"', 1),
        "is not one of its content",
    ),
}


@pytest.mark.parametrize("how", FORGERIES)
def test_a_forgery_without_the_key_is_refused(tmp_path, require, how):
    _save(tmp_path / "run", 1, wait=True)
    change, told = FORGERIES[how]
    if change is _rebuilt:
        _rebuilt(tmp_path / "run")
    else:
        _resealed(next((tmp_path / "run").glob("step-*1/commit.json")), change)
    with pytest.raises(Corrupt, match=told):
        _resumed(tmp_path / "run")


def test_a_forgery_is_signed_by_another_key_in_vain(tmp_path, require, keys):
    _save(tmp_path / "run", 1, wait=True)
    commit = next((tmp_path / "run").glob("step-*1/commit.json"))
    _resealed(commit, lambda text: (bare := text[: text.index(b',"signature"')]) + _signed_by(keys[1][0], bare))
    with pytest.raises(Untrusted, match="it is signed by SHA256:"):
        open_checkpoint(LocalStore(tmp_path / "run"), StepDir(1))


def test_a_trusted_key_above_sums_that_anybody_can_forge_is_refused(tmp_path, require, keys):
    """A checkpoint that the key's holder signed carelessly, with another program."""
    _save(tmp_path / "run", 1, key="", wait=True)
    commit = next((tmp_path / "run").glob("step-*1/commit.json"))
    _resealed(commit, lambda text: text + _signed_by(tmp_path / "ours", text))
    with pytest.raises(Untrusted, match="not every file has sha256"):
        open_checkpoint(LocalStore(tmp_path / "run"), StepDir(1))
    with pytest.raises(FormatError, match="must have sha256"):
        manifest.encode(manifest.decode(commit.read_bytes(), None), lambda text: "x")


def test_a_signed_commit_cannot_be_moved_to_another_step(tmp_path, require):
    _save(tmp_path / "run", 1, 2, wait=True)
    shutil.copytree(tmp_path / "run" / "step-00000001", tmp_path / "run" / "step-00000009")
    report = _resumed(tmp_path / "run")
    assert (report.step, list(report.fell_back_from)) == (2, [9])


@pytest.mark.parametrize("forged", [False, True])
def test_an_attempt_whose_acks_are_not_ours_is_not_committed_in_our_name(tmp_path, keys, forged):
    """Else whoever may write there would have a resume sign what he likes."""
    store, fuse = LocalStore(tmp_path / "run"), Fuse()
    _save(store.root, 1, wait=True)

    def work(comm):
        with Checkpointer(FaultyStore(store, fuse), comm=comm, wait=True) as c:
            c.resume(state := Sharded(comm.rank, 2))
            fuse.arm("create step-00000002/commit.json", forever=True)
            state.set(2)
            c.save(2, state)

    with pytest.MonkeyPatch.context() as patch:
        if forged:
            patch.delenv(SIGN_KEY)
        assert all(isinstance(error, StoreError) for error in on_threads(2, work))
    report = _resumed(store.root)
    assert report.step == (1 if forged else 2)


@pytest.mark.parametrize(
    "other", [(1, 1, "ab" * 6), (2, 2, "ab" * 6), (2, 1, "cd" * 6)], ids=["step", "generation", "attempt"]
)
@pytest.mark.parametrize("says", ["finished", "failed"])
def test_an_ack_of_another_attempt_cannot_stand_in_for_one_signed_as_it_is(tmp_path, keys, other, says):
    store, (step, generation, name) = LocalStore(tmp_path / "run"), other
    ours, theirs = Attempt(StepDir(2), "ab" * 6, 2), Attempt(StepDir(step, generation), name, 2)
    for attempt in (ours, theirs):
        if says == "failed":
            write_refusal(store, attempt, 1, StoreError("full"))
        else:
            write_ack(store, attempt, 1, FileInfo(data_file(1, attempt.id), 10, 9, "0" * 64), None)
    assert read_ack(store, ours, 1)
    shutil.copy(store.root / theirs.key(ack_file(1, theirs.id)), store.root / ours.key(ack_file(1, ours.id)))
    with pytest.raises(FormatError, match="is not the ack of rank 1 in this attempt"):
        read_ack(store, ours, 1)


@pytest.mark.parametrize("how", ["planted", "of another output", "not JSON"])
def test_a_copy_that_somebody_else_has_begun_is_begun_anew(tmp_path, require, how):
    """Else whoever may write beside a copy would have its maker sign what he likes."""
    _save(tmp_path / "run", 1, wait=True)
    found = Plan(
        Request(Source(tmp_path / "run" / "step-00000001"), str(tmp_path / "copy"), Distckpt(), Change(), 1 << 20)
    )
    (output,) = found.sink.outputs
    found.staging.make(output)
    assert found.staging.finished([output])
    (record,) = (p for p in (found.staging.root / "done").iterdir())
    said = {"attempt": found.attempt, "output": output.name, "result": ["x", 1, 1, "0" * 64]}
    if how == "planted":
        record.write_bytes(seal(said))
    elif how == "not JSON":
        record.write_bytes(b"{")
    else:
        record.write_bytes(seal(said | {"output": "step-00000001/other"}, signer()))
    assert not found.staging.finished([output])
    assert cli(["cp", str(tmp_path / "run" / "step-00000001"), str(tmp_path / "copy")]) == 0
    assert _resumed(tmp_path / "copy").step == 1


def test_frozen_weights_are_named_only_of_a_commit_that_this_key_has_signed(tmp_path, keys):
    """Signing alone, as a run begins with it: what is read back of an earlier save becomes part of what is signed."""
    tuning = Tuning()
    with layouts.quiet(), Checkpointer(tmp_path, wait=True) as c:
        c.resume(tuning.state)
        c.save(1, tuning.state)
        _resealed(tmp_path / "step-00000001" / "commit.json", lambda text: text[: text.index(b',"signature"')])
        c.save(2, tuning.state)
    content = manifest.decode((tmp_path / "step-00000002" / "commit.json").read_bytes(), None)
    assert not [f.name for f in content.files if "/" in f.name]


def test_words_of_removing_that_are_not_signed_keep_no_job_from_its_checkpoint(tmp_path, require):
    _save(tmp_path / "run", 1, 2, wait=True)
    said = {"expires": 1e18, "host": "x", "removes": True, "directory": "step-00000002"}
    (tmp_path / "run" / "leases").mkdir(exist_ok=True)
    path = tmp_path / "run" / "leases" / f"step-00000002.{'ab' * 6}.json"
    path.write_bytes(seal(said))
    assert _resumed(tmp_path / "run").step == 2
    path.write_bytes(seal(said | {"directory": "step-00000001"}, signer()))
    assert _resumed(tmp_path / "run").step == 2


def test_a_launch_that_is_not_signed_supersedes_nothing(tmp_path, require, monkeypatch):
    _save(tmp_path / "run", 1, 2, wait=True)
    with Checkpointer(tmp_path / "run", wait=True, timeout=5) as c:
        c.resume(state := Sharded(0, 1))
        with monkeypatch.context() as patch:
            patch.delenv(SIGN_KEY)
            patch.delenv(REQUIRE_SIGNATURE)
            assert open_launch(LocalStore(tmp_path / "run"), None, 1, "now") == 3
        state.set(3)
        c.save(3, state)
    assert _resumed(tmp_path / "run").step == 3


def test_directories_of_other_tools_are_refused(tmp_path, require):
    torch.save({"w": torch.ones(2)}, tmp_path / "model.pt")
    with pytest.raises(Untrusted, match=r"model\.pt: is no checkpoint of distckpt"):
        open_source(tmp_path / "model.pt")
    with pytest.raises(Untrusted), Checkpointer(tmp_path / "run") as c:
        c.load(TrainState(model=torch.nn.Linear(1, 1), rng=False), source=tmp_path / "model.pt")


def test_a_fingerprint_is_what_ssh_keygen_says():
    key = "eae475317a785f07788b278eb26559f688b99291d8ece3296b4f4322cffe7e93"
    assert fingerprint(f"ed25519:{key}:{'0' * 128}") == "SHA256:rmO0slJ2r83XRriMf0eULiu5TFbocd/1+oKzFUe+kzE"
    assert fingerprint("rsa:00") == ""


# -- the command line -------------------------------------------------------------------------------------------------


def test_the_command_line_says_who_signed_and_requires_it(tmp_path, keys, capsys, monkeypatch):
    _save(tmp_path / "run", 1, wait=True)
    _save(tmp_path / "plain", 1, key="", wait=True)
    monkeypatch.delenv(SIGN_KEY)
    assert cli(["show", str(tmp_path / "run"), "--json"]) == 0
    whose = json.loads(capsys.readouterr().out)["signed_by"]
    assert whose.startswith("SHA256:")
    assert cli(["verify", str(tmp_path / "run")]) == 0
    assert f"says that it is signed by {whose}" in capsys.readouterr().out
    assert cli(["verify", str(tmp_path / "run"), "--require-signature", keys[0]]) == 0
    assert f"; signed by {whose}" in capsys.readouterr().out
    assert REQUIRE_SIGNATURE not in os.environ
    for command in ("verify", "show", "export", "reshard"):
        out = str(tmp_path / "out.safetensors")
        to = {"export": ["-o", out], "reshard": [out]}.get(command, [])
        assert cli([command, str(tmp_path / "plain"), *to, "--require-signature", keys[0]]) == NOTHING, command
        told = capsys.readouterr().err
        assert "it is not signed" in told
        assert not (tmp_path / "out.safetensors").exists()
    assert cli(["verify", str(tmp_path / "run"), "--require-signature", str(tmp_path / "gone")]) == 4
    assert "gone: cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("to", ["model.safetensors", "model.pt", "hf", "dcp --to dcp"])
def test_a_signed_run_is_exported_where_signatures_are_required(tmp_path, require, to):
    train(tmp_path / "run", [1])
    name, *more = to.split()
    assert cli(["export", str(tmp_path / "run"), "-o", str(tmp_path / name), *more]) == 0
    assert (tmp_path / name).exists()


def test_a_copy_that_could_not_be_read_here_is_refused_before_it_is_made(tmp_path, require, capsys, monkeypatch):
    _save(tmp_path / "run", 1, wait=True)
    monkeypatch.delenv(SIGN_KEY)
    assert cli(["cp", str(tmp_path / "run"), str(tmp_path / "copy")]) == 1
    assert "DISTCKPT_SIGN_KEY is not" in capsys.readouterr().err
    assert not (tmp_path / "copy").exists()
    assert not list(tmp_path.glob(".copy*"))


# -- keys -------------------------------------------------------------------------------------------------------------


def _rsa(encryption):
    return rsa.generate_private_key(65537, 2048).private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, encryption)


BAD = {
    "not there": (None, "cannot be read", StoreError),
    "no key": (lambda: b"hello", "an Ed25519 private key", FormatError),
    "of another kind": (lambda: _rsa(form.NoEncryption()), "holds a RSAPrivateKey", FormatError),
    "with a passphrase": (lambda: _rsa(form.BestAvailableEncryption(b"x")), "without a passphrase", FormatError),
}


@pytest.mark.parametrize("what", BAD)
def test_a_private_key_that_cannot_be_used_is_told_at_the_start(tmp_path, monkeypatch, what):
    make, told, kind = BAD[what]
    if make:
        (tmp_path / "key").write_bytes(make())
    monkeypatch.setenv(SIGN_KEY, str(tmp_path / "key"))
    with pytest.raises(kind, match=told) as caught:
        Checkpointer(tmp_path / "run")
    assert f"{SIGN_KEY}={tmp_path / 'key'}" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "has no key"),
        ("# nobody\n", "has no key"),
        ("ssh-ed25519 AAAA\n", "line 1: no public key"),
        ("{good}\nssh-rsa AAAA x\n", "line 2: no public key"),
        ("hello\n", "line 1: no public key"),
        ("@revoked {good}\n", "line 1: no public key"),
        ('expiry-time="20200101" {good}\n', "line 1: no public key"),
    ],
)
def test_public_keys_that_cannot_be_used_are_told_with_their_line(tmp_path, keys, monkeypatch, text, told):
    (tmp_path / "list").write_text(text.replace("{good}", Path(keys[0]).read_text().strip()))
    monkeypatch.setenv(REQUIRE_SIGNATURE, str(tmp_path / "list"))
    with pytest.raises(FormatError, match=told):
        Checkpointer(tmp_path / "run")


def test_a_list_of_keys_may_have_comments(tmp_path, require, keys, monkeypatch):
    _save(tmp_path / "run", 1, wait=True)
    ours, theirs = (Path(p).read_text().strip() for p in (keys[0], keys[1][1]))
    (tmp_path / "list").write_text(f"# the team\n\n{theirs}\n  {ours}\n")
    monkeypatch.setenv(REQUIRE_SIGNATURE, str(tmp_path / "list"))
    assert _resumed(tmp_path / "run").step == 1


@pytest.mark.parametrize("name", [SIGN_KEY, REQUIRE_SIGNATURE])
def test_a_variable_that_is_set_and_empty_switches_nothing_off(tmp_path, keys, monkeypatch, name, capsys):
    _save(tmp_path / "run", 1, key="", wait=True)
    monkeypatch.setenv(name, "")
    with pytest.raises(FormatError, match=f"{name} is set, and empty"):
        Checkpointer(tmp_path / "run")
    monkeypatch.delenv(name)
    assert cli(["verify", str(tmp_path / "run"), "--require-signature", ""]) == 1
    assert "and empty" in capsys.readouterr().err


def test_a_key_that_this_process_would_not_trust_is_told_at_the_start(tmp_path, keys, monkeypatch):
    monkeypatch.setenv(REQUIRE_SIGNATURE, keys[1][1])
    with pytest.raises(Untrusted, match="its public key is not in"):
        Checkpointer(tmp_path / "run")
    monkeypatch.delenv(SIGN_KEY)
    with pytest.raises(Untrusted, match="nothing saved here could be resumed"):
        _save(tmp_path / "run", 1, wait=True)
    assert not _sealed(tmp_path / "run")


def test_the_key_itself_is_nowhere(tmp_path, require):
    _save(tmp_path / "run", 1, 2)
    secret = form.load_ssh_private_key((tmp_path / "ours").read_bytes(), None).private_bytes_raw()
    for path in (tmp_path / "run").rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            assert secret not in data
            assert secret.hex().encode() not in data
            assert b"PRIVATE" not in data
