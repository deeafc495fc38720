"""A small real endpoint for chat completions on loopback that first misbehaves as it is told to, and then works."""

from __future__ import annotations

import json
import re
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ITEM = re.compile(r"item-(\w+)")
"""How a prompt tells which item it is about."""


class JudgeServer(ThreadingHTTPServer):
    """Answers `correct` about items whose text says `right-answer`, else `incorrect`."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock = threading.Lock()
        self.requests: list[dict[str, Any]] = []
        """Bodies of all requests, in the order of their arrival; then their headers, with names in lower case."""

        self.headers: list[dict[str, str]] = []
        self.asked: Counter[str] = Counter()
        """Requests by item."""

        self.under_way = self.most_under_way = 0
        self.mishaps: dict[str, list[str]] = defaultdict(list)
        """By item, or `*` for any: what happens to its next requests, see `Handler.answer`."""

        self.replies: dict[str, dict[str, Any]] = {}
        """By item: the message instead of the usual one."""

        self.forbidden: set[str] = set()
        """Parameters that are answered by 400, as by an endpoint that does not know them."""

        self.delay, self.slow = 0.0, 1.0
        """Seconds that every answer takes, and that a `slow` one takes besides."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that gave up is none of our faults."""

    def next_mishap(self, item: str) -> str:
        for name in (item, "*"):
            if self.mishaps[name]:
                return self.mishaps[name].pop(0)
        return ""


class Handler(BaseHTTPRequestHandler):
    server: JudgeServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Silent."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][0]["content"]
        item = found[1] if (found := ITEM.search(text)) else ""
        with self.server.lock:
            self.server.requests.append(body)
            self.server.headers.append({name.lower(): value for name, value in self.headers.items()})
            self.server.asked[item] += 1
            self.server.under_way += 1
            self.server.most_under_way = max(self.server.most_under_way, self.server.under_way)
            mishap = self.server.next_mishap(item)
        try:
            time.sleep(self.server.delay)
            self.answer(mishap, body, item, text)
        finally:
            with self.server.lock:
                self.server.under_way -= 1

    def answer(self, mishap: str, body: dict[str, Any], item: str, text: str) -> None:
        if forbidden := self.server.forbidden & body.keys():
            self.send(400, {"error": {"message": f"unknown {sorted(forbidden)}", "code": None}})
        elif mishap == "hang up":
            self.close_connection = True
            self.connection.close()
        elif mishap == "slow":
            time.sleep(self.server.slow)
            self.completion({"content": '{"verdict": "refused"}'})
        elif mishap == "nonsense":
            self.send(200, "<html>Bad gateway</html>", kind="text/html")
        elif mishap == "other JSON":
            self.send(200, {"choices": []})
        elif mishap == "filter":
            self.send(400, {"error": {"message": "no", "code": "content_filter"}})
        elif mishap == "401":
            self.send(
                401, {"error": {"message": f"wrong key {self.headers['Authorization']}", "code": "invalid_api_key"}}
            )
        elif mishap == "echo":
            self.send(418, {"error": {"message": f"I am a teapot, you are {self.headers['Authorization']}"}})
        elif mishap:
            self.send(int(mishap), {"error": {"message": "later", "code": None}}, retry_after="0.05")
        else:
            word = "correct" if "right-answer" in text else "incorrect"
            usual = {"content": json.dumps({"reason": f"because {item}", "verdict": word})}
            self.completion(self.server.replies.get(item, usual))

    def completion(self, message: dict[str, Any]) -> None:
        said = {"role": "assistant", **message}
        choice = {"index": 0, "message": said, "finish_reason": said.pop("finish_reason", "stop")}
        self.send(200, {"choices": [choice], "usage": {"prompt_tokens": 100, "completion_tokens": 10}})

    def send(self, status: int, body: object, kind: str = "application/json", retry_after: str = "") -> None:
        data = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        if retry_after:
            self.send_header("Retry-After", retry_after)
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def judge_server() -> Iterator[JudgeServer]:
    with JudgeServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
