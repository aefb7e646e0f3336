"""The client: websocket frames from hand-made bytes, and HTTP against a small server."""

from __future__ import annotations

import json
import re
import socket
import struct
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from run_module import run
from styleloom_runner import client


class Wire:
    """A socket made of bytes: gives them out in pieces of `step`, and keeps what is sent."""

    def __init__(self, data: bytes, step: int = 3):
        self.data, self.step, self.sent = data, step, b""

    def recv(self, size: int) -> bytes:
        size = min(size, self.step)
        piece, self.data = self.data[:size], self.data[size:]
        return piece

    def sendall(self, data: bytes) -> None:
        self.sent += data


def frame(opcode: int, payload: bytes, final: bool = True, mask: bytes = b"") -> bytes:
    size, bit = len(payload), 0x80 if mask else 0
    if size < 126:
        head = bytes((size | bit,))
    elif size < 1 << 16:
        head = bytes((126 | bit,)) + struct.pack("!H", size)
    else:
        head = bytes((127 | bit,)) + struct.pack("!Q", size)
    body = bytes(byte ^ mask[i % 4] for i, byte in enumerate(payload)) if mask else payload
    return bytes((opcode | (0x80 if final else 0),)) + head + mask + body


@pytest.mark.parametrize("size", [0, 1, 125, 126, 127, 65535, 65536, 70000])
@pytest.mark.parametrize("mask", [b"", b"\x01\x02\x03\xff"])
def test_every_length_of_frame(size, mask):
    payload = bytes(i % 251 for i in range(size))
    assert client.read_frame(Wire(frame(2, payload, mask=mask), 4096)) == (2, True, payload)


def test_pings_are_answered_and_previews_skipped():
    wire = Wire(frame(9, b"are you there") + frame(2, b"\x00" * 300) + frame(1, b"a") + frame(10, b"") + frame(1, b"b")
                + frame(8, struct.pack("!H", 1000) + b"bye") + frame(1, b"after the end"))
    assert list(client.messages(wire)) == ["a", "b"]
    answers = Wire(wire.sent)
    assert client.read_frame(answers) == (10, True, b"are you there")
    assert client.read_frame(answers) == (8, True, struct.pack("!H", 1000))
    assert wire.sent[1] & 0x80  # a client must mask


def test_message_in_pieces_with_a_ping_between():
    text = "grün → blau".encode()
    wire = Wire(frame(1, text[:3], final=False) + frame(9, b"") + frame(0, text[3:6], final=False) + frame(0, text[6:]))
    assert list(client.messages(wire)) == ["grün → blau"]


def test_torn_connection_is_an_error_and_a_clean_end_is_not():
    assert list(client.messages(Wire(frame(1, b"a")))) == ["a"]
    for cut in (1, 2, 3):
        with pytest.raises(ConnectionError, match="in the middle of a message"):
            list(client.messages(Wire(frame(1, b"abc")[:-cut])))


@settings(deadline=None, max_examples=60)
@given(texts=st.lists(st.text(max_size=200), max_size=6), cuts=st.lists(st.integers(0, 200), max_size=6),
       step=st.integers(1, 64))
def test_texts_survive_any_cutting(texts, cuts, step):
    data = b""
    for text in texts:
        body = text.encode()
        edges = sorted({0, len(body), *(cut for cut in cuts if cut < len(body))})
        pieces = [body[a:b] for a, b in zip(edges[:-1], edges[1:], strict=True)] or [b""]
        for i, piece in enumerate(pieces):
            data += frame(0 if i else 1, piece, final=i == len(pieces) - 1)
        data += frame(2, b"preview")
    assert list(client.messages(Wire(data, step))) == texts


def test_control_frames_are_short():
    with pytest.raises(ValueError, match="at most 125"):
        client.masked_frame(client.PONG, b"x" * 126)


def _event(kind: str, prompt: str) -> dict:
    return {"type": kind, "data": {"prompt_id": prompt}}


def test_follow_takes_the_events_of_its_own_prompt():
    talk = run.Client("http://127.0.0.1:1")
    talk._events = [{"type": "status", "data": {}}, {"type": "odd", "data": None}, _event("execution_start", "a"),
                    _event("execution_start", "b"), _event("execution_success", "a"), _event("execution_error", "b")]
    seen = []
    assert [e["type"] for e in talk.follow("a", seen.append)] == ["execution_start", "execution_success"]
    assert len(seen) == 2
    assert talk.follow("b")[-1]["type"] == "execution_error" and talk.follow("a") == seen
    with pytest.raises(TimeoutError):
        talk.follow("c", timeout=0.05)
    talk._lost = "it closed the connection"
    with pytest.raises(ConnectionError, match="it closed"):
        talk.follow("c")


def test_client_against_a_small_server():
    """Over real sockets: the upgrade, an event that comes with it, JSON both ways, and an error's body."""
    asked = []
    listener = socket.create_server(("127.0.0.1", 0))

    def serve():
        for _ in range(4):
            sock, _ = listener.accept()
            text = b""
            while b"\r\n\r\n" not in text:
                text += sock.recv(65536)
            head, body = text.split(b"\r\n\r\n", 1)
            length = re.search(rb"Content-Length: (\d+)", head)
            while length and len(body) < int(length[1]):
                body += sock.recv(65536)
            asked.append((head, body))
            if b"/ws?" in head:
                end = json.dumps(_event("execution_success", "p1")).encode()
                sock.sendall(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n" + frame(1, end))
                continue  # stays open for the client to close
            bad = b"bad" in body
            answer = b'{"node_errors": {"1": "bad"}}' if bad else b'{"prompt_id": "p1"}'
            sock.sendall(b"HTTP/1.1 %s\r\nContent-Type: application/json; charset=utf-8\r\nContent-Length: %d\r\n\r\n%s"
                         % (b"400 Bad" if bad else b"200 OK", len(answer), answer))
            sock.close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    with run.Client(f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=5) as talk:
        assert talk.queue({"1": {}}) == "p1"
        assert talk.follow("p1", timeout=5) == [_event("execution_success", "p1")]
        with pytest.raises(run.HostError) as error:
            talk.post("/prompt", {"prompt": "bad"})
        assert error.value.status == 400 and error.value.body == {"node_errors": {"1": "bad"}}
        assert talk.get("/anything") == {"prompt_id": "p1"}
    thread.join(5)
    listener.close()
    assert f"/ws?clientId={talk.id}".encode() in asked[0][0] and json.loads(asked[1][1])["client_id"] == talk.id
