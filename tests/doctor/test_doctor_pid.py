"""``doctor --pid`` reports on running programs, each a real family of processes on a virtual stack.

The programs are functions that run in a new process (:func:`forking.in_program`).  They run the doctor on themselves
and report its findings.  Nothing here imports pcsc_safe's core, because raw programs must not have it.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Optional

import forking
import pytest
from programs import say

from pcsc_safe.__main__ import main
from pcsc_safe.doctor import _command, _proc, _process, _sockets
from pcsc_safe.testing import VirtualPcsc

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="it reads /proc")
needs_root = pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() != 0, reason="it takes root to be another user")
assert _command  # imported here, while its file is readable
RAW, SAFE = "smartcard.scard", "pcsc_safe.scard"


# The programs.


def connected(module: str) -> Any:
    """A context and a card of this process."""
    scard = __import__(module, fromlist=["*"])
    hresult, context = scard.SCardEstablishContext(scard.SCARD_SCOPE_SYSTEM)
    assert hresult == 0
    hresult, readers = scard.SCardListReaders(context, [])
    hresult, card, _ = scard.SCardConnect(context, readers[0], scard.SCARD_SHARE_SHARED, scard.SCARD_PROTOCOL_ANY)
    assert hresult == 0
    return scard, context, card


@contextlib.contextmanager
def child(
    body: Callable[[Callable[[], None]], None] = lambda idle: idle(), fork: Callable[[], int] = forking.fork
) -> Iterator[int]:
    """A forked child that has run ``body`` and idles until the end of the block; its PID.

    :param body: what it runs; it has to call its argument, which idles.
    """
    (ready, say_ready), (told, tell) = os.pipe(), os.pipe()

    def idle() -> None:
        os.write(say_ready, b"!")
        os.read(told, 1)

    pid, result = forking.start(body, idle, fork=fork)
    os.read(ready, 1)
    try:
        yield pid
    finally:
        os.write(tell, b"!")
        forking.wait_for((pid, result))


def doctor(pid: int, *prefix: str, **options: Any) -> Any:
    """Run the doctor on a process; return the exit status and the findings."""
    command = [*prefix, sys.executable, "-m", "pcsc_safe", "doctor", "--json", "--pid", str(pid)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False, **options)
    assert done.stderr == ""
    return done.returncode, json.loads(done.stdout)["findings"]


def tell(pid: int, **who: int) -> None:
    """Report what the doctor finds in a process, by the roles of its family's members."""
    status, findings = doctor(pid)
    roles = {number: role for role, number in who.items()}
    processes = {roles.get(each["data"]["pid"], "?"): each for each in findings if each["key"] == "process"}
    say({"status": status, "family": findings[0], "who": who, **processes})


def raw_family() -> None:
    connected(RAW)
    (number,) = [number for number, _ in held(os.getpid())]

    def parent(idle: Callable[[], None]) -> None:
        with child() as grandchild:
            os.write(up, b"%d" % grandchild)
            idle()

    down, up = os.pipe()
    sleep = ["sleep", "30"]
    with (
        child(parent) as forked,
        subprocess.Popen(sleep) as closed,
        subprocess.Popen(sleep, pass_fds=[number]) as open_,
    ):
        grandchild = int(os.read(down, 20))
        tell(os.getpid(), head=os.getpid(), child=forked, grandchild=grandchild, exec=closed.pid, leak=open_.pid)
        closed.kill()
        open_.kill()


def held(pid: int) -> list[tuple[int, int]]:
    table, _ = _sockets.table()
    numbers = _proc.sockets(pid) or {}
    return [(number, inode) for number, inode in numbers.items() if inode in table and table[inode].connected]


def safe_family() -> None:
    import ctypes

    scard, context, _ = connected(SAFE)

    def uses(idle: Callable[[], None]) -> None:
        assert scard.SCardListReaders(context, [])[0] == 0
        idle()

    with child() as idle, child(uses) as user, child(fork=ctypes.PyDLL(None).fork) as unhooked:
        tell(os.getpid(), head=os.getpid(), idle=idle, user=user, unhooked=unhooked)


def with_a_page() -> None:
    """Raw pyscard, and a page of another library that resembles pcsc_safe's."""
    import mmap

    page = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    page.madvise(18)
    connected(RAW)
    with child() as forked:
        tell(os.getpid(), child=forked)
    page.close()


def broker_family() -> None:
    import pcsc_safe

    pcsc_safe.configure(broker="always")
    connected(SAFE)
    tell(os.getpid(), head=os.getpid())


def handed_over() -> None:
    import pcsc_safe

    scard, _, card = connected(SAFE)
    stack = contextlib.ExitStack()

    def goes_on(idle: Callable[[], None]) -> None:
        assert scard.SCardStatus(card)[0] == 0
        idle()

    with pcsc_safe.handover():
        forked = stack.enter_context(child(goes_on))
    with stack:
        tell(os.getpid(), head=os.getpid(), child=forked)


