"""Looking at pictures of explanations: what a terminal prints, what a browser sees and does."""

import io
import json
import re
import shutil
import subprocess
from html import unescape as html_unescape
from html.parser import HTMLParser
from types import SimpleNamespace
from typing import Any

from rich.console import Console

from atman_triton.render.terminal import show


def printed(explanation, width=80, colour=None, **options):
    file = io.StringIO()
    console = Console(
        file=file,
        width=width,
        color_system=colour,
        force_terminal=colour is not None,
        markup=False,
        emoji=False,
        _environ={},
    )
    show(explanation, width=width, console=console, **options)
    return file.getvalue()


class Page(HTMLParser):
    """What a browser would see of a page."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.html, self.path, self.text, self.scripts = html, [], "", []
        self.elements: list[Any] = []
        self.feed(html)
        self.close()
        assert not self.path  # every element is closed
        self.data = json.loads(self.scripts[0])
        self.spans = [e for e in self.elements if "data-p" in e.attributes]

    def handle_starttag(self, tag, attrs):
        node = SimpleNamespace(
            tag=tag, attributes=dict(attrs), text="", inside=self._inside_the_text()
        )
        self.elements.append(node)
        if tag not in ("meta", "input", "img"):
            self.path.append((tag, node))
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        assert self.path.pop()[0] == tag

    def _inside_the_text(self):
        return any(node.attributes.get("id") == "text" for _, node in self.path)

    def handle_data(self, data):
        if self.path and self.path[-1][0] == "script":
            self.scripts[-1] += data
        if self._inside_the_text():
            self.text += data
        for _, node in self.path[-1:]:
            node.text += data


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = """
const result = {};
const byId = (id) => document.getElementById(id);
const press = (key) => new KeyboardEvent("keydown", {key, bubbles: true});
const key = (name) => byId("text").dispatchEvent(press(name));
const all = (selector) => [...document.querySelectorAll(selector)];
const texts = (selector) => all(selector).map((e) => e.textContent);
const pick = (name, value) =>
  document.querySelector(`input[name="${name}"][value="${value}"]`).click();
const words = (row, name) => row.querySelector(name).textContent;
const rows = () => [...document.querySelectorAll(".row")]
  .map((row) => words(row, "b") + " " + words(row, ".number"));
const sign = (span) => span.className.split(" ").filter((name) => "pn".includes(name));
const painted = () => [...document.querySelectorAll("#text .p, #text .n")]
  .map((span) => span.textContent + " " + sign(span) + span.style.getPropertyValue("--v"));
try { STEPS } catch (error) { result.error = String(error); }
document.body.replaceChildren(JSON.stringify(result));
"""


def drive(tmp_path, html, steps):
    """What the page's script does, as JSON; the page's policy would rightly stop the driver."""
    html = re.sub(r"<meta http-equiv=[^>]*>", "", html)
    script = f"<script>{DRIVER.replace('STEPS', steps)}</script></body>"
    path = tmp_path / "page.html"
    path.write_text(html.replace("</body>", script), encoding="utf-8")
    options = "--headless --no-sandbox --disable-gpu --no-first-run --disable-component-update"
    quiet = ["--disable-background-networking", f"--user-data-dir={tmp_path / 'profile'}"]
    command = [str(CHROMIUM), *options.split(), *quiet, "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    body = re.search(r"<body>(.*?)</body>", done.stdout, re.DOTALL)
    assert body, done.stderr
    return json.loads(html_unescape(body[1]))
