"""The Celery example, with a real redis-server: every signature is right, even if processes, cards or machines die."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import ipaddress
import os
import random
import re
import shutil
import signal
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pcsc_safe.testing import PcscStackError

pytest.importorskip("celery", reason="Celery is not installed (extra hosts)")
pytest.importorskip("redis", reason="redis-py is not installed (extra hosts)")
if shutil.which("redis-server") is None:
    pytest.skip("redis-server is not installed", allow_module_level=True)
try:
    from celery_hosts import EXAMPLES, Host, a_host, a_redis, eventually
except PcscStackError as error:
    pytest.skip(str(error), allow_module_level=True)

import redis
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

PAGE = EXAMPLES.parent / "docs" / "hosts" / "celery.md"
REDELIVER_AFTER = 1  # seconds


@pytest.fixture(scope="module")
def broker() -> Iterator[redis.Redis]:
    """A redis-server for the module, and the environment that names it."""
    with a_redis() as (client, directory), pytest.MonkeyPatch.context() as patch:
        url = f"redis+socket://{directory}/sock"
        for name, value in environment(url).items():
            patch.setenv(name, value)
        yield client


def environment(url: str) -> dict[str, str]:
    """The environment of clients and workers."""
    return {
        "CELERY_BROKER_URL": url,
        "CELERY_RESULT_BACKEND": url,
        "SIGN_REDELIVER_AFTER": str(REDELIVER_AFTER),
    }


@pytest.fixture(scope="module")
def example(broker: redis.Redis) -> Iterator[ModuleType]:
    """The example, as a client imports it."""
    with imported_example() as module:
        yield module


@contextlib.contextmanager
def imported_example() -> Iterator[ModuleType]:
    """The example, which imports its own piv, not that of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        others = sys.modules.pop("piv", None)
        import celery_sign

        del sys.modules["celery_sign"], sys.modules["piv"]
        if others is not None:
            sys.modules["piv"] = others
        yield celery_sign
        celery_sign.app.close()


@pytest.fixture
def hosts(broker: redis.Redis, tmp_path: Path) -> Iterator[list[Host]]:
    """Two hosts, whose workers are not started."""
    broker.flushall()
    with a_host("first@machines", tmp_path) as first, a_host("second@machines", tmp_path) as second:
        yield [first, second]


def await_service(example: ModuleType, *hosts: Host) -> None:
    """Return when the workers take tasks, and their hosts know the queues of their cards; a client checks this."""
    for host in hosts:
        inspect = example.app.control.inspect([host.name], timeout=1, limit=1)
        queues = eventually(inspect.active_queues)[host.name]
        (host.queue,) = {queue["name"] for queue in queues} - {"sign"}
        host.serves = True


def who_signed(message: str, fingerprint: str, certificate: str, signature: str) -> str:
    """The holder of the card; raises if the signature is wrong, or comes from another card than requested."""
    der = ssl.PEM_cert_to_DER_cert(certificate)
    assert fingerprint in ("", hashlib.sha256(der).hexdigest())
    parsed = x509.load_der_x509_certificate(der)
    key = parsed.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    key.verify(bytes.fromhex(signature), message.encode(), ec.ECDSA(SHA256()))
    return str(parsed.subject.rfc4514_string()).removeprefix("CN=")


class Clients:
    """Clients, 24 at a time, each with a message of its own: a third of them for each card, a third for any card."""

    def __init__(self, example: ModuleType, hosts: list[Host], count: int, patience: float = 30) -> None:
        self.example, self.hosts, self.count, self.patience = example, hosts, count, patience
        self.plan: dict[int, Callable[[], object]] = {}
        """What happens after so many signatures."""
        self.sent_again = -count
        self._lock = threading.Lock()

    def work(self) -> dict[str, int]:
        """Return how many signatures each card made; all are right."""
        counts = {host.name: 0 for host in self.hosts}
        pool = ThreadPoolExecutor(24)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self.example.sign, "apply_async", self._count(self.example.sign.apply_async))
            futures: list[Future[str]] = [pool.submit(self._client, number) for number in range(self.count)]
            try:
                for done, future in enumerate(as_completed(futures, timeout=300), 1):
                    counts[future.result()] += 1
                    self.plan.get(done, lambda: None)()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
        return counts

    def _client(self, number: int) -> str:
        message = os.urandom(16).hex()
        host = [None, *self.hosts][number % (len(self.hosts) + 1)]
        fingerprint = host.queue.removeprefix("sign.") if host else ""
        holder = who_signed(message, fingerprint, *self.example.signed(message, fingerprint, self.patience))
        assert host is None or holder == host.name
        return holder

    def _count(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def counting(*arguments: Any, **options: Any) -> Any:
            with self._lock:
                self.sent_again += 1
            return function(*arguments, **options)

        return counting


@contextlib.contextmanager
def killing(hosts: list[Host], every: float) -> Iterator[list[int]]:
    """SIGKILL random processes of the pools, repeatedly, during the block; return the list of those."""
    killed: list[int] = []
    end = threading.Event()

    def kill() -> None:
        while not end.wait(every):
            # Celery ends a worker whose pool dies during the start.
            pool = [pid for host in hosts if host.serves for pid in host.processes()]
            if pool:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid := random.choice(pool), signal.SIGKILL)
                    killed.append(pid)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield killed
    finally:
        end.set()
        thread.join()


