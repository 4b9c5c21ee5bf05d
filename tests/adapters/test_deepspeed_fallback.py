"""A damaged tag, once install() was called: every rank falls back to the newest one before it."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import pytest
import torch

from distckpt.errors import Corrupt, RankFailed, StateUnusable, StateWarning
from tests import deepspeeds, ranks
from tests.adapters.scripts import script, train
from tests.layouts import quiet


def _save_three(root, names):
    engine = script(1)
    for i in range(3):
        train(engine, i, i + 1)
        engine.save_checkpoint(root, tag=names.format(i + 1), client_state={"at": i + 1})


def _data(root, tag):
    return next(Path(root, tag).rglob("rank-00001*.safetensors"))


def _damage(root, tag):
    path = _data(root, tag)
    content = bytearray(path.read_bytes())
    content[4100] ^= 1  # a weight: found out once others have been loaded
    path.write_bytes(content)


def _beside_a_copy(root):
    shutil.copytree(root / "global_step3", root / "zz-copy")
    _damage(root, "global_step3")


def _two_copies_damaged(root):
    _damage(root, "global_step3")
    shutil.copytree(root / "global_step3", root / "zz-copy")


def _set_back(root):
    (root / "latest").write_text("global_step2")
    _damage(root, "global_step2")


def _with_one_renamed(root):
    (root / "global_step2").rename(root / "good")
    _damage(root, "global_step3")


def _not_whole(root):
    next((root / "global_step3").rglob("commit.json")).unlink()


def _among_others(root):
    (root / "note.txt").write_text("")
    (root / "step-00000001.2").mkdir()
    (root / "empty").mkdir()
    (root / "gone").symlink_to("nowhere")
    _damage(root, "global_step3")


DAMAGED = {
    _beside_a_copy: ("zz-copy", 3),
    _two_copies_damaged: ("global_step2", 2),
    _set_back: ("global_step1", 1),
    _with_one_renamed: ("good", 2),
    _not_whole: ("global_step2", 2),
    _among_others: ("global_step2", 2),
}


def _load_each(roots):
    engine, found = script(1, seed=2), []
    for root in roots:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", StateWarning)
            path, client = engine.load_checkpoint(root)
        name = Path(path).name
        assert [w for w in caught if f"falling back from tag {Path(root, 'latest').read_text()}" in str(w.message)]
        assert [w for w in caught if f"{name}: " in str(w.message)]
        found.append((name, client["at"]))
    return found


def test_every_rank_falls_back_to_the_newest_tag_before_it(tmp_path):
    deepspeeds.run(2, _save_three, str(tmp_path / "saved"), "global_step{}")
    roots = []
    for damage in DAMAGED:
        roots.append(tmp_path / damage.__name__)
        shutil.copytree(tmp_path / "saved", roots[-1])
        damage(roots[-1])
    for found in deepspeeds.run(2, _load_each, [str(r) for r in roots]):
        assert found == [*DAMAGED.values()]


@pytest.mark.parametrize(("names", "before"), [("step-{:08d}", "step-00000002"), ("run/a{}", "run/a2")])
def test_tags_may_be_called_like_steps_or_lie_deeper(tmp_path, names, before):
    deepspeeds.run(2, _save_three, str(tmp_path), names)
    _damage(tmp_path, names.format(3))
    assert deepspeeds.run(2, _load_each, [str(tmp_path)]) == [[(Path(before).name, 2)]] * 2


def _asked_for(root):
    engine = script(1, seed=2)
    text = ranks.expect_error(lambda: engine.load_checkpoint(root, tag="global_step3"), Corrupt)
    ranks.expect_error(lambda: engine.save_checkpoint(root, tag="after"), StateUnusable)
    engine.load_checkpoint(root, tag="global_step1")
    engine.save_checkpoint(root, tag="after")
    return text


def _a_part(root):
    engine = script(1, seed=2)
    with quiet():
        path, _ = engine.load_checkpoint(root, load_module_only=True)
        engine.save_checkpoint(root, tag="after", save_latest=False)
        text = ranks.expect_error(
            lambda: engine.load_checkpoint(root, tag="global_step3", load_module_only=True), Corrupt
        )
        engine.load_checkpoint(root, load_module_only=True)
        again = ranks.expect_error(lambda: engine.save_checkpoint(root, tag="after"), StateUnusable)
    return Path(path).name, text, again


def test_a_part_that_is_loaded_after_damage_mends_what_that_left_half_way_and_nothing_before(tmp_path):
    deepspeeds.run(2, _save_three, str(tmp_path), "global_step{}")
    _damage(tmp_path, "global_step3")
    for name, *_ in deepspeeds.run(2, _a_part, str(tmp_path)):
        assert name == "global_step2"


def _every_one(root):
    engine = script(1, seed=2)
    return ranks.expect_error(lambda: engine.load_checkpoint(root), Corrupt)


def test_damage_is_an_error_where_the_tag_was_asked_for_and_where_nothing_is_left(tmp_path):
    deepspeeds.run(2, _save_three, str(tmp_path), "global_step{}")
    _damage(tmp_path, "global_step3")
    for text in deepspeeds.run(2, _asked_for, str(tmp_path)):
        assert _data(tmp_path, "global_step3").name in text
    shutil.rmtree(tmp_path / "after")
    for tag in ("global_step1", "global_step2"):
        _damage(tmp_path, tag)
    (tmp_path / "latest").write_text("global_step3")
    for text in deepspeeds.run(2, _every_one, str(tmp_path)):
        assert "rank-00001" in text


def _look(root):
    engine = script(1)
    engine.save_checkpoint(root, tag="t")
    torch.distributed.barrier()
    Path(root, "latest").write_text("nul\0")
    return ranks.expect_error(lambda: engine.load_checkpoint(root), RankFailed)


def test_what_rank_0_fails_at_while_it_looks_is_told_to_every_rank(tmp_path):
    for text in deepspeeds.run(2, _look, str(tmp_path)):
        assert "looking for the tag failed on rank 0: ValueError: embedded null byte" in text
