"""A copy to a URI: a step of a run, written in place as a save writes one, and committed last.

Its attempt is the copy's own name. What is finished is what has an ack, so a copy that was killed goes on from there;
what it leaves behind for good is for `distckpt gc`. Two processes that make the same copy write the same bytes, and of
two commits one wins: so nothing needs a lock.
"""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from distckpt.errors import Corrupt, FormatError, KeyMissing
from distckpt.format import manifest
from distckpt.format.layout import StepDir
from distckpt.format.manifest import FileInfo
from distckpt.loading.open import Checkpoint
from distckpt.saving.commit import (
    Attempt,
    acked_ranks,
    commit,
    committed_manifest,
    read_ack,
    remove_acks,
    write_ack,
)
from distckpt.store.base import write_all
from distckpt.store.open import open_store

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from distckpt.foreign.sink import Output, Sink


class InPlace:
    """The attempt: each output of the sink is a rank's data file. See Staging, which does the same in a file system."""

    def __init__(self, sink: Sink, uri: str, attempt: str) -> None:
        directory = StepDir.parse(sink.top)
        assert directory is not None
        self.data = open_store(uri)
        self._attempt = Attempt(directory, attempt, len(sink.outputs))
        self._ranks = {output.name: rank for rank, output in enumerate(sink.outputs)}
        self._whole: manifest.Manifest | None = None

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Nothing need be held."""
        yield

    def finished(self, outputs: Iterable[Output]) -> dict[str, Any]:
        """What those of the outputs returned that are finished, by name."""
        outputs = list(outputs)
        if made := committed_manifest(self.data, self._attempt):  # and its acks are gone
            return {o.name: _told(made.files[self._ranks[o.name]]) for o in outputs}
        acked = acked_ranks(self.data, self._attempt)
        sizes = {entry.name: entry.size for entry in self.data.list(str(self._attempt.directory))}
        wanted = [o for o in outputs if self._ranks[o.name] in acked and sizes.get(o.name.rpartition("/")[2]) == o.size]
        with ThreadPoolExecutor(self.data.pace.in_flight, "distckpt-copy") as pool:
            found = zip(wanted, pool.map(self._said, wanted), strict=True)
            return {output.name: said for output, said in found if said}

    def _said(self, output: Output) -> list[Any] | None:
        """What the ack of an output says; None where that cannot be used."""
        try:
            return read_ack(self.data, self._attempt, self._ranks[output.name]).get("file")
        except (KeyMissing, Corrupt, FormatError):
            return None

    def make(self, output: Output) -> None:
        """Write an output, and say that it is written."""
        file = FileInfo(*output.write(self.data))
        write_ack(self.data, self._attempt, self._ranks[output.name], file, None)

    def complete(self, files: Iterable[tuple[str, bytes]]) -> Checkpoint:
        """Write what makes the copy whole but the commit, and open it as if that were there."""
        *others, (_, last) = files
        for name, data in others:
            write_all(self.data, name, data)
        self._whole = manifest.decode(last, None)
        return Checkpoint(self.data, self._attempt.directory, self._whole)

    def forget(self) -> None:
        """Take no output for finished any more: what was written is not what is there."""
        remove_acks(self.data, self._attempt)

    def publish(self) -> None:
        """Commit. RunConflict where another has committed this step."""
        assert self._whole is not None
        commit(self.data, self._attempt, self._whole)
        remove_acks(self.data, self._attempt)


def _told(file: FileInfo) -> list[Any]:
    return [file.name, file.size, file.header, file.digest]
