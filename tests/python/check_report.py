#!/usr/bin/env python3
"""Looks at the report in a real Chromium: no console errors, no request, no findings of axe, everything by keyboard.

    apt-get install chromium
    pip install playwright==1.60.0
    npm install --prefix DIR axe-core@4.12.1
    cargo run -- run recipes/quickstart.yaml
    python tests/python/check_report.py target/debug/pipeline DIR/node_modules/axe-core/axe.min.js [SCREENSHOTS]

Twice: the quickstart's report from disk, at three widths and in both themes, and that of rows that try to be markup. Then a
served one beside a run, which has to follow it.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).parents[2]
PROGRAM = str(Path(sys.argv[1]).resolve())
AXE = Path(sys.argv[2]).read_text()
PICTURES = Path(sys.argv[3]) if len(sys.argv) > 3 else None
WIDTHS = {"phone": 360, "tablet": 800, "desktop": 1440}
BAD = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
failed = []


def check(what, good, more=""):
    print(f"{'ok' if good else 'FAILED':>7}  {what} {more}")
    if not good:
        failed.append(what)


def pipeline(*arguments, cwd=ROOT):
    return subprocess.run([PROGRAM, *arguments], check=True, stdout=subprocess.PIPE, text=True, cwd=cwd).stdout


def watched(browser, **settings):
    """A page that notes what it asks for and complains of."""
    context = browser.new_context(**settings)
    page = context.new_page()
    page.requests_made, page.complaints = [], []
    page.on("request", lambda request: page.requests_made.append(request.url))
    page.on("console", lambda message: page.complaints.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    return page


def findings(browser, path, **settings):
    """What axe finds. The page's policy keeps other scripts out, so it is looked at without."""
    context = browser.new_context(bypass_csp=True, **settings)
    page = context.new_page()
    page.goto(path)
    page.evaluate("document.querySelectorAll('details').forEach((part) => part.open = true)")
    page.evaluate(AXE)
    result = page.evaluate("axe.run(document, { resultTypes: ['violations'] })")
    context.close()
    return [f"{v['id']}: {v['nodes'][0]['html'][:160]} ({len(v['nodes'])} places)" for v in result["violations"]]


def from_disk(browser, file):
    address = file.as_uri()
    for scheme in ("light", "dark"):
        for name, width in WIDTHS.items():
            settings = {"viewport": {"width": width, "height": 900}, "color_scheme": scheme}
            page = watched(browser, **settings)
            page.goto(address)
            page.wait_for_timeout(200)
            what = f"{scheme}, {name}"
            # The empty icon is part of the page.
            asked = [url for url in page.requests_made if url != address and not url.startswith("data:")]
            check(f"{what}: no request", not asked, asked[:2])
            check(f"{what}: nothing on the console", not page.complaints, page.complaints[:2])
            wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
            check(f"{what}: nothing sticks out", wide <= 0, wide)
            if PICTURES:
                PICTURES.mkdir(parents=True, exist_ok=True)
                page.screenshot(path=PICTURES / f"{scheme}-{name}.png", full_page=True)
            page.context.close()
            found = findings(browser, address, **settings)
            check(f"{what}: axe", not found, found[:4])


def by_keyboard(browser, file):
    page = watched(browser, viewport={"width": 1000, "height": 900})
    page.goto(file.as_uri())
    page.keyboard.press("Tab")
    check("the first stop skips to the contents", page.evaluate("document.activeElement.className") == "skip")
    stops, charts, opened = 0, 0, 0
    while stops < 1000:
        page.keyboard.press("Tab")
        stops += 1
        focused = page.evaluate(
            "(() => { const e = document.activeElement; const box = e.getBoundingClientRect();"
            " return { tag: e.tagName, chart: e.matches('figure.chart'), hidden: box.width === 0,"
            " outline: getComputedStyle(e).outlineStyle }; })()"
        )
        if focused["tag"] == "BODY":
            break
        if focused["hidden"] or focused["outline"] == "none":
            check(f"the stop {stops} is seen", False, json.dumps(focused))
        if focused["tag"] == "SUMMARY" and opened < 3:
            page.keyboard.press("Enter")
            opened += page.evaluate("document.activeElement.parentElement.open")
        if focused["chart"] and charts < 2:
            page.keyboard.press("ArrowRight")
            page.keyboard.press("ArrowRight")
            reading = page.evaluate("document.activeElement.querySelector('.reading').textContent")
            charts += reading.startswith("at ") and "nothing" not in reading
    check("the keyboard goes through the page and out of it", 20 < stops < 1000, stops)
    check("parts open by Enter", opened == 3)
    check("arrows read charts", charts == 2)
    page.evaluate("document.getElementById('theme').focus()")
    for theme in ("light", "dark"):
        page.keyboard.press("Enter")
        check(f"the button turns to {theme}", page.evaluate("document.documentElement.dataset.theme") == theme)
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    check("dark is dark", paper == "rgb(20, 23, 27)", paper)
    page.goto(file.as_uri() + "#stage-0")
    check("a link to a stage opens it", page.evaluate("document.getElementById('stage-0').open"))
    figure = page.locator("figure.chart").first
    figure.scroll_into_view_if_needed()
    box = figure.locator("svg").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + box["height"] / 2)
    reading = figure.locator(".reading").text_content()
    check("the pointer reads charts", reading.startswith("at "), reading)
    check("nothing on the console", not page.complaints, page.complaints[:2])
    page.context.close()


