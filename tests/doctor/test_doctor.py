"""What the doctor finds on machines of every kind, what it never does, and how it reports.

Each state of pcscd is a real one on a virtual stack.  If a real pcscd can't be brought into the state here, something
else listens on the socket.  Nothing depends on the machine's pcscd: PCSCLITE_CSOCK_NAME names another one.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Optional

import macos
import pytest
from conftest import Session
from places import ROOT

from pcsc_safe import policy
from pcsc_safe import scard as safe
from pcsc_safe.__main__ import main
from pcsc_safe.doctor import _command, _fork, _machine, _pcscd, _probe, _tasks, _view
from pcsc_safe.doctor._ask import TaskResult
from pcsc_safe.doctor._findings import KEYS, NEEDS, Finding, Ledger, Status
from pcsc_safe.testing import CardEvent, EchoCard, PcscStackError, VirtualPcsc, _activation, _install, _versions
from pcsc_safe.testing._daemon import Daemon, short_temporary_path
from pcsc_safe.testing._disposable import Ended

OK, WARNING, PROBLEM, UNKNOWN, SKIPPED = Status
ON_LINUX = sys.platform.startswith("linux")
on_linux = pytest.mark.skipif(not ON_LINUX, reason="only Linux has pcscd")
ALWAYS = [
    *("python", "platform", "pyscard", "wrapt", "pcsc_safe", "settings", "pcscd.program", "pcscd.socket"),
    *("pcscd.answer", "pcscd.clients", "libpcsclite", "pcsc.access", "readers", "reader", "reader"),
    *("fork.hooks", "fork.page", "fork.detection", "policy.auto", "broker"),
]


class Told:
    """What the doctor reported."""

    def __init__(self, status: int, whole: Any) -> None:
        self.status = status
        self.whole = whole
        self.findings = whole["findings"]
        self.of = {each["key"]: each for each in self.findings}  # the last one, if there are several

    def statuses(self, *keys: str) -> list[str]:
        return [self.of[key]["status"] for key in keys]


def run(*arguments: str, env: Optional[dict[str, str]] = None, **more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pcsc_safe", "doctor", *arguments]
    return subprocess.run(
        command, env={**(env or os.environ), **more}, capture_output=True, text=True, timeout=60, check=False
    )


def doctor(*arguments: str, env: Optional[dict[str, str]] = None, **more: str) -> Told:
    done = run("--json", "--no-probe", *arguments, env=env, **more)
    assert done.stderr == ""
    return Told(done.returncode, json.loads(done.stdout))


def about_pcsc(path: str, seconds: float = 10.0) -> Told:
    """What the doctor reports on PC/SC alone, without the time that the rest takes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(_activation.VARIABLE, path)
        found = [finding for findings, _ in _pcscd.service(seconds) for finding in findings]
    return Told(_command._status(found), {"findings": [each.as_json() for each in found]})


def at(path: str) -> dict[str, str]:
    """An environment in which pcscd's socket has this path."""
    return {**os.environ, _activation.VARIABLE: path}


@pytest.fixture
def path() -> Iterator[str]:
    """A path for a socket."""
    directory = short_temporary_path()
    os.mkdir(directory)
    yield os.path.join(directory, "pcscd.comm")
    shutil.rmtree(directory)


# The interface.


def test_keys() -> None:
    """The keys of findings are stable: keys may be added, but none is removed."""
    promised = (
        *("pcsc_safe", "python", "platform", "pyscard", "wrapt", "libpcsclite", "settings"),
        *("pcscd.program", "pcscd.socket", "pcscd.answer", "pcscd.clients", "pcsc.access", "readers", "reader"),
        *("fork.hooks", "fork.page", "fork.detection", "policy.auto", "broker"),
        *("probe.inherited", "probe.fresh", "probe.c-fork", "probe.card", "hazards", "hazard"),
        *("self.passing", "self.ends", "self.brokers", "self.deaths", "self.cancel", "self.idle", "self.exchange"),
        *("family", "process"),
    )
    assert promised == KEYS


@on_linux
def test_a_well_machine_and_an_untouched_card() -> None:
    """On a healthy machine the status is 0 and the JSON is as documented; the card isn't touched."""
    with VirtualPcsc(2, [EchoCard()], activate=False) as stack:
        card = stack.readers[0].card
        assert card is not None
        card.wait_for(CardEvent.POWER_OFF)  # pcscd powers off an unused card
        before = card.record
        told = doctor(env=stack.env)
        assert card.record == before
    assert told.status == 0
    assert list(told.whole) == ["version", "findings", "left_out"]
    assert told.whole["left_out"] == {}
    assert [each["key"] for each in told.findings] == ALWAYS
    assert {tuple(each) for each in told.findings} == {("key", "status", "what", "detail", "remedy", "data")}
    assert {each["status"] for each in told.findings} == {"ok"}
    states = [each["data"] for each in told.findings if each["key"] == "reader"]
    assert [("present" in each["state"], each["atr"]) for each in states] == [(True, card.atr.hex()), (False, "")]
    assert told.of["pcscd.clients"]["data"] == {"clients": 0, "limit": 200}
    assert told.of["broker"]["data"]["seconds"] > 0
    assert any("libpcsclite" in file for file in told.of["libpcsclite"]["data"]["files"])
    assert told.of["fork.detection"]["data"]["layers"] == ["hook", "page"]
    assert told.of["policy.auto"]["data"]["chooses"] == "reestablish"


