"""What run.py promises of the server that every other test here stands on."""

from __future__ import annotations

import re
import socket
import struct
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PICTURE = {
    "1": {"class_type": "EmptyImage", "inputs": {"width": 24, "height": 16, "batch_size": 1, "color": 255}},
    "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "own/base"}},
    "3": {"class_type": "PreviewAny", "inputs": {"source": "grün\nblau"}},
}


def test_the_pack_and_the_kit_are_loaded_and_no_other(server):
    block = server.log_text().split("Import times for custom nodes:")[1]
    loaded = re.findall(r"seconds: (.*)", block)
    assert sorted(Path(path).name for path in loaded) == ["StyleLoom", "styleloom_kit"]


def test_a_prompt_goes_all_the_way(server, client):
    prompt_id = client.queue(PICTURE)
    seen = []
    events = client.follow(prompt_id, seen.append, timeout=60)
    assert events == seen and events[-1]["type"] == "execution_success"
    assert {event["data"]["prompt_id"] for event in events} == {prompt_id}
    outputs = client.history(prompt_id)["outputs"]
    assert outputs["3"]["text"] == ["grün\nblau"]
    image = outputs["2"]["images"][0]
    png = client.view(image["filename"], image["subfolder"], image["type"])
    assert struct.unpack("!II", png[16:24]) == (24, 16)
    assert (server.base / "output" / "own" / image["filename"]).read_bytes() == png


def test_a_failing_node_ends_the_prompt_with_its_error(client):
    missing = {"1": {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 0}},
               "2": {"class_type": "ImageCrop", "inputs": {"image": ["1", 0], "width": 8, "height": 8, "x": 0, "y": 0}},
               "3": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "../outside"}}}
    end = client.follow(client.queue(missing), timeout=60)[-1]
    assert end["type"] == "execution_error" and end["data"]["node_id"] == "3"


def test_a_refused_prompt_carries_the_reason(client):
    with pytest.raises(RuntimeError) as error:
        client.queue({"1": {"class_type": "NoSuchNode", "inputs": {}}})
    assert error.value.status == 400 and error.value.body["error"]["type"] == "missing_node_type"


def test_it_listens_on_this_machine_only(server):
    assert client_socket("127.0.0.1", server.port)
    others = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}
    assert not any(client_socket(address, server.port) for address in others if not address.startswith("127."))


def client_socket(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=2).close()
    except OSError:
        return False
    return True
