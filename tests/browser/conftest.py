"""A real ComfyUI, and its frontend in a real Chromium.

STYLELOOM_BROWSER names the Chromium; `python run.py test` sets it. "none" (--no-browser) skips these tests, and only
that does: a browser that is not named, not there or does not start is a failure.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]

sys.path.insert(0, str(HERE))  # so that the tests share their helpers by plain name

from frontend import SETTINGS, Frontend


def pytest_collection_modifyitems(items):
    if os.environ.get("STYLELOOM_BROWSER") == "none":
        skip = pytest.mark.skip(reason="left out by --no-browser (STYLELOOM_BROWSER=none)")
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(skip)


class Browser:
    """One Chromium, and in it one page with the frontend, for all tests of this folder: to load a page takes longer than
    most tests.

    Not for the whole session: while Playwright runs, its event loop counts as this thread's running one, and
    `asyncio.run` fails in every other test. So it ends with the last test of this folder, and begins when it is used.
    """

    def __init__(self):
        self._stack = contextlib.ExitStack()
        self._chromium = self.page = None

    def chromium(self):
        """Playwright's handle of the running browser."""
        if self._chromium is None:
            self._chromium = self._start()
        return self._chromium

    def _start(self):
        named = os.environ.get("STYLELOOM_BROWSER", "")
        if not named:
            pytest.fail("STYLELOOM_BROWSER is not set: it must name a Chromium (`python run.py test` finds or fetches "
                        "one and sets it), or be 'none' to leave these tests out.", pytrace=False)
        if not Path(named).is_file():
            pytest.fail(f"STYLELOOM_BROWSER is {named}, which is not there. Name a Chromium, or set it to 'none' to "
                        "leave these tests out (`python run.py test --no-browser`).", pytrace=False)
        from playwright.sync_api import Error, sync_playwright

        playwright = self._stack.enter_context(sync_playwright())
        try:
            browser = playwright.chromium.launch(executable_path=named, args=ARGUMENTS)
        except Error as error:
            pytest.fail(f"{named} does not start: {error}", pytrace=False)
        self._stack.callback(browser.close)
        return browser

    def close(self) -> None:
        self._chromium = self.page = None
        self._stack.close()


BROWSER = Browser()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item, nextitem):
    try:
        return (yield)
    finally:
        if nextitem is None or HERE not in nextitem.path.parents:
            BROWSER.close()


@pytest.fixture(scope="module")
def open_frontend(server):
    """`with open_frontend(settings) as front:` gives a fresh page with the frontend in it, as a Frontend."""
    runner = sys.modules["styleloom_live"].runner  # loaded for the server

    @contextlib.contextmanager
    def opening(**settings):
        with runner("client").Client(server.url) as client:
            client.post("/settings", {**SETTINGS, **settings})
        context = BROWSER.chromium().new_context(viewport={"width": 1600, "height": 1000})
        try:
            yield Frontend(context.new_page(), server.url).load()
        finally:
            context.close()

    return opening


@pytest.fixture
def front(server):
    """The page that all tests share, as a Frontend: the settings of SETTINGS, an empty graph, no complaints."""
    runner = sys.modules["styleloom_live"].runner
    if BROWSER.page is None:
        with runner("client").Client(server.url) as client:
            client.post("/settings", SETTINGS)
        context = BROWSER.chromium().new_context(viewport={"width": 1600, "height": 1000})
        BROWSER.page = Frontend(context.new_page(), server.url).load()
    return BROWSER.page.cleared()
