"""A real browser for tests: Debian's chromium, without a window. What is not installed skips the test, and says why."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from html import unescape

import pytest

_FRAMES = """<!DOCTYPE html><meta charset="utf-8"><body>{frames}<pre id="said"></pre><script>
window.onload = () => {{
  const said = {{}};
  for (const frame of document.querySelectorAll("iframe")) {{
    const page = frame.contentDocument, inner = frame.contentWindow, root = page.documentElement;
    const wide = [...page.querySelectorAll("main *")].filter(e => !e.closest("svg") && e.getClientRects().length &&
      e.getBoundingClientRect().right > root.clientWidth + 0.5);
    const pictures = [...page.querySelectorAll("svg")].map(e => e.getBoundingClientRect());
    said[frame.width] = {{
      width: root.clientWidth, scroll: root.scrollWidth, height: root.scrollHeight, text: page.body.innerText,
      wide: wide.map(e => e.tagName + " " + e.className), pictures: pictures.filter(r => r.width && r.height).length,
      small: [...page.querySelectorAll("svg")].filter(e => e.getClientRects().length).map(
        e => e.getBoundingClientRect().width / e.viewBox.baseVal.width),
      loaded: inner.performance.getEntriesByType("resource").map(e => e.name), pwned: inner.pwned === 1,
    }};
  }}
  document.getElementById("said").textContent = JSON.stringify(said);
}};
</script>"""


def require():
    """Skip the test where there is no browser, saying why; where CI runs, that is a failure."""
    if shutil.which("chromium"):
        return
    why = "not installed: chromium (apt-get install chromium)"
    if os.environ.get("CI") == "true":
        pytest.fail(f"no browser here: {why}")
    pytest.skip(f"no browser here: {why}")


def measured(page, folder, *widths):
    """What a browser makes of a page at these widths: for each its text, and how wide it and what is in it came out."""
    require()
    frames = "".join(f'<iframe src="{page.name}" width="{width}" height="900"></iframe>' for width in widths)
    harness = page.with_name("frames.html")
    harness.write_text(_FRAMES.format(frames=frames))
    options = [
        *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
        *("--allow-file-access-from-files", "--virtual-time-budget=10000", f"--user-data-dir={folder / 'profile'}"),
    ]
    line = ["chromium", *options, "--dump-dom", harness.as_uri()]
    done = subprocess.run(line, capture_output=True, text=True, timeout=90)
    said = re.search(r'<pre id="said">(.*?)</pre>', done.stdout, re.DOTALL)
    assert said, (done.stdout[-500:], done.stderr[-2000:])
    return {int(width): what for width, what in json.loads(unescape(said[1])).items()}
