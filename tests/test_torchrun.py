"""Runs over several nodes, started by torchrun: what they do when a process, a whole node or the cable is gone.

A node is a launcher. Some share this machine's address; where network namespaces may be made (by root, on Linux, with
iproute2) others are hosts of their own, joined by a virtual cable.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from adder_runs import assert_same, rows, train, wait_for_steps, write_adder
from processes import run, time_limit

TOKENS = ["--sampled-tokens", 1200]


@pytest.fixture(autouse=True)
def _limited() -> Iterator[None]:
    with time_limit(240):
        yield


@pytest.fixture(scope="module")
def adder(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    return write_adder(tmp_path_factory.mktemp("adder"))


@pytest.fixture(scope="module")
def alone(adder: list[object], tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Runs that are left alone, by their number of processes."""
    folder = tmp_path_factory.mktemp("alone")
    for processes in (1, 2):
        run(processes, train, *adder, *TOKENS, "--out", folder / str(processes), logs=folder / f"logs{processes}")
    return {processes: folder / str(processes) for processes in (1, 2)}


@dataclass(frozen=True)
class Host:
    """Where a launcher runs."""

    address: str = "127.0.0.1"
    namespace: str | None = None
    interface: str = "lo"

    @property
    def enter(self) -> list[str]:
        """What a command is preceded with, to run there."""
        return [] if self.namespace is None else ["ip", "netns", "exec", self.namespace]


HERE = Host()


class Nodes:
    """Launchers of one process each that share a run; the first keeps torchrun's store.

    Args:
        nodes: torchrun's --nnodes.
        arguments: of `ibtpo train`.
        logs: a file for each launcher.
        hosts: where they run.
        may_rejoin: may a node that was lost come back? It takes a setting of torchrun's and, at times, two restarts.
    """

    def __init__(
        self,
        nodes: str,
        arguments: list[object],
        *,
        logs: Path,
        hosts: tuple[Host, Host] = (HERE, HERE),
        may_rejoin: bool = False,
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._hosts = hosts
        self._logs = logs
        self._may_rejoin = may_rejoin
        self._launcher = [
            sys.executable, "-m", "torch.distributed.run", "--nnodes", nodes, "--nproc-per-node", "1",
            "--max-restarts", "3" if may_rejoin else "1", "--monitor-interval", "0.1",
            "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{hosts[0].address}:{port}",
        ]  # fmt: skip
        self._train = ["-m", "ibtpo", "train", *map(str, arguments)]
        self._running: list[subprocess.Popen[bytes]] = []
        self._all = ExitStack()

    def __enter__(self) -> Nodes:
        for number in range(len(self._hosts)):
            self._running.append(self._start(number))
        return self

    def __exit__(self, *exc: object) -> None:
        self._all.close()

    def _start(self, number: int) -> subprocess.Popen[bytes]:
        host, environment = self._hosts[number], dict(os.environ)
        environment |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "GLOO_SOCKET_IFNAME": host.interface}
        settings = f"is_host={int(number == 0)},last_call_timeout=5"
        if self._may_rejoin:
            environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # else nobody is let in after a restart
            settings += ",keep_alive_interval=2"  # a node is given up after three of these; by default 15 s
        where = ["--local-addr", host.address, "--rdzv-conf", settings]
        with self._logs.with_name(f"{self._logs.name}{number}.txt").open("a") as log:
            node = subprocess.Popen(
                [*host.enter, *self._launcher, *where, *self._train],
                env=environment, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        self._all.callback(_kill, node)
        return node

    def worker(self, number: int) -> int:
        """The process that trains, of a node."""
        parents = {self._running[number].pid}
        for _ in range(50):
            for parent in sorted(parents):
                for child in map(int, Path(f"/proc/{parent}/task/{parent}/children").read_text().split()):
                    parents.add(child)
                    if b"LOCAL_RANK=0" in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
                        return child
            time.sleep(0.1)
        raise AssertionError(f"node {number} trains nothing")

    def lose(self, number: int) -> None:
        """Kill all there is of a node."""
        worker = self.worker(number)
        _kill(self._running[number])
        with suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)  # torchrun gave it a session of its own

    def begin_again(self, number: int) -> None:
        """Start a node that was lost."""
        self._running[number] = self._start(number)

    def end(self, *numbers: int) -> str:
        """Wait for these nodes to end well; what all have printed."""
        codes = [self._running[number].wait(timeout=150) for number in numbers]
        printed = "\n".join(path.read_text() for path in sorted(self._logs.parent.glob(f"{self._logs.name}*.txt")))
        assert not any(codes), printed
        return printed


