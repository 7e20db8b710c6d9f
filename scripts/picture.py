"""Make the README's picture from the real report: `python scripts/picture.py report.html`.

Needs the dev extra and a Chromium (`chromium` on the path, or UNDERHOOD_CHROMIUM).
"""

import os
import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

OUT = Path(__file__).parent.parent / "docs" / "report.png"
SIZE = {"width": 1100, "height": 1500}


def main(report: str) -> None:
    browser_path = os.environ.get("UNDERHOOD_CHROMIUM") or shutil.which("chromium")
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        page = browser.new_page(viewport=SIZE, java_script_enabled=False)
        page.goto(Path(report).resolve().as_uri())
        page.screenshot(path=OUT, clip={"x": 0, "y": 0, **SIZE})
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1])
