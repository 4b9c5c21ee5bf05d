"""The data file: any safetensors reader opens it, no damage goes unseen, and a malformed header is a format error."""

from __future__ import annotations

import json
import struct
from math import prod

import pytest
import safetensors
import torch
from hypothesis import given
from hypothesis import strategies as st

from distckpt.errors import FormatError
from distckpt.format import datafile
from distckpt.format.checksum import BLOCK, CRC32C, SHA256
from distckpt.format.datafile import (
    DATA_ALIGNMENT,
    Chunk,
    Table,
    build,
    decode_header,
    decode_table,
    encode_table,
    pack,
    table_size,
)
from distckpt.format.dtype import ITEM_SIZE, stored_as
from tests.format.draw import damaged, json_values


def content_of(chunk: Chunk) -> bytes:
    """Bytes for a chunk, told from its name; only 0 and 1, which are values of every dtype."""
    return bytes((i * len(chunk.name) + ord(chunk.name[0])) % 3 % 2 for i in range(chunk.nbytes))


def file_of(chunks, objects=b"{}"):
    """(image, bytes of the whole file)."""
    image = build(pack(chunks), objects)
    by_name = {c.name: c for c in chunks}
    body = image.header
    for segment in image.segments:
        assert len(image.header) + segment.start == len(body)
        body += content_of(by_name[segment.name])
    body += image.objects
    assert len(body) == image.table_start
    sums = CRC32C.blocks()
    sums.feed(memoryview(body))
    return image, body + encode_table(Table(CRC32C, sums.finish()))


def every_dtype():
    return [Chunk(f"{dtype}.{n}", dtype, shape) for dtype in ITEM_SIZE for n, shape in enumerate([(2, 3), (), (0, 4)])]


chunk_lists = st.lists(
    st.builds(
        Chunk,
        st.text(min_size=1, max_size=30).filter(lambda n: not n.startswith("__")),
        st.sampled_from(list(ITEM_SIZE)),
        st.lists(st.sampled_from([0, 1, 2, 3, 7]), max_size=3).map(tuple),
        st.booleans(),
    ),
    max_size=60,
    unique_by=lambda c: c.name,
)


def test_safetensors_reads_every_dtype_bit_for_bit(tmp_path):
    chunks = every_dtype()
    path = tmp_path / "x.safetensors"
    path.write_bytes(file_of(chunks)[1])
    with safetensors.safe_open(path, "pt") as opened:
        assert set(opened.keys()) == {c.name for c in chunks} | {"__objects__", "__checksums__"}
        for chunk in chunks:
            tensor = opened.get_tensor(chunk.name)
            tag, shape = stored_as(chunk.dtype, chunk.shape)
            assert tuple(tensor.shape) == shape
            assert tensor.dtype == (torch.uint8 if tag == "U8" else getattr(torch, chunk.dtype))
            assert bytes(tensor.reshape(-1).view(torch.uint8).tolist()) == content_of(chunk)
            true = tensor.view(getattr(torch, chunk.dtype)) if tag == "U8" else tensor
            assert true.reshape(chunk.shape).dtype == getattr(torch, chunk.dtype)


def test_safetensors_reads_objects_and_table_as_bytes():
    image, data = file_of([Chunk("a", "float32", (3,))], b'{"a":1}')
    found = dict(safetensors.deserialize(data))
    assert bytes(found["__objects__"]["data"]) == b'{"a":1} '
    assert bytes(found["__checksums__"]["data"]) == data[image.table_start :]


@given(chunk_lists)
def test_a_file_of_any_chunks_is_one_that_safetensors_and_decode_header_agree_on(chunks):
    image, data = file_of(chunks)
    assert image.size == len(data)
    theirs = {name: (e["dtype"], tuple(e["shape"]), bytes(e["data"])) for name, e in safetensors.deserialize(data)}
    ours = decode_header(image.header, len(data))
    assert {n: (e.tag, e.shape, data[e.start : e.stop]) for n, e in ours.items()} == theirs
    assert {c.name: content_of(c) for c in chunks} == {n: t[2] for n, t in theirs.items() if not n.startswith("__")}


