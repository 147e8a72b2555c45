"""Two torchrun agents on two hosts, as on a cluster: they meet, survive a lost process and go on
after a stop."""

from __future__ import annotations

import itertools
import os
import random
import signal
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from transnormer.train.metrics import read_metrics

from ..conftest import REPOSITORY
from .runs import PATIENCE, environment, held, train_on_two, wait_until, write_recipe

STEPS = 40
SETTINGS = (
    f"train.steps={STEPS}",
    "optim.name=muon",
    "eval.every=10",
    "eval.tokens=256",
    "checkpoint.every=5",
)


class Hosts:
    """Two hosts with names, addresses and a wire between them, in network namespaces; this machine
    twice where it may not."""

    def __init__(self, folder: Path):
        self._names = [f"tn{os.getpid()}{end}" for end in "ab"]
        self._wire = [f"tn{os.getpid() % 10_000}{end}" for end in "ab"]
        self._folder = folder
        self._agents: list[subprocess.Popen[str]] = []
        self.real = self._try("ip", "netns", "add", self._names[0])
        if not self.real:
            warnings.warn(
                "no network namespaces here: both hosts are this machine, on loopback", stacklevel=2
            )
            return
        try:
            self._ip("netns", "add", self._names[1])
            self._ip("link", "add", self._wire[0], "type", "veth", "peer", "name", self._wire[1])
            addresses = "".join(f"10.99.0.{number + 1} host{number}\n" for number in range(2))
            for number, (name, wire) in enumerate(zip(self._names, self._wire, strict=True)):
                self._ip("link", "set", wire, "netns", name)
                self._ip("-n", name, "addr", "add", f"10.99.0.{number + 1}/24", "dev", wire)
                for device in (wire, "lo"):
                    self._ip("-n", name, "link", "set", device, "up")
                etc = Path("/etc/netns") / name  # `ip netns exec` lays these over /etc
                etc.mkdir(parents=True)
                (etc / "hosts").write_text(f"127.0.0.1 localhost\n{addresses}")
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        for each in itertools.chain.from_iterable(family(agent) for agent in self._agents):
            with suppress(psutil.Error):
                each.kill()
        for name in self._names:
            self._try("ip", "netns", "delete", name)
            for file in (Path("/etc/netns") / name).glob("*"):
                file.unlink()
            if (Path("/etc/netns") / name).exists():
                (Path("/etc/netns") / name).rmdir()

    def start(self, number: int, port: int, *overrides: str) -> subprocess.Popen[str]:
        """launch/torchrun.sh on one of them, one process a host."""
        command = [
            str(REPOSITORY / "launch" / "torchrun.sh"), "2",
            f"{'host0' if self.real else 'localhost'}:{port}",
            "tiny.toml", *SETTINGS, *overrides,
        ]  # fmt: skip
        if self.real:
            inside = ["unshare", "--uts", "sh", "-c", f'hostname host{number}; exec "$@"', "sh"]
            command = ["ip", "netns", "exec", self._names[number], *inside, *command]
        variables = {
            **environment(), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PET_NPROC_PER_NODE": "1",
        }  # fmt: skip
        log = (self._folder / f"host{number}.log").open("a")
        agent = subprocess.Popen(
            command, stdout=log, stderr=log, text=True, env=variables, cwd=self._folder
        )
        self._agents.append(agent)
        return agent

    def _ip(self, *words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    def _try(self, *command: str) -> bool:
        try:
            return subprocess.run(command, capture_output=True).returncode == 0
        except OSError:
            return False


@pytest.fixture
def hosts(tmp_path: Path, prepared: Path) -> Iterator[Hosts]:
    write_recipe(tmp_path, prepared)
    found = Hosts(tmp_path)
    try:
        yield found
    finally:
        found.close()


def free_port() -> int:
    """A free port outside the range that the system assigns from, because tests run side by
    side."""
    for port in random.sample(range(20_000, 32_000), 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port
    raise AssertionError("no port is free")


def workers(agents: list[subprocess.Popen[str]]) -> list[psutil.Process]:
    """The training process that each agent has started."""
    found = []
    for each in itertools.chain.from_iterable(family(agent) for agent in agents):
        with suppress(psutil.Error):
            found += [each] if each.cmdline()[1:4] == ["-u", "-m", "transnormer"] else []
    return found


def family(agent: subprocess.Popen[str]) -> list[psutil.Process]:
    """A process and all below it."""
    try:
        return [psutil.Process(agent.pid), *psutil.Process(agent.pid).children(recursive=True)]
    except psutil.Error:
        return []


def lines(folder: Path, run: str) -> int:
    path = folder / "runs" / run / "metrics.jsonl"
    return len(read_metrics(path)) if path.exists() else 0


def curve(folder: Path, run: str) -> list[tuple[int, float, float, float | None]]:
    found = read_metrics(folder / "runs" / run / "metrics.jsonl")
    return [
        (line["step"], line["loss"], line["gradient_norm"], line.get("valid_loss"))
        for line in found
    ]


def end(agents: list[subprocess.Popen[str]], folder: Path) -> list[int]:
    try:
        return [agent.wait(PATIENCE) for agent in agents]
    except subprocess.TimeoutExpired:
        pytest.fail(f"the agents do not end:\n{logs(folder)}")


def logs(folder: Path) -> str:
    return "\n".join((folder / f"host{number}.log").read_text()[-3_000:] for number in range(2))


def wait_for(
    happened: Callable[[], bool], agents: list[subprocess.Popen[str]], folder: Path
) -> None:
    try:
        wait_until(happened, *agents)
    except AssertionError as error:
        pytest.fail(f"{error}:\n{logs(folder)}")


def test_a_lost_process_and_a_stop_leave_no_trace_in_the_curve(
    hosts: Hosts, tmp_path: Path
) -> None:
    train_on_two((*SETTINGS, "run=whole"), folder=tmp_path)
    whole = curve(tmp_path, "whole")
    assert [step for step, *_ in whole] == list(range(1, STEPS + 1))

    port = free_port()
    # the last step but one: it does not end before it is stopped
    with held(4 * (STEPS - 2), tmp_path):
        agents = [hosts.start(number, port, "run=hurt") for number in range(2)]
        wait_for(lambda: lines(tmp_path, "hurt") > 12, agents, tmp_path)
        first = workers(agents)
        assert len(first) == 2
        first[1].kill()
        wait_for(lambda: len({*workers(agents)} - {*first}) == 2, agents, tmp_path)
        wait_for(lambda: lines(tmp_path, "hurt") > 25, agents, tmp_path)
        for each in itertools.chain.from_iterable(family(agent) for agent in agents):
            # to all as Slurm does; the agents hand it on once more
            each.send_signal(signal.SIGTERM)
    assert 0 not in end(agents, tmp_path)
    stopped = lines(tmp_path, "hurt")
    assert stopped < STEPS

    port = free_port()
    agents = [hosts.start(number, port, "run=hurt") for number in (1, 0)]  # the head may come last
    assert end(agents, tmp_path) == [0, 0]
    log = (tmp_path / "host0.log").read_text()
    assert f"stopped and saved at step {stopped}; the same command goes on from there" in log
    assert f"going on after step {stopped} of {STEPS}" in log
    assert curve(tmp_path, "hurt") == whole
