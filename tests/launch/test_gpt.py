from __future__ import annotations

import pytest
import torch

from launch.gpt import GPT, Shape


def test_the_default_has_some_millions_of_parameters_and_ties_its_output():
    model = GPT(Shape())
    assert 2e6 < sum(p.numel() for p in model.parameters()) < 5e6
    assert model.out.weight is model.embed.weight


def test_logits_of_a_byte_do_not_depend_on_later_bytes():
    model = GPT(Shape(layers=2, width=12, heads=3, seq=8)).eval()
    tokens = torch.arange(16).reshape(2, 8)
    logits = model(tokens)
    assert logits.shape == (2, 8, 256)
    tokens[:, 5:] = 0
    assert torch.allclose(model(tokens)[:, :5], logits[:, :5], atol=1e-6)


def test_dropout_follows_the_generator_and_only_in_training():
    model = GPT(Shape(layers=1, width=12, heads=3, seq=8, dropout=0.5))
    tokens = torch.zeros(1, 8, dtype=torch.int64)

    def run(seed):
        torch.manual_seed(seed)
        return model(tokens)

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    model.eval()
    assert torch.equal(run(1), run(2))


def test_a_width_that_the_heads_cannot_share_is_refused():
    with pytest.raises(ValueError, match="width 10 cannot be divided among 3 heads"):
        Shape(width=10, heads=3)
