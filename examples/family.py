"""A family of processes: workers that get their own sessions, and a successor that takes a session over.

What it shows: which process has which session, and when.  This command draws docs/timeline.svg, with the virtual stack
of ``pcsc_safe.testing`` instead of a reader::

    python -m pcsc_safe.testing -- python -m pcsc_safe run --timeline docs/timeline.svg examples/family.py

Without the drawing, it runs with any reader, and with a card that may reply anything::

    python examples/family.py
"""

import os
import sys
import time

import pcsc_safe
from pcsc_safe import scard

COMMAND = [0x80, 0x01, 0x00, 0x00, 0x03, 1, 2, 3]


def check(hresult):
    if hresult != scard.SCARD_S_SUCCESS:
        sys.exit(scard.SCardGetErrorMessage(hresult))


def use(card, times):
    """Send groups of commands, each in a transaction."""
    for _ in range(times):
        check(scard.SCardBeginTransaction(card))
        for _ in range(3):
            hresult, _ = scard.SCardTransmit(card, scard.SCARD_PCI_T1, COMMAND)
            check(hresult)
        check(scard.SCardEndTransaction(card, scard.SCARD_LEAVE_CARD))
        time.sleep(0.005)


def work(context, card):
    """In a forked worker: connect by SCardReconnect, because the parent may be in a transaction at this moment."""
    hresult, _ = scard.SCardReconnect(card, scard.SCARD_SHARE_SHARED, scard.SCARD_PROTOCOL_T1, scard.SCARD_LEAVE_CARD)
    check(hresult)
    use(card, 4)
    check(scard.SCardReleaseContext(context))


def main():
    hresult, context = scard.SCardEstablishContext(scard.SCARD_SCOPE_SYSTEM)
    check(hresult)
    hresult, readers = scard.SCardListReaders(context, [])
    check(hresult)
    hresult, card, _ = scard.SCardConnect(context, readers[0], scard.SCARD_SHARE_SHARED, scard.SCARD_PROTOCOL_T1)
    check(hresult)
    use(card, 2)

    workers = []
    for _ in range(2):
        workers.append(os.fork())
        if workers[-1] == 0:
            try:
                work(context, card)
                os._exit(0)
            except SystemExit as error:
                print(error, file=sys.stderr, flush=True)
            finally:
                os._exit(1)
        use(card, 2)
    failed = [pid for pid in workers if os.waitpid(pid, 0)[1]]

    with pcsc_safe.handover():
        successor = os.fork()
    if successor == 0:
        use(card, 3)  # the same session continues here
        check(scard.SCardDisconnect(card, scard.SCARD_LEAVE_CARD))
        check(scard.SCardReleaseContext(context))
        os._exit(0)
    _, status = os.waitpid(successor, 0)
    if failed or status:
        sys.exit("a process of the family has failed")
    print("all done", flush=True)


if __name__ == "__main__":
    main()
