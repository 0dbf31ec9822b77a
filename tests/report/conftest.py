"""A headless Chromium, and reports of every kind to look at in it."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
# It runs in a container, and does nothing that it was not asked for.
ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium of this machine; without one the test is skipped, and fails where CI runs it."""
    found = next((path for path in map(shutil.which, NAMES) if path), None)
    missing = pytest.fail if os.environ.get("CI") else pytest.skip
    if found is None:
        missing(f"none of {', '.join(NAMES)} is installed")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing("playwright is not installed")
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=found, args=ARGUMENTS)
        yield launched
        launched.close()


@pytest.fixture
def opened(browser: Any) -> Iterator[Any]:
    """Opens a file in a new tab: `opened(path, width=360, color_scheme="dark")`.

    The page has `problems`: console errors, exceptions, dialogs, and requests for anything else.
    """
    contexts = []

    def open_page(path: Path, *, width: int = 1100, **options: Any) -> Any:
        context = browser.new_context(viewport={"width": width, "height": 800}, **options)
        contexts.append(context)
        page = context.new_page()
        page.problems = []
        page.on("console", lambda message: page.problems.append(message.text))
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        page.on("dialog", lambda dialog: page.problems.append(dialog.message))
        page.on("request", lambda request: page.problems.append(request.url))
        page.goto(path.as_uri())
        page.problems.remove(path.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
