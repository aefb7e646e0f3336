"""The host's HTTP API and the part of the websocket protocol (RFC 6455) that it takes to listen to the host."""

from __future__ import annotations

import base64
import http.client
import json
import os
import socket
import struct
import threading
import time
import urllib.parse
import uuid

TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10
ENDS = ("execution_success", "execution_error", "execution_interrupted")


class HostError(RuntimeError):
    """The host answered with an error. `status` is the HTTP status, `body` its answer (JSON if it was that)."""

    def __init__(self, status: int, body):
        super().__init__(f"the host answered {status}: {body if isinstance(body, str) else json.dumps(body)}")
        self.status, self.body = status, body


class Client:
    """Talks to one ComfyUI server at `url` (http://127.0.0.1:port). Listens from the first `queue` on."""

    def __init__(self, url: str, timeout: float = 60):
        parts = urllib.parse.urlsplit(url)
        self.address, self.timeout = (parts.hostname, parts.port or 80), timeout
        self.id = uuid.uuid4().hex
        self._events: list[dict] = []
        self._news = threading.Condition()
        self._socket: socket.socket | None = None
        self._lost: str | None = None

    def get(self, path: str):
        """GET: the answer as JSON (text or bytes if it is not JSON). Raises HostError from status 400 on."""
        return self._request("GET", path, None)

    def post(self, path: str, obj):
        """POST of `obj` as JSON: the answer as JSON, None if empty. Raises HostError from status 400 on."""
        return self._request("POST", path, json.dumps(obj).encode("utf-8"))

    def queue(self, api_prompt: dict) -> str:
        """Queues an API-format prompt; returns its id. HostError.body holds `node_errors` if the host refuses it."""
        self._listen()
        answer = self.post("/prompt", {"prompt": api_prompt, "client_id": self.id})
        if answer.get("node_errors"):  # the host runs what is valid of it and answers 200
            raise HostError(200, answer)
        return answer["prompt_id"]

    def follow(self, prompt_id: str, on_event=None, timeout: float = 600) -> list[dict]:
        """Waits for the end of a prompt; returns its events, each {"type": ..., "data": {...}}, in order.

        The last one is execution_success, execution_error or execution_interrupted. `on_event(event)` is called
        for each as it comes. TimeoutError after `timeout` seconds, ConnectionError if the host goes away.
        """
        found, seen, end = [], 0, time.monotonic() + timeout
        while True:
            with self._news:
                while seen == len(self._events):
                    if self._lost:
                        raise ConnectionError(f"the host went away before the end of {prompt_id}: {self._lost}")
                    if not self._news.wait(max(0.0, end - time.monotonic())) and time.monotonic() >= end:
                        raise TimeoutError(f"prompt {prompt_id} was not done within {timeout} s")
                event = self._events[seen]
                seen += 1
            if (event.get("data") or {}).get("prompt_id") != prompt_id:
                continue
            found.append(event)
            if on_event:
                on_event(event)
            if event["type"] in ENDS:
                return found

    def history(self, prompt_id: str, timeout: float = 10) -> dict:
        """The host's record of a finished prompt: {"outputs": ..., "status": ...}. KeyError if there is none.

        The host writes it a moment after it has sent the last event, so this waits for up to `timeout` seconds.
        """
        end = time.monotonic() + timeout
        while True:
            record = self.get(f"/history/{prompt_id}").get(prompt_id)
            if record is not None:
                return record
            if time.monotonic() > end:
                raise KeyError(prompt_id)
            time.sleep(0.05)

    def interrupt(self) -> None:
        """Stops what is running now."""
        self.post("/interrupt", {})

    def view(self, filename: str, subfolder: str = "", type: str = "output") -> bytes:
        """The bytes of a file that the host wrote, named as in the history's outputs."""
        query = urllib.parse.urlencode({"filename": filename, "subfolder": subfolder, "type": type})
        return self._exchange("GET", f"/view?{query}", None)[1]

    def close(self) -> None:
        """Stops listening."""
        if self._socket is not None:
            try:
                self._socket.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # the host closed it first
            self._socket.close()
            self._socket = None

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _request(self, method: str, path: str, body: bytes | None):
        kind, data = self._exchange(method, path, body)
        if not data:
            return None
        if kind.startswith("application/json"):
            return json.loads(data)
        return data.decode("utf-8") if kind.startswith("text/") else data

    def _exchange(self, method: str, path: str, body: bytes | None) -> tuple[str, bytes]:
        # http.client and not urllib: a proxy set for the machine must not stand between us and 127.0.0.1.
        connection = http.client.HTTPConnection(*self.address, timeout=self.timeout)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"} if body is not None else {})
            answer = connection.getresponse()
            kind, data = answer.headers.get("Content-Type", ""), answer.read()
        except http.client.HTTPException as error:
            raise ConnectionError(f"no HTTP answer from {self.address}: {error!r}") from error
        finally:
            connection.close()
        if answer.status >= 400:
            text = data.decode("utf-8", errors="replace")
            raise HostError(answer.status, json.loads(text) if kind.startswith("application/json") else text)
        return kind, data

    def _listen(self) -> None:
        """Opens the websocket before the first prompt, so that no event of it is missed, and keeps it drained."""
        if self._socket is not None and self._lost is None:
            return
        self.close()
        self._lost = None
        self._socket = connect(self.address, f"/ws?clientId={self.id}", self.timeout)
        threading.Thread(target=self._drain, args=(self._socket,), name="comfyui-events", daemon=True).start()

    def _drain(self, sock: socket.socket) -> None:
        lost = "it closed the connection"
        try:
            for text in messages(sock):
                event = json.loads(text)
                with self._news:
                    self._events.append(event)
                    self._news.notify_all()
        except (OSError, ValueError) as error:
            lost = repr(error)
        with self._news:
            self._lost = lost
            self._news.notify_all()


