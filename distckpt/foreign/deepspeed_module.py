"""The model of a checkpoint as a tag is to have it: what is trained, frozen, a buffer, and the dtype of each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from distckpt.errors import Mismatch, Unsupported
from distckpt.format.dtype import widens
from distckpt.format.objects import TensorRef
from distckpt.format.text import shown
from distckpt.statedict import is_extra_state

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from distckpt.format.manifest import TensorInfo

DTYPES = ("float32", "bfloat16", "float16")


class Module:
    """Names of the model's own tensors, those trained first.

    infos: of each. fqns: their canonical names. tied: other name -> name. extra: extra state of modules by its key.
    dtype: of the weights that are computed with.
    """

    def __init__(
        self, model: Mapping[str, Any], tensors: Mapping[str, TensorInfo], trained: Iterable[str], dtype: str
    ) -> None:
        self.extra = {name: value for name, value in model.items() if is_extra_state(name)}
        known = {n: ref.fqn for n, ref in model.items() if n not in self.extra and isinstance(ref, TensorRef)}
        self._trained = dict.fromkeys(trained)
        owners: dict[str, str] = {}
        for name in (*self._trained, *known):
            owners.setdefault(known[name], name)
        self.fqns = {name: fqn for fqn, name in owners.items()}
        self.tied = {name: owners[fqn] for name, fqn in known.items() if owners[fqn] != name}
        self.infos = {name: tensors[fqn] for name, fqn in self.fqns.items()}
        self._dtype = dtype
        self._frozen: set[str] = set()

    def freeze(self, said: Iterable[str], asked: Iterable[str]) -> None:
        """Say which are parameters without gradients. said: by the source; asked: these must be there. Mismatch."""
        if unknown := [n for n in asked if n not in self.infos and n not in self.tied]:
            raise Mismatch(f"frozen={shown(unknown)}: the model has no parameters of these names")
        self._frozen = {*said, *asked} - self._trained.keys()

    @property
    def frozen(self) -> list[str]:
        """Names of parameters without gradients."""
        return [name for name in self.infos if name in self._frozen]

    @property
    def buffers(self) -> list[str]:
        """Names of what is no parameter."""
        return [name for name in self.infos if self.is_buffer(name)]

    def is_buffer(self, name: str) -> bool:
        """Whether this is neither trained nor frozen."""
        return name not in self._trained and name not in self._frozen

    def dtype_of(self, name: str) -> str:
        """Dtype that a tensor has in the model's part of a tag."""
        own = self.infos[name].dtype
        computed = name in self._trained or (name in self._frozen and own in {*DTYPES, "float64"})
        return self._dtype if computed else own

    def refuse_narrowing(self) -> None:
        """Unsupported for parameters whose values float32, which ZeRO's masters are, has not."""
        for name in self._trained:
            own = self.infos[name].dtype
            if own != "float32" and not widens(own, "float32"):
                raise Unsupported(
                    f"{self.fqns[name]}: is {own}: the master weights of a tag are float32, which has not all of its "
                    "values. Convert the model before (dtype= casts it, to another format)"
                )
