"""A page of HTML in one file: no script, nothing from elsewhere, light or dark as the reader's system is. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from distckpt.tools.svg import safe

if TYPE_CHECKING:
    from collections.abc import Sequence

_STYLE = """
:root{color-scheme:light dark;--fg:#1b1f24;--bg:#fff;--card:#f6f8fa;--line:#d8dee4;--m:#59636e;--on:#0969da;
--good:#1a7f37;--warn:#9a6700;--bad:#cf222e;--goodbg:#dafbe1;--warnbg:#fff8c5;--badbg:#ffebe9;--greybg:#eaeef2;
--band:#f0f3f6}
@media(prefers-color-scheme:dark){:root{--fg:#e6edf3;--bg:#0d1117;--card:#161b22;--line:#30363d;--m:#9198a1;
--on:#58a6ff;--good:#3fb950;--warn:#d29922;--bad:#f85149;--goodbg:#12261a;--warnbg:#2b2111;--badbg:#2d1416;
--greybg:#21262d;--band:#161b22}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--fg);
font:15px/1.5 ui-sans-serif,system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1200px;margin:0 auto;padding:28px 24px 60px}
h1{font-size:26px;line-height:1.25;margin:0 0 2px;overflow-wrap:anywhere}
h2{font-size:18px;margin:40px 0 10px;padding-bottom:6px;border-bottom:1px solid var(--line)}
h3{font-size:14px;margin:0 0 4px;overflow-wrap:anywhere}
p{margin:6px 0;max-width:84ch;overflow-wrap:anywhere}.m{color:var(--m)}small{font-size:13px}
code{font:13px ui-monospace,SFMono-Regular,Menlo,monospace;overflow-wrap:anywhere}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:10px;margin:18px 0}
.tile,.chart{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:10px 14px;min-width:0}
.tile b{display:block;font-size:20px;font-weight:600;line-height:1.3}.tile span{color:var(--m);font-size:13px}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(340px,100%),1fr));gap:10px}
.badge{display:inline-block;border-radius:99px;padding:0 9px;font-size:12px;font-weight:600;line-height:20px;
white-space:nowrap;background:var(--greybg);color:var(--fg)}
.badge.good{background:var(--goodbg);color:var(--good)}.badge.warn{background:var(--warnbg);color:var(--warn)}
.badge.bad{background:var(--badbg);color:var(--bad)}
.note{border-left:4px solid var(--good);background:var(--goodbg);padding:8px 14px;border-radius:4px;margin:16px 0}
.note.bad{border-color:var(--bad);background:var(--badbg)}.note.warn{border-color:var(--warn);background:var(--warnbg)}
.note ul{margin:4px 0;padding-left:20px}.note li{overflow-wrap:anywhere}
table{border-collapse:collapse;width:100%;font-size:14px}
th{text-align:left;color:var(--m);font-weight:600;font-size:12px;padding:4px 12px 4px 0;vertical-align:bottom}
td{border-top:1px solid var(--line);padding:7px 12px 7px 0;vertical-align:top;overflow-wrap:anywhere}
.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}td.w{white-space:nowrap}
svg{display:block;width:100%;height:auto}svg text{font:11px ui-sans-serif,system-ui,sans-serif;fill:var(--fg)}
svg text.m{fill:var(--m)}svg text.t,svg text.b{font-weight:600}svg text.b{font-size:13px}
svg text.l{fill:#1b1f24;paint-order:stroke;stroke:#fff;stroke-opacity:.65;stroke-width:3px;stroke-linejoin:round}
.o{fill:none;stroke:var(--bg);stroke-width:1.5}.bar{fill:var(--on)}.bar:hover{opacity:.7}.grid{stroke:var(--line)}
.band0{fill:none}.band1{fill:var(--band)}circle.bad{fill:var(--bad)}
.line{fill:none;stroke-width:1.8}.line.on{stroke:var(--on)}.line.off{stroke:var(--m);stroke-dasharray:4 3;opacity:.7}
.dot.on{fill:var(--on)}.dot.off{fill:var(--m)}
.narrow{display:none}details summary{cursor:pointer;color:var(--on);padding:8px 0}
footer{margin-top:48px;color:var(--m);font-size:13px}
@media(max-width:700px){main{padding:18px 14px 40px}h1{font-size:21px}.wide{display:none}.narrow{display:block}
.tiles{grid-template-columns:1fr 1fr}
thead{display:none}table,tbody{display:block}
tr{display:flex;flex-wrap:wrap;gap:2px 16px;border-top:1px solid var(--line);padding:9px 0}
td,td.w,td.n{display:flex;gap:6px;border:0;padding:0;text-align:left;white-space:normal;min-width:0}
td::before{content:attr(data-l);color:var(--m);font-size:13px;white-space:nowrap}
td.f{flex-basis:100%}td:empty{display:none}}
@media print{main{max-width:none}}
"""
GOOD, WARN, BAD, GREY = "good", "warn", "bad", "grey"


def page(title: str, body: Sequence[str]) -> str:
    """Return the whole page."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{safe(title)}</title><style>{_STYLE}</style></head>\n<body><main>\n"
        + "\n".join(body)
        + "\n</main></body></html>\n"
    )


def badge(text: str, kind: str = GREY) -> str:
    """Return a word in a coloured box."""
    return f'<span class="badge {kind}">{safe(text)}</span>'


def tiles(figures: Sequence[tuple[str, str]]) -> str:
    """Return figures, each with what it is of."""
    return (
        '<div class="tiles">'
        + "".join(f'<div class="tile"><b>{safe(value)}</b><span>{safe(name)}</span></div>' for name, value in figures)
        + "</div>"
    )


def section(title: str, *parts: str) -> str:
    """Return a heading, and what stands below it."""
    return "\n".join([f"<section><h2>{safe(title)}</h2>", *filter(None, parts), "</section>"])


def note(kind: str, lead: str, lines: Sequence[str] = ()) -> str:
    """Return a box that says something, with a list."""
    items = "".join(f"<li>{safe(line)}</li>" for line in lines)
    return f'<div class="note {kind}">{safe(lead)}{f"<ul>{items}</ul>" if items else ""}</div>'


def muted(text: str) -> str:
    """Return a small paragraph."""
    return f'<p class="m"><small>{safe(text)}</small></p>'


def both(wide: str, narrow: str) -> str:
    """Return a picture for a wide screen, and one for a narrow."""
    return f'<div class="wide">{wide}</div><div class="narrow">{narrow}</div>'


def table(columns: Sequence[tuple[str, str]], rows: Sequence[Sequence[str]], shown: int) -> str:
    """Return rows of HTML; those after the first `shown` are folded away. columns: name, and class of the cells.

    On a narrow screen a row is a list, each cell beside its column's name.
    """
    head = "".join(f'<th class="{kind}">{safe(name)}</th>' for name, kind in columns)
    made = [
        "<tr>"
        + "".join(
            f'<td class="{kind}" data-l="{safe(name)}">{f"<div>{cell}</div>" if cell else ""}</td>'
            for (name, kind), cell in zip(columns, row, strict=True)
        )
        + "</tr>"
        for row in rows
    ]

    def whole(some: Sequence[str]) -> str:
        return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(some)}</tbody></table>"

    if len(made) <= shown:
        return whole(made)
    rest = f"<details><summary>{len(made) - shown} more</summary>{whole(made[shown:])}</details>"
    return whole(made[:shown]) + rest