def hostile(browser, folder):
    rows = [{"prompt": f"{BAD}{n}", "chosen": BAD, "rejected": "'\"><svg onload=alert(1)>"} for n in range(3)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe = f"version: 1\ndescription: {json.dumps(BAD)}\nstages:\n  pairs: {{ import_dataset: {{ path: pairs.jsonl }} }}\n"
    (folder / "r.yaml").write_text(recipe)
    pipeline("run", "r.yaml", cwd=folder)
    pipeline("report", "r.yaml", cwd=folder)
    page = watched(browser)
    page.on("dialog", lambda dialog: (failed.append("a dialog"), dialog.dismiss()))
    page.goto((folder / "r.html").as_uri())
    page.evaluate("document.querySelectorAll('details').forEach((part) => part.open = true)")
    page.wait_for_timeout(300)
    check("rows that try to be markup do nothing", page.title() == "r.yaml: report", page.title())
    check("and are shown as they are", BAD in page.locator("main").inner_text())
    check("and complain of nothing", not page.complaints, page.complaints[:2])
    page.context.close()


def live(browser, folder):
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    (folder / ".pipeline").mkdir()
    recipe = "recipes/quickstart.yaml"
    server = subprocess.Popen([PROGRAM, "report", recipe, "--serve"], stdout=subprocess.PIPE, text=True, cwd=folder)
    try:
        address = server.stdout.readline().strip()
        page = watched(browser)
        page.goto(address)
        check("served: nothing ran yet", "to run" in page.locator("#graph").inner_text())
        page.evaluate("document.getElementById('stage-1').open = true")
        run = subprocess.Popen([PROGRAM, "run", recipe], stderr=subprocess.DEVNULL, cwd=folder)
        page.wait_for_selector("#state .running", timeout=60_000)
        check("served: a run appears", True)
        page.wait_for_selector("#training figure", timeout=300_000)
        check("served: curves appear while it runs", run.poll() is None)
        check("served: what was open stays open", page.evaluate("document.getElementById('stage-1').open"))
        if PICTURES:
            page.screenshot(path=PICTURES / "live.png", full_page=True)
        run.wait(timeout=900)
        page.wait_for_selector("#evaluation", timeout=60_000)
        check("served: the end appears", page.locator("#state .running").count() == 0)
        ours = [url for url in page.requests_made if not url.startswith((address, "data:"))]
        check("served: only our address is asked", not ours, ours[:2])
        server.terminate()
        server.wait(timeout=10)
        time.sleep(3)
        # The browser itself writes down that the server is gone.
        complaints = [text for text in page.complaints if "ERR_CONNECTION_REFUSED" not in text]
        check("served: nothing on the console", not complaints, complaints[:2])
        check("served: the end of the server is said", "not served any more" in page.locator("#state").inner_text())
        page.context.close()
    finally:
        server.kill()


def main():
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        folder = Path(folder)
        file = folder / "quickstart.html"
        pipeline("report", "recipes/quickstart.yaml", "-o", str(file))
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        from_disk(browser, file)
        by_keyboard(browser, file)
        (folder / "hostile").mkdir()
        (folder / "hostile/.pipeline").mkdir()
        hostile(browser, folder / "hostile")
        (folder / "live").mkdir()
        live(browser, folder / "live")
        browser.close()
    sys.exit(f"failed: {failed}" if failed else 0)


if __name__ == "__main__":
    main()
