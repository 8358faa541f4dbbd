#!/usr/bin/env python3
"""Draws the picture of the README: a real run of the quickstart at a terminal, then a plan after a change, as an SVG.

    pip install pyte==0.8.2
    python tests/python/record_picture.py target/release/pipeline docs/images/session.svg

Lines in the middle of the run that a reader can do without are left out, with a line of dots in their place.
"""

import shutil
import sys
from html import escape
from pathlib import Path

from record_sessions import Session, project

COLUMNS = 100
# The most lines that are kept of the run's beginning and of its end.
FIRST, LAST = 6, 15
BACKGROUND, FOREGROUND, DIM = "#16181d", "#d8dce5", "#8a91a0"
COLOURS = {
    "black": "#5c6370", "red": "#f07178", "green": "#8fd19e", "brown": "#e6c07b", "blue": "#7aa8f0", "magenta": "#c792ea",
    "cyan": "#7fd0d8", "white": "#d8dce5", "brightblack": "#8a91a0", "brightred": "#ff8b92", "brightgreen": "#a8e6b5",
    "brightbrown": "#f5d08a", "brightblue": "#9cc0ff", "brightmagenta": "#dcb0ff", "brightcyan": "#9be4ec", "brightwhite": "#ffffff",
}
WIDTH, HEIGHT, SIZE, MARGIN = 8.4, 19, 14, 16


def rows(session):
    """What is left of a session: each line as runs of equal looks."""
    screen = session.screen
    lines = list(screen.history.top) + [screen.buffer[number] for number in range(screen.lines)]
    found = []
    for line in lines:
        runs = []
        for column in range(COLUMNS):
            cell = line[column]
            look = (cell.fg, cell.bold)
            if runs and runs[-1][0] == look:
                runs[-1][1].append(cell.data)
            else:
                runs.append((look, [cell.data]))
        found.append([(look, "".join(text)) for look, text in runs])
    while found and not text(found[-1]).strip():
        found.pop()
    return found


def text(runs):
    return "".join(part for _, part in runs)


def plain(text, bold=False):
    return [(("default", bold), text)]


def draw(lines):
    width = COLUMNS * WIDTH + 2 * MARGIN
    height = len(lines) * HEIGHT + 2 * MARGIN
    drawn = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" width="{width:.0f}" height="{height}" role="img">',
        "<title>A terminal session</title>",
        f'<rect width="100%" height="100%" rx="8" fill="{BACKGROUND}"/>',
        f'<g font-family="ui-monospace, SFMono-Regular, Menlo, Consolas, \'DejaVu Sans Mono\', monospace" font-size="{SIZE}" fill="{FOREGROUND}">',
    ]
    for number, runs in enumerate(lines):
        y = MARGIN + (number + 0.75) * HEIGHT
        column = 0
        for (colour, bold), text in runs:
            # Each word has its own place, so that a font of another width moves nothing.
            start = 0
            for word in text.split(" "):
                if word:
                    x = MARGIN + (column + start) * WIDTH
                    fill = f' fill="{COLOURS[colour]}"' if colour in COLOURS else ""
                    weight = ' font-weight="bold"' if bold else ""
                    length = f' textLength="{len(word) * WIDTH:.1f}" lengthAdjust="spacingAndGlyphs"'
                    drawn.append(f'<text x="{x:.1f}" y="{y:.1f}"{fill}{weight}{length}>{escape(word)}</text>')
                start += len(word) + 1
            column += len(text)
    return "\n".join([*drawn, "</g>", "</svg>", ""])


def main():
    program, picture = str(Path(sys.argv[1]).resolve()), Path(sys.argv[2])
    folder = project()
    lines = []
    for arguments in (["run", "recipes/quickstart.yaml"], ["plan", "recipes/quickstart.yaml", "--set", "stages.tuned.train_orpo.beta=0.2"]):
        session = Session(program, arguments, folder, columns=COLUMNS)
        if session.code:
            sys.exit(f"{arguments}: {session.code}\n{session.text()}")
        shown = rows(session)
        if len(shown) > FIRST + LAST + 1:
            end = shown[-LAST:]
            # A message whose beginning is left out is left out whole.
            while end and text(end[0]).startswith(" " * 11):
                end = end[1:]
            shown = shown[:FIRST] + [plain("     ..")] + end
        lines += [plain("$ pipeline " + " ".join(arguments), True), *shown, plain("")]
    lines.pop()
    shutil.rmtree(folder)
    picture.parent.mkdir(parents=True, exist_ok=True)
    picture.write_text(draw(lines), encoding="utf-8")
    print(f"{picture}: {len(lines)} lines")


if __name__ == "__main__":
    main()
