"""The programs of test_pkcs11.py: PKCS#11 through PyKCS11 and OpenSC's module, in processes that fork.

A program imports pcsc_safe only if it uses more than the guard, so that the guard is tested as in programs that use
nothing else.
"""

from __future__ import annotations

import glob
import json
import os
import signal
import sys
import threading
from typing import Any

import PyKCS11
from forking import start, wait_for

PIN = "123456"
ROUNDS = 30
MODULES = [*glob.glob("/usr/lib/*/opensc-pkcs11.so"), *glob.glob("/usr/lib*/opensc-pkcs11.so")]


class Token:
    """A PKCS#11 session on the first card, with the PIN verified."""

    def __init__(self) -> None:
        self._library = PyKCS11.PyKCS11Lib()
        self._library.load(MODULES[0])
        self._open()

    def _open(self) -> None:
        slot = self._library.getSlotList(tokenPresent=True)[0]
        self._session = self._library.openSession(slot, PyKCS11.CKF_SERIAL_SESSION)
        self._session.login(PIN)
        self._key = self._session.findObjects([(PyKCS11.CKA_CLASS, PyKCS11.CKO_PRIVATE_KEY)])[0]

    def sign(self, message: str) -> str:
        """The signature, r and s in hexadecimal; or PKCS#11's error."""
        mechanism = PyKCS11.Mechanism(PyKCS11.CKM_ECDSA_SHA256, None)
        try:
            return bytes(self._session.sign(self._key, message.encode(), mechanism)).hex()
        except PyKCS11.PyKCS11Error as error:
            return str(error)

    def sign_all(self, name: str) -> dict[str, str]:
        """Sign 30 messages; return the result of each."""
        return {f"{name} {number}": self.sign(f"{name} {number}") for number in range(ROUNDS)}

    def begin_anew(self) -> None:
        """What PKCS#11 requires of a forked process: C_Initialize, before any other call."""
        assert self._library.lib.C_Initialize() == PyKCS11.CKR_OK
        self._open()

    def finalize(self) -> None:
        """Call C_Finalize, as PyKCS11 does at the end of a program."""
        self._library.lib.C_Finalize()


# The children; each gets its parent's session, and returns its report.


def uses(token: Token) -> Any:
    """Sign as if it were the parent, which it may not."""
    signed = token.sign("the parent's session in the child")
    token.finalize()
    return signed


def has_a_child(token: Token) -> Any:
    return wait_for(start(token.finalize)), token.finalize()


def closes_everything(token: Token) -> None:
    """Close all descriptors, as daemons do first."""
    os.closerange(3, 300)
    token.finalize()


def begins_anew(token: Token) -> Any:
    token.begin_anew()
    signed = token.sign_all("child")
    token.finalize()
    return signed


def is_killed(token: Token) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


# The programs.


def ends_in_an_orderly_way() -> None:
    """The child is a program that exits: all its finalizers run."""
    token = Token()
    pid = os.fork()
    if pid == 0:
        signal.alarm(20)
        sys.exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    tell(token)


def forks(child: str) -> None:
    """Fork such a child, then sign."""
    import pcsc_safe  # reads the environment, and does nothing else

    assert pcsc_safe.__version__
    token = Token()
    told: Any = None
    if child in ("is_killed", "closes_everything"):
        pid, _ = start(globals()[child], token)
        told = os.waitpid(pid, 0)[1]
    else:
        told = wait_for(start(globals()[child], token))
    tell(token, told)


def forks_in_a_thread() -> None:
    """Fork in one of several threads, while no other is in PKCS#11."""
    import pcsc_safe

    pcsc_safe.configure(guard_native=True)
    token = Token()
    thread = threading.Thread(target=lambda: wait_for(start(token.finalize)))
    thread.start()
    thread.join()
    tell(token)


def both_sign() -> None:
    """Child and parent sign at the same time, each in its own session."""
    import pcsc_safe

    pcsc_safe.configure(guard_native=True)
    token = Token()
    child = start(begins_anew, token)
    signed = token.sign_all("meanwhile")
    tell(token, {**signed, **wait_for(child)})


def has_sessions_of_both(handed_over: str) -> None:
    """A session of PKCS#11, and one of pcsc_safe on another card; the child finalizes the first and uses the second."""
    import pcsc_safe
    from pcsc_safe import scard as safe

    pcsc_safe.configure(guard_native=True)
    token = Token()
    _, context = safe.SCardEstablishContext(safe.SCARD_SCOPE_SYSTEM)
    reader = sorted(safe.SCardListReaders(context, [])[1])[1]
    _, card, _ = safe.SCardConnect(context, reader, safe.SCARD_SHARE_SHARED, safe.SCARD_PROTOCOL_T1)

    def ask() -> Any:
        return safe.SCardTransmit(card, safe.SCARD_PCI_T1, [0x80, 0x30, 0, 0, 0])

    def child() -> Any:
        before, parents = ask(), token.sign("the parent's")
        token.finalize()
        return before, ask(), parents

    assert safe.SCardTransmit(card, safe.SCARD_PCI_T1, [0x80, 0x20, 0, 0, 0]) == [0, [0x90, 0]]
    if handed_over == "handed over":
        with pcsc_safe.handover():
            forked = start(child)
    else:
        forked = start(child)
    tell(token, [*wait_for(forked), ask()])


def is_forked_from_c(when: str) -> None:
    """A fork without hooks: pcsc_safe detects it at its first use, before (``first``) or after C_Initialize."""
    import ctypes

    import pcsc_safe
    from pcsc_safe import scard as safe

    pcsc_safe.configure(guard_native=True)
    token = Token()

    def child() -> Any:
        if when == "anew":
            token.begin_anew()
        safe.SCardEstablishContext(safe.SCARD_SCOPE_SYSTEM)
        signed = token.sign_all("child") if when == "anew" else {}
        token.finalize()
        return signed

    libc = ctypes.PyDLL(None)
    tell(token, wait_for(start(child, fork=lambda: int(libc.fork()))))


def tell(token: Token, told: Any = None) -> None:
    """Print the child's report, and what the parent signs afterwards."""
    print(json.dumps([told, token.sign_all("parent")]), flush=True)