def orphaned() -> None:
    """The owner is killed; its child idles."""
    down, up = os.pipe()

    def owner() -> None:
        connected(RAW)
        with child() as idle:
            os.write(up, b"%d" % idle)
            os.kill(os.getpid(), signal.SIGKILL)

    pid, _ = forking.start(owner)
    idle = int(os.read(down, 20))
    os.waitpid(pid, 0)
    tell(idle, child=idle, owner=pid)
    os.kill(idle, signal.SIGKILL)


def untold() -> None:
    connected(RAW)

    def refuses(*_: Any) -> Any:
        raise OSError

    def examined() -> list[Any]:
        return [each.as_json() for each in _process.examine(os.getpid())[0]]

    kernel, _sockets._ask_kernel = _sockets._ask_kernel, refuses
    with child() as forked:
        borrowed = examined()
        os.pidfd_open = refuses
        nothing = examined()
        _sockets._ask_kernel = kernel
        say({"borrowed": borrowed, "nothing": nothing, "older": examined(), "head": os.getpid(), "child": forked})


# The tests.


@contextlib.contextmanager
def sleeping(*command: str, **options: Any) -> Iterator[Any]:
    with subprocess.Popen(command, **options) as process:
        try:
            yield process
        finally:
            process.kill()


def as_nobody(pid: int) -> Any:
    """What the doctor reports to a user without permission."""
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        status = main(["doctor", "--json", "--pid", str(pid)])
    return status, json.loads(said.getvalue())["findings"]


def outcome(program: Callable[[], None], stack: Optional[VirtualPcsc] = None) -> Any:
    done = forking.in_program(program, env=stack.env if stack else None)
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


def test_raw_pyscard(shared_stack: VirtualPcsc) -> None:
    """A child or grandchild that holds its ancestor's connection is a problem; an exec'd process doesn't hold it."""
    told = outcome(raw_family, shared_stack)
    head = told["who"]["head"]
    assert told["status"] == 1
    (own,) = told["head"]["data"]["connections"]
    assert (told["head"]["status"], own["inherited"], own["owner"]) == ("ok", False, head)
    assert own["holders"][0] == head
    assert set(own["holders"]) == {told["who"][role] for role in ("head", "child", "grandchild", "leak")}
    for role, hazards in [("child", ["2", "3", "5"]), ("grandchild", ["2", "3", "5"]), ("leak", ["5"])]:
        process = told[role]
        assert (process["status"], process["data"]["hazards"]) == ("problem", hazards)
        assert process["data"]["connections"] == [{**own, "inherited": True}]
        assert f"holds process {head}'s connection" in process["detail"]
    assert "python -m pcsc_safe run" in told["child"]["remedy"]
    assert "pcsc_safe" not in told["leak"]["remedy"]  # that process is not Python
    assert (told["exec"]["status"], told["exec"]["data"]["connections"]) == ("ok", [])
    assert told["head"]["data"]["pcsc_safe"] == ""
    assert told["family"]["data"]["shared"] == 1


def test_pcsc_safe(shared_stack: VirtualPcsc) -> None:
    """A child on pcsc_safe holds a dead socket, or its own connection; after a fork from C, the parent's at first."""
    told = outcome(safe_family, shared_stack)
    head = told["who"]["head"]
    assert told["status"] == 0
    assert {told[role]["data"]["pcsc_safe"] for role in ("head", "idle", "user", "unhooked")} == {"mark"}
    assert (told["idle"]["status"], told["idle"]["data"]["connections"]) == ("ok", [])
    assert list(told["idle"]["data"]["dead_sockets"].values()) == [head]
    assert f"a dead socket that replaces process {head}'s connection: harmless" in told["idle"]["detail"]
    (own,) = told["user"]["data"]["connections"]
    assert (told["user"]["status"], own["owner"], own["inherited"]) == ("ok", told["who"]["user"], False)
    assert (told["unhooked"]["status"], told["unhooked"]["data"]["hazards"]) == ("warning", ["5"])


def test_a_page_is_no_proof(shared_stack: VirtualPcsc) -> None:
    """A page that other libraries have as well, such as glibc 2.41, does not make raw pyscard look like pcsc_safe."""
    told = outcome(with_a_page, shared_stack)
    assert (told["child"]["data"]["pcsc_safe"], told["child"]["data"]["hazards"]) == ("", ["2", "3", "5"])


def smaps(*areas: tuple[int, int, str], access: str = "rw-p", of: str = "") -> list[str]:
    """The lines of /proc/PID/smaps for areas: first page, number of pages, flags."""
    page = os.sysconf("SC_PAGE_SIZE")
    found = []
    for first, count, flags in areas:
        found.append(f"{first * page:x}-{(first + count) * page:x} {access} 00000000 00:00 0 {of}\n")
        found += ["Size:  4 kB\n", f"VmFlags: rd wr mr mw me ac {flags} \n"]
    return found


