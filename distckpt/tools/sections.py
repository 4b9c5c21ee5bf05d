"""The sections of a run's report, as HTML. Pure: made of what tools/told.py tells."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any

from distckpt import __version__
from distckpt.run.keep import NEWEST
from distckpt.tools.charts import curve, seconds_text, timeline
from distckpt.tools.page import BAD, GOOD, GREY, WARN, badge, both, muted, note, page, section, table, tiles
from distckpt.tools.shardmap import shard_map
from distckpt.tools.svg import safe
from distckpt.tools.told import local
from distckpt.units import size_text

if TYPE_CHECKING:
    from collections.abc import Mapping

    from distckpt.tools.told import Told

_ROWS, _CURVES, _LISTED = 60, 12, 6
_KINDS = {"committed": GOOD, "incomplete": WARN, "not read": WARN, "damaged": BAD, "superseded": GREY}
_STATES = {"finished": GOOD, "running": GOOD, "dead": BAD, "resumable": WARN}
_CHECKED = {
    "quick": "sizes, headers and tables of checksums were checked, tensors were not read (--verify full does)",
    "full": "every byte was read and compared with its checksum",
    "none": "commits alone were read (--verify quick, or full, looks at the files)",
}
_RULES = {
    "last": "the {} newest",
    "every_steps": "the first at or after each multiple of {} steps",
    "newest_for": "those of the last {}",
    "bytes": "all within {}",
}


def whole_page(told: Told) -> str:
    """Return the report."""
    now = datetime.now().astimezone().strftime("%F %T %Z")
    parts = [
        f"<header><h1>{safe(told.name)} {badge(told.state, _STATES.get(told.state, GREY))}</h1>",
        f'<p class="m"><code>{safe(told.where)}</code></p></header>',
        tiles(_figures(told)),
        _attention(told),
        section("Saves", *_saves(told)),
        section("Metrics", *_metrics(told)),
        section("Checkpoints", *_checkpoints(told)),
        section("Launches", *_launches(told)),
        section("Who wrote what", *_shards(told)),
        f"<footer>distckpt {safe(__version__)}, {now}; <code>distckpt report {safe(told.where)}</code></footer>",
    ]
    return page(f"{told.name}: checkpoints", parts)


def _figures(told: Told) -> list[tuple[str, str]]:
    good = [row for row in told.rows if told.health(row) == "committed"]
    stalls = sorted(s.stall for s in told.saves if s.stall is not None)
    found = [
        ("newest step", str(max((row["step"] for row in good), default="none"))),
        ("checkpoints that count", str(len(good))),
        ("on disk, all committed", size_text(sum(row.get("bytes", 0) for row in told.rows))),
        ("launches", str(len(told.lives))),
    ]
    if told.has_events:
        failed = sum(bool(s.failed) for s in told.saves)
        found.append((f"saves, of which {failed} failed" if failed else "saves", str(len(told.saves))))
    if stalls:
        found.append(("training waited, median of saves", seconds_text(stalls[len(stalls) // 2])))
    if told.goodput and told.goodput.share is not None:
        found.append((f"goodput of {seconds_text(told.goodput.wall)}", f"{told.goodput.share:.1%}"))
    return found


def _attention(told: Told) -> str:
    by_health: dict[str, list[str]] = {}
    for row in told.rows:
        by_health.setdefault(told.health(row), []).append(row["path"])
    lines = [
        f"{path} is {health}: {told.problems[path][0].problem}"
        for health in ("damaged", "not read")
        for path in by_health.get(health, [])
    ]
    unfinished = by_health.get("incomplete", [])
    if unfinished and told.state != "running":
        lines.append(f"saves that did not finish: {', '.join(unfinished[:5])}; distckpt gc tells what may go")
    lines += told.failures[-_LISTED:]
    if len(told.failures) > _LISTED:
        lines.append(f"and {len(told.failures) - _LISTED} things earlier")
    if by_health.get("damaged") or told.state == "dead":
        lead = "No checkpoint counts: there is nothing to resume from." if told.state == "dead" else "Damage was found."
        return note(BAD, lead, lines)
    if lines:
        return note(WARN, "The checkpoints that count are good; some things went wrong.", lines)
    checked = {"quick": "in sizes and headers", "full": "in every byte", "none": "in their commits"}[told.checked]
    return note(GOOD, f"Nothing wrong was found: every committed checkpoint is whole {checked}.")


def _saves(told: Told) -> list[str]:
    if not told.saves:
        return [muted("No save is known.")]
    parts = [both(timeline(told.saves, 1150), timeline(told.saves, 360))]
    parts.append(muted(f"{len(told.saves)} saves, from {told.saves[0].at} to {told.saves[-1].at}."))
    if not told.has_events:
        parts.append(muted("A run at a URI keeps no events: what saves took is not known, and those removed are not."))
    elif told.goodput and told.goodput.wall:
        g = told.goodput
        rest = {"saving": g.saving, "work that was lost": g.lost, "start-up, loading and being down": g.down}
        shares = ", ".join(f"{name} {seconds / g.wall:.1%}" for name, seconds in rest.items())
        parts.append(muted(f"Of {seconds_text(g.wall)} in all: training for good {g.share or 0:.1%}, {shares}."))
    if any(s.failed for s in told.saves):
        parts.append(muted("A red dot is a save that failed."))
    return parts


def _metrics(told: Told) -> list[str]:
    if not told.metrics:
        return [muted("No checkpoint has numbers among its metrics.")]
    names = sorted(told.metrics, key=lambda name: -len(told.metrics[name]))
    charts = []
    for name in names[:_CURVES]:
        points = told.metrics[name]
        values = [p for p in points if p.counts] or points
        newest = max(values, key=lambda p: (p.step, p.launch))
        low, high = (min(p.value for p in values), max(p.value for p in values))
        said = f"{newest.value:.5g} at step {newest.step}; least {low:.5g}, greatest {high:.5g}"
        charts.append(
            f'<div class="chart"><h3>{safe(name)}</h3><small class="m">{safe(said)}</small>{curve(points)}</div>'
        )
    rest = f"Not shown: {', '.join(names[_CURVES:])}." if len(names) > _CURVES else ""
    left = any(not p.counts for points in told.metrics.values() for p in points)
    grey = "Grey and dashed: saves that a rewind left behind." if left else ""
    return [f'<div class="charts">{"".join(charts)}</div>', *(muted(text) for text in (grey, rest) if text)]


def _checkpoints(told: Told) -> list[str]:
    columns = [
        ("checkpoint", "f"),
        ("saved", "w"),
        ("epoch", "n"),
        ("launch", "n"),
        ("ranks", "n"),
        ("size", "n"),
        ("state", ""),
        ("why", "f"),
    ]
    return [
        f"<p>{safe(_rules(told.rules))}</p>",
        table(columns, [_row(told, row) for row in told.rows], _ROWS),
        muted(f"Checked: {_CHECKED[told.checked]}."),
        *(muted(text) for text in told.notes),
    ]


def _row(told: Told, row: Mapping[str, Any]) -> list[str]:
    health, problems = told.health(row), [d.problem for d in told.problems.get(row["path"], [])]
    names = "".join(f" {badge(name)}" for name in row["names"])
    why = "; ".join([*problems[:3], *([f"and {len(problems) - 3} more"] if len(problems) > 3 else [])])
    kept = f"goes: {row['goes']}" if "goes" in row else ", ".join(row.get("kept", ()))
    if not kept and health == "superseded":
        kept = "a later launch resumed from before it"
    return [
        f"<b>{safe(row['path'])}</b>{names}",
        safe(local(row["date"])) if "date" in row else "",
        *(safe("" if row.get(name) is None else row[name]) for name in ("epoch", "launch", "world_size")),
        safe(size_text(row["bytes"])) if "bytes" in row else "",
        badge(health, _KINDS.get(health, GREY)),
        safe(why or kept),
    ]


def _rules(rules: Mapping[str, Any] | None) -> str:
    """Rules of a run in words."""
    if rules is None:
        return "The run was saved without rules (keep=): all checkpoints stay."
    told = [text.format(rules[name]) for name, text in _RULES.items() if rules.get(name) is not None]
    told += ["the newest of each epoch"] if rules.get("per_epoch") else []
    best = rules.get("best") or []
    for rule in best if best and isinstance(best[0], list) else [best] if best else []:
        count = rule[2] if len(rule) > 2 else 1
        told.append(f"the {count} with the {'least' if rule[1] == 'min' else 'greatest'} {rule[0]}")
    return f"Kept are the {NEWEST} newest whatever the rules, and by rule: {'; '.join(told) or 'all'}."


def _launches(told: Told) -> list[str]:
    if not told.lives:
        return [muted("None: checkpoints were saved, or copied here, without a job that resumes.")]
    columns = [
        ("launch", "f"),
        ("began", "w"),
        ("lasted", "w"),
        ("from", ""),
        ("ranks", "n"),
        ("where", ""),
        ("saves", "n"),
        ("last step", "n"),
        ("end", ""),
    ]
    rows = [
        [
            f"<b>{life.number}</b>",
            safe(life.began),
            safe(life.lasted),
            safe(life.resumed_from),
            safe(life.ranks),
            f'{safe(life.host)} <small class="m">{safe(life.job)}</small>',
            safe(life.saves),
            safe("" if life.last_step is None else life.last_step),
            badge(life.ended, BAD if life.wrong else GREY),
        ]
        for life in reversed(told.lives)
    ]
    return [table(columns, rows, _ROWS)]


def _shards(told: Told) -> list[str]:
    if told.newest is None:
        return [muted("There is no checkpoint that counts.")]
    wide, narrow = (shard_map(told.newest, width=width, style="") for width in (1150, 360))
    how = (
        "Areas are to scale within a part, and cut where ranks' parts meet; one of several tensors is striped by how "
        "much each rank wrote. Point at one for its name and shape."
    )
    return [muted(f"The newest, step {told.newest.step}. {how}"), both(wide, narrow)]
