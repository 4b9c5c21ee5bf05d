"""The promise, shown: training is killed in the middle of saves and resumed on as many ranks or fewer; nothing is lost.

    python -m launch.demo [--out demo-out] [--steps 50]

Phase A  4 ranks, dropout on, uninterrupted.
Phase B  the same, SIGKILLed in the middle of a save, resumed on 4: bit for bit what A is.
Phase C  4 ranks, dropout off, uninterrupted.
Phase D  the same, killed in the middle of a save, resumed on 3, killed again, resumed on 2: what C is, but for float32
         sums that another number of ranks adds up in another order.

Ends with a table and OUT/losses.png. The exit status is 0 only if every promise held.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from launch.lives import Broken, Plan, Run, Screen

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import FrameType

NOISE = 1e-4
"""Largest relative difference of losses that the order of float32 sums explains."""


def plans(steps: int) -> list[Plan]:
    """The four phases."""
    return [
        Plan(phase="A", dropout=0.1, ranks=(4,)),
        Plan(phase="B", dropout=0.1, ranks=(4, 4), kills=(steps * 4 // 10,)),
        Plan(phase="C", dropout=0.0, ranks=(4,)),
        Plan(phase="D", dropout=0.0, ranks=(4, 3, 2), kills=(steps * 3 // 10, steps * 6 // 10)),
    ]


def difference(run: Run, base: Run) -> list[tuple[int, float]]:
    """Relative difference of the loss of each step that `run` made, steps made twice included."""
    expected = {row["step"]: row["loss"] for row in base.rows}
    return [(row["step"], abs(row["loss"] / expected[row["step"]] - 1)) for row in run.rows]


def differing_chunks(ours: Path, theirs: Path) -> list[str]:
    """Names of the chunks of two checkpoints' data files that are not bit for bit the same in both."""
    from safetensors import safe_open

    def chunks(of: Path) -> dict[str, bytes]:
        found: dict[str, bytes] = {}
        for path in sorted(of.glob("rank-*.safetensors")):
            with safe_open(path, framework="np") as file:
                rank = path.name.split(".")[0]
                # the checksums also cover the random id of the attempt, which the file's own header holds
                found |= {f"{rank} {k}": file.get_tensor(k).tobytes() for k in file.keys() if k != "__checksums__"}  # noqa: SIM118
        return found

    a, b = chunks(ours), chunks(theirs)
    return sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))


def promises(runs: dict[str, Run]) -> list[tuple[str, str]]:
    """Each promise, and how it was broken ("" where it held)."""
    a, b, c, d = (runs[phase] for phase in "ABCD")
    exact = {row["step"]: row["hex"] for row in a.rows}
    unequal = sorted({row["step"] for row in b.rows if row["hex"] != exact[row["step"]]})
    chunks = differing_chunks(b.committed()[b.steps], a.committed()[a.steps])
    noisy = [(step, rel) for step, rel in difference(d, c) if not rel <= NOISE]
    incomplete = [r.plan.phase for r in runs.values() if {row["step"] for row in r.rows} != set(range(1, r.steps + 1))]
    return [
        ("every run made every step", f"phases {incomplete} did not" if incomplete else ""),
        ("B: the loss of every step is A's, bit for bit", f"not at steps {unequal[:10]}" if unequal else ""),
        (
            "B: parameters, moments and RNG after the last step are A's, bit for bit",
            f"{len(chunks)} chunks differ, such as {chunks[:5]}" if chunks else "",
        ),
        (
            f"D: on 4, 3 and 2 ranks the loss of every step is C's within {NOISE:g}",
            "; ".join(f"step {step}: {rel:.1e}" for step, rel in noisy[:10]),
        ),
    ]


def table(runs: dict[str, Run]) -> str:
    """One line for each life."""
    lines = [["phase", "steps", "ranks", "start to first step", "MB a checkpoint", "largest loss difference", "end"]]
    for base, run in zip([None, runs["A"], None, runs["C"]], runs.values(), strict=True):
        size = sum(file.stat().st_size for file in run.committed()[run.steps].iterdir())
        made = 0
        for life in run.lives:
            count = life.last - life.first + 1
            largest = max(rel for _, rel in difference(run, base)[made : made + count]) if base else None
            made += count
            lines.append(
                [
                    life.phase,
                    f"{life.first} to {life.last}",
                    str(life.ranks),
                    f"{life.startup:.1f} s",
                    f"{size / 1e6:.1f}",
                    "" if largest is None else f"{largest:.1e}" if largest else "0, bit for bit",
                    f"killed in the save of step {life.cut}"
                    if life.cut
                    else "finished"
                    if life is run.lives[-1]
                    else "killed",
                ]
            )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def plot(runs: dict[str, Run], path: Path) -> None:
    """Loss curves of all phases, with the kills, and below them how far D is from C."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (top, bottom) = plt.subplots(2, sharex=True, figsize=(8, 7), height_ratios=(2, 1), layout="constrained")
    labels = {
        "A": "dropout, uninterrupted",
        "B": "dropout, killed",
        "C": "no dropout, uninterrupted",
        "D": "no dropout, killed",
    }
    for run, style in zip(runs.values(), ("C0-", "C1--", "C2-", "C3--"), strict=True):
        name = run.plan.phase
        ranks = " then ".join(str(life.ranks) for life in run.lives)
        curve = sorted((row["step"], row["loss"]) for row in run.rows)
        top.plot(*zip(*curve, strict=True), style, label=f"{name}: {labels[name]}, {ranks} ranks", linewidth=1.5)
        for life in run.lives:
            if life.cut:
                top.axvline(life.cut, color=style[:2], linestyle=":", linewidth=1)
    top.set_ylabel("loss (nats per byte)")
    top.set_title("Dotted: every process killed in the middle of that step's save")
    top.legend()
    steps, values = zip(*sorted(difference(runs["D"], runs["C"])), strict=True)
    bottom.plot(steps, values, "C3.", label="D against C")
    bottom.set_yscale("symlog", linthresh=1e-8)  # a logarithm would have no place for "bit for bit the same"
    bottom.set_ylim(-1e-9, 10 * NOISE)
    bottom.axhline(NOISE, color="black", linestyle=":", label="limit")
    bottom.set_xlabel("step")
    bottom.set_ylabel("relative difference of losses")
    bottom.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _end(number: int, _frame: FrameType | None) -> None:
    # as an exception, so that the context managers on the way out kill the job
    sys.exit(128 + number)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="directory for all that the demo writes")
    parser.add_argument("--steps", type=int, default=50, help="optimizer steps of each phase, at least 20")
    args = parser.parse_args(argv)
    if args.steps < 20:
        parser.error(f"--steps {args.steps}: fewer than 20 steps leave no room for two kills")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _end)
    started = time.monotonic()
    runs = {}
    with closing(Screen(4 * args.steps)) as screen:
        for plan in plans(args.steps):
            run = runs[plan.phase] = Run(args.out.absolute(), plan, args.steps, screen)
            try:
                run.go()
            except Broken as e:
                screen.say(f"FAILED: {e}")
                return 1
    plot(runs, args.out / "losses.png")
    print(f"\n{table(runs)}\n")
    results = promises(runs)
    for promise, broken in results:
        print(f"{'BROKEN' if broken else 'held  '}  {promise}{': ' if broken else ''}{broken}")
    print(f"\n{time.monotonic() - started:.0f} s in all; loss curves in {args.out / 'losses.png'}")
    return 1 if any(broken for _, broken in results) else 0


if __name__ == "__main__":
    sys.exit(main())
