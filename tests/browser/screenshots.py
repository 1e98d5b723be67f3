"""Pictures of every page at three widths in both themes, and what its first load costs. Called by `make screenshots`.

`measures.json` has for each page, opened in a fresh window with nothing cached: milliseconds until DOMContentLoaded and
until the formulas are drawn, counted from the start of the navigation, the bytes that came over the wire, and the
number of requests.
"""

import json
import sys
from pathlib import Path

from visits import CHROMIUM, PAGES, chromium, served, visitor

WIDTHS = (1280, 820, 420)
THEMES = ("light", "dark")
HIGHEST = 16_000  # pixels that Chromium can draw into one picture
LOADED = "performance.getEntriesByType('navigation')[0].domContentLoadedEventEnd"


def measured(visit, address):
    """Open the page and say what that took."""
    wire = visit.page.context.new_cdp_session(visit.page)
    sizes = []
    wire.on("Network.loadingFinished", lambda event: sizes.append(event["encodedDataLength"]))
    wire.send("Network.enable")
    visit.open(address)
    drawn = visit.page.evaluate("performance.now()")
    return {
        "dom_content_loaded_ms": round(visit.page.evaluate(LOADED)),
        "formulas_drawn_ms": round(drawn),
        "bytes": round(sum(sizes)),
        "requests": len(sizes),
    }


def shoot(visit, stem):
    for width in WIDTHS:
        for theme in THEMES:
            page = visit.show(theme, width)
            height = min(page.evaluate("document.documentElement.scrollHeight"), HIGHEST)
            clip = {"x": 0, "y": 0, "width": width, "height": height}
            page.screenshot(path=f"{stem}-{width}-{theme}.png", full_page=True, clip=clip)


def main(folder):
    if CHROMIUM is None or not PAGES:
        raise SystemExit("Chromium (apt-get install chromium) and the built site (make book) are needed.")
    measures = {}
    with served() as base, chromium() as browser:
        for name in PAGES:
            visit = visitor(browser, base)
            measures[name] = measured(visit, base + name)
            stem = folder / Path(name).with_suffix("")
            stem.parent.mkdir(parents=True, exist_ok=True)
            shoot(visit, stem)
            visit.page.context.close()
            print(name, measures[name], flush=True)
    (folder / "measures.json").write_text(json.dumps(measures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
