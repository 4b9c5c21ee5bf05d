"""Every error distckpt raises, one tree. Each is also the built-in that fits it, so that plain `except` clauses work.

    DistckptError
    ├── NotACheckpoint      FileNotFoundError  no such directory, nothing committed there, a half-written save
    ├── FormatError         ValueError         bytes that do not follow docs/format.md
    │   └── NewerFormat                        written by a newer distckpt
    ├── Corrupt             ValueError         committed bytes that no longer match their checksums
    │   └── Untrusted                          not signed by a key that is trusted (signing.py)
    ├── Mismatch            ValueError         the checkpoint does not fit the state; every problem listed
    ├── Unsupported         TypeError          a value or layout that cannot be saved
    ├── StateUnusable       RuntimeError       a load failed half-way; the state must not be saved or trained on
    ├── RunConflict         RuntimeError       another launch or job owns this step or run directory
    ├── StoreError          OSError            the file system or object store refused
    │   ├── KeyMissing      FileNotFoundError
    │   ├── KeyTruncated    EOFError           a key is shorter than the bytes asked of it
    │   └── KeyExists       FileExistsError    create-if-absent found the key present
    ├── RankFailed          RuntimeError       other ranks failed, for reasons of more than one kind
    │   └── OutOfStep                          ranks called different things: none knows what became of the others'
    └── RanksMissing        TimeoutError       ranks that did not answer in time, by number

Each takes one message: what, where, expected, found, what to do. So an error can cross to other ranks as
(class name, message) and be raised there as the same class.
"""

from __future__ import annotations


class DistckptError(Exception):
    """Base of every error that distckpt raises on purpose."""


class NotACheckpoint(DistckptError, FileNotFoundError):
    """There is no committed checkpoint where one was asked for."""


class FormatError(DistckptError, ValueError):
    """Bytes that do not follow the on-disk format."""


class NewerFormat(FormatError):
    """A format version that this release does not know."""


class Corrupt(DistckptError, ValueError):
    """Committed bytes that do not match their checksums, or are gone."""


class Untrusted(Corrupt):
    """Bytes that no trusted key has signed, where signatures are required."""


class Mismatch(DistckptError, ValueError):
    """The checkpoint does not fit the state it is loaded into. Nothing was moved."""


class Unsupported(DistckptError, TypeError):
    """A value or a layout that cannot be saved."""


class StateUnusable(DistckptError, RuntimeError):
    """A load failed after bytes had moved: the live state is a mix until another load succeeds."""


class RunConflict(DistckptError, RuntimeError):
    """Another launch or job has committed what this one was about to, or owns the run directory."""


class StoreError(DistckptError, OSError):
    """The file system or the object store refused an operation."""


class KeyMissing(StoreError, FileNotFoundError):
    """A key that does not exist."""


class KeyTruncated(StoreError, EOFError):
    """A key ends before the last byte that was asked for."""


class KeyExists(StoreError, FileExistsError):
    """A key that was to be created exists already."""


class RankFailed(DistckptError, RuntimeError):
    """Ranks failed, for reasons of more than one kind. The message names each rank and its cause."""


class OutOfStep(RankFailed):
    """Ranks are not at the same point of the program. What each had begun goes on."""


class RanksMissing(DistckptError, TimeoutError):
    """Ranks that did not answer within the timeout. The message names them."""


class StateWarning(UserWarning):
    """What a resume wants known: per-rank values derived anew, an environment that changed."""


def by_name(name: str) -> type[DistckptError]:
    """Class of this module named `name`; `RankFailed` for any other name (a foreign error on another rank)."""
    found = globals().get(name)
    return found if isinstance(found, type) and issubclass(found, DistckptError) else RankFailed


def failure_text(error: BaseException) -> str:
    """What an error says, with its class where the text alone would not tell."""
    text = str(error)
    return text if text and isinstance(error, DistckptError) else f"{type(error).__name__}: {text}"