def _kill(node: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(node.pid, signal.SIGKILL)
    node.wait()


def test_a_node_that_is_lost_comes_back(adder: list[object], alone: dict[int, Path], tmp_path: Path) -> None:
    """Launcher and process are killed, and started again by hand; the run ends as one that is left alone does."""
    folder = tmp_path / "run"
    with Nodes("2", [*adder, *TOKENS, "--out", folder], logs=tmp_path / "node", may_rejoin=True) as nodes:
        wait_for_steps(folder, 3)
        nodes.lose(1)
        nodes.begin_again(1)
        printed = nodes.end(0, 1)
    assert printed.count("2 processes, ddp") >= 2
    assert_same(folder, alone[2], within=1e-12)


def test_the_others_go_on_without_a_node_that_is_lost(
    adder: list[object], alone: dict[int, Path], tmp_path: Path
) -> None:
    """With --nnodes 1:2 one is enough; what it does alone is what two would have done."""
    folder = tmp_path / "run"
    with Nodes("1:2", [*adder, *TOKENS, "--out", folder], logs=tmp_path / "node", may_rejoin=True) as nodes:
        wait_for_steps(folder, 3)
        nodes.lose(1)
        printed = nodes.end(0)
    assert printed.count("2 processes, ddp") == 1
    assert printed.count("memory plan") == 2
    assert_same(folder, alone[1], within=1e-3)


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host] | None]:
    """Two hosts with a cable between them; None where network namespaces cannot be made."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        yield None
        return
    names = [f"ibtpo-{os.getpid()}-{number}" for number in range(2)]
    pair = tuple(Host(f"10.213.7.{1 + number}", name, f"cable{number}") for number, name in enumerate(names))
    with ExitStack() as undo:
        for name in names:
            if subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode != 0:
                yield None
                return
            undo.callback(_ip, "netns", "del", name)
        _ip("link", "add", "cable0", "netns", names[0], "type", "veth", "peer", "name", "cable1", "netns", names[1])
        for host in pair:
            _ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", host.interface)
            _ip("-n", host.namespace, "link", "set", "lo", "up")
            _ip("-n", host.namespace, "link", "set", host.interface, "up")
        yield pair[0], pair[1]


def _ip(*arguments: str | None) -> None:
    subprocess.run(["ip", *map(str, arguments)], check=True, capture_output=True)


def test_a_cable_may_be_pulled_and_a_process_that_is_killed_comes_back(
    adder: list[object], alone: dict[int, Path], hosts: tuple[Host, Host] | None, tmp_path: Path
) -> None:
    """Two hosts, where they can be made: nothing is sent for four seconds, then the run goes on as if never.

    Then a process is killed; the launcher of the first node counts no restart. The run ends as one left alone does.
    """
    folder = tmp_path / "run"
    with Nodes("2", [*adder, *TOKENS, "--out", folder], logs=tmp_path / "node", hosts=hosts or (HERE, HERE)) as nodes:
        wait_for_steps(folder, 3)
        if hosts is None:
            warnings.warn("network namespaces need root and iproute2: no cable was pulled", stacklevel=1)
        else:
            cable = ("-n", hosts[1].namespace, "link", "set", hosts[1].interface)
            _ip(*cable, "down")
            time.sleep(1)
            steps = len(rows(folder))
            time.sleep(3)
            assert len(rows(folder)) == steps
            _ip(*cable, "up")
            wait_for_steps(folder, steps + 1)
        os.kill(nodes.worker(1), signal.SIGKILL)
        printed = nodes.end(0, 1)
    assert printed.count("2 processes, ddp") == 2
    assert (folder / "report.html").exists()
    assert_same(folder, alone[2], within=1e-12)