@given(chunk_lists)
def test_chunks_lie_packed_and_aligned_larger_items_and_the_model_first(chunks):
    image = build(pack(chunks), b"")
    by_name = {c.name: c for c in chunks}
    placed = [by_name[s.name] for s in image.segments]
    assert len(image.header) % DATA_ALIGNMENT == 0
    assert [(ITEM_SIZE[c.dtype], not c.last) for c in placed] == sorted(
        ((ITEM_SIZE[c.dtype], not c.last) for c in placed), reverse=True
    )
    position = 0
    for chunk, segment in zip(placed, image.segments, strict=True):
        assert (segment.start, segment.nbytes) == (position, prod(chunk.shape) * ITEM_SIZE[chunk.dtype])
        assert segment.start % ITEM_SIZE[chunk.dtype] == 0
        position += segment.nbytes
    assert image.objects_start == len(image.header) + position


@given(chunk_lists, st.randoms())
def test_the_order_in_which_chunks_are_given_changes_nothing(chunks, random):
    shuffled = random.sample(chunks, len(chunks))
    assert build(pack(chunks), b"{}") == build(pack(shuffled), b"{}")


@pytest.mark.parametrize("count", [40, 57, 58, 59, 60, 3000])
def test_the_header_grows_by_whole_pages(count):
    chunks = [Chunk(f"model.layers.{i}.w", "float32", (1,)) for i in range(count)]
    image, data = file_of(chunks)
    assert len(image.header) % DATA_ALIGNMENT == 0
    assert len(image.header) > DATA_ALIGNMENT or count < 60
    text = image.header[8:].rstrip(b" ")
    assert len(image.header) - 8 - len(text) < DATA_ALIGNMENT
    assert len(decode_header(image.header, len(data))) == len(safetensors.deserialize(data)) == count + 2


def test_a_header_that_no_safetensors_reader_takes_is_refused(monkeypatch):
    monkeypatch.setattr(datafile, "MAX_HEADER", 5000)
    with pytest.raises(FormatError, match="data file header of 8192 bytes"):
        build(pack([Chunk(f"{i}", "float32", (1,)) for i in range(90)]), b"")


@pytest.mark.parametrize("names", [["a", "a"], ["__objects__"], ["__metadata__"], ["__checksums__"]], ids=",".join)
def test_a_name_that_would_hide_another_chunk_is_refused(names):
    with pytest.raises(FormatError, match="chunk"):
        build(pack([Chunk(n, "float32", (1,)) for n in names]), b"")


def test_every_damaged_byte_of_header_or_table_changes_the_digest_of_the_file():
    image, data = file_of([Chunk("a", "float32", (3,)), Chunk("b[0:1]", "bfloat16", (1, 2))])
    header, table = data[: len(image.header)], data[image.table_start :]
    whole = CRC32C.digest(header, table)
    for part, other in ((header, lambda p: (p, table)), (table, lambda p: (header, p))):
        for i in range(len(part)):
            flipped = bytearray(part)
            flipped[i] ^= 1 << i % 8
            assert CRC32C.digest(*other(bytes(flipped))) != whole


