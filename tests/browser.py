"""Load a page in a headless browser, run a script on it, and report the resulting page and any errors."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

WATCH = """
<script>const failed = text => document.documentElement.setAttribute("data-" + "error", text);
window.onerror = failed; window.alert = () => failed("markup was executed");</script>"""
SAY = """
const pre = document.createElement("pre"); pre.id = "said"; pre.textContent = JSON.stringify(said);
document.body.append(pre);"""


def act(page: Path, script: str, scratch: Path) -> dict[str, Any]:
    """Run a script in the page, on a screen as narrow as a phone; returns what it put into ``said``."""
    text = page.read_text()
    assert "http" not in re.sub("http-equiv", "", text), "the page refers to the network"
    probed = scratch / "probed.html"
    acting = f"<script>const said = {{}};{script}{SAY}</script></body>"
    probed.write_text(text.replace("<head>", "<head>" + WATCH, 1).replace("</body>", acting, 1))
    shown = _chromium(scratch, "--window-size=500,900", "--dump-dom", probed.as_uri())
    assert "data-error" not in shown, shown[:300]
    match = re.search(r'<pre id="said">(.*?)</pre>', shown, re.S)
    assert match, shown[-2000:]
    return dict(json.loads(html.unescape(match[1])))


def printed(page: Path, scratch: Path) -> bytes:
    """The page as a PDF."""
    _chromium(scratch, f"--print-to-pdf={scratch}/printed.pdf", page.as_uri())
    return (scratch / "printed.pdf").read_bytes()


def _chromium(scratch: Path, *arguments: str) -> str:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs chromium")
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={scratch}/profile"]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=120).stdout