MARKED = ((8, 1, "wf rr"), (9, 1, "sr"), (10, 1, "rr"), (11, 1, "sr"))


@pytest.mark.parametrize(
    ("lines", "is_marked"),
    [
        (smaps(*MARKED), True),
        (smaps(*MARKED, of="[anon:cpython:mmap]"), True),
        (smaps((1, 7, "wf"), *MARKED, (12, 3, "")), True),
        (smaps(*MARKED, access="r--p"), False),
        (smaps(*MARKED[1:]), False),
        (smaps((8, 1, "rr"), *MARKED[1:]), False),
        (smaps((7, 2, "wf rr"), *MARKED[1:]), False),
        (smaps(*MARKED[:3], (12, 1, "sr")), False),
        (smaps((8, 1, "wf"), (9, 1, "wf dd"), (10, 4, "wf dp")), False),
        ([], False),
    ],
)
def test_what_a_mark_looks_like(lines: list[str], is_marked: bool) -> None:
    """pcsc_safe is recognized by four pages that no other library has, at any address, and by nothing similar."""
    assert _proc.is_marked(lines) is is_marked


def test_a_mark_goes_with_the_program() -> None:
    """A child of any fork has the mark.  A program has none after an exec, and none before it imports pcsc_safe."""
    source = "import sys; {}; sys.stdout.write('!'); sys.stdout.flush(); sys.stdin.read()"
    twice = "import os, pcsc_safe.scard; os.fork() and (os.wait(), os._exit(0))"
    gone = "import os, pcsc_safe.scard; os.execv(sys.executable, [sys.executable, '-c', {!r}])".format(
        source.format("0")
    )
    for body, expected in (("import pcsc_safe.scard", "mark"), (twice, "mark"), ("0", ""), (gone, "")):
        command = [sys.executable, "-c", source.format(body)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.read(1) == b"!"
            found = {_proc._mark(pid) for pid in _proc.descendants(process.pid)}
            process.communicate(timeout=30)
        assert found == {expected}, body


@pytest.mark.parametrize(
    ("arguments", "is_broker"),
    [
        (["-m", "pcsc_safe.broker"], True),
        (["-c", "import runpy; runpy.run_module('pcsc_safe.broker', None, '__main__', True)"], True),
        (["-S", "-c", "from pcsc_safe.broker.__main__ import main; main([])", "/a"], True),
        (["--pcsc-safe-broker"], True),
        (["pcsc_safe.broker"], False),
        (["-c", "pcsc_safe.broker"], False),
        ([], False),
    ],
)
def test_what_a_broker_is_called(arguments: list[str], is_broker: bool) -> None:
    """Brokers of every kind are recognized by their command line; an editor that shows their file is none."""
    assert _proc._is_brokers(arguments) == is_broker


def test_how_brokers_are_started() -> None:
    """Brokers are started with the command line by which the doctor recognizes them."""
    from pcsc_safe.broker import start

    assert _proc._is_brokers(start._command("/configured")[1:])
    assert _proc._is_brokers(start._command("")[1:])
    assert _proc._is_brokers(["-m", start._MODULE])
    assert _proc._is_brokers([start.FROZEN_BROKER])


def test_a_broker(shared_stack: VirtualPcsc) -> None:
    """A broker is reported as a broker, not as a hazard."""
    told = outcome(broker_family, shared_stack)
    assert told["status"] == 0
    assert (told["?"]["status"], told["?"]["data"]["pcsc_safe"]) == ("ok", "broker")
    assert "broker" in told["?"]["detail"]
    assert (told["head"]["data"]["connections"], told["head"]["data"]["libpcsclite"]) == ([], False)


def test_a_handover(shared_stack: VirtualPcsc) -> None:
    """A session that pcsc_safe has handed over belongs to the child, whichever process established it."""
    told = outcome(handed_over, shared_stack)
    assert told["status"] == 0
    (connection,) = told["child"]["data"]["connections"]
    assert connection["holders"] == [told["who"]["child"]]
    assert told["head"]["data"]["connections"] == []


@needs_root
def test_an_orphan(shared_stack: VirtualPcsc) -> None:
    """If the process that made a connection is dead, pcscd's end of the connection still names it."""
    told = outcome(orphaned, shared_stack)
    (connection,) = told["child"]["data"]["connections"]
    assert (connection["owner"], connection["owner_known"]) == (told["who"]["owner"], True)
    assert (told["child"]["status"], told["child"]["data"]["hazards"]) == ("problem", ["4", "5"])
    assert told["status"] == 1


def test_sockets_that_nobody_has_accepted(tmp_path: Path) -> None:
    """A client that waits in a server's queue is not mistaken for the other end of a connection."""
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        listener.bind(str(tmp_path / "pcscd.comm"))
        listener.listen()
        client.connect(str(tmp_path / "pcscd.comm"))
        assert 0 in {each.inode for each in _sockets._listed()}
        assert 0 not in _sockets.table()[0]
        assert _sockets.table()[0][os.fstat(client.fileno()).st_ino].connected


def test_where_the_kernel_does_not_pair_sockets(shared_stack: VirtualPcsc) -> None:
    """Without sock_diag, borrowed descriptors give the same findings; without both, the doctor makes no claim.

    Without borrowed descriptors alone, the owner is the oldest holder, and the finding says that this is a guess.
    """
    told = outcome(untold, shared_stack)
    (child_,) = [each for each in told["borrowed"] if each["data"].get("pid") == told["child"]]
    assert child_["data"]["hazards"] == ["2", "3", "5"]
    assert told["nothing"][0]["status"] == "unknown"
    assert "problem" not in {each["status"] for each in told["nothing"]}
    (child_,) = [each for each in told["older"] if each["data"].get("pid") == told["child"]]
    (connection,) = child_["data"]["connections"]
    assert (connection["owner"], connection["owner_known"]) == (told["head"], False)
    assert "(probably, " in child_["detail"]


@needs_root
def test_a_process_of_another_user() -> None:
    """A process that can't be examined is a finding with its remedy, and the status says that nothing was seen."""
    with sleeping("sleep", "30") as process:
        status, (family, finding) = forking.in_child(as_nobody, process.pid)
    assert (status, finding["status"], finding["data"]["readable"]) == (2, "unknown", False)
    assert finding["remedy"] == f"sudo {sys.executable} -m pcsc_safe doctor --pid {process.pid}"
    assert family["data"]["connections"] == 0


def test_a_process_that_is_gone(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """If there is no such process, the status is 2; a child that has ended, or is a zombie, is reported as such."""
    with subprocess.Popen(["true"]) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert [each.status.value for each in _process.examine(process.pid)[0]] == ["ok", "ok"]
        assert "has ended" in _process.examine(process.pid)[0][1].detail
    assert main(["doctor", "--pid", str(process.pid)]) == 2
    assert f"no process {process.pid}" in capsys.readouterr().err
    monkeypatch.setattr(_proc, "descendants", lambda pid: [pid, process.pid])
    found = {each.data["pid"]: each for each in _process.examine(os.getpid())[0]}
    assert found[process.pid].detail == "it ended before the doctor could examine it"


@pytest.mark.parametrize("error", [None, PermissionError()])
def test_a_process_that_proc_hides(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: Optional[OSError]
) -> None:
    """With hidepid, /proc doesn't show the processes of other users; the message doesn't say that there is none."""

    def kill(pid: int, number: int) -> None:
        assert number == 0
        if error is not None:
            raise error

    monkeypatch.setattr(_proc, "_stat", lambda pid: None)
    monkeypatch.setattr(os, "kill", kill)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert main(["doctor", "--pid", "1"]) == 2
    expected = f"this user may not see process 1: sudo {sys.executable} -m pcsc_safe doctor --pid 1\n"
    assert capsys.readouterr().err == f"the doctor can't examine it: {expected}"


@needs_root
def test_another_network_namespace() -> None:
    """If the sockets can't be identified from here, the finding says so, with the command that can."""
    if subprocess.run(["unshare", "-n", "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine permits no network namespace")
    with sleeping("unshare", "-n", "sh", "-c", "echo; exec sleep 30", stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        status, (finding,) = doctor(process.pid)
    assert (status, finding["status"]) == (2, "unknown")
    assert finding["remedy"].startswith(f"nsenter -t {process.pid} -n {sys.executable} ")


@pytest.mark.parametrize("user", [0, 1000])
def test_root_is_not_told_to_become_root(monkeypatch: pytest.MonkeyPatch, user: int) -> None:
    """A remedy is sudo only for other users; root gets one that can help, also in a container."""
    monkeypatch.setattr(os, "geteuid", lambda: user)
    hidden = _proc.look(os.getpid())._replace(sockets=None, libpcsclite=True)
    family = _process._Family({hidden.pid: hidden}, {}, False, 0, frozenset())
    for finding in (_process._summary(hidden.pid, family), _process._finding(hidden.pid, hidden, family)):
        assert finding.remedy
        assert ("sudo" in finding.remedy) is (user != 0)


def test_it_is_for_linux(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """On other systems ``--pid`` ends with 2 and gives the reason."""
    monkeypatch.setattr("pcsc_safe.policy.PLATFORM", "darwin")
    assert main(["doctor", "--pid", str(os.getpid())]) == 2
    assert "Linux" in capsys.readouterr().err
