"""distckpt's own format: the files of one step directory."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from distckpt import __version__
from distckpt.foreign.sink import Output, Sink, refuse_empty
from distckpt.format import datafile, manifest, objects
from distckpt.format.box import Box
from distckpt.format.layout import COMMIT, chunk_name, data_file, object_file
from distckpt.format.manifest import FileInfo, ObjectInfo
from distckpt.loading.stream import Stretch, stream
from distckpt.run.publish import now
from distckpt.saving.image import MODEL_LEAD
from distckpt.saving.part import whole
from distckpt.signing import algorithm, refuse_keyless, signer

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from distckpt.format.box import Region, Shape
    from distckpt.format.layout import StepDir
    from distckpt.store.base import Store
    from distckpt.tools.view import View


def run_sink(view: View, directory: StepDir, attempt: str, room: int, has: Iterable[FileInfo] = ()) -> Sink:
    """Plan the files of a step directory. NotACheckpoint where there is nothing to write.

    has: files of earlier checkpoints there, which are named where the source names equal ones of its own.
    """
    content = view.manifest
    refuse_empty(view)
    refuse_keyless()
    last = max((info.partition.last_file for info in content.tensors.values()), default=0)
    count = max(content.world_size, last + 1)
    known = {_content_of(file): file for file in has}
    named = {i: known[_content_of(f)] for i, f in enumerate(content.files) if "/" in f.name and _content_of(f) in known}
    written = {i: _data_file(view, f"{directory}/", i, attempt, room) for i in range(count) if i not in named}
    shared = {name: objects.encode(view.object(name), name) for name in content.objects}
    infos = {n: ObjectInfo(object_file(n, attempt), len(data), algorithm().digest(data)) for n, data in shared.items()}

    def finish(results: Mapping[str, Any]) -> list[tuple[str, bytes]]:
        whole = replace(
            content,
            generation=directory.generation,
            launch=0,
            attempt=attempt,
            date=content.date or now(),
            files=tuple(named.get(i) or FileInfo(*results[written[i].name]) for i in range(count)),
            objects=infos,
            writer={**content.writer, "distckpt": __version__},
            signature="",
        )
        manifest.check(whole)
        readable = [(f"{directory}/{infos[n].name}", data) for n, data in shared.items()]
        return [*readable, (f"{directory}/{COMMIT}", manifest.encode(whole, signer()))]

    notes = [f"{name}: cannot be read safely; left out: {why}" for name, why in view.unreadable.items()]
    beside = [file.name for file in named.values()]
    return Sink([*written.values()], finish, notes, "inside", top=str(directory), beside=beside)


def _content_of(file: FileInfo) -> tuple[int, int, str]:
    """What files that are equal have in common: the digest is one of all their checksums."""
    return file.size, file.header, file.digest


def _data_file(view: View, lead: str, index: int, attempt: str, room: int) -> Output:
    chunks: dict[str, Stretch] = {}
    for fqn, info in view.manifest.tensors.items():
        for region in info.partition.of_file(index):
            copy_of = index if hasattr(info.partition, "copy_of") else None
            chunks[chunk_name(fqn, region, info.shape)] = Stretch.whole(fqn, region, info.dtype, copy_of)
    packed = datafile.pack(
        datafile.Chunk(name, s.dtype, _sizes(s.region), not s.fqn.startswith(MODEL_LEAD)) for name, s in chunks.items()
    )
    image = datafile.build(packed, _rank_objects(view, index), algorithm())
    name = data_file(index, attempt)

    def write(store: Store) -> list[Any]:
        wanted = [chunks[segment.name] for segment in image.segments]
        content = whole(image, (data for _, data in stream(view, wanted, room)))
        store.write(lead + name, content, size=image.size)
        return [name, image.size, len(image.header), content.digest]

    return Output(lead + name, image.size, write)


def _rank_objects(view: View, rank: int) -> bytes:
    own = view.rank_objects(rank) if rank < view.manifest.world_size and view.manifest.rank_objects else {}
    return json.dumps({n: objects.tag(v, n) for n, v in own.items()}, separators=(",", ":")).encode()


def _sizes(region: Region) -> Shape:
    return region.sizes if isinstance(region, Box) else (region.numel,)
