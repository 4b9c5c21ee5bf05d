"""Imports go one way. Each rule says why it stands, and so does the failure of a file that breaks it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).parent.parent / "distckpt"

LAYERS = [
    {"errors", "latest", "garbage", "system", "units"},
    {"format", "store"},
    {"signing"},
    {"comm", "comm_threads"},
    {"state", "statedict"},
    {"slabs"},
    {"adapters"},
    {"saving", "loading"},
    {"foreign"},
    {"run"},
    {"drop-ins", "integrations"},
    {"queue"},
    {"tools"},
    {"cli", "reshard", "__main__"},
]
"""Lowest first. `distckpt/__init__.py` stands above all: it only tells where the public names live."""

DROP_INS = ("distckpt.adapters.dcp", "distckpt.adapters.deepspeed")
"""What another framework calls, and what calls ours: so they stand above run, though they live beside the adapters."""

RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


class Use(NamedTuple):
    """A dotted name that a file imports or reaches through attributes, and where."""

    name: str
    line: int
    imported: bool


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer_of(module: str) -> str:
    """First name below `distckpt`; the package itself is `__init__`."""
    if any(below(module, drop_in) for drop_in in DROP_INS):
        return "drop-ins"
    return (module.split(".") + ["__init__"])[1]


def uses(source: str, module: str) -> list[Use]:
    """Every dotted name in the source: imports (relative ones made absolute), and chains of attributes."""
    found, inner = [], set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names):
                found += [Use(a.name, node.lineno, True) for a in names]
            case ast.ImportFrom(base, names, level):
                lead = ".".join(module.split(".")[: -level or None] if level else [])
                base = ".".join(filter(None, [lead, base]))
                found += [Use(f"{base}.{a.name}", node.lineno, True) for a in names]
            case ast.Attribute() if node not in inner:
                names, at = [], node
                while isinstance(at, ast.Attribute):
                    names.append(at.attr)
                    inner.add(at)
                    at = at.value
                if isinstance(at, ast.Name):
                    found.append(Use(".".join([at.id, *reversed(names)]), node.lineno, False))
            case ast.Call(func=ast.Name("__import__") | ast.Attribute(attr="import_module")):
                found += [Use(a.value, node.lineno, True) for a in node.args if isinstance(a, ast.Constant)]
    return found


def below(name: str, root: str) -> bool:
    return name == root or name.startswith(root + ".")


def faults(source: str, module: str) -> list[str]:
    """What is wrong with the imports of one file, each with its reason."""
    layer = layer_of(module)
    if layer == "__init__":
        return []
    if layer not in RANK:
        return [f"distckpt.{layer} has no place in LAYERS: give it one, so that its imports have a direction"]
    wrong = []
    for use in uses(source, module):
        where = f"{module}, line {use.line}: {use.name}"
        if use.imported and below(use.name, "distckpt"):
            wanted = layer_of(use.name)
            if wanted not in RANK:
                if wanted != "__version__":
                    wrong.append(f"{where}: inside the package a name is imported from the module it lives in")
            elif RANK[wanted] > RANK[layer]:
                wrong.append(
                    f"{where}: {layer} is below {wanted}. A lower layer that knows a higher one can neither be tested "
                    "nor be understood without it"
                )
            elif {layer, wanted} == {"saving", "loading"}:
                wrong.append(
                    f"{where}: saving and loading do not know each other. What both need is part of the format, or of the "
                    "state; else a change of one would change what the other reads or writes"
                )
            elif {layer, wanted} == {"format", "store"}:
                wrong.append(f"{where}: the format is pure values and a store is bytes by key; neither needs the other")
        if layer in {"format", "store"} and use.imported and use.name.split(".")[0] in {"torch", "numpy"}:
            wrong.append(
                f"{where}: {layer} imports neither torch nor numpy: the writer process and the command line must "
                "start without them"
            )
        if below(use.name, "torch.distributed") and layer not in {"comm", "adapters", "drop-ins"}:
            wrong.append(
                f"{where}: torch.distributed is named only in comm.py and adapters/. Elsewhere ranks talk through a "
                "Comm, so that solo runs and tests with threads take the same path"
            )
        pickles = below(use.name, "pickle") or below(use.name, "torch.load")
        if pickles and not below(module, "distckpt.foreign"):
            wrong.append(f"{where}: reading runs no code from a checkpoint; only foreign/ reads pickles of others")
    return wrong


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_a_file_imports_only_what_its_layer_may(path):
    assert not faults(path.read_text(), module_of(path)), "\n".join(faults(path.read_text(), module_of(path)))


def test_every_layer_that_stands_below_the_others_has_files():
    assert {"errors", "format", "store"} <= {layer_of(module_of(path)) for path in FILES}


@pytest.mark.parametrize(
    ("module", "source", "reason"),
    [
        ("distckpt.errors", "from distckpt.format.box import Box", "errors is below format"),
        ("distckpt.format.box", "import distckpt.state", "format is below state"),
        ("distckpt.format.box", "from ..store import base", "neither needs the other"),
        ("distckpt.store.local", "from distckpt.format import layout", "neither needs the other"),
        ("distckpt.format.box", "def f():\n    import numpy as np", "neither torch nor numpy"),
        ("distckpt.store.local", "from torch import Tensor", "neither torch nor numpy"),
        ("distckpt.comm", "from distckpt.adapters import plain", "comm is below adapters"),
        (
            "distckpt.state",
            "if TYPE_CHECKING:\n    from distckpt.run.trainstate import TrainState",
            "state is below run",
        ),
        ("distckpt.saving.plan", "from distckpt.loading.plan import cover", "do not know each other"),
        ("distckpt.loading.plan", "from distckpt.saving import plan", "do not know each other"),
        ("distckpt.loading.plan", "from distckpt import Checkpointer", "the module it lives in"),
        ("distckpt.run.checkpointer", "from distckpt import cli", "run is below cli"),
        ("distckpt.run.direct", "from distckpt.adapters.dcp import StorageWriter", "run is below drop-ins"),
        ("distckpt.state", "import torch.distributed as dist", "named only in comm"),
        ("distckpt.state", "from torch import distributed", "named only in comm"),
        ("distckpt.run.checkpointer", "import torch\ntorch.distributed.barrier()", "named only in comm"),
        ("distckpt.loading.read", "x = torch.load(path)", "runs no code"),
        ("distckpt.loading.read", "from torch import load", "runs no code"),
        ("distckpt.adapters.plain", "import pickle", "runs no code"),
        ("distckpt.loading.read", "importlib.import_module('distckpt.run.history')", "loading is below run"),
        ("distckpt.misc", "", "no place in LAYERS"),
    ],
)
def test_a_planted_fault_is_found(module, source, reason):
    (fault,) = faults(source, module)
    assert reason in fault


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("distckpt.comm", "import torch.distributed as dist\nfrom distckpt.errors import RanksMissing"),
        ("distckpt.adapters.dtensor", "from torch.distributed.tensor import DTensor\nimport distckpt.state"),
        ("distckpt.foreign.torchfile", "import torch\ntorch.load(path, weights_only=True)"),
        ("distckpt.format.box", "from distckpt.format import text\nfrom . import layout"),
        ("distckpt.tools.copy", "from distckpt import __version__\nfrom distckpt.run import history"),
        ("distckpt.adapters.dcp.writer", "import torch.distributed.checkpoint\nfrom distckpt.run.place import place"),
        ("distckpt", "from distckpt.run.checkpointer import Checkpointer"),
    ],
)
def test_what_the_rules_allow_is_no_fault(module, source):
    assert faults(source, module) == []


@pytest.mark.parametrize(
    "statement", ["import distckpt", "import distckpt.errors, distckpt.format.manifest, distckpt.store.local"]
)
def test_what_must_start_at_once_imports_neither_torch_nor_numpy(statement):
    program = f"import sys; {statement}; print([m for m in ('torch', 'numpy') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=PACKAGE.parent, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