@on_linux
def test_where_sigchld_is_ignored(path: str) -> None:
    """A process that inherits an ignored SIGCHLD can't wait for a child; the doctor works there, too."""
    ignore = (
        "import os, signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN); os.execv(sys.executable, sys.argv[1:])"
    )
    command = [sys.executable, "-c", ignore, sys.executable, "-m", "pcsc_safe", "doctor", "--no-probe"]
    done = subprocess.run(command, env=at(path), capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr == ""
    assert "Forks" in done.stdout


@on_linux
def test_a_session_of_another_process_goes_on(session: Session) -> None:
    """The session of another process continues, PIN included, even with ``--touch-cards``."""
    told = doctor("--touch-cards")
    session.assert_untouched()
    assert (told.status, told.of["probe.card"]["status"]) == (0, "ok")


@on_linux
def test_touched_cards_are_left_as_they_are() -> None:
    """``--touch-cards`` connects and forks, but resets nothing and sends no APDU."""
    with VirtualPcsc(2, [EchoCard()], activate=False) as stack:
        card = stack.readers[0].card
        assert card is not None
        told = doctor("--touch-cards", env=stack.env)
        assert (card.count(CardEvent.RESET), card.apdus) == (0, 0)
    (touched,) = [each for each in told.findings if each["key"] == "probe.card"]
    assert touched["data"]["parent"]["protocol"] == "T=1"
    assert touched["data"]["parent"]["disconnect"] == touched["data"]["child"]["own"] == "SCARD_S_SUCCESS"


@on_linux
def test_a_card_held_exclusively(shared_stack: VirtualPcsc) -> None:
    """A card that another application holds exclusively is reported as held, not as a problem."""
    session = Session(safe.SCARD_SHARE_EXCLUSIVE)
    try:
        told = doctor("--touch-cards")
        session.assert_untouched()
    finally:
        session.close()
    held, other = (each for each in told.findings if each["key"] == "reader")
    assert (held["status"], "exclusive" in held["data"]["state"], other["status"]) == ("warning", True, "ok")
    refused, touched = (each for each in told.findings if each["key"] == "probe.card")
    assert (refused["status"], touched["status"]) == ("warning", "ok")
    assert "SCARD_E_SHARING_VIOLATION" in refused["detail"]
    assert told.status == 0


# pcscd in other states.


@on_linux
def test_no_socket(path: str) -> None:
    """Without pcscd: a problem with its remedy, and status 1; the findings on the library and on forks are complete."""
    told = doctor(env=at(path))
    assert told.status == 1
    assert (told.of["pcscd.socket"]["data"]["connect"], told.of["pcscd.socket"]["status"]) == ("ENOENT", "problem")
    assert "PCSCLITE_CSOCK_NAME" in told.of["pcscd.socket"]["remedy"]
    assert told.statuses("libpcsclite", "fork.page", "policy.auto", "broker") == ["ok"] * 4
    assert not {"pcscd.answer", "pcsc.access", "readers"} & set(told.of)


@on_linux
def test_a_socket_that_was_left_behind(path: str) -> None:
    """A pcscd that died leaves a socket on which no process listens; the doctor reports it."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
    told = about_pcsc(path)
    assert (told.status, told.of["pcscd.socket"]["data"]["connect"]) == (1, "ECONNREFUSED")
    assert "no process listens on it" in told.of["pcscd.socket"]["detail"]


@on_linux
def test_a_stopped_pcscd() -> None:
    """A pcscd that hangs is found within seconds, and is the only thing that the doctor waits for."""
    with VirtualPcsc(activate=False) as stack:
        os.kill(stack.pid, signal.SIGSTOP)
        try:
            told = about_pcsc(stack.env[_activation.VARIABLE], 0.3)
        finally:
            os.kill(stack.pid, signal.SIGCONT)
    assert (told.status, told.of["pcscd.answer"]["data"]["answer"]) == (1, "timeout")
    assert "restart" in told.of["pcscd.answer"]["remedy"]
    assert "pcsc.access" not in told.of


@on_linux
def test_a_pcscd_that_accepts_nobody(path: str) -> None:
    """A pcscd that accepts no client, so that its queue fills, is also reported as one that hangs."""
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as first:
        listener.bind(path)
        listener.listen(0)
        first.connect(path)
        told = about_pcsc(path)
    assert (told.status, told.of["pcscd.socket"]["data"]["connect"]) == (1, "EAGAIN")
    assert "hangs" in told.of["pcscd.socket"]["detail"]


@contextlib.contextmanager
def server(path: str, serve: Callable[[socket.socket], None]) -> Iterator[None]:
    """A server in place of pcscd."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(8)

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    client, _ = listener.accept()
                    with client:
                        serve(client)

        thread = threading.Thread(target=accept)
        thread.start()
        yield
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


@on_linux
def test_a_user_who_is_refused(path: str) -> None:
    """If polkit refuses a user, pcscd closes the connection without reading the request.

    A real refusal needs a pcscd that is built with polkit, and a D-Bus.
    """

    def hangs_up(client: socket.socket) -> None:
        while len(client.recv(100, socket.MSG_PEEK)) < _tasks._VERSION.size:
            time.sleep(0.001)  # like polkit, which takes so long that the whole request has arrived

    with server(path, hangs_up):
        told = about_pcsc(path)
    assert told.status == 1
    assert told.of["pcscd.answer"]["data"]["answer"] in ("ECONNRESET", "hung up")
    assert told.of["pcscd.answer"]["remedy"]
    assert told.of["pcsc.access"]["data"]["establish"] == "SCARD_W_SECURITY_VIOLATION"


POLKIT = _pcscd._Program("/usr/sbin/pcscd", "2.3.3", "/run/pcscd", True)


@pytest.mark.parametrize(
    ("program", "user", "seen", "clients", "why", "remedy"),
    [
        (POLKIT, 0, ("bus", ["init", "pcscd", "polkitd"]), 1, "would allow root", "see the log"),
        (POLKIT, 0, ("bus", ["init", "pcscd"]), 1, "because no polkitd runs here", "--disable-polkit"),
        (POLKIT, 0, ("", ["init", "pcscd"]), 1, "because no dbus-daemon runs", "--disable-polkit"),
        (POLKIT, 1000, ("", ["init", "pcscd"]), 1, "because no dbus-daemon runs", "--disable-polkit"),
        (POLKIT, 1000, ("bus", ["init", "pcscd", "polkitd"]), 1, "polkit refuses this user", "/etc/polkit-1"),
        (POLKIT, 1000, ("bus", ["", "pcscd"]), 1, "polkit refuses this user", "/etc/polkit-1"),
        (POLKIT, 1000, ("", ["init", ""]), 1, "is not visible", "see its log on the system where it runs"),
        (POLKIT, 0, ("bus", ["init", "pcscd"]), 200, "serves 200 clients", "end some"),
        (POLKIT, 0, ("bus", ["init", "pcscd --max-thread 300"]), 200, "because no polkitd", "--disable-polkit"),
        (POLKIT, 0, ("bus", ["init", "pcscd --max-thread 300"]), 300, "serves 300 clients", "end some"),
        (POLKIT._replace(asks_polkit=False), 0, ("", ["init", "pcscd"]), 1, "accepts no more clients", "see the log"),
    ],
)
def test_why_pcscd_hangs_up(
    monkeypatch: pytest.MonkeyPatch,
    program: _pcscd._Program,
    user: int,
    seen: tuple[str, list[str]],
    clients: int,
    why: str,
    remedy: str,
) -> None:
    """The reason for a refusal is reported, with what to start or to leave out; root isn't told to become root."""
    bus, names = seen
    monkeypatch.setattr(_pcscd, "_BUS", os.devnull if bus else "/no/such/bus")
    monkeypatch.setattr(os, "geteuid", lambda: user)
    monkeypatch.setattr(_pcscd._proc, "all_pids", lambda: iter(range(1, len(names) + 1)))
    monkeypatch.setattr(_pcscd._proc, "name", lambda pid: names[pid - 1].partition(" ")[0])
    monkeypatch.setattr(_pcscd._proc, "command", lambda pid: names[pid - 1].split())
    said = _pcscd._refusal(2, clients, program)
    assert why in said[0]
    assert remedy in said[1]
    assert "run as root" not in said[1] or user


@on_linux
def test_another_protocol(path: str) -> None:
    """A pcscd with another protocol version is reported with it, as in containers."""

    def refuses(client: socket.socket) -> None:
        client.recv(100)
        client.sendall(struct.pack("=iiI", 5, 0, 0x8010001D))

    with server(path, refuses):
        told = about_pcsc(path)
    assert (told.status, told.of["pcscd.answer"]["data"]["protocol"]) == (1, "5.0")
    assert "same version" in told.of["pcscd.answer"]["remedy"]


@on_linux
@pytest.mark.parametrize(("oldest", "newest"), [(4, 4), (5, 5), (4, 6), (6, 6), (7, 8), (4, 9)])
def test_every_protocol_that_a_client_can_agree_on(path: str, oldest: int, newest: int) -> None:
    """pcsc-lite 1.9.9 uses protocol 4.4, 2.3.3 only 4.5, and 2.5.3 4.4 to 4.6; each is OK."""

    def speaks(client: socket.socket) -> None:
        while request := client.recv(_tasks._VERSION.size):
            minor = _tasks._VERSION.unpack(request)[3]
            client.sendall(struct.pack("=iiI", 4, newest, 0 if oldest <= minor <= newest else 0x8010001E))

    with server(path, speaks), socket.socket(socket.AF_UNIX) as client:
        client.settimeout(10)
        client.connect(path)
        told = _tasks._handshake(client)
    assert told == {"answer": "ok", "protocol": f"4.{newest}", "result": 0}
    finding = _pcscd._response_finding("ok", told, POLKIT)
    assert (finding.status, finding.detail) == (OK, f"yes, protocol 4.{newest}")


def test_a_file_in_the_current_directory(tmp_path: Path) -> None:
    """The doctor's processes import nothing from there, unless the doctor itself does."""
    (tmp_path / "wrapt.py").write_text("open('was_imported', 'w')")
    code = "import sys; sys.path.pop(0); from pcsc_safe.__main__ import main; sys.exit(main(['doctor', '--no-probe']))"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, timeout=60, check=False)
    assert done.returncode in (0, 1), done.stderr
    assert not (tmp_path / "was_imported").exists()