def lose(example: ModuleType, host: Host, broker: redis.Redis, *options: str) -> int:
    """Take the host away while tasks are running and queued; restore it when they have been delivered again.

    :return: how many times it was taken away until a task was running.
    """
    for times in range(1, 20):
        eventually(lambda: host.under_way(broker) and broker.llen(host.queue))
        host.vanish()
        taken = host.under_way(broker)
        if taken:
            eventually(lambda: not host.under_way(broker))
            assert broker.llen(host.queue) >= len(taken)
        host.come_back(*options)
        await_service(example, host)
        if taken:
            return times
    raise AssertionError("the host was idle whenever it vanished")


def nothing_left(hosts: list[Host], broker: redis.Redis) -> None:
    """Stop the workers: no task, no delivery, no connection to a card is left."""
    eventually(lambda: not broker.hlen("unacked"))
    for host in hosts:
        host.stop()
    assert [host.ended() for host in hosts] == [0, 0]
    assert broker.hlen("unacked") == 0
    assert [broker.llen(queue) for queue in ("sign", *(host.queue for host in hosts))] == [0, 0, 0]
    for host in hosts:
        host.stack.wait_for_clients(0)


RECYCLED = "--max-tasks-per-child", "10"


def test_nothing_is_lost(example: ModuleType, hosts: list[Host], broker: redis.Redis) -> None:
    """Processes are recycled and killed, a host disappears and returns: each of 100 tasks is signed by its card."""
    clients = Clients(example, hosts, 100, patience=8)
    clients.plan[10] = lambda: lose(example, hosts[1], broker, *RECYCLED)
    everything_right(clients, broker)


@pytest.mark.long
def test_nothing_is_lost_of_a_thousand(example: ModuleType, hosts: list[Host], broker: redis.Redis) -> None:
    """The same with 1,000 tasks; a worker is also restarted, and two end because pcscd or the card is missing."""
    first, second = hosts
    clients = Clients(example, hosts, 1000, patience=90)  # a host whose pool recycles a process needs 30 s to end
    vanished = []

    def end_first() -> None:
        eventually(lambda: first.under_way(broker))
        first.stop()
        assert first.ended() == 0
        first.start(*RECYCLED)
        await_service(example, first)

    def kill_pcscd_of_first() -> None:
        first.serves = False
        first.stack.kill()
        assert first.ended() == 0
        first.come_back(*RECYCLED)
        await_service(example, first)

    def take_card_of_second() -> None:
        second.serves = False
        card = second.stack.readers[0].remove()
        assert second.ended() == 0
        second.stack.readers[0].insert(card)
        second.start(*RECYCLED)
        await_service(example, second)

    # The other clients continue during each step, with some hundred tasks: the last step needs tasks that are left.
    clients.plan[100] = end_first
    clients.plan[250] = lambda: vanished.append(lose(example, second, broker, *RECYCLED))
    clients.plan[400] = lambda: vanished.append(lose(example, first, broker, *RECYCLED))
    clients.plan[550] = kill_pcscd_of_first
    clients.plan[700] = take_card_of_second
    everything_right(clients, broker, every=1)
    assert clients.sent_again <= sum(vanished)  # Redis may forget one message when its taker dies


def everything_right(clients: Clients, broker: redis.Redis, every: float = 0.4) -> None:
    """Start the workers, run the clients while processes are killed, and check that nothing is left."""
    for host in clients.hosts:
        host.start(*RECYCLED)
    await_service(clients.example, *clients.hosts)
    with killing(clients.hosts, every) as killed:
        counts = clients.work()
    print(f"killed {len(killed)}, sent again {clients.sent_again}, signed {counts}")
    assert killed
    assert sum(counts.values()) == clients.count
    assert min(counts.values()) >= clients.count // 3
    nothing_left(clients.hosts, broker)


