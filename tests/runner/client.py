"""The host's HTTP API and the events that it sends. Needs aiohttp, which every ComfyUI brings with it."""

from __future__ import annotations

import asyncio
import json
import threading
import time
import uuid
from collections.abc import Callable

import aiohttp

ENDS = ("execution_success", "execution_error", "execution_interrupted")


class HostError(RuntimeError):
    """The host answered with an error. `status` is the HTTP status, `body` its answer (JSON if it was that)."""

    def __init__(self, status: int, body):
        super().__init__(f"the host answered {status}: {body if isinstance(body, str) else json.dumps(body)}")
        self.status, self.body = status, body


class Client:
    """Talks to one ComfyUI server at `url` (http://127.0.0.1:port). Listens from the first `queue` on.

    Plain calls from outside; inside, one event loop in a thread of its own, which keeps the events coming while the
    caller is busy, and does not mind whether the caller's thread has a loop already (Playwright's has).
    A host that cannot be reached, or that takes longer than `timeout` seconds to answer, is a ConnectionError.
    """

    def __init__(self, url: str, timeout: float = 60):
        self.url, self.timeout, self.id = url, timeout, uuid.uuid4().hex
        self._events: list[dict] = []
        self._news = threading.Condition()
        self._listener: asyncio.Task | None = None
        self._lost: str | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="comfyui-client", daemon=True)
        self._thread.start()
        self._session: aiohttp.ClientSession = self._wait_for(self._open())

    def get(self, path: str):
        """GET: the answer as JSON (text or bytes if it is not JSON). Raises HostError from status 400 on."""
        return self._request("GET", path)

    def post(self, path: str, obj):
        """POST of `obj` as JSON: the answer as JSON, None if empty. Raises HostError from status 400 on."""
        return self._request("POST", path, json=obj)

    def queue(self, api_prompt: dict) -> str:
        """Queues an API-format prompt; returns its id. HostError.body holds `node_errors` if the host refuses it."""
        self._wait_for(self._listen())  # first, so that no event of the prompt is missed
        answer = self.post("/prompt", {"prompt": api_prompt, "client_id": self.id})
        if answer.get("node_errors"):  # the host runs what is valid of it and answers 200
            raise HostError(200, answer)
        return answer["prompt_id"]

    def follow(self, prompt_id: str, on_event: Callable[[dict], None] | None = None,
               timeout: float = 600) -> list[dict]:
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
        query = {"filename": filename, "subfolder": subfolder, "type": type}
        return self._wait_for(self._exchange("GET", "/view", params=query))[1]

    def close(self) -> None:
        """Stops listening. The client cannot be used afterwards."""
        if self._thread.is_alive():
            self._wait_for(self._shut())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _wait_for(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def _request(self, method: str, path: str, **options):
        kind, data = self._wait_for(self._exchange(method, path, **options))
        if not data:
            return None
        if kind == "application/json":
            return json.loads(data)
        return data.decode("utf-8") if kind.startswith("text/") else data

    async def _open(self) -> aiohttp.ClientSession:
        # Without trust_env: a proxy set for the machine must not stand between us and 127.0.0.1.
        return aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=self.timeout))

    async def _exchange(self, method: str, path: str, **options) -> tuple[str, bytes]:
        """(content type, bytes) of the host's answer."""
        try:
            async with self._session.request(method, self.url + path, **options) as answer:
                kind, data = answer.content_type, await answer.read()
        except (aiohttp.ClientError, asyncio.TimeoutError) as error:
            raise ConnectionError(f"no HTTP answer from {self.url}: {error!r}") from error
        if answer.status >= 400:
            text = data.decode("utf-8", errors="replace")
            raise HostError(answer.status, json.loads(text) if kind == "application/json" else text)
        return kind, data

    async def _listen(self) -> None:
        """Opens the websocket, if it is not open, and keeps it drained."""
        if self._listener is not None and not self._listener.done():
            return
        try:
            # No limit on a message: the host sends previews the same way.
            socket = await self._session.ws_connect(f"{self.url}/ws", params={"clientId": self.id}, max_msg_size=0)
        except (aiohttp.ClientError, asyncio.TimeoutError) as error:
            raise ConnectionError(f"the host would not open a websocket: {error!r}") from error
        self._lost = None
        self._listener = asyncio.create_task(self._drain(socket))

    async def _drain(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        lost = "it closed the connection"
        try:
            async for message in socket:
                if message.type is aiohttp.WSMsgType.TEXT:  # previews are binary
                    event = json.loads(message.data)
                    with self._news:
                        self._events.append(event)
                        self._news.notify_all()
                elif message.type is aiohttp.WSMsgType.ERROR:
                    lost = repr(message.data)
        except ValueError as error:
            lost = repr(error)
        finally:
            with self._news:
                self._lost = lost
                self._news.notify_all()

    async def _shut(self) -> None:
        if self._listener is not None:
            self._listener.cancel()
            await asyncio.gather(self._listener, return_exceptions=True)
        await self._session.close()
