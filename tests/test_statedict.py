"""Naming what is in a state dict: pure, with stand-ins for tensors."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import pytest

from distckpt.errors import Unsupported
from distckpt.format.objects import TensorRef
from distckpt.statedict import canonical, insert, parameters_of, references, state_of


@dataclass(frozen=True)
class T:
    """Stands for a tensor."""

    value: object = 0
    kind: str = "torch"


@dataclass(frozen=True)
class Number(T):
    """Stands for a tensor of no dimensions."""

    shape: tuple = ()

    def item(self):
        return self.value


def kind_of(value):
    return value.kind if isinstance(value, T) else None


def named(tree):
    found = canonical(tree, kind_of)
    return dict(sorted(found.tensors.items())), found.objects


GROUPS = [{"lr": 0.1, "params": ["a", "b.c"]}]


def test_a_model_is_its_tensors():
    tensors, objects = named({"model": OrderedDict({"a": T(1), "b.c": T(2)})})
    assert tensors == {"model.a": T(1), "model.b.c": T(2)}
    assert objects == {}


def test_extra_state_of_modules_is_one_object_by_module():
    tensors, objects = named({"model": {"a": T(1), "_extra_state": 5, "b._extra_state": {"x": T(2)}}})
    assert tensors == {"model.a": T(1), "model.extra_state.b.x": T(2)}
    assert objects == {"model.extra_state": {"": 5, "b": {"x": TensorRef("model.extra_state.b.x")}}}


def test_an_optimizer_is_named_by_parameter_and_state():
    tensors, objects = named(
        {"optim": {"state": {"a": {"m": T(1), "n": 3}, "b.c": {"m": T(2)}}, "param_groups": GROUPS}}
    )
    assert tensors == {"optim.a.m": T(1), "optim.b.c.m": T(2)}
    assert objects == {"optim": {"optimizer": "", "groups": GROUPS, "values": {"a": {"n": 3}}}}


def test_a_flattened_optimizer_has_the_same_names():
    flat = {
        "state.a.m": T(1),
        "state.b.c.m": T(2),
        "state.a.n": 3,
        "param_groups.a.lr": 0.1,
        "param_groups.b.c.lr": 0.1,
    }
    nested = {"state": {"a": {"m": T(1), "n": 3}, "b.c": {"m": T(2)}}, "param_groups": GROUPS}
    assert named({"optim": flat}) == named({"optim": nested})


def test_parameters_named_by_position_keep_their_type_in_objects():
    """Other tools turn the keys of a state into text, while the groups list numbers."""
    state = {"0": {"m": T(1), "n": 2}}
    tensors, objects = named({"optim": {"state": state, "param_groups": [{"lr": 1, "params": [0]}]}})
    assert tensors == {"optim.0.m": T(1)}
    assert objects["optim"]["values"] == {0: {"n": 2}}


def test_a_hyper_parameter_that_is_a_tensor_of_no_dimensions_is_a_number():
    groups = [{"lr": Number(0.1), "betas": (Number(0.9), 0.99), "w": T(7), "params": []}]
    tensors, objects = named({"optim": {"state": {}, "param_groups": groups}})
    assert objects["optim"]["groups"][0]["lr"] == 0.1
    assert objects["optim"]["groups"][0]["betas"] == (0.9, 0.99)
    assert tensors == {"optim.param_groups.0.w": T(7)}


def test_several_models_or_optimizers_are_led_by_their_names():
    optimizer = {"state": {"a": {"m": T(3)}}, "param_groups": GROUPS}
    tensors, objects = named({"model": {"g": {"a": T(1)}, "d": {"a": T(2)}}, "optim": {"g": optimizer, "note": 4}})
    assert tensors == {"model.g.a": T(1), "model.d.a": T(2), "optim.g.a.m": T(3)}
    assert objects.keys() == {"optim.g", "optim.note"}


def test_anything_else_is_an_object_with_references():
    tensors, objects = named({"x": {1: T(1), "y": [T(2), (3, T(4, "numpy"))]}, "n": None, "t": T(5)})
    assert tensors == {"x.1": T(1), "x.y.0": T(2), "x.y.1.1": T(4, "numpy"), "t": T(5)}
    assert objects == {
        "x": {1: TensorRef("x.1"), "y": [TensorRef("x.y.0"), (3, TensorRef("x.y.1.1", "numpy"))]},
        "n": None,
    }


def test_keys_that_cannot_be_names_share_an_object():
    tensors, objects = named({3: T(1), "two words": 2, "": T(3), "state_dict": {"a": T(4)}, ("a", 1): "x"})
    assert objects.keys() == {"state_dict"}
    assert objects["state_dict"].keys() == {3, "two words", "", "state_dict", ("a", 1)}
    assert sorted(references(objects)) == sorted(tensors)


def test_keys_that_read_alike_have_names_of_their_own():
    tensors, objects = named({"x": {1: T("int"), "1": T("str"), "n": 0}})
    assert insert(objects["x"], tensors) == {1: T("int"), "1": T("str"), "n": 0}
    assert len(tensors) == 2


def test_two_entries_of_one_name_are_refused():
    with pytest.raises(Unsupported, match=r"a\.b"):
        named({"a.b": T(1), "a": {"b": T(2)}})
    with pytest.raises(Unsupported, match=r"optim\.a\.b\.c"):
        state = {"a": {"b.c": T(1)}, "a.b": {"c": T(2)}}
        named({"optim": {"state": state, "param_groups": [{"params": ["a", "a.b"]}]}})


def test_a_state_is_taken_apart_by_the_parameters_there_are():
    parameters = parameters_of([{"params": [0, "a.b", "a"]}])
    assert state_of("optim.0.m", "optim", parameters) == (0, "m")
    assert state_of("optim.a.b.m", "optim", parameters) == ("a.b", "m")
    assert state_of("optim.a.c.m", "optim", parameters) == ("a", "c.m")
    assert state_of("optim.z.m", "optim", parameters) is None
