"""The code of a grading process (see grading.py); started as a script, does not import torch.

A request is a line with a base64 pickle of (kind, prompt, completion, answer, data); it is trusted, since it comes from
the parent process. A reply is a line of JSON: {"reward": float, "faults": [[reward's name, "timeout" | "failure",
message], ...]} to "grade", {"answer": str | None, "faults": ...} to "extract". The first line written is {} once the
rewards are loaded, or {"error": message} if they cannot be.
"""

from __future__ import annotations

import base64
import contextlib
import faulthandler
import json
import numbers
import os
import pickle
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from types import FrameType
from typing import IO, Any, TypeVar

from ibtpo.printable import printable
from ibtpo.rewards import Graded, Reward, RewardSpec, load_reward

_SELF_DESTRUCT = 2.0  # seconds after the time limit when a process stuck in C code ends itself, if no parent does
_MEMORY = 4 << 30  # bytes of address space: a power tower raises MemoryError instead of swapping
_ROUNDING = 1e-6  # a reward may lie this far outside of [0, 1]
_MESSAGE = 300  # characters of an error's last line that are passed on

Result = TypeVar("Result")


class _TimeUp(BaseException):
    """Not an Exception, so that no handler in the algebra system swallows it."""


@contextlib.contextmanager
def _limit(timeout: float) -> Iterator[None]:
    """Raise _TimeUp after `timeout` seconds; a process stuck in C code ends itself a little later."""
    faulthandler.dump_traceback_later(timeout + _SELF_DESTRUCT, exit=True, file=2)
    signal.setitimer(signal.ITIMER_REAL, timeout)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        faulthandler.cancel_dump_traceback_later()


def _time_up(_signal: int, _frame: FrameType | None) -> None:
    raise _TimeUp


def checked(value: Any) -> float:
    """A reward as a float in [0, 1].

    Raises:
        TypeError: it is not a number.
        ValueError: it is NaN or lies outside of [0, 1].
    """
    if not isinstance(value, numbers.Real) and not (hasattr(value, "__float__") and hasattr(value, "dtype")):
        raise TypeError(f"a reward must be a number in [0, 1], not {type(value).__name__}")
    number = float(value)
    if not -_ROUNDING <= number <= 1 + _ROUNDING:
        raise ValueError(f"a reward must lie in [0, 1], not {number}")
    return min(max(number, 0.0), 1.0)


def _attempt(call: Callable[[], Result], timeout: float) -> tuple[Result | None, list[str]]:
    """(result, []), or (None, [kind of fault, message])."""
    try:
        with _limit(timeout):
            return call(), []
    except _TimeUp:
        return None, ["timeout", f"took longer than {timeout:g} s"]
    except BaseException as error:  # a reward that calls sys.exit() is a failed reward, too
        return None, ["failure", _last_line(error)]


def _last_line(error: BaseException) -> str:
    """The last line of the traceback, and where the error was raised."""
    text = printable(" ".join(traceback.format_exception_only(error)[-1].split())[:_MESSAGE])
    frames = traceback.extract_tb(error.__traceback__)
    if not frames or frames[-1].filename.startswith("<"):  # raised inside the import system, say
        return text
    return f"{text} ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})"


def _grade(rewards: list[tuple[RewardSpec, Reward]], graded: Graded, timeout: float) -> dict[str, Any]:
    total, faults = 0.0, []
    for spec, reward in rewards:
        value, fault = _attempt(lambda reward=reward: checked(reward.grade(graded)), timeout)  # type: ignore[misc]
        total += spec.weight * (value or 0.0)
        if fault:
            faults.append([spec.name, *fault])
    return {"reward": min(total / sum(spec.weight for spec, _ in rewards), 1.0), "faults": faults}


def _reply(rewards: list[tuple[RewardSpec, Reward]], request: bytes, timeout: float) -> dict[str, Any]:
    kind, *fields = pickle.loads(base64.b64decode(request))
    graded = Graded(*fields)
    if kind == "grade":
        return _grade(rewards, graded, timeout)
    answer, fault = _attempt(lambda: rewards[0][1].extract(graded.completion), timeout)
    return {"answer": answer, "faults": [[rewards[0][0].name, *fault]] if fault else []}


def _limit_memory() -> None:
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    soft = _MEMORY if hard == resource.RLIM_INFINITY else min(_MEMORY, hard)
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def main(specs: list[RewardSpec], timeout: float) -> None:
    replies: IO[bytes] = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # output of rewards must not mix with the replies
    requests: IO[bytes] = os.fdopen(os.dup(0), "rb")
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)  # nor may rewards, or processes they start, read the requests
    _limit_memory()
    signal.signal(signal.SIGALRM, _time_up)
    rewards = []
    for spec in specs:
        try:
            rewards.append((spec, load_reward(spec.name)))
        except BaseException as error:
            replies.write(json.dumps({"error": f"{spec.name} cannot be loaded: {_last_line(error)}"}).encode() + b"\n")
            return
    replies.write(b"{}\n")
    for request in requests:  # ends when the parent closes the pipe or has ended
        replies.write(json.dumps(_reply(rewards, request, timeout)).encode() + b"\n")


if __name__ == "__main__":
    main([RewardSpec(*spec) for spec in json.loads(sys.argv[1])], float(sys.argv[2]))
    if os.getsid(0) == os.getpid():  # as started by grading.py
        os.killpg(0, signal.SIGKILL)  # the parent has ended, so end the processes that rewards have started
