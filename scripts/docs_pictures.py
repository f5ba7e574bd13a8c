"""Draws the pictures of README.md and docs/ from a finished run, in a browser: a row with its mask, and report.html.

    python scripts/docs_pictures.py runs/quickstart     # writes docs/img/mask.png and docs/img/report.png

The row is the page of `instructft inspect --html`, the report is the run folder's own. It needs the Chromium that
scripts/browser.sh finds; run it when one of the two pages looks otherwise than in the pictures.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PICTURES = ROOT / "docs" / "img"


def main() -> None:
    from playwright.sync_api import sync_playwright

    run = Path(sys.argv[1])
    found = subprocess.run(["sh", "scripts/browser.sh", "--find"], cwd=ROOT, capture_output=True, text=True)
    if found.returncode:
        sys.exit("no Chromium: sh scripts/browser.sh installs one")
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        rows = Path(folder) / "rows.html"
        inspect = ["inspect", str(run / "recipe.yaml"), "-n", "1", "--html", str(rows)]
        subprocess.run([sys.executable, "-m", "instructft", *inspect], check=True, capture_output=True)
        chromium = playwright.chromium.launch(executable_path=found.stdout.strip(), args=["--no-sandbox"])
        page = chromium.new_page(viewport={"width": 760, "height": 900}, device_scale_factor=1.5)
        page.goto(rows.as_uri())
        top = page.locator(".bar").bounding_box()["y"]  # the legend; above it stand facts of the data
        end = page.locator("article").nth(0).bounding_box()
        clip = {"x": 0, "y": top, "width": 760, "height": end["y"] + end["height"] + 16 - top}
        page.screenshot(path=PICTURES / "mask.png", clip=clip, full_page=True)
        page.set_viewport_size({"width": 1000, "height": 620})
        page.goto((run / "report.html").resolve().as_uri())
        page.screenshot(path=PICTURES / "report.png")
        chromium.close()


if __name__ == "__main__":
    main()
