"""A `/v1/completions` server on localhost over a small engine, which can be told to misbehave."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from ibtpo_engine import EngineBackend, Sampling

Fault = Callable[["Handler", dict[str, Any]], None]
"""Answers a request instead of the model; given the handler and the request's body."""

Twist = Callable[[dict[str, Any]], None]
"""Changes every answer before it is sent."""

LONGEST_BODY = 1 << 20


class Server(ThreadingHTTPServer):
    """Serves `backend`; `requests` are the bodies seen, `faults` is used up from the front, a request each."""

    daemon_threads = False  # closing waits for the requests still being answered, whether or not anyone listens
    request_queue_size = 128

    def __init__(self, backend: EngineBackend, twist: Twist | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.backend = backend
        self.twist = twist
        self.faults: list[Fault] = []
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.under_way = self.most_under_way = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone away is what some of the tests are about."""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        if self.path != "/v1/completions":
            return self.answer(404, {"error": {"message": f"no route {self.path}"}})
        length = int(self.headers["Content-Length"])
        if length > LONGEST_BODY:
            return self.answer(413, {"error": {"message": "too long"}})
        body = json.loads(self.rfile.read(length))
        server = self.server
        with server.lock:
            server.requests.append(body)
            server.headers.append(dict(self.headers))
            fault = server.faults.pop(0) if server.faults else None
            server.under_way += 1
            server.most_under_way = max(server.most_under_way, server.under_way)
        try:
            response = None if fault else self.complete(body)
        finally:
            with server.lock:  # before the answer: its reader may ask again at once
                server.under_way -= 1
        if response is None:
            assert fault is not None
            return fault(self, body)
        return self.answer(200, response)

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        """As vLLM answers: raw log-probs, token ids on request, seed + i for the i-th of `n`."""
        sampling = Sampling(
            temperature=body["temperature"],
            top_p=body["top_p"],
            top_k=max(body["top_k"], 0),
            min_p=body["min_p"],
            max_tokens=body["max_tokens"],
            stop_tokens=tuple(body["stop_token_ids"]),
        )
        seeds = [[body["seed"] + i for i in range(body["n"])]]
        [completions] = self.server.backend.extend([body["prompt"]], body["n"], sampling=sampling, seeds=seeds)
        choices = [
            {
                "index": i,
                "text": "",
                "finish_reason": completion.finish,
                "logprobs": {
                    "tokens": [f"w{token}" for token in completion.tokens.tolist()],
                    "token_logprobs": completion.logprob_raw.tolist(),
                },
                "token_ids": completion.tokens.tolist() if body.get("return_token_ids") else None,
                "prompt_token_ids": body["prompt"],
            }
            for i, completion in enumerate(completions)
        ]
        response = {"object": "text_completion", "model": body["model"], "choices": choices[::-1]}
        if self.server.twist is not None:
            self.server.twist(response)
        return response

    def answer(self, status: int, body: dict[str, Any] | bytes, **headers: str) -> None:
        text = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *args: Any) -> None:
        """Say nothing."""


@contextmanager
def serving(backend: EngineBackend, twist: Twist | None = None) -> Iterator[Server]:
    """A server in a thread, gone at the end of the block."""
    with Server(backend, twist) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
