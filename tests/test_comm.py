"""Ranks talking: every rank learns every failure, and every wait ends with the names of who is missing."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from distckpt import comm
from distckpt.comm import MAX_PAYLOAD, exchange, together
from distckpt.comm_threads import ThreadComm
from distckpt.errors import Corrupt, Mismatch, RankFailed, RanksMissing
from tests import ranks
from tests.saving.test_agree import on_threads


def test_together_returns_every_ranks_result_by_rank():
    assert (
        on_threads(ThreadComm.group(4), lambda c: together(c, "x", lambda: bytes([c.rank]) * c.rank))
        == [[b"", b"\1", b"\2\2", b"\3\3\3"]] * 4
    )


def failures(size, fn):
    def work(c):
        try:
            together(c, "trying", lambda: fn(c.rank))
        except Exception as e:
            return e
        return None

    return on_threads(ThreadComm.group(size), work)


def test_a_failure_on_one_rank_is_raised_on_every_rank_as_its_own_class_with_rank_and_cause():
    def fn(rank):
        if rank == 2:
            raise Corrupt("the file is bad")

    found = failures(4, fn)
    assert [type(e) for e in found] == [Corrupt] * 4
    assert {str(e) for e in found} == {"trying failed on rank 2: the file is bad"}


def test_failures_of_different_kinds_are_one_error_that_names_each():
    def fn(rank):
        if rank == 0:
            raise Corrupt("bad")
        if rank == 1:
            raise KeyError("lost")

    for e in failures(3, fn):
        assert type(e) is RankFailed
        assert "rank 0: bad" in str(e)
        assert "rank 1: KeyError: 'lost'" in str(e)


def test_the_same_failure_on_every_rank_is_told_once():
    def fn(rank):
        raise ValueError("all alike")

    assert {str(e) for e in failures(5, fn)} == {"trying failed on every rank: ValueError: all alike"}


def test_the_cause_is_kept_on_the_rank_that_failed():
    def fn(rank):
        if rank == 1:
            raise ZeroDivisionError("here")

    assert isinstance(failures(2, fn)[1].__cause__, ZeroDivisionError)


def test_a_result_that_is_too_long_to_travel_is_an_error():
    assert f"at most {MAX_PAYLOAD} travel" in str(failures(2, lambda rank: b"x" * (MAX_PAYLOAD + 1))[0])


def test_exchange_moves_messages_of_any_length():
    found = on_threads(ThreadComm.group(3), lambda c: exchange(c, "x", b"a" * (c.rank * 1000)))
    assert found[0] == [b"", b"a" * 1000, b"a" * 2000]


def test_alone_an_error_is_raised_as_it_is():
    def fail():
        raise ZeroDivisionError("here")

    with pytest.raises(ZeroDivisionError):
        together(comm.SoloComm(), "x", fail)


def test_threads_that_do_not_come_are_named():
    group = ThreadComm.group(3, timeout=0.1)
    threading.Thread(target=lambda: ranks.expect_error(lambda: group[1].all_gather("x", b"1"), RanksMissing)).start()
    with pytest.raises(RanksMissing, match="x: rank 2 did not answer"):
        group[0].all_gather("x", b"0")


def _first_contact(timeout):
    import torch.distributed as dist

    if dist.get_rank() == 1:
        time.sleep(timeout + 4)
        return None
    return ranks.expect_error(lambda: comm.TorchComm(timeout), RanksMissing)


def test_where_the_others_do_not_come_the_cause_is_told_by_the_rank_that_has_it():
    one, _ = ThreadComm.group(2, timeout=0.1)

    def fail():
        raise Corrupt("the block")

    with pytest.raises(RanksMissing, match=r"rank 1 did not answer.*Before that, rank 0 had failed: the block"):
        together(one, "trying", fail)


def test_a_rank_that_is_missing_from_the_start_is_named():
    first, _, last = ranks.run(3, _first_contact, 2.0)
    assert "making a process group: rank 1 did not answer" in first
    assert "making a process group: rank 1 did not answer" in last


def _patience():
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import _get_default_store

    before = _get_default_store().timeout
    comm.TorchComm(2.0)
    dist.barrier()
    return before, _get_default_store().timeout


def test_what_others_wait_for_at_the_rendezvous_store_keeps_its_timeout():
    for before, after in ranks.run(2, _patience):
        assert before == after


def _collective(victim, how, timeout):
    """Gather once; then the victim dies, stops or is busy; the others gather again."""
    c = comm.TorchComm(timeout)
    assert c.all_gather("first", bytes([c.rank])) == [bytes([r]) for r in range(c.world_size)]
    if c.rank == victim:
        if how == "slow":
            time.sleep(timeout + 4)
            return None
        os.kill(os.getpid(), signal.SIGKILL if how == "kill" else signal.SIGSTOP)
    started = time.monotonic()
    text = ranks.expect_error(lambda: c.all_gather("second", b"x"), RanksMissing)
    again = ranks.expect_error(lambda: c.all_gather("third", b"x"), RanksMissing)
    return text, again, time.monotonic() - started


@pytest.mark.parametrize(("victim", "how"), [(1, "kill"), (0, "kill"), (2, "slow")])
def test_a_lost_rank_is_named_on_every_other_within_the_timeout(victim, how):
    timeout = 3.0
    answers = ranks.run(3, _collective, victim, how, timeout, may_die=(victim,))
    for rank, answer in enumerate(answers):
        if rank == victim:
            continue
        text, again, seconds = answer
        assert f"second: rank {victim} did not answer" in text
        assert "restart the job" in again
        assert seconds < 2 * timeout + 2


def test_a_rank_that_was_killed_is_noticed_long_before_the_timeout():
    answers = ranks.run(4, _collective, 3, "kill", 60.0, may_die=(3,))
    assert all(seconds < 10 for _, _, seconds in answers[:3])


def _place(_):
    return tuple(comm.current())


def test_current_tells_rank_and_world_size():
    assert ranks.run(2, _place, 0) == [(0, 2), (1, 2)]
    assert tuple(comm.current()) == (0, 1)


def _at_different_points(root):
    """One rank saves while the other resumes; then both do the same."""
    import torch.distributed as dist

    from distckpt import Checkpointer, TrainState

    with Checkpointer(root, timeout=20, wait=True) as c:
        state = TrainState()
        c.resume(state)
        wrong = [lambda: c.save(1, state), lambda: c.resume(state)][dist.get_rank()]
        text = ranks.expect_error(wrong, RankFailed)
        check = dist.get_rank() == 1  # one more exchange on one rank, of another length than what the other is at
        other = ranks.expect_error(lambda: c.save(2, state, check_replicas=check), RankFailed)
        return text, other, c.save(3, state).step


def test_ranks_that_call_different_things_are_told_where_each_is_and_can_go_on(tmp_path):
    for text, other, step in ranks.run(2, _at_different_points, str(tmp_path)):
        assert "rank 0: describing the state; rank 1: looking for unfinished saves" in text
        assert "rank 0: writing step-00000002; rank 1: comparing replicas" in other
        assert step == 3


def _of_another_version(root):
    """One rank has another distckpt installed."""
    import torch.distributed as dist

    from distckpt import Checkpointer, TrainState

    with Checkpointer(root, timeout=20, wait=True) as c:
        state = TrainState()
        c.resume(state)
        c.save(1, state)
        usual, comm.__version__ = comm.__version__, "0.0.9" if dist.get_rank() == 1 else comm.__version__
        text = ranks.expect_error(lambda: c.save(2, state), Mismatch)
        comm.__version__ = usual
        return text, c.steps()


def test_ranks_that_run_different_versions_are_told_so(tmp_path):
    for text, steps in ranks.run(3, _of_another_version, str(tmp_path)):
        assert f"(ranks 0, 2: {comm.__version__}; rank 1: 0.0.9): install the same one" in text
        assert steps == [1]


def _few_speak(rank_that_does):
    from distckpt import comm as comms

    comm = comms.default(20)
    return comms.exchange(comm, "telling", b"x" * 1000 if comm.rank == rank_that_does else b"")


def test_what_one_rank_has_to_say_is_sent_once():
    """Not padded for each rank: few of many have a description of their own."""
    assert ranks.run(4, _few_speak, 2) == [[b"", b"", b"x" * 1000, b""]] * 4
