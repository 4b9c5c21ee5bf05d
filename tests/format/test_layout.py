"""Names on disk: each has one meaning, and none leads out of the run directory."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distckpt.errors import FormatError
from distckpt.format.box import Box, Run
from distckpt.format.layout import (
    StepDir,
    ack_file,
    ack_rank,
    attempt_of,
    check_key,
    chunk_name,
    data_file,
    fqn_of,
    launch_file,
    launch_number,
    object_file,
    pointer_file,
)
from tests.format.draw import regions, shapes

ATTEMPT = "0123456789ab"

nasty = st.one_of(
    st.text(alphabet="_\\[]:,01 flatx.\n\u0661", max_size=14),
    st.lists(
        st.sampled_from(
            ["__", "_", "\\", "x", "[0:1]", "[flat 0:1]", "[0:1,2:3]", "[", "]", "\n", "[]", "[\u0661:\u0662]"]
        ),
        max_size=5,
    ).map("".join),
)
NASTY = ["__x", "\\__x", "a[0:1]", "a[flat 0:1]", "a[0:1]\\", "\\x", "x\\", "\\", "\\\\", "", "__objects__", "a[0:1]\n"]
shape_and_region = shapes.flatmap(lambda s: st.tuples(st.just(s), regions(s)))


@given(st.one_of(nasty, st.sampled_from(NASTY), st.text()), shape_and_region)
def test_the_fqn_of_a_chunk_is_in_its_name(fqn, drawn):
    shape, region = drawn
    assert fqn_of(chunk_name(fqn, region, shape)) == fqn


@given(st.tuples(nasty, nasty), shape_and_region, shape_and_region)
def test_chunks_of_two_tensors_never_share_a_name(fqns, one, other):
    names = [chunk_name(fqn, region, shape) for fqn, (shape, region) in zip(fqns, (one, other), strict=True)]
    assert (names[0] != names[1]) or (fqns[0] == fqns[1])


@given(nasty, shapes.flatmap(lambda s: st.tuples(st.just(s), regions(s), regions(s))))
def test_two_chunks_of_one_tensor_share_a_name_only_if_they_are_one(fqn, drawn):
    shape, a, b = drawn
    same = a == b or a.numel == b.numel == Box.whole(shape).numel
    assert (chunk_name(fqn, a, shape) == chunk_name(fqn, b, shape)) == same


@given(st.one_of(nasty, st.sampled_from(NASTY)), shape_and_region)
def test_no_chunk_takes_a_reserved_name(fqn, drawn):
    shape, region = drawn
    assert not chunk_name(fqn, region, shape).startswith("__")


@pytest.mark.parametrize(
    ("fqn", "region", "name"),
    [
        ("model.w", Box((0, 0), (8, 4)), "model.w"),
        ("model.w", Run(0, 32), "model.w"),
        ("model.w", Box((2, 0), (2, 4)), "model.w[2:4,0:4]"),
        ("model.w", Box((2, 0), (0, 4)), "model.w[2:2,0:4]"),
        ("model.w", Run(3, 9), "model.w[flat 3:9]"),
        ("__x", Run(3, 9), "\\__x[flat 3:9]"),
        ("a[0:1]", Box((0, 0), (8, 4)), "a[0:1]\\"),
        ("x\\", Run(0, 1), "x\\\\[flat 0:1]"),
    ],
)
def test_a_chunk_s_name_is_its_fqn_and_its_slice(fqn, region, name):
    assert chunk_name(fqn, region, (8, 4)) == name


@given(st.integers(0, 10**12), st.integers(1, 1000))
def test_a_step_directory_is_found_by_its_name(step, generation):
    directory = StepDir(step, generation)
    assert StepDir.parse(str(directory)) == directory
    assert check_key(str(directory))


@pytest.mark.parametrize(
    "name",
    [
        "step-100",
        "step-00000100.tmp",
        "step-00000100.1",
        "step-00000100.02",
        "step-00000100.",
        "step-000000100",
        "step-0000010\u0660",
        "xstep-00000100",
        "step-00000100/",
        "step-00000100\n",
        "step--0000100",
        "",
    ],
)
def test_other_names_are_no_step_directories(name):
    assert StepDir.parse(name) is None


def test_step_directories_sort_by_step_then_generation():
    assert sorted([StepDir(10, 2), StepDir(9), StepDir(100), StepDir(10)]) == [
        StepDir(9),
        StepDir(10),
        StepDir(10, 2),
        StepDir(100),
    ]
    assert str(StepDir(10, 2)) == "step-00000010.2"


@given(st.integers(0, 10**7))
def test_the_names_of_a_rank_s_files_are_keys_that_say_what_they_are(number):
    for name in (data_file(number, ATTEMPT), ack_file(number, ATTEMPT), object_file("trainer_state", ATTEMPT)):
        assert attempt_of(check_key(name)) == ATTEMPT
    assert ack_rank(ack_file(number, ATTEMPT), ATTEMPT) == number
    assert ack_rank(ack_file(number, ATTEMPT), "f" * 12) is None
    assert ack_rank(data_file(number, ATTEMPT), ATTEMPT) is None
    assert launch_number(launch_file(number).partition("/")[2]) == number


@pytest.mark.parametrize(
    "name", ["1.json", "00001.json", "0001.json.tmp", "0001", "\u0660\u0660\u0660\u0661.json", "0001.json\n"]
)
def test_a_launch_has_one_name(name):
    assert launch_number(name) is None


@pytest.mark.parametrize("stem", ["ack-1", "ack-000001", "ack-0000\u0661", "nack-00001", "ack-00001x"])
def test_an_ack_has_one_name(stem):
    assert ack_rank(f"{stem}.{ATTEMPT}.json", ATTEMPT) is None


@pytest.mark.parametrize("name", ["commit.json", "a.0123456789AB.json", "a.0123456789ab.txt", f".a.{ATTEMPT}.json"])
def test_other_files_carry_no_attempt(name):
    assert attempt_of(name) is None


def test_names_are_what_the_format_says():
    assert data_file(7, ATTEMPT) == f"rank-00007.{ATTEMPT}.safetensors"
    assert ack_file(7, ATTEMPT) == f"ack-00007.{ATTEMPT}.json"
    assert object_file("trainer_state", ATTEMPT) == f"trainer_state.{ATTEMPT}.json"
    assert launch_file(3) == "launches/0003.json"
    assert pointer_file("last") == "last.json"


@pytest.mark.parametrize(
    "key",
    [
        "",
        "/",
        "/a",
        "a/",
        "a//b",
        ".",
        "..",
        "a/../b",
        "../a",
        ".a",
        "a/.b",
        "-a",
        "a b",
        "a\n",
        "a\\b",
        "a\0",
        "\u00e4",
        "x" * 256,
    ],
)
def test_a_key_that_could_lead_out_or_hide_is_refused(key):
    with pytest.raises(FormatError, match="not a key"):
        check_key(key)


@given(st.text(max_size=20))
def test_only_plain_names_are_keys(key):
    plain = re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*(/[A-Za-z0-9_][A-Za-z0-9_.+-]*)*", key)
    try:
        assert check_key(key) == key
        assert plain
    except FormatError:
        assert not plain