@on_linux
def test_no_readers() -> None:
    """A machine without a reader has a warning about that, and no other."""
    found = _install.look()
    if isinstance(found, _install.Missing):
        pytest.skip(found.problem)
    daemon = Daemon(found, _activation.switch().path, 20)
    try:
        daemon.configure([])
        daemon.start()
        told = about_pcsc(daemon.path)
    finally:
        daemon.close()
    assert (told.status, told.of["readers"]["status"]) == (0, "warning")
    assert told.of["readers"]["data"] == {"readers": [], "list": "SCARD_E_NO_READERS_AVAILABLE"}


@pytest.mark.parametrize(
    ("reported", "keys", "words"),
    [
        ({}, [], ""),
        (
            {
                "list": "SCARD_S_SUCCESS",
                "readers": ["r"],
                "status": "SCARD_S_SUCCESS",
                "states": [["r", ["empty"], ""]],
            },
            ["readers", "reader"],
            "no card",
        ),
        ({"list": "SCARD_S_SUCCESS", "readers": ["r"]}, ["readers", "reader"], "did not end in 9 s"),
        ({"list": "SCARD_E_X", "readers": []}, ["readers"], "returns SCARD_E_X"),
    ],
)
def test_readers_as_far_as_they_were_told(reported: Any, keys: list[str], words: str) -> None:
    """If a process hangs while it lists the readers, what it reported so far is kept, and the hang is a problem."""
    task = {"establish": "SCARD_S_SUCCESS" if reported else "SCARD_E_NO_SERVICE", **reported}
    ended = {"exit_status": 0} if "states" in reported else {"timed_out": 9.0}
    found = list(_pcscd._readers(TaskResult(Ended({"task": task}, **ended))))
    assert [each.key for each in found] == keys
    assert not found or words in found[-1].detail
    never = list(_pcscd._readers(TaskResult(Ended({"task": {"establish": "SCARD_S_SUCCESS"}}, timed_out=9.0))))
    assert [(each.key, each.status) for each in never] == [("readers", PROBLEM)]


