"""The demo: a workflow in a real host, progress while the host works, and plain words at the end."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

from .client import Client, HostError
from .common import DEMO, OUTPUT, ROOT, WORK, StepFailed, as_command, lock, say
from .server import Server, make_base

ABOUT = """
What happened: reference pictures, real ones that come with ComfyUI's own templates, went through two image
encoders; the Image-to-LoRA Predictor turned what they saw into a LoRA in one pass, without training; the LoRA was
written to a file, and ComfyUI made the same picture without it and with it.
What is real and what is not: every step is the one that the published models go through, in their architectures at
small width. But these small models are untrained (seeded random numbers; nothing is downloaded), so the pictures
can only be abstract: look at how far the LoRA moved the image, and at its targets, ranks and norms. With the
published models (README.md says where they go) the same nodes give the style of your references."""


def title(prompt: dict, node: str) -> str:
    """What a node is called: its title in the workflow, else its class. Id "5.0.1" is part of what 5 expanded to."""
    entry = prompt.get(node) or prompt.get(str(node).split(".")[0]) or {}
    return entry.get("_meta", {}).get("title") or entry.get("class_type") or f"node {node}"


class Progress:
    """Shows the host's events: one line that rewrites itself on a terminal, one line per node elsewhere."""

    def __init__(self, prompt: dict, stream=None):
        self.prompt, self.stream = prompt, stream or sys.stdout
        self.tty = self.stream.isatty()
        self.node, self.seen, self.said, self.width = None, set(), 0.0, 0

    def event(self, event: dict) -> None:
        """Takes one event of Client.follow."""
        kind, data = event["type"], event["data"]
        if kind == "execution_cached":
            self.seen.update(data.get("nodes", []))
        elif kind == "executing" and data.get("node"):
            self.node = str(data["node"])
            self.seen.add(self.node)
            self._show("", always=True)
        elif kind == "progress" and data.get("max"):
            done = data["value"] >= data["max"]
            self._show(f" {100 * data['value'] // data['max']:.0f} %", always=done and self.tty)

    def _show(self, percent: str, always: bool) -> None:
        now = time.monotonic()
        if self.node is None or not always and now - self.said < (0.1 if self.tty else 15):
            return
        self.said = now
        count = min(len(self.seen), len(self.prompt))
        line = f"  [{count}/{len(self.prompt)}] {title(self.prompt, self.node)}{percent}"
        self.stream.write(f"\r{line:<{self.width}}" if self.tty else f"{line}\n")
        self.width = len(line)
        self.stream.flush()

    def close(self) -> None:
        """Ends the line that rewrites itself."""
        if self.tty and self.width:
            self.stream.write("\n")
            self.stream.flush()


def describe(event: dict, prompt: dict) -> str:
    """In words, why a prompt did not succeed, from its last event."""
    data = event["data"]
    if event["type"] == "execution_interrupted":
        return f"The run was interrupted in {title(prompt, data.get('node_id'))}."
    trace = "".join(data.get("traceback") or [])
    return (f"{title(prompt, data.get('node_id'))} failed: {data.get('exception_type')}: "
            f"{data.get('exception_message')}\n{trace}")


def files_below(folder: Path) -> dict[Path, tuple[int, int]]:
    """Every file below `folder` with its size and time: two of these show what was written in between."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


def texts(prompt: dict, record: dict) -> list[str]:
    """The texts that nodes showed, each once, under its node's title. `record` is the host's history of the prompt."""
    shown, before = [], set()
    for node, output in record.get("outputs", {}).items():
        lines = [text for text in output.get("text") or [] if isinstance(text, str)]
        if lines and tuple(lines) not in before:
            before.add(tuple(lines))
            body = "\n".join(lines).strip().replace("\n", "\n    ")
            shown.append(f"  {title(prompt, node)}:\n    {body}")
    return shown


def savers(prompt: dict, record: dict, folder: Path) -> dict[Path, str]:
    """Which node wrote a file below the output folder: {path: the node's title}, for what the history tells."""
    found = {}
    for node, output in record.get("outputs", {}).items():
        for item in (item for items in output.values() if isinstance(items, list) for item in items):
            if isinstance(item, dict) and item.get("type") == "output" and item.get("filename"):
                found[folder / item.get("subfolder", "") / item["filename"]] = title(prompt, node)
    return found


def summary(prompt: dict, record: dict, written: list[Path], seconds: float, is_demo: bool) -> str:
    """The plain words at the end: what was done, what the nodes said, and every file written."""
    lines = [f"\nDone in {seconds:.1f} s."]
    if is_demo:
        lines.append(ABOUT)
    said = texts(prompt, record)
    if said:
        lines += ["\nWhat the nodes said:", *said]
    lines.append("\nWhere to look:" if written else "\nNo file was written.")
    whose = savers(prompt, record, OUTPUT)
    for path in written:
        by = f"  {whose[path]}" if path in whose else ""
        lines.append(f"  {os.path.relpath(path, ROOT)}  ({_size(path.stat().st_size)}){by}")
    return "\n".join(lines)


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{max(count / 1e3, 0.1):.1f} kB"


def run(host: Path, workflow: Path, serve: bool, port: int | None) -> int:
    """Runs a workflow in API format in the ComfyUI at `host`; returns the exit status. Raises StepFailed."""
    prompt = json.loads(workflow.read_text("utf-8"))
    base = WORK / "base"
    OUTPUT.mkdir(exist_ok=True)
    busy = f"Another demo is running on {base}. Stop it first (ctrl-C in its window)."
    with lock(base / "demo.lock", busy, wait=False):
        make_base(base, ROOT)
        say("Starting ComfyUI …")
        with Server(host, base, extra_args=["--output-directory", str(OUTPUT)], port=port) as server:
            if server.failed_imports():
                raise StepFailed(f"The host could not load a pack. Its log:\n{server.log_text()}")
            say(_run_in(server, workflow, prompt))
            if serve:
                say(f"\nThe same ComfyUI is open at {server.url} (its Templates list StyleLoom's workflows). "
                    "Stop it with ctrl-C.")
                try:
                    server.process.wait()
                except KeyboardInterrupt:
                    say("Stopped.")
    return 0


def _run_in(server: Server, workflow: Path, prompt: dict) -> str:
    """Runs the prompt in a started server; returns the words at the end."""
    before, began = files_below(OUTPUT), time.monotonic()
    with Client(server.url) as client:
        say(f"Running {workflow.name}: {len(prompt)} nodes")
        progress = Progress(prompt)
        try:
            prompt_id = client.queue(prompt)
            end = client.follow(prompt_id, progress.event, timeout=3600)[-1]
        except HostError as error:
            raise StepFailed(f"ComfyUI refused {workflow.name}: {json.dumps(error.body, indent=2)}") from None
        finally:
            progress.close()
        if end["type"] != "execution_success":
            raise StepFailed(describe(end, prompt) + f"\nThe whole log: {server.log}")
        written = [path for path, state in files_below(OUTPUT).items() if before.get(path) != state]
        return summary(prompt, client.history(prompt_id), written, time.monotonic() - began, workflow == DEMO)


def main(arguments: list[str]) -> int:
    """The part of `run.py demo` that runs in the prepared Python; run.py passes the arguments."""
    parser = argparse.ArgumentParser()
    parser.add_argument("host", type=Path)
    parser.add_argument("workflow", type=Path)
    parser.add_argument("--serve", action="store_true")
    parser.add_argument("--port", type=int)
    options = parser.parse_args(arguments)
    return as_command(lambda: run(options.host, options.workflow, options.serve, options.port))
