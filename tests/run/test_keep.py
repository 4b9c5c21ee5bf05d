"""Rules of retention: what they keep, and what they may never let go of. Values only; files are in test_retention.py."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distckpt import Keep
from distckpt.errors import Unsupported
from distckpt.format.layout import StepDir
from distckpt.run.keep import Candidate, decide


def at(step, generation=1, **known):
    return Candidate(StepDir(step, generation), **known)


def steps(decision):
    return sorted(d.step for d in decision.stays)


def run_of(*all_steps, **known):
    return [at(step, **known) for step in all_steps]


def test_without_a_rule_everything_stays_and_the_limit_takes_the_oldest():
    found = run_of(1, 2, 3, 4, 5, nbytes=10)
    assert steps(decide(Keep(), found, {})) == [1, 2, 3, 4, 5]
    limited = decide(Keep(bytes=35), found, {})
    assert steps(limited) == [3, 4, 5]
    assert limited.goes[StepDir(1)] == "over the limit of 35 B"


def test_the_last_and_every_so_many_steps_are_a_union():
    found = run_of(40, 100, 130, 210, 290, 300, 301, 302)
    decision = decide(Keep(last=3, every_steps=100), found, {})
    assert steps(decision) == [100, 210, 300, 301, 302]
    assert "the first at or after a multiple of 100 steps" in decision.why(StepDir(210))
    assert decision.why(StepDir(40)) == "no rule keeps it"


def test_of_a_step_saved_again_the_highest_generation_is_the_one_of_a_rule():
    found = [at(100), at(100, 2), at(130), at(200), at(201)]
    assert list(decide(Keep(every_steps=100), found, {}).goes) == [StepDir(130), StepDir(100)]


def test_the_newest_of_each_epoch_and_a_name_for_it():
    found = [at(1, epoch=0), at(2, epoch=0), at(3, epoch=1), at(4, epoch=1), at(5, epoch=2), at(6), at(7)]
    decision = decide(Keep(per_epoch=True), found, {})
    assert steps(decision) == [2, 4, 5, 6, 7]
    assert {e: d.step for e, d in decision.epochs.items()} == {0: 2, 1: 4, 2: 5}
    assert "which epoch" in decide(Keep(per_epoch=True), run_of(1, 2), {}).notes[0]


def test_the_best_by_several_metrics_and_of_equal_ones_the_newest():
    found = [
        at(1, metrics={"loss": 2.0, "acc": 0.9}),
        at(2, metrics={"loss": 1.0}),
        at(3, metrics={"loss": 1.0}),
        at(4, metrics={"loss": 3.0, "acc": 0.1}),
        *run_of(5, 6),
    ]
    decision = decide(Keep(best=[("loss", "min", 1), ("acc", "max", 1)]), found, {})
    assert steps(decision) == [1, 3, 5, 6]
    assert decision.best == StepDir(3)
    assert steps(decide(Keep(best=("loss", "min")), found, {})) == [3, 5, 6]


def test_an_unknown_metric_is_told_and_keeps_nothing():
    decision = decide(Keep(best=("val_lss", "min", 2)), run_of(1, 2, 3, metrics={"val_loss": 1.0}), {})
    assert steps(decision) == [2, 3]
    assert decision.best is None
    assert decision.notes == ["best: no checkpoint has a number 'val_lss' among its metrics; known: val_loss"]


def test_newest_for_counts_back_from_the_newest_however_long_the_run_stood_still():
    dates = {1: "2020-01-01T09:00:00+00:00", 2: "2020-01-01T10:30:00+00:00", 3: "not a date", 4: "2020-01-01T12:00:00"}
    found = [at(step, date=date) for step, date in dates.items()] + [at(5, date="2020-01-01T12:00:00+00:00")]
    assert steps(decide(Keep(newest_for="2 h"), found, {})) == [2, 4, 5]


def test_what_was_asked_for_when_it_was_saved_stays():
    decision = decide(Keep(last=1), [at(1, asked="milestone"), *run_of(2, 3, 4)], {})
    assert steps(decision) == [1, 3, 4]
    assert "milestone" in decision.why(StepDir(1))


def test_superseded_and_damaged_ones_do_not_count():
    found = [at(1), at(2), at(3, state="superseded"), at(4, state="damaged", problem="torn"), at(5, state="superseded")]
    decision = decide(Keep(last=1), found, {})
    assert steps(decision) == [1, 2, 4]
    assert decision.why(StepDir(4)) == "damaged, and set aside: torn"
    assert decision.why(StepDir(5)).startswith("superseded")


def test_what_another_refers_to_and_what_a_reader_holds_stays():
    found = [
        at(1),
        at(2, refers_to=frozenset({StepDir(1)})),
        at(3),
        at(4),
        at(5, refers_to=frozenset({StepDir(2)})),
        at(6),
    ]
    decision = decide(Keep(last=1), found, {StepDir(3): "a reader has a lease on it"})
    assert steps(decision) == [1, 2, 3, 5, 6]
    assert decision.why(StepDir(1)) == "step-00000002 refers to its files"
    assert decision.why(StepDir(3)) == "a reader has a lease on it"


def test_the_limit_spares_the_best_longest_and_says_what_it_cannot_meet():
    found = [at(1, nbytes=10, metrics={"loss": 0.0}), *[at(s, nbytes=10, metrics={"loss": 9.0}) for s in (2, 3, 4, 5)]]
    keep = {"last": 4, "best": ("loss", "min", 1)}
    assert steps(decide(Keep(**keep, bytes=30), found, {})) == [1, 4, 5]
    tight = decide(Keep(**keep, bytes=10), found, {})
    assert steps(tight) == [4, 5]
    assert tight.best is None
    assert tight.notes == ["what must stay takes 20 B, more than bytes=10 B"]


@pytest.mark.parametrize(
    ("rules", "told"),
    [
        ({"last": 0}, "last=0"),
        ({"last": True}, "last=True"),
        ({"every_steps": 1.5}, "every_steps=1.5"),
        ({"per_epoch": 3}, "per_epoch=3"),
        ({"best": "val_loss"}, "best='val_loss'"),
        ({"best": ("val_loss", "least", 2)}, "'min' or 'max'"),
        ({"best": ("val_loss", "min", 0)}, "best="),
        ({"newest_for": "2 parsecs"}, "newest_for='2 parsecs'"),
        ({"newest_for": -1}, "newest_for=-1"),
        ({"bytes": "much"}, "'much': a size"),
        ({"bytes": -5}, "a size"),
        ({"fn": 3}, "fn=3"),
    ],
)
def test_nonsense_is_refused_with_its_name(rules, told):
    with pytest.raises(ValueError, match="Keep: ") as caught:
        Keep(**rules)
    assert told in str(caught.value)


def test_what_fn_says_is_a_reason():
    keep = Keep(fn=lambda step, metrics: {1: True, 2: "because", 3: None, 4: False, 5: 7}[step])
    assert [keep.asked(step, {}) for step in (1, 2, 3, 4)] == ["fn", "because", "", ""]
    with pytest.raises(Unsupported, match="returned 7 for step 5"):
        keep.asked(5, {})


def test_rules_cross_to_another_process():
    import json

    keep = Keep(last=3, best=("val_loss", "min", 2), newest_for="2 h", bytes="2 TB", fn=lambda *_: None)
    there = Keep.from_json(json.loads(json.dumps(keep.to_json())))
    assert (there.last, there.bests, there.seconds, there.limit) == (3, keep.bests, 7200.0, 2 * 10**12)
    with pytest.raises(ValueError, match="no such rule: newest"):
        Keep.from_json({"newest": 1})


RULES = st.builds(
    Keep,
    last=st.none() | st.integers(1, 4),
    every_steps=st.none() | st.integers(1, 9),
    per_epoch=st.booleans(),
    best=st.sampled_from([(), ("loss", "min", 2), [("loss", "max", 1), ("other", "min", 1)]]),
    newest_for=st.none() | st.integers(1, 5),
    bytes=st.none() | st.integers(0, 60),
)


@st.composite
def runs(draw):
    directories = draw(st.lists(st.builds(StepDir, st.integers(0, 20), st.integers(1, 2)), unique=True, max_size=12))
    found = []
    for d in sorted(directories):
        older = [c.directory for c in found]
        found.append(
            Candidate(
                d,
                nbytes=draw(st.integers(0, 20)),
                date=f"2020-01-01T00:00:{d.step:02d}+00:00",
                epoch=draw(st.none() | st.integers(0, 3)),
                metrics=draw(st.dictionaries(st.sampled_from(["loss", "other"]), st.floats(-1, 1))),
                asked=draw(st.sampled_from(["", "", "", "milestone"])),
                refers_to=frozenset(draw(st.lists(st.sampled_from(older), max_size=2))) if older else frozenset(),
                state=draw(st.sampled_from(["committed", "committed", "committed", "superseded", "damaged"])),
            )
        )
    return found


@given(RULES, runs(), st.data())
def test_whatever_the_rules_what_is_protected_stays(keep, found, data):
    held = data.draw(st.lists(st.sampled_from([c.directory for c in found]), max_size=2)) if found else []
    decision = decide(keep, found, dict.fromkeys(held, "held"))
    assert decision.stays.keys() | decision.goes.keys() == {c.directory for c in found}
    assert not decision.stays.keys() & decision.goes.keys()
    counting = sorted(c.directory for c in found if c.state == "committed")
    assert set(counting[-2:]) <= decision.stays.keys()
    assert set(held) <= decision.stays.keys()
    assert all(c.refers_to <= decision.stays.keys() for c in found if c.directory in decision.stays)
    assert decision.best is None or decision.best in decision.stays
    assert set(decision.epochs.values()) <= decision.stays.keys()
    assert all(decision.why(c.directory) for c in found)
    again = decide(keep, [c for c in found if c.directory in decision.stays], dict.fromkeys(held, "held"))
    assert not again.goes
