"""A `/v1/completions` server (vLLM, SGLang, or a compatible one) as a backend."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import closing, suppress
from dataclasses import dataclass, field
from typing import Any, Literal, Self, get_args
from urllib.parse import urlsplit

from ibtpo_engine.backends import Completion
from ibtpo_engine.completions_api import LogprobKind, read_completions, request_body
from ibtpo_engine.errors import BackendError
from ibtpo_engine.sampling import Sampling

_TEMPORARY = {408, 425, 429, 500, 502, 503, 504}  # worth another try
_LONGEST_WAIT = 60.0  # seconds between two tries, whatever the server asks for
_GLANCE = 0.1  # seconds between two checks whether the call is over


@dataclass(frozen=True, kw_only=True)
class CompletionsServer:
    """Where a server is and how to talk to it.

    Attributes:
        url: its base address, such as "http://127.0.0.1:8000/v1".
        model: the name it serves the model under.
        api_key: sent as a bearer token if given.
        logprobs: which log-probs it returns: "raw", "scaled" or "sampled" (see `LogprobKind`).
        siblings: "apart" sends a request a completion, each with its own seed, and works with every server; "together"
            sends one request with `n`, for servers that vary the seed themselves (vLLM adds 0, 1, ... to it).
        timeout: seconds without a byte from the server after which a try fails; a response comes in one piece, so this
            must exceed the longest generation.
        retries: tries after the first, if the server cannot be reached, times out or says it is busy.
        backoff: seconds before the second try; doubled for every further one, or what the server asks for.
        max_requests: most concurrent requests.

    Raises:
        ValueError: a value is out of range; the message names it.
    """

    url: str
    model: str
    api_key: str | None = field(default=None, repr=False)
    logprobs: LogprobKind = "raw"
    siblings: Literal["apart", "together"] = "apart"
    timeout: float = 600.0
    retries: int = 4
    backoff: float = 0.5
    max_requests: int = 64

    def __post_init__(self) -> None:
        if not _is_base_address(self.url):
            raise ValueError(f'CompletionsServer.url: {self.url!r} must look like "http://host:port/v1"')
        if self.logprobs not in get_args(LogprobKind):
            raise ValueError(f"CompletionsServer.logprobs: {self.logprobs!r} is not one of raw, scaled, sampled")
        if self.siblings not in ("apart", "together"):
            raise ValueError(f"CompletionsServer.siblings: {self.siblings!r} is not one of apart, together")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable()):
            raise ValueError(
                "CompletionsServer.api_key: it holds a line end, or a character that is not printable ASCII; strip() it"
            )
        for name, least in (("backoff", 0), ("retries", 0), ("max_requests", 1)):
            if not getattr(self, name) >= least:
                raise ValueError(f"CompletionsServer.{name}: {getattr(self, name)} must be at least {least}")
        if not self.timeout > 0:
            raise ValueError(f"CompletionsServer.timeout: {self.timeout} must be above 0")


def _is_base_address(url: str) -> bool:
    """Can requests be posted below this URL, using every part of it?"""
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # an invalid port
        return False
    return bool(known) and parts.path.isascii() and " " not in parts.netloc + parts.path and not parts.query


class HttpBackend:
    """Samples on a server; as `Backend`.

    Log-probs are stored according to `CompletionsServer.logprobs`; entropy is unknown (NaN), so a search that needs it
    must use an `Engine`, or surprisal, ``-logprob_raw``, instead. A request that is tried again carries the same seed.

    Args:
        server: where it is.
    """

    def __init__(self, server: CompletionsServer) -> None:
        self.server = server
        self._pool = ThreadPoolExecutor(server.max_requests, thread_name_prefix="completions")
        self._closed = threading.Event()
        self._tls = ssl.create_default_context() if server.url.startswith("https") else None

    def extend(
        self, prefixes: Sequence[Sequence[int]], n: int, *, sampling: Sampling, seeds: Sequence[Sequence[int]]
    ) -> list[list[Completion]]:
        """Continue every prefix `n` times, all requests side by side; as `Backend.extend`."""
        return self.extend_until(prefixes, n, sampling=sampling, seeds=seeds, cancelled=self._closed)

    def extend_until(
        self,
        prefixes: Sequence[Sequence[int]],
        n: int,
        *,
        sampling: Sampling,
        seeds: Sequence[Sequence[int]],
        cancelled: threading.Event,
    ) -> list[list[Completion]]:
        """The same; once `cancelled` is set no further request is sent, and open ones are cut off."""
        if self._closed.is_set():
            raise BackendError(f"{self.server.url}: the backend is closed; make a new one")
        together = self.server.siblings == "together"
        asked = [[(seed, n) for seed in row[:1]] if together else [(seed, 1) for seed in row] for row in seeds]
        call = _Call(cancelled, self._closed)
        futures = [
            [self._pool.submit(self._complete, prefix, count, sampling, seed, call) for seed, count in row]
            for prefix, row in zip(prefixes, asked, strict=True)
        ]
        requests = [future for row in futures for future in row]
        try:
            while wait(requests, _GLANCE, FIRST_EXCEPTION).not_done:
                call.check(self.server.url)
                for future in [future for future in requests if future.done()]:
                    future.result()  # raises what it failed with
            return [[completion for future in row for completion in future.result()] for row in futures]
        finally:
            call.cut()
            for future in requests:
                future.cancel()

    def close(self) -> None:
        """Send nothing more and cut open requests off; closing twice is allowed."""
        self._closed.set()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _complete(self, prefix: Sequence[int], n: int, sampling: Sampling, seed: int, call: _Call) -> list[Completion]:
        body = json.dumps(request_body(self.server.model, prefix, n, sampling, seed)).encode()
        return read_completions(self._post(body, call), prefix, n, sampling, self.server.logprobs)

    def _post(self, body: bytes, call: _Call) -> Any:
        """The parsed answer, after retries if needed.

        Raises:
            BackendError: the server refused, or failed every time.
        """
        server, problem = self.server, ""
        for attempt in range(server.retries + 1):
            call.check(server.url)
            pause = server.backoff * 2 ** min(attempt, 32)
            try:
                status, asked_to_wait, text = self._send(body, call)
                if status == 200:
                    return _parsed(text)
            except (OSError, http.client.HTTPException) as error:  # refused, reset, timed out, cut off half-way
                problem = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            else:
                problem = f"HTTP {status}: {_message(text)}"
                if status not in _TEMPORARY:
                    raise BackendError(f"{server.url}: {problem}; repeating the request will not help, correct it")
                pause = pause if asked_to_wait is None else asked_to_wait
            if attempt < server.retries:
                call.rest(min(pause, _LONGEST_WAIT))
        raise BackendError(
            f"{server.url}: {problem}, {server.retries + 1} times in a row; check that the server runs, and that "
            f"timeout={server.timeout:g} s is long enough for {server.max_requests} requests at a time"
        )

    def _send(self, body: bytes, call: _Call) -> tuple[int, float | None, bytes]:
        """Post once: (status, seconds the server asks to wait, body)."""
        parts = urlsplit(self.server.url)
        assert parts.hostname is not None
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self.server.api_key is not None:
            headers["Authorization"] = f"Bearer {self.server.api_key}"
        if self._tls is not None:
            connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                parts.hostname, parts.port, timeout=self.server.timeout, context=self._tls
            )
        else:
            connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=self.server.timeout)
        with closing(connection):
            connection.connect()
            connected = connection.sock  # if the server closes, the connection drops it before the body is read
            call.sockets.add(connected)
            try:
                if call.is_over:  # meanwhile: `cut` may have missed this socket
                    raise ConnectionAbortedError("nobody waits for the answer")
                connection.request("POST", parts.path.rstrip("/") + "/completions", body, headers)
                response = connection.getresponse()
                return response.status, _seconds(response.getheader("Retry-After")), response.read()
            finally:
                call.sockets.discard(connected)


class _Call:
    """One `extend` and its open requests; over as soon as one of the events is set."""

    def __init__(self, *ends: threading.Event) -> None:
        self.ends = ends
        self.sockets: set[socket.socket] = set()
        self._is_cut = False

    @property
    def is_over(self) -> bool:
        return self._is_cut or any(end.is_set() for end in self.ends)

    def check(self, url: str) -> None:
        """Raise `BackendError` if the call is over."""
        if self.is_over:
            raise BackendError(f"{url}: the backend was closed, or the call was left, before all answers arrived")

    def cut(self) -> None:
        """End the call and cut off its open requests."""
        self._is_cut = True
        for connected in list(self.sockets):
            with suppress(OSError):  # it may have just ended
                socket.socket.shutdown(connected, socket.SHUT_RDWR)  # below TLS: wakes its reader on another thread

    def rest(self, seconds: float) -> None:
        """Wait so long, or until the call is over, to free the thread for other requests."""
        end = time.monotonic() + seconds
        while not self.is_over and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, _GLANCE))


def _parsed(text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        ends = isinstance(error, json.JSONDecodeError) and (error.pos >= len(error.doc) or "Unterminated" in error.msg)
        if ends or (text.lstrip().startswith(b"{") and not text.rstrip().endswith(b"}")):
            raise http.client.IncompleteRead(text) from None  # without a length, a lost connection looks like the end
        raise BackendError(
            f"the server's answer is not JSON: {text[:80]!r}; check that this is a completions server"
        ) from None


def _message(text: bytes) -> str:
    """The message of an error response: that inside the usual JSON, or the beginning of the text."""
    try:
        said = json.loads(text)
        said = said.get("error", said)
        return str(said.get("message", said))[:300]
    except (ValueError, AttributeError, RecursionError):
        return text[:300].decode(errors="replace")


def _seconds(header: str | None) -> float | None:
    """The value of Retry-After if it is a number of seconds, not a date."""
    try:
        return max(float(header), 0.0) if header is not None else None
    except ValueError:
        return None