def test_a_call_about_readers_that_fails() -> None:
    """If a call fails, that is a problem, and its remedy is the log: the reader may be there."""
    listed = {"establish": "SCARD_S_SUCCESS", "list": "SCARD_S_SUCCESS", "readers": ["r"]}
    for reported, keys in (
        ({**listed, "list": "SCARD_F_COMM_ERROR", "readers": []}, ["readers"]),
        ({**listed, "status": "SCARD_E_NO_SERVICE", "states": []}, ["readers", "reader"]),
    ):
        found = list(_pcscd._readers(TaskResult(Ended({"task": reported}, 0))))
        assert [each.key for each in found] == keys
        assert (found[-1].status, found[-1].remedy) == (PROBLEM, _pcscd.LOG)


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        ("SCARD_E_SHARING_VIOLATION", "another application may hold the card: have it disconnect"),
        ("SCARD_W_SECURITY_VIOLATION", _pcscd.POLKIT),
        ("SCARD_E_NO_SERVICE", _pcscd.LOG),
    ],
)
def test_why_a_card_is_refused(code: str, remedy: str) -> None:
    """Only a sharing violation means that another application holds the card."""
    finding = _probe._touched("a reader", TaskResult(Ended({"parent": {"connect": code}}, 0)))
    assert (finding.status, finding.remedy) == (WARNING, remedy)


@pytest.mark.parametrize(
    ("flags", "status", "words"),
    [
        (["empty"], OK, "no card"),
        (["present", "inuse"], OK, "in use"),
        (["present", "mute"], WARNING, "doesn't respond"),
        (["present", "exclusive", "inuse"], WARNING, "exclusively"),
        (["unavailable"], WARNING, "is unavailable"),
    ],
)
def test_states_of_a_reader(flags: list[str], status: Status, words: str) -> None:
    """Each reader state is reported in words, with a remedy if something is wrong."""
    finding = _pcscd._reader("a reader", flags, "3b00")
    assert finding.status is status
    assert words in finding.detail
    assert bool(finding.remedy) == (status is not OK)


