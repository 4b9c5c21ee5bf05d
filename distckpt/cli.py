"""`distckpt COMMAND ...`: looking at runs and checkpoints, and after them. Each command is a module of distckpt/tools/.

Exit codes:
  0    done, and nothing wrong was found
  1    something is wrong: damage, a difference, a check that failed, what could not be removed
  2    wrong usage
  3    there is no run or no checkpoint where one was asked for
  4    refused: by the file system, or because another job is at it
  130  interrupted
What removes anything only says so, unless it is given --delete. --json prints one value instead of text; of an error
{"error": message, "kind": its class, "code": the exit code}, besides the line on stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import keyword
import os
import sys
import warnings
from typing import TYPE_CHECKING, Any

from distckpt import __version__
from distckpt.errors import DistckptError, NotACheckpoint, RanksMissing, RunConflict, StoreError
from distckpt.signing import REQUIRE_SIGNATURE, trusted

if TYPE_CHECKING:
    from collections.abc import Iterator

COMMANDS = {
    "ls": "checkpoints of a run, or the runs of a directory",
    "show": "what a checkpoint holds, the statistics of a tensor, a picture of who wrote what",
    "diff": "what two checkpoints differ in: names, shapes, and how far their values are apart",
    "export": "a model's weights for those who use them: Hugging Face, safetensors, torch.save, DCP, DeepSpeed",
    "import": "another tool's checkpoint as a step of a run",
    "cp": "checkpoints from one directory or object store to another, verified",
    "reshard": "any checkpoint that is read, as any that is written",
    "verify": "read every byte of checkpoints, and compare it with its checksum; --quick: no tensor",
    "prune": "what rules keep of a run and what they let go of; --delete removes it",
    "gc": "what killed saves and copies left behind; --delete removes it",
    "repair": "write pointers, symlinks and meta.json anew from the commits",
    "report": "one page of HTML about a run: saves, metrics, what is good, what is kept and why",
    "watch": "what happens to a run, as it happens; for Prometheus, TensorBoard, OpenTelemetry too",
    "queue": "several runs in order, so many at a time, through crashes and reboots",
    "selftest": "a cold restart of your own training: is the step after a load the same, bit for bit",
    "preflight": "whether a directory is fit for a long run, and what a save will cost",
}
_REQUIRE = f"file of public keys: read only checkpoints that one of them signed (as {REQUIRE_SIGNATURE} says)"
FAILED, USAGE, NOTHING, REFUSED, INTERRUPTED = 1, 2, 3, 4, 130


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns its exit code. What goes wrong is one line on stderr."""
    given = sys.argv[1:] if arguments is None else arguments
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115  closed by its parent
    parser = _parser(next((a for a in given if not a.startswith("-")), ""))
    try:
        options = parser.parse_args(given)
    except SystemExit as e:  # argparse has said what is wrong, or was asked for help
        return e.code if isinstance(e.code, int) else USAGE
    warnings.simplefilter("ignore")  # what they say is among the notes
    try:
        with _requiring(options.require_signature):
            answer = options.run(options)
        text = _json(answer.value) if options.json else "\n".join(answer.lines)
        if answer.lines or answer.value is not None:
            print(text, flush=True)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # whoever read the output has read enough
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (DistckptError, ValueError, OSError) as e:
        line = " ".join(str(e).split()) or type(e).__name__
        print(f"distckpt {options.command}: {line}", file=sys.stderr)
        if options.json:
            print(_json({"error": line, "kind": type(e).__name__, "code": _code(e)}), flush=True)
        return _code(e)
    return int(answer.code)


@contextlib.contextmanager
def _requiring(keys: str | None) -> Iterator[None]:
    """Have signatures required by what the block runs, and by its child processes."""
    before = os.environ.get(REQUIRE_SIGNATURE)
    if keys is not None:
        os.environ[REQUIRE_SIGNATURE] = keys
    try:
        trusted()  # what is wrong with the keys is told before anything is looked at
        yield
    finally:
        if keys is not None:
            os.environ.pop(REQUIRE_SIGNATURE)
            os.environ.update({REQUIRE_SIGNATURE: before} if before is not None else {})


def _json(value: Any) -> str:
    return json.dumps(_strict(value), indent=1, allow_nan=False)


def _strict(value: Any) -> Any:
    """Value as strict JSON has it: what is not finite as text."""
    if isinstance(value, dict):
        return {name: _strict(member) for name, member in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(member) for member in value]
    return str(value) if isinstance(value, float) and value - value != 0 else value


def _code(error: Exception) -> int:
    if isinstance(error, NotACheckpoint):
        return NOTHING
    if isinstance(error, (StoreError, RunConflict, RanksMissing)):
        return REFUSED
    if isinstance(error, DistckptError):
        return FAILED
    return REFUSED if isinstance(error, OSError) else USAGE


def _parser(chosen: str) -> argparse.ArgumentParser:
    """Parser that knows the options of the chosen command; modules of the others are not imported."""
    parser = argparse.ArgumentParser(
        prog="distckpt", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, what in COMMANDS.items():
        added = commands.add_parser(name, help=what, description=what)
        if name == chosen:
            tool = importlib.import_module(f"distckpt.tools.{name}{'_' * keyword.iskeyword(name)}")
            tool.options(added)
            added.add_argument("--json", action="store_true", help="print JSON instead of text")
            added.add_argument("--require-signature", metavar="KEYS", help=_REQUIRE)
            added.set_defaults(run=tool.run)
    return parser


if __name__ == "__main__":
    sys.exit(main())
