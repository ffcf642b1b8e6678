"""The pictures of the docs: `python -m tests.e2e.page_screenshots URL FOLDER [USER]`, of a service that runs."""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

MOST = 150_000  # bytes of one picture
DESKTOP, PHONE = {"width": 1440, "height": 1080}, {"width": 360, "height": 760}


def save(page: Any, file: Path) -> None:
    """A picture in as many colours as fit into the size, rare ones kept."""
    page.mouse.move(0, 0)
    page.wait_for_timeout(900)
    whole = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    for colours in (256, 128, 64, 32):
        whole.quantize(colours, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(file, optimize=True)
        if file.stat().st_size <= MOST:
            return print(f"{file}  {file.stat().st_size:,} bytes, {colours} colours")
    raise SystemExit(f"{file}: {file.stat().st_size:,} bytes")


def change(page: Any, label: str, value: str) -> None:
    page.get_by_label(label, exact=True).fill(value)
    page.wait_for_selector("#moved:not([hidden])")


def story(browser: Any, url: str, folder: Path, user: str, column: tuple[str, str]) -> None:
    page = browser.new_page(viewport=DESKTOP, color_scheme="light")
    page.goto(f"{url}#user={user}")
    page.wait_for_selector("#right .row")
    page.wait_for_selector(".ablation li")
    page.evaluate("document.activeElement.blur()")
    save(page, folder / "page.png")
    change(page, *column)
    page.evaluate("document.activeElement.blur(); scrollTo(0, document.querySelector('.work').offsetTop - 60)")
    save(page, folder / "page-moved.png")
    page = browser.new_page(viewport=DESKTOP, color_scheme="dark")
    page.goto(f"{url}#user={user}")
    page.wait_for_selector("#right .row")
    page.select_option("#model-b", index=1 + (page.locator("#model-a option").count() > 1))
    page.wait_for_selector("#pair[data-view=compare]")
    page.wait_for_selector(".ablation li")
    page.evaluate("document.activeElement.blur()")
    save(page, folder / "page-compare.png")
    page = browser.new_page(viewport=PHONE, color_scheme="light", device_scale_factor=2, has_touch=True)
    page.goto(f"{url}#user={user}")
    page.wait_for_selector("#right .row")
    save(page, folder / "page-phone.png")
    page.locator("#right .row").nth(1).click()
    page.wait_for_selector(".ablation li")
    page.evaluate("document.activeElement.blur()")
    save(page, folder / "page-phone-item.png")


if __name__ == "__main__":
    url, target, *rest = sys.argv[1:]
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        story(chromium, url, Path(target), rest[0] if rest else "13", ("weekday", "6"))
        chromium.close()