@pytest.mark.parametrize(
    ("why", "inside", "program", "words", "remedy"),
    [
        ("ENOENT", "", "/usr/sbin/pcscd", "doesn't run", "pcscd"),
        ("ENOENT", "", None, "doesn't run", "install pcscd"),
        ("ENOENT", "container", None, "in this container", "docker run -v"),
        ("ENOENT", "Flatpak app", None, "in this Flatpak app", "flatpak override --user --socket=pcsc org.x.App"),
        ("ENOENT", "snap", None, "in this snap", "snap connect NAME:pcscd"),
        ("EACCES", "snap", None, "this snap may not connect", "snap connect NAME:pcscd"),
        ("EACCES", "", "/usr/sbin/pcscd", "may not connect", "permissions"),
        ("EACCES", "container", "/usr/sbin/pcscd", "may not connect", "permissions"),
        ("EAGAIN", "", "/usr/sbin/pcscd", "hangs", "restart"),
        ("ENOTSOCK", "", "/usr/sbin/pcscd", "ENOTSOCK", "pcscd"),
    ],
)
def test_why_pcscd_is_not_reached(
    monkeypatch: pytest.MonkeyPatch, why: str, inside: str, program: Any, words: str, remedy: str
) -> None:
    """Each reason why pcscd can't be reached has its own sentence and remedy."""
    monkeypatch.setattr(_pcscd, "surroundings", lambda: inside)
    monkeypatch.setenv("FLATPAK_ID", "org.x.App")
    monkeypatch.delenv("SNAP_INSTANCE_NAME", raising=False)
    said = _pcscd._not_connected(
        "/run/pcscd/pcscd.comm", why, _pcscd._Program(program, "2.0.0", "/run/pcscd", True), False
    )
    assert words in said[0]
    assert remedy in said[1]


