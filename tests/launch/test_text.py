from __future__ import annotations

import itertools

import pytest
import torch

from launch.text import StdlibText


def test_the_text_is_the_same_every_time():
    one, two = StdlibText(20_000, 64), StdlibText(20_000, 64)
    assert one.digest == two.digest
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_windows_cover_the_text_and_share_their_border():
    text = StdlibText(20_000, 64)
    assert len(text) == 19_999 // 64
    samples = list(text)
    assert all(s.shape == (65,) and s.dtype == torch.int64 for s in samples)
    assert all(a[-1] == b[0] for a, b in itertools.pairwise(samples))
    assert bytes(torch.cat([s[:-1] for s in samples]).tolist()).startswith(b'"""Record of phased-in')


def test_a_longer_text_begins_with_the_shorter():
    assert all(torch.equal(a, b) for a, b in zip(StdlibText(5_000, 50), StdlibText(9_000, 50), strict=False))


def test_more_text_than_there_is_and_too_little_are_refused():
    with pytest.raises(ValueError, match="no window of 64"):
        StdlibText(64, 64)
    with pytest.raises(ValueError, match="holds only"):
        StdlibText(10**9, 64)
