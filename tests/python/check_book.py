#!/usr/bin/env python3
"""Builds the book with the real mdBook and looks at it in a real Chromium.

    cargo install mdbook --locked
    apt-get install chromium
    pip install playwright==1.60.0
    python tests/python/check_book.py mdbook [SCREENSHOTS]

mdBook must have nothing to warn of. Every link and picture of every page has to lead to a file of the book and to an anchor that is there. In
the browser no page may complain, ask for anything but files of the book, or be wider than the window, at the widths of a phone and a desktop.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from playwright.sync_api import sync_playwright

DOCS = Path(__file__).parents[2] / "docs"
WIDTHS = {"phone": 360, "desktop": 1440}
SHOWN = ["introduction.html", "reference/cli.html"]
failed = []


def check(what, good, more=""):
    print(f"{'ok' if good else 'FAILED':>7}  {what} {'' if good else more}")
    if not good:
        failed.append(what)


class Page(HTMLParser):
    """The anchors of a page, and what it refers to."""

    def __init__(self, file):
        super().__init__()
        self.anchors, self.references = set(), []
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.anchors.add(attributes.get("id"))
        reference = attributes.get("src" if tag in ("img", "script", "iframe") else "href")
        if reference and tag != "base":
            self.references.append((tag, reference))


def build(mdbook, folder):
    ended = subprocess.run([mdbook, "build", "--dest-dir", folder, DOCS], capture_output=True, text=True)
    said = re.findall(r".*\b(?:WARN|ERROR)\b.*", ended.stdout + ended.stderr)
    check("mdBook builds the book without a warning", ended.returncode == 0 and not said, said[:3] or ended.stderr)


def links(folder):
    # print.html has all pages in one, and 404.html is for any address.
    files = [file for file in sorted(folder.rglob("*.html")) if file.name not in ("print.html", "404.html")]
    pages = {file.resolve(): Page(file) for file in files}
    broken, seen = [], 0
    for file, page in pages.items():
        for tag, reference in page.references:
            parts = urlsplit(reference)
            if parts.scheme or parts.netloc:
                if tag != "a":
                    broken.append(f"{file.name}: {tag} {reference} needs a network")
                continue
            seen += 1
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            if not target.is_file():
                broken.append(f"{file.name}: {reference}")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
                broken.append(f"{file.name}: {reference} has no such heading")
    check(f"all {seen} links of {len(pages)} pages lead somewhere", not broken, broken[:5])
    check("there are links", seen > 1000, seen)
    return [file.relative_to(folder) for file in files if file.name not in ("toc.html", "index.html")]


def look(folder, pages, pictures):
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for name, width in WIDTHS.items():
            page = browser.new_page(viewport={"width": width, "height": 900})
            complaints, asked = [], []
            page.on("console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None)
            page.on("pageerror", lambda error: complaints.append(str(error)))
            page.on("request", lambda request: asked.append(request.url))
            wide = []
            for file in pages:
                page.goto((folder / file).as_uri())
                more = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
                if more > 0:
                    wide.append(f"{file}: {more}")
                if pictures and str(file) in SHOWN:
                    pictures.mkdir(parents=True, exist_ok=True)
                    page.screenshot(path=pictures / f"{file.stem}-{name}.png")
            elsewhere = [url for url in asked if not url.startswith((folder.as_uri(), "data:"))]
            check(f"{name}: nothing on the console", not complaints, sorted(set(complaints))[:3])
            check(f"{name}: no request leaves the book", not elsewhere, elsewhere[:3])
            check(f"{name}: no page is wider than the window", not wide, wide[:5])
            page.close()
        browser.close()


def main():
    pictures = Path(sys.argv[2]) if len(sys.argv) > 2 else None
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder).resolve()
        build(sys.argv[1], folder)
        look(folder, links(folder), pictures)
    sys.exit(f"failed: {failed}" if failed else 0)


if __name__ == "__main__":
    main()