@pytest.mark.parametrize(
    ("file", "variables", "inside"),
    [
        ("", {}, ""),
        ("/.dockerenv", {}, "container"),
        ("/run/systemd/container", {}, "container"),
        ("", {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, "container"),
        ("/.flatpak-info", {"container": "flatpak"}, "Flatpak app"),
        ("", {"SNAP": "/snap/app/1"}, "snap"),
    ],
)
def test_what_the_doctor_runs_in(
    monkeypatch: pytest.MonkeyPatch, file: str, variables: dict[str, str], inside: str
) -> None:
    """Containers of every kind, Flatpak apps and snaps are recognised."""
    monkeypatch.setattr(os.path, "exists", lambda path: path == file)
    monkeypatch.setattr(os, "environ", variables)
    assert _machine.surroundings() == inside
    assert not inside or inside in _pcscd._FROM_OUTSIDE


def test_who_made_the_socket() -> None:
    """The process that listens determines what is reported: systemd, pcscd or another one."""
    assert "is not visible" in _pcscd._origin(None)
    assert f"process {os.getpid()}" in _pcscd._origin(os.getpid()) or not ON_LINUX


def test_many_clients() -> None:
    """Near pcscd's limit of clients there is a warning, because a refused client isn't given the reason."""
    assert [_pcscd._clients(count).status for count in (2, 195)] == [OK, WARNING]


# The installation.


def test_settings() -> None:
    """Each setting is reported with its source; all that can't work is one problem."""
    assert _machine.settings({}).status is OK
    told = _machine.settings({"PCSC_SAFE_POLICY": "raise", "PCSC_SAFE_CARDS": ""})
    assert (told.status, told.data["policy"]) == (OK, {"value": "raise", "from": "PCSC_SAFE_POLICY"})
    assert told.data["cards"] == {"value": "auto", "from": "default"}
    told = _machine.settings({"PCSC_SAFE_POLICY": "no", "PCSC_SAFE_QUIESCE_TIMEOUT": "-1"})
    assert told.status is PROBLEM
    assert "PCSC_SAFE_POLICY cannot be 'no'; PCSC_SAFE_QUIESCE_TIMEOUT cannot be '-1'" in told.detail
    assert "'reestablish'" in told.remedy
    assert _machine.settings({"PCSC_SAFE_POLICY": "share"}).status is PROBLEM
    told = _machine.settings({"PCSC_SAFE_POLCY": "raise"})
    assert (told.status, "PCSC_SAFE_POLICY" in told.remedy) == (WARNING, True)


@on_linux
def test_settings_that_make_no_sense(path: str) -> None:
    """Invalid settings are a finding, without a traceback, and everything else is still examined."""
    told = doctor(env=at(path), PCSC_SAFE_POLICY="nonsense", PCSC_SAFE_BROKER_PYTHON="/no/such/python")
    assert told.statuses("settings", "broker", "fork.hooks", "policy.auto") == ["problem", "problem", "ok", "ok"]
    assert "PCSC_SAFE_BROKER_PYTHON" in told.of["broker"]["remedy"]


@pytest.mark.parametrize(("version", "status"), [("2.0.5", OK), ("1.9", PROBLEM), ("not installed", PROBLEM)])
def test_packages(monkeypatch: pytest.MonkeyPatch, version: str, status: Status) -> None:
    """A missing or outdated package is a problem; the remedy is a command for the same Python."""
    monkeypatch.setattr(_machine, "versions", lambda: {**_versions.versions(), "pyscard": version})
    imported = "ok" if version[0].isdecimal() else "ModuleNotFoundError: No module named 'smartcard'"
    monkeypatch.setattr(
        _machine,
        "run_task",
        lambda *given: TaskResult(Ended({"task": {"smartcard.scard": imported, "wrapt": "ok"}}, 0)),
    )
    (found,) = [each for each in _machine.installation() if each.key == "pyscard"]
    assert found.status is status
    assert found.remedy.startswith(sys.executable if status is PROBLEM else "")


@on_linux
@pytest.mark.parametrize(
    ("pyscard", "key", "words"),
    [
        ("raise ImportError('no library')", "pyscard", "ImportError: no library"),
        ("os.kill(os.getpid(), 11)", "pyscard", "SIGSEGV"),
        ("SCARD_SCOPE_SYSTEM = 2\ndef SCardEstablishContext(scope): os.kill(0, 11)", "pcsc.access", "SIGSEGV"),
    ],
)
def test_a_broken_pyscard(tmp_path: Path, shared_stack: VirtualPcsc, pyscard: str, key: str, words: str) -> None:
    """A pyscard that can't be imported, or crashes, is detected from another process."""
    (tmp_path / "smartcard").mkdir()
    (tmp_path / "smartcard" / "__init__.py").touch()
    (tmp_path / "smartcard" / "scard.py").write_text(f"import os\n{pyscard}")
    told = doctor(env=shared_stack.env, PYTHONPATH=str(tmp_path))
    assert (told.status, told.of[key]["status"], told.of["wrapt"]["status"]) == (1, "problem", "ok")
    assert words in told.of[key]["detail"]


@on_linux
def test_one_cause_is_one_finding(tmp_path: Path, shared_stack: VirtualPcsc) -> None:
    """Without pyscard there is one problem; what needs pyscard isn't examined, and is listed as left out."""
    (tmp_path / "smartcard").mkdir()
    (tmp_path / "smartcard" / "__init__.py").write_text("raise ModuleNotFoundError('no pyscard')")
    env = {**shared_stack.env, "PYTHONPATH": str(tmp_path)}
    told = Told((done := run("--json", "--touch-cards", env=env)).returncode, json.loads(done.stdout))
    assert told.status == 1
    assert [each["key"] for each in told.findings if each["status"] != "ok"] == ["pyscard"]
    needing = ["pcsc_safe", "libpcsclite", "broker", "probe.card", *_probe.KEYS, "hazards"]
    assert told.whole["left_out"] == {"pyscard": needing}
    page = run(env=env).stdout
    assert "Left out because of the problem with pyscard: pcsc_safe, " in page
    assert page.splitlines()[-1] == "1 problem."


def test_what_needs_what() -> None:
    """Each finding is examined after those that it needs; if one of them is a problem, it is left out."""
    for key, needs in NEEDS.items():
        assert {key, *needs} <= set(KEYS)
    ledger = Ledger()
    assert ledger.enter(Finding("wrapt", WARNING, "", "", "an opinion"))
    assert ledger.allows("broker")
    assert ledger.enter(Finding("pcscd.socket", PROBLEM, "", "", "start it"))
    assert ledger.allows("broker")
    assert not ledger.allows("reader")
    assert not ledger.enter(Finding("readers", OK, "", ""))
    assert [each.key for each in ledger.findings] == ["wrapt", "pcscd.socket"]
    assert ledger.left_out == {"pcscd.socket": ["reader", "readers"]}


# Forks.


@on_linux
def test_macos(tmp_path: Path, shared_stack: VirtualPcsc, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the simulated macOS the doctor looks for no pcscd, and policy auto chooses a broker, which reaches PC/SC.

    Each probe, the fresh context included, fails with raw pyscard and passes with pcsc_safe.
    """
    try:
        macos.build(tmp_path)
    except macos.NoCompilerError as error:
        pytest.skip(str(error))
    told = doctor(env=macos.environment(shared_stack.env, tmp_path))
    assert told.status == 0
    assert not [key for key in told.of if key.startswith("pcscd.")]
    assert told.of["policy.auto"]["data"]["chooses"] == "broker"
    assert "macOS" in told.of["policy.auto"]["detail"]
    assert told.of["broker"]["data"]["establish"] == "SCARD_S_SUCCESS"
    for name, value in macos.environment(shared_stack.env, tmp_path).items():
        monkeypatch.setenv(name, value)
    inherited, fresh, c_fork = _probe.probes()
    assert {each.status for each in (inherited, fresh, c_fork)} == {OK}
    assert inherited.data["raw"] == c_fork.data["raw"] == "the child died of SIGSEGV"
    assert "SCARD_E_NO_SERVICE" in fresh.data["raw"]


def test_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """On Windows there are no forks: one sentence says so, and there is no probe."""
    monkeypatch.setattr(policy, "PLATFORM", "win32")
    (finding,) = _fork.forks()
    assert "no fork" in finding.detail
    assert not _fork.are_possible()


def test_the_tasks_can_be_imported_on_windows() -> None:
    """The code for the disposable processes imports no name that only Unix has."""
    code = (
        "import os, signal, socket\n"
        "lacks = (os, 'fork killpg waitid'), (signal, 'SIGALRM setitimer'), (socket, 'AF_UNIX AF_NETLINK')\n"
        "for module, names in lacks:\n"
        "    for name in names.split():\n"
        "        vars(module).pop(name, None)\n"
        "import pcsc_safe.doctor._tasks as tasks, pcsc_safe.doctor._command\n"
        "tasks.Stage(None, 5).report('task', ran=True)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    assert json.loads(done.stdout) == ["task", {"ran": True}]


@pytest.mark.parametrize(
    ("noticed", "statuses", "layers"),
    [
        (("hook", "page"), [OK, OK], ["hook", "page"]),
        (("hook", "pid"), [OK, WARNING if ON_LINUX else OK], ["hook", "pid"]),
        (("page", "page"), [PROBLEM, OK], ["page"]),
        (("hook", "import"), [OK, PROBLEM], ["hook"]),
    ],
)
def test_what_notices_a_fork(noticed: tuple[str, str], statuses: list[Status], layers: list[str]) -> None:
    """Each layer of fork detection reports what it detected; if none detects a fork, that is a problem."""
    seen = {fork: {"noticed_by": by} for fork, by in zip(("os.fork", "C fork"), noticed)}
    hooks, page, used = _fork._detection(TaskResult(Ended({"task": {"page": True}, **seen}, 0)))
    assert [hooks.status, page.status] == statuses
    assert used.data["layers"] == layers


@pytest.mark.parametrize(
    ("environment", "platform", "chooses", "words"),
    [
        ({}, "linux", "reestablish", "uses PC/SC itself"),
        ({}, "darwin", "broker", "on macOS"),
        ({"PCSC_SAFE_BROKER": "always"}, "linux", "broker", "'always'"),
        ({"PCSC_SAFE_POLICY": "raise"}, "linux", "reestablish", "the policy is 'raise'"),
    ],
)
def test_what_auto_chooses(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], platform: str, chooses: str, words: str
) -> None:
    """What policy auto chooses here, and why, is reported in words and as data."""
    monkeypatch.setattr(policy, "PLATFORM", platform)
    monkeypatch.setattr(_machine.os, "environ", environment)
    monkeypatch.setattr(_fork, "in_force", lambda: _machine.in_force(environment))
    finding = _fork._auto()
    assert (finding.data["chooses"], finding.data["after_unquiet_fork"]) == (chooses, "broker")
    assert words in finding.detail


# The probes.


@on_linux
def test_the_probes(shared_stack: VirtualPcsc) -> None:
    """pcsc_safe passes the three probes that need no card; raw pyscard uses its parent's connection.

    The probes power, reset or address no card.
    """
    cards = [reader.card for reader in shared_stack.readers if reader.card is not None]
    before = [(card.power_ons, card.resets, card.apdus) for card in cards]
    found = {each.key: each for each in _probe.probes()}
    assert [(card.power_ons, card.resets, card.apdus) for card in cards] == before
    assert {key: each.status for key, each in found.items()} == dict.fromkeys(
        ("probe.inherited", "probe.fresh", "probe.c-fork"), OK
    )
    assert [bool(each.data["raw"]) for each in found.values()] == [True, False, True]


CHILD, PARENT = {"code": "A", "shares": False, "ended": 0}, {"code": "A", "afterwards": "A"}


@pytest.mark.parametrize(
    ("reported", "ended", "harm", "known"),
    [
        ({"parent": PARENT, "child": CHILD}, {}, "", True),
        ({}, {}, "", False),
        ({"parent": PARENT}, {}, "", False),
        ({"parent": PARENT}, {"timed_out": 2.0, "exit_status": None}, "did not end in 2 s", True),
        ({}, {"killed_by": 11, "exit_status": None}, "died of SIGSEGV", False),
        ({"parent": PARENT, "child": {**CHILD, "ended": -11}}, {}, "the child died of SIGSEGV", True),
        ({"parent": PARENT, "child": {**CHILD, "code": "B"}}, {}, "the child got B", True),
        ({"parent": PARENT, "child": {**CHILD, "shares": True}}, {}, "its parent's connection", True),
        ({"parent": {**PARENT, "afterwards": "B"}, "child": CHILD}, {}, "got B afterwards", True),
    ],
)
def test_a_probe_is_judged_by_what_was_reported(reported: Any, ended: Any, harm: str, known: bool) -> None:
    """Harm is reported only if it was seen; from too few reports nothing is concluded, and the finding is unknown."""
    seen = _probe._judge(TaskResult(Ended(reported, **{"exit_status": 0, **ended})))
    assert (harm in seen.harm, bool(seen.harm), seen.known) == (True, bool(harm), known)
    finding = _probe._probe_finding(_probe._PROBES[0], seen, seen)
    assert finding.status is (UNKNOWN if not known else PROBLEM if harm else OK)


@on_linux
def test_hazards(monkeypatch: pytest.MonkeyPatch, shared_stack: VirtualPcsc) -> None:
    """The demo's hazards are findings; if pcsc_safe doesn't prevent one, it is a problem, and the status is 1."""
    from pcsc_safe.demo import hazards

    (tenth,) = hazards.load(["10"])
    monkeypatch.setattr(hazards, "load", lambda: [tenth])
    assert [(each.key, each.status) for each in _probe.hazards()] == [("hazard", OK), ("hazards", OK)]
    monkeypatch.setattr(_probe, "SAFE", _probe.RAW)
    found = list(_probe.hazards())
    assert [(each.key, each.status) for each in found] == [("hazard", PROBLEM), ("hazards", PROBLEM)]
    assert _command._status(found) == 1


@on_linux
def test_hazards_whose_stack_does_not_start(monkeypatch: pytest.MonkeyPatch, shared_stack: VirtualPcsc) -> None:
    """If the virtual stack of a hazard can't be started, this hazard is unknown, and the others are still tried."""
    from pcsc_safe.demo import _run, hazards

    tried = hazards.load(["9", "10"])
    judged = _run.judged

    def fails(hazard: Any, module: str, stop: threading.Event) -> Any:
        if hazard.NUMBER == tried[0].NUMBER:
            raise PcscStackError("no more memory", remedy="free some")
        return judged(hazard, module, stop)

    monkeypatch.setattr(hazards, "load", lambda: tried)
    monkeypatch.setattr(_run, "judged", fails)
    found = list(_probe.hazards())
    assert [(each.key, each.status) for each in found] == [("hazard", UNKNOWN), ("hazard", OK), ("hazards", UNKNOWN)]
    assert ("no more memory" in found[0].detail, found[0].remedy) == (True, "free some")


def test_hazards_where_there_is_no_virtual_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a virtual stack the hazards are skipped, and the finding says what to install."""
    monkeypatch.setattr(shutil, "which", lambda *given, **named: None)
    _install.look.cache_clear()
    try:
        (finding,) = _probe.hazards()
    finally:
        _install.look.cache_clear()
    assert (finding.key, finding.status) == ("hazards", SKIPPED)
    assert finding.remedy


# The output.


class Terminal(io.StringIO):
    """A stream that pretends to be a terminal."""

    def isatty(self) -> bool:
        return True


LONG = Finding("settings", PROBLEM, "a long name of something", "word " * 40, "remedy " * 30)


@pytest.mark.parametrize("width", [200, 100, 80, 60, 40, 25])
def test_the_page_fits(width: int) -> None:
    """No line is longer than the terminal, and no word is lost, with columns or, on a narrow terminal, without."""
    stream = io.StringIO()
    page = _view.Page(stream, width)
    page.section("A part")
    page.show(LONG)
    page.show(Finding("python", OK, "short", "well"))
    text = stream.getvalue()
    assert max(map(len, text.splitlines())) <= width
    assert (text.count("word"), text.count("remedy"), text.count("-> ")) == (40, 30, 1)


def test_columns_are_aligned() -> None:
    """Details begin in the same column."""
    stream = io.StringIO()
    for what in ("short", "somewhat longer than that"):
        _view.Page(stream, 100).show(Finding("python", OK, what, "here"))
    assert len({line.index("here") for line in stream.getvalue().splitlines()}) == 1


@pytest.mark.parametrize(
    ("stream", "environment", "coloured"),
    [(Terminal(), {}, True), (Terminal(), {"NO_COLOR": "1"}, False), (io.StringIO(), {}, False)],
)
def test_colour(monkeypatch: pytest.MonkeyPatch, stream: Any, environment: dict[str, str], coloured: bool) -> None:
    """Colour is used only on a terminal, only if NO_COLOR is empty or unset, and changes no column."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    _view.Page(stream, 80).show(LONG)
    assert ("\033[31mproblem\033[0m" in stream.getvalue()) == coloured


def test_the_page_is_printed(path: str) -> None:
    """Without ``--json`` the output is for people: it has a line of sums, and no escape sequence in a file."""
    done = run("--no-probe", env=at(path), COLUMNS="90")
    assert done.stderr == ""
    assert done.stdout.startswith("pcsc_safe ")
    assert "\033" not in done.stdout
    # a path isn't wrapped
    assert all(len(line) <= 90 or " " not in line.strip() for line in done.stdout.splitlines())
    if ON_LINUX:
        assert done.returncode == 1
        assert "  problem  pcscd's socket " in done.stdout
        assert done.stdout.splitlines()[-1] == "1 problem."


def test_sums() -> None:
    """The last line counts what isn't OK, or says that everything is."""
    ok = Finding("python", OK, "", "")
    assert _view.summary([ok]) == "All is well."
    assert _view.summary([ok, LONG, LONG, Finding("hazards", SKIPPED, "", "")]) == "2 problems, 1 skipped."


@pytest.mark.parametrize(
    "arguments",
    [["--pid", "1", "--touch-cards"], ["--pid", "1", "--no-probe"], ["--pid", "x"], ["--pid", "0"], ["--timeout", "0"]],
)
def test_a_wrong_call_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Wrong arguments end with status 2, and the message says how to use the doctor."""
    with pytest.raises(SystemExit) as ended:
        main(["doctor", *arguments])
    assert ended.value.code == 2
    assert "usage:" in capsys.readouterr().err
