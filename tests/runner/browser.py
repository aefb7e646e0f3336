"""A Chromium for the browser tests: one that is there, else one that may be fetched."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from .common import WORK, StepFailed, apt_install, ask_to_install, can_apt, say
from .environment import Environment

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge",
         "microsoft-edge", "microsoft-edge-stable")
MAC = ("Chromium.app/Contents/MacOS/Chromium", "Google Chrome.app/Contents/MacOS/Google Chrome",
       "Microsoft Edge.app/Contents/MacOS/Microsoft Edge")
WINDOWS = ("Chromium/Application/chrome.exe", "Google/Chrome/Application/chrome.exe",
           "Microsoft/Edge/Application/msedge.exe")
WAY_ROUND = "Install Chromium or Chrome, or run the tests without it: python run.py test --no-browser"


def on_system(environ: dict, platform: str, which=shutil.which) -> list[str]:
    """Every Chromium-like browser on the system, best first: on the path, then where installers put them."""
    found = [path for path in map(which, NAMES) if path]
    if platform == "darwin":
        roots, tails = [Path("/Applications"), Path(environ.get("HOME", "/")) / "Applications"], MAC
    elif platform == "win32":
        variables = ("PROGRAMFILES", "PROGRAMFILES(X86)", "LOCALAPPDATA")
        roots, tails = [Path(environ[name]) for name in variables if environ.get(name)], WINDOWS
    else:
        roots, tails = [], ()
    found += [str(root / tail) for tail in tails for root in roots if (root / tail).is_file()]
    return list(dict.fromkeys(found))


def works(path: str) -> bool:
    """True when the browser starts. Ubuntu's `chromium-browser` may be a mere pointer to a snap that is not there."""
    if os.name == "nt":
        return Path(path).is_file()  # there, --version opens a window
    try:
        done = subprocess.run([path, "--version"], capture_output=True, timeout=60, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def obtain(environment: Environment) -> str:
    """The path of a Chromium that starts; fetched if need be. Raises StepFailed, naming the way round."""
    named = os.environ.get("STYLELOOM_BROWSER", "").strip()
    if named:
        if named != "none" and not works(named):
            raise StepFailed(f"STYLELOOM_BROWSER is {named}, which does not start. {WAY_ROUND}")
        return named
    ways = (lambda: on_system(os.environ, sys.platform), lambda: _playwrights(environment), _from_debian,
            lambda: _download(environment))
    for way in ways:
        for path in way():
            if works(path):
                return path
    raise StepFailed(f"No Chromium could be found or fetched for the browser tests. {WAY_ROUND}")


def _from_debian() -> list[str]:
    return on_system(os.environ, sys.platform) if can_apt() and apt_install("chromium", WAY_ROUND) else []


def _playwrights(environment: Environment) -> list[str]:
    """The Chromium that this Playwright would start, if it has been downloaded."""
    code = ("from playwright.sync_api import sync_playwright\n"
            "with sync_playwright() as playwright: print(playwright.chromium.executable_path)")
    done = subprocess.run(environment.command(code), capture_output=True, text=True, cwd=WORK)
    lines = done.stdout.strip().splitlines()
    return [lines[-1]] if done.returncode == 0 and lines and Path(lines[-1]).is_file() else []


def _download(environment: Environment) -> list[str]:
    extra = []
    if can_apt():  # on a bare Debian its libraries are missing too
        ask_to_install("the libraries of Playwright's Chromium", WAY_ROUND)
        extra = ["--with-deps"]
    say("Fetching Playwright's Chromium.")
    code = "import runpy; runpy.run_module('playwright', run_name='__main__')"
    subprocess.run(environment.command(code, "install", *extra, "chromium"), cwd=WORK)
    return _playwrights(environment)