def test_every_damaged_byte_before_the_table_is_found_in_its_block():
    image, data = file_of([Chunk("a", "uint8", (BLOCK + 5,))])
    table = decode_table(data[image.table_start :], image.table_start, CRC32C)
    for i in (0, 8, len(image.header), BLOCK - 1, BLOCK, image.objects_start, image.table_start - 1):
        flipped = bytearray(data[: image.table_start])
        flipped[i] ^= 0x10
        blocks = [memoryview(flipped)[k * BLOCK : (k + 1) * BLOCK] for k in range(2)]
        assert [k for k in range(2) if not table.holds(k, [blocks[k]])] == [i // BLOCK]


@pytest.mark.parametrize("algorithm", [CRC32C, SHA256], ids=lambda a: a.name)
@pytest.mark.parametrize("covered", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK])
def test_a_table_survives_and_has_the_size_it_says(algorithm, covered):
    table = Table(algorithm, bytes(range(-(-covered // BLOCK) * algorithm.size)))
    data = encode_table(table)
    assert len(data) == table_size(covered, algorithm)
    assert decode_table(data, covered, algorithm) == table


def test_a_table_says_what_its_sums_are():
    assert encode_table(Table(CRC32C, b"\4\3\2\1")) == b"crc32c\0\0\0\0\0\0\x00\x00\x10\x00\x04\x03\x02\x01"


ONE = encode_table(Table(CRC32C, bytes(4)))


@pytest.mark.parametrize(
    "table",
    [
        b"",
        encode_table(Table(CRC32C, bytes(8))),
        ONE[:-1],
        b"sha256" + ONE[6:],
        ONE[:12] + struct.pack("<I", 4096) + b"\0" * 4,
    ],
    ids=["empty", "long", "short", "algorithm", "block"],
)
def test_a_table_of_another_size_or_kind_is_refused(table):
    with pytest.raises(FormatError, match="checksum"):
        decode_table(table, 10, CRC32C)


def header_of(entries) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


def entries_of(image):
    return json.loads(image.header[8:])


@given(st.binary(max_size=60), st.integers(0, 10_000))
def test_any_bytes_are_no_header(data, size):
    with pytest.raises(FormatError):
        decode_header(data, size)
    with pytest.raises(FormatError):
        decode_header(struct.pack("<Q", len(data)) + data, size)


@pytest.mark.parametrize("depth", [500, 950, 1000, 100_000])
def test_a_deeply_nested_header_is_a_format_error(depth):
    for nest in (b'{"a":' * depth + b"1" + b"}" * depth, b"[" * depth + b"]" * depth):
        with pytest.raises(FormatError):
            decode_header(struct.pack("<Q", len(nest)) + nest, 10)


@given(damaged(entries_of(build(pack([Chunk("a", "float32", (3,)), Chunk("b", "complex64", (2,))]), b"{}"))))
def test_a_damaged_header_is_a_format_error_or_describes_the_whole_file(entries):
    header = header_of(entries)
    size = len(header) + 3 * 4 + 2 * 8 + 4 + table_size(1, CRC32C)
    try:
        found = list(decode_header(header, size).values())
    except FormatError:
        return
    assert [found[0].start, *(e.stop for e in found)] == [*(e.start for e in found), size]


@given(json_values)
def test_any_json_is_no_header(value):
    with pytest.raises(FormatError):
        decode_header(header_of({"a": value}), 100)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e["a"].update(dtype="F33"), "malformed"),
        (lambda e: e["a"].update(shape=[4]), "malformed"),
        (lambda e: e["a"].update(shape=[-3]), "malformed"),
        (lambda e: e["a"].update(data_offsets=[4, 16]), "begins at"),
        (lambda e: e["a"].update(data_offsets=[12, 0]), "malformed"),
        (lambda e: e.pop("b"), "begins at"),
        (lambda e: e.pop("__checksums__"), "chunks end"),
        (lambda e: e.update({"c": {"dtype": "U8", "shape": [0], "data_offsets": [60, 60]}}), "begins at|chunks end"),
    ],
)
def test_a_header_with_a_hole_or_a_wrong_size_is_refused(change, message):
    image = build(pack([Chunk("a", "float32", (3,)), Chunk("b", "float16", (2,))]), b"{}")
    entries = entries_of(image)
    decode_header(image.header, image.size)
    change(entries)
    header = header_of(entries)
    with pytest.raises(FormatError, match=message):
        decode_header(header, image.size - len(image.header) + len(header))


def test_a_header_with_a_name_twice_is_refused():
    text = b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'
    with pytest.raises(FormatError, match="twice"):
        decode_header(struct.pack("<Q", len(text)) + text, 8 + len(text))


def test_a_file_of_another_size_is_refused():
    image = build(pack([Chunk("a", "float32", (3,))]), b"{}")
    for size in (image.size - 1, image.size + 1):
        with pytest.raises(FormatError, match="chunks end"):
            decode_header(image.header, size)