@pytest.mark.long
@pytest.mark.parametrize("pool", ["threads", "solo"])
def test_other_pools(example: ModuleType, hosts: list[Host], broker: redis.Redis, pool: str) -> None:
    """Threads share the connection of the worker's process and take turns; "solo" has one thread and no pool."""
    for host in hosts:
        host.start("--pool", pool)
    await_service(example, *hosts)
    clients = Clients(example, hosts, 60)
    assert sum(clients.work().values()) == 60
    assert clients.sent_again == 0
    nothing_left(hosts, broker)


@pytest.mark.long
def test_without_a_card(hosts: list[Host]) -> None:
    """Without a card, the worker ends before it takes a task, and gives the reason."""
    host = hosts[0]
    host.stack.readers[0].remove()
    host.start()
    assert host.ended() == 1
    assert "celery_sign.py: SCardConnect: " in host.log.read_text()


@pytest.mark.long
def test_on_raw_pyscard_it_fails(example: ModuleType, hosts: list[Host], tmp_path: Path) -> None:
    """On raw pyscard the same program signs few of 20 messages, if any, so the tests can fail."""
    seam = "import sys, pcsc_safe, smartcard.scard as raw; pcsc_safe.scard = sys.modules['pcsc_safe.scard'] = raw"
    tmp_path.joinpath("sitecustomize.py").write_text(seam)
    host = hosts[0]
    host.start(env={"PYTHONPATH": str(tmp_path)})
    await_service(example, host)
    messages = [os.urandom(16).hex() for _ in range(20)]
    tasks = [example.sign.apply_async((message,), queue=host.queue) for message in messages]
    end, right = time.monotonic() + 8, 0
    while time.monotonic() < end and not all(task.ready() for task in tasks):
        time.sleep(0.1)
    for message, task in zip(messages, tasks):
        with contextlib.suppress(Exception):  # whatever is raised, it is not a signature
            assert task.ready()
            who_signed(message, "", *task.get(timeout=1))
            right += 1
        task.forget()
    print(f"on raw pyscard {right} of 20 are right")
    assert right < 20


@pytest.mark.long
def test_over_tls(tmp_path: Path) -> None:
    """With the redis.conf of docs/hosts/celery.md, Redis uses TLS, and accepts only one user, with a password."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    certificate, key, config = (tmp_path / name for name in ("redis.crt", "redis.key", "redis.conf"))
    self_signed(certificate, key)
    (text,) = re.findall(r"```conf\n(# redis.conf\n.*?)```", PAGE.read_text(), re.DOTALL)
    here = [("ca.crt", "redis.crt"), ("/etc/redis", str(tmp_path)), ("6380", str(port)), ("PASSWORD", "secret")]
    for there, value in here:
        assert there in text
        text = text.replace(there, value)
    config.write_text(text)
    tls = f"?ssl_cert_reqs=required&ssl_ca_certs={certificate}"
    with contextlib.ExitStack() as undo:
        undo.enter_context(a_redis(config))
        patch = undo.enter_context(pytest.MonkeyPatch.context())
        for name, value in environment(f"rediss://sign:secret@127.0.0.1:{port}/0{tls}").items():
            patch.setenv(name, value)
        example = undo.enter_context(imported_example())
        host = undo.enter_context(a_host("only@machine", tmp_path))
        host.start()
        await_service(example, host)
        assert sum(Clients(example, [host], 6).work().values()) == 6
        for url in (f"rediss://127.0.0.1:{port}/0{tls}", f"rediss://sign:secret@127.0.0.1:{port}/0"):
            with redis.Redis.from_url(url) as stranger, pytest.raises(redis.RedisError):
                stranger.ping()  # without the password; without the CA certificate of the server
        host.stop()
        assert host.ended() == 0


def self_signed(certificate: Path, key: Path) -> None:
    """A certificate for 127.0.0.1, and its key."""
    private = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "redis")])
    now = datetime.now(timezone.utc)
    builder = x509.CertificateBuilder(name, name, private.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=1))
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    builder = builder.add_extension(x509.SubjectAlternativeName([address]), critical=False)
    certificate.write_bytes(builder.sign(private, SHA256()).public_bytes(Encoding.PEM))
    key.write_bytes(private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
