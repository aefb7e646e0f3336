"""The client against a small server with real sockets: events, refusals, timeouts, and a host that goes away."""

from __future__ import annotations

import asyncio
import threading

import pytest
from aiohttp import web
from run_module import load_runner

client = load_runner("client")
END = "execution_success"


def event(kind: str, prompt: str) -> dict:
    return {"type": kind, "data": {"prompt_id": prompt}}


class Host:
    """A server that answers like the host. `says`: what each websocket sends when a prompt comes, then it stays open.

    An item of `says` is an event (sent as text), bytes (a preview), "garbage", "bye" (a proper close) or "drop" (the
    connection is cut).
    """

    def __init__(self):
        self.says, self.asked, self.sockets, self.ids = [], [], [], []

    async def ws(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        self.sockets.append((socket, request.transport))
        self.ids.append(request.query["clientId"])
        async for _ in socket:
            pass
        return socket

    async def prompt(self, request: web.Request) -> web.Response:
        self.asked.append(await request.json())
        if "bad" in self.asked[-1]["prompt"]:
            return web.json_response({"node_errors": {"1": "bad"}}, status=self.asked[-1]["prompt"]["bad"])
        socket, transport = self.sockets[-1]
        for item in self.says:
            if isinstance(item, bytes):
                await socket.send_bytes(item)
            elif isinstance(item, dict):
                await socket.send_json(item)
            elif item == "garbage":
                await socket.send_str("{")
            elif item == "bye":
                asyncio.create_task(socket.close())
            else:
                transport.abort()
        return web.json_response({"prompt_id": "a"})

    async def view(self, request: web.Request) -> web.Response:
        return web.Response(body=repr(dict(request.query)).encode())

    async def plain(self, request: web.Request) -> web.Response:
        return web.Response(text="grün", status=int(request.query.get("status", 200)))

    async def slow(self, request: web.Request) -> web.Response:
        await asyncio.sleep(30)

    async def nothing(self, request: web.Request) -> web.Response:
        return web.Response()


@pytest.fixture
def host():
    served, loop = Host(), asyncio.new_event_loop()

    async def start() -> web.AppRunner:
        app = web.Application()
        app.add_routes([web.get("/ws", served.ws), web.post("/prompt", served.prompt), web.get("/view", served.view),
                        web.get("/plain", served.plain), web.get("/slow", served.slow),
                        web.post("/interrupt", served.nothing)])
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        served.url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"
        return runner

    runner = loop.run_until_complete(start())
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    yield served
    asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
    loop.close()


@pytest.fixture
def talk(host):
    with client.Client(host.url, timeout=10) as made:
        yield made


def test_events_of_a_prompt_come_in_order_and_alone(host, talk):
    big = event("progress", "a") | {"text": "ü" * 5_000_000}  # more than aiohttp takes unless it is told to
    host.says = [{"type": "status", "data": {}}, {"type": "odd", "data": None}, event("execution_start", "a"),
                 b"\0" * 5_000_000, event("execution_start", "b"), big, event(END, "a"), event("execution_error", "b")]
    assert talk.queue({"1": {}}) == "a"
    seen = []
    assert talk.follow("a", seen.append, timeout=10) == seen == [event("execution_start", "a"), big, event(END, "a")]
    assert talk.follow("b", timeout=10)[-1] == event("execution_error", "b")
    assert talk.follow("a", timeout=10) == seen  # once more: nothing is used up
    assert host.asked == [{"prompt": {"1": {}}, "client_id": talk.id}] and host.ids == [talk.id]
    assert talk.queue({"2": {}}) == "a" and len(host.ids) == 1, "one connection for all prompts"


def test_a_prompt_that_does_not_end_is_a_timeout(host, talk):
    host.says = [event("execution_start", "a")]
    with pytest.raises(TimeoutError, match="a was not done within 0.05 s"):
        talk.follow(talk.queue({"1": {}}), timeout=0.05)


@pytest.mark.parametrize("way", ["bye", "drop", "garbage"])
def test_a_host_that_goes_away_is_an_error_and_the_next_prompt_connects_again(host, talk, way):
    host.says = [event("execution_start", "a"), way]
    if way == "drop":  # before the answer: the prompt itself may be lost, or its events
        try:
            talk.queue({"1": {}})
        except ConnectionError:
            pass
    else:
        talk.queue({"1": {}})
    with pytest.raises(ConnectionError, match="went away before the end of a"):
        talk.follow("a", timeout=10)
    host.says = [event(END, "a")]
    assert talk.follow(talk.queue({"1": {}}), timeout=10)[-1] == event(END, "a")
    assert host.ids == [talk.id, talk.id]


@pytest.mark.parametrize("status", [400, 200])
def test_a_refused_prompt_carries_the_hosts_answer(talk, status):
    with pytest.raises(client.HostError) as error:
        talk.queue({"bad": status})
    assert error.value.status == status and error.value.body == {"node_errors": {"1": "bad"}}


def test_answers_of_every_kind(talk):
    assert talk.get("/plain") == "grün" and talk.interrupt() is None
    query = {"filename": "a b&c.png", "subfolder": "ü", "type": "temp"}
    assert talk.view(**query) == repr(query).encode()
    with pytest.raises(client.HostError) as error:
        talk.get("/plain?status=503")
    assert error.value.status == 503 and error.value.body == "grün"


def test_a_host_that_is_not_there_or_not_answering_is_a_connection_error(host):
    with client.Client("http://127.0.0.1:1") as nobody:
        with pytest.raises(ConnectionError, match="no HTTP answer"):
            nobody.get("/plain")
        with pytest.raises(ConnectionError, match="would not open a websocket"):
            nobody.queue({})
    with client.Client(host.url, timeout=0.2) as hasty, pytest.raises(ConnectionError, match="no HTTP answer"):
        hasty.get("/slow")


def test_it_works_where_a_loop_is_running_and_closes_twice(host):
    async def inside():
        with client.Client(host.url) as talk:
            answer = talk.get("/plain")
            talk.close()
            return answer

    assert asyncio.run(inside()) == "grün"