def connect(address: tuple[str, int], path: str, timeout: float) -> socket.socket:
    """Opens a websocket: the upgrade request and a check of its answer. ConnectionError if the host will not."""
    sock = socket.create_connection(address, timeout)
    key = base64.b64encode(os.urandom(16)).decode("ascii")
    request = (f"GET {path} HTTP/1.1\r\nHost: {address[0]}:{address[1]}\r\nUpgrade: websocket\r\n"
               f"Connection: Upgrade\r\nSec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n")
    sock.sendall(request.encode("ascii"))
    answer = b""
    while not answer.endswith(b"\r\n\r\n"):
        byte = sock.recv(1)  # one by one: the first frame may follow at once
        if not byte:
            break
        answer += byte
    status = answer.split(b"\r\n", 1)[0].decode("latin-1")
    if " 101 " not in f"{status} ":
        sock.close()
        raise ConnectionError(f"the host would not open a websocket: {status or 'no answer'}")
    sock.settimeout(None)
    return sock


def messages(sock):
    """Yields the text of each text message until the host closes. Answers pings, skips binary messages (previews)."""
    kind, parts = None, []
    while True:
        frame = read_frame(sock)
        if frame is None:
            return
        opcode, final, payload = frame
        if opcode == PING:
            sock.sendall(masked_frame(PONG, payload))
        elif opcode == CLOSE:
            sock.sendall(masked_frame(CLOSE, payload[:2]))
            return
        elif opcode != PONG:
            if opcode:  # 0 continues the message before
                kind, parts = opcode, []
            parts.append(payload)
            if final and kind == TEXT:
                yield b"".join(parts).decode("utf-8")


def read_frame(sock) -> tuple[int, bool, bytes] | None:
    """One frame: (opcode, is it the last of its message, payload). None when the connection ends between frames."""
    head = _read(sock, 2, may_end=True)
    if head is None:
        return None
    size = head[1] & 0x7F
    if size == 126:
        size = struct.unpack("!H", _read(sock, 2))[0]
    elif size == 127:
        size = struct.unpack("!Q", _read(sock, 8))[0]
    mask = _read(sock, 4) if head[1] & 0x80 else None
    payload = _read(sock, size)
    return head[0] & 0x0F, bool(head[0] & 0x80), _mask(payload, mask) if mask else payload


def masked_frame(opcode: int, payload: bytes) -> bytes:
    """A frame from client to server; those must be masked. Control frames only, so at most 125 bytes."""
    if len(payload) > 125:
        raise ValueError(f"a control frame carries at most 125 bytes, not {len(payload)}")
    mask = os.urandom(4)
    return bytes((0x80 | opcode, 0x80 | len(payload))) + mask + _mask(payload, mask)


def _mask(payload: bytes, mask: bytes) -> bytes:
    return bytes(byte ^ mask[index % 4] for index, byte in enumerate(payload))


def _read(sock, size: int, may_end: bool = False) -> bytes | None:
    data = bytearray()
    while len(data) < size:
        block = sock.recv(min(size - len(data), 1 << 20))
        if not block:
            if may_end and not data:
                return None
            raise ConnectionError("the connection ended in the middle of a message")
        data += block
    return bytes(data)
