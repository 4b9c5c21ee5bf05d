"""commit.json: what is written is read, every damaged byte is found, and nothing malformed is believed."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distckpt.errors import Corrupt, FormatError, NewerFormat
from distckpt.format.box import Run
from distckpt.format.checksum import digest
from distckpt.format.manifest import FileInfo, Manifest, ObjectInfo, TensorInfo, decode, encode
from distckpt.format.partition import Copies, FlatEven, Grid, Pieces, Split
from tests.format.draw import damaged, json_values, partitions

ATTEMPT = "0123456789ab"


def files(count):
    return tuple(FileInfo(f"rank-{r:05d}.{ATTEMPT}.safetensors", 9000 + r, 4096, f"{r:032x}") for r in range(count))


def manifest(**changes) -> Manifest:
    members = {
        "step": 100,
        "generation": 1,
        "launch": 3,
        "attempt": ATTEMPT,
        "date": "2026-01-02T03:04:05Z",
        "world_size": 2,
        "tensors": {
            "model.w": TensorInfo((4, 3), "float32", Grid((4, 3), ((Split(2, 1),), ()), 0)),
            "model.b": TensorInfo((), "bfloat16", Grid((), (), 1)),
            "model.mean": TensorInfo((2,), "float32", Copies((2,), 0, 2)),
            "optim.w.exp_avg": TensorInfo((4, 3), "float32", FlatEven((4, 3), 8, 2, 0)),
            "model.frozen": TensorInfo((5,), "uint8", Pieces((5,), ((2, Run(0, 2)), (0, Run(2, 5))))),
        },
        "files": (*files(2), FileInfo(f"step-00000001/rank-00000.{ATTEMPT}.safetensors", 9000, 4096, "f" * 32)),
        "objects": {"trainer_state": ObjectInfo(f"trainer_state.{ATTEMPT}.json", 17, "0" * 32)},
        "rank_objects": {"rng": "derive", "loader": "refuse"},
        "aliases": {"model.tied": "model.w"},
        "metrics": {"loss": 0.25, "best": float("inf"), "tokens": 2**70, "$x": (1, 2)},
        "writer": {"distckpt": "0.1.0", "torch": "2.13"},
    }
    return Manifest(**members | changes)


def signed(body) -> bytes:
    text = json.dumps(body).encode()[:-1]
    return text + f',"digest":"{digest(text)}"}}\n'.encode()


def body_of(m: Manifest):
    body = json.loads(encode(m))
    del body["digest"]
    return body


def test_a_manifest_survives():
    assert decode(encode(manifest()), None) == manifest()


@given(st.dictionaries(st.text(max_size=8), partitions, max_size=4))
def test_a_manifest_of_any_partitions_survives(divided):
    tensors = {fqn: TensorInfo(p.shape, "float32", p) for fqn, p in divided.items()}
    count = max((p.last_file for p in divided.values()), default=0) + 1
    m = manifest(tensors=tensors, files=files(count), aliases={}, world_size=1)
    assert decode(encode(m), None) == m


def test_equal_manifests_have_equal_bytes_whatever_order_their_tensors_came_in():
    turned = dict(reversed(manifest().tensors.items()))
    assert encode(manifest(tensors=turned)) == encode(manifest())


def test_the_digest_is_the_last_member_of_a_json_object():
    data = encode(manifest())
    assert list(json.loads(data))[-1] == "digest"
    text, _, rest = data.rpartition(b',"digest":"')
    assert rest == digest(text).encode() + b'"}\n'


def test_every_damaged_byte_is_found():
    data = encode(manifest())
    for i in range(len(data)):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[i] ^= 1 << bit
            with pytest.raises(Corrupt):
                decode(bytes(flipped), None)


@pytest.mark.parametrize("cut", [0, 1, 40, 300])
def test_a_truncated_or_grown_manifest_is_corrupt(cut):
    data = encode(manifest())
    for damaged_data in (data[:cut], data[: -cut or None][:-1], data[cut + 1 :], data + b"\n"):
        with pytest.raises(Corrupt):
            decode(damaged_data, None)


def test_a_newer_version_says_so_and_what_to_do():
    with pytest.raises(NewerFormat, match="Install a newer distckpt"):
        decode(signed({"format": 2, "whatever": 1}), None)


@pytest.mark.parametrize("version", [None, 0, -1, 1.0, "1", True, [], 10**30])
def test_a_version_that_is_no_positive_integer_is_refused(version):
    with pytest.raises(FormatError):
        decode(signed(body_of(manifest()) | {"format": version}), None)


def changed(*path_and_value):
    *path, last, value = path_and_value
    body = node = body_of(manifest())
    for key in path:
        node = node[key]
    node[last] = value
    return body


@pytest.mark.parametrize(
    "body",
    [
        [],
        None,
        {},
        {"format": 1},
        changed("step", -1),
        changed("step", "1"),
        changed("generation", 0),
        changed("launch", -1),
        changed("world_size", 0),
        changed("world_size", 4),
        changed("tensors", []),
        changed("tensors", "model.w", 0, [4, -3]),
        changed("tensors", "model.w", 0, [4, 3.0]),
        changed("tensors", "model.w", 1, "float33"),
        changed("tensors", "model.w", 1, ["float32"]),
        changed("tensors", "model.w", 2, {"file": 3}),
        changed("tensors", "model.w", 2, {"file": 0, "grid": [[[5, 1]]]}),
        changed("tensors", "model.w", 2, {"pieces": [[0, 0, 11]]}),
        changed("tensors", "model.w", 2, None),
        changed("files", 0, 0, "../rank"),
        changed("files", 0, 0, "/etc/passwd"),
        changed("files", 0, 0, "a//b"),
        changed("files", 0, 0, ".hidden"),
        changed("files", 0, 0, "a\\b"),
        changed("files", 0, 1, 10),
        changed("files", 0, 2, 8),
        changed("files", 0, 3, "0" * 31),
        changed("files", 0, None),
        changed("objects", "trainer_state", 0, "other/x.json"),
        changed("objects", "trainer_state", 0, ".."),
        changed("objects", "trainer_state", 1, -1),
        changed("objects", "trainer_state", 2, ""),
        changed("rank_objects", "rng", "forget"),
        changed("rank_objects", "rng", ["derive"]),
        changed("aliases", "model.tied", "model.nothing"),
        changed("aliases", "model.tied", ["model.w"]),
        changed("aliases", "model.b", "model.w"),
        changed("metrics", []),
        changed("metrics", "loss", {"$no": 1}),
        changed("metrics", "loss", float("nan")),
        changed("writer", "torch", 2),
    ],
    ids=lambda b: None,
)
def test_a_malformed_manifest_is_refused_even_where_its_digest_holds(body):
    with pytest.raises(FormatError):
        decode(signed(body), None)


def test_a_file_index_too_long_to_print_is_a_format_error():
    splits = [[[10**4000, 1], [10**4000, 10**4200]]]
    with pytest.raises(FormatError):
        decode(signed(changed("tensors", "model.w", 2, {"file": 0, "grid": splits})), None)


@pytest.mark.parametrize("depth", [150, 500, 900, 950, 960, 970, 980, 990, 100_000])
def test_a_deeply_nested_manifest_is_a_format_error(depth):
    for where in ('"metrics": {}', '"writer": {}', '"aliases": {}'):
        text = json.dumps(body_of(manifest(metrics={}, writer={}, aliases={})))
        nested = text.replace(where, where[:-2] + '{"a":' * depth + "{}" + "}" * depth)[:-1].encode()
        assert len(nested) > len(text)
        # metrics may nest as deep as any object, so only beyond that is an error sure
        if depth > 200 or "metrics" not in where:
            with pytest.raises(FormatError):
                decode(nested + f',"digest":"{digest(nested)}"}}\n'.encode(), None)


@given(st.one_of(damaged(body_of(manifest())), json_values))
def test_any_signed_json_is_a_format_error_or_a_manifest_that_survives(body):
    try:
        text = signed(body)
        found = decode(text, None)
    except (FormatError, Corrupt):
        return
    assert decode(encode(found), None) == found


@given(st.binary(max_size=200))
def test_any_bytes_are_corrupt(data):
    with pytest.raises(Corrupt):
        decode(data, None)


def test_the_index_of_an_even_split_grows_with_its_files_only():
    def size(ranks):
        shape = (16384, 64)
        tensors = {
            f"model.{i:03d}": TensorInfo(shape, "float32", Grid(shape, ((Split(ranks, 1),), ()), 0)) for i in range(200)
        }
        body = body_of(manifest(tensors=tensors, files=files(ranks), world_size=ranks, aliases={}))
        return len(json.dumps(body["tensors"]))

    digits = 200 * (len("16384") - len("8"))
    assert size(16384) - size(8) == digits


@pytest.mark.parametrize(
    "change",
    [
        {"tensors": {"model.w": [[1 << 40], "uint8", {"file": 0}]}},
        {"tensors": {"model.w": [[1 << 62] * 20, "float32", {"file": 0}]}},
        {"tensors": {"model.w": [[1] * 65, "uint8", {"file": 0}]}},
        {"tensors": {"model.w": [[4], "uint8", {"file": 0, "grid": [[[1, 0]] * 65]}]}},
        {"tensors": {f"model.{i}": [[10000], "uint8", {"file": 0}] for i in range(3)}},
        {"files": [["a", 1 << 62, 1 << 61, "0" * 32]] * 2},
        {"objects": {"o": ["o.json", 1 << 45, "0" * 32]}},
    ],
    ids=["tensor", "dimensions", "many dimensions", "many cuts", "sum", "header", "object"],
)
def test_sizes_that_no_file_bears_out_are_refused_before_memory_is_taken_for_them(change):
    with pytest.raises(FormatError):
        decode(signed(body_of(manifest(aliases={})) | change), None)
