"""The bug report that started it: establish a context, fork, list the readers in the child.

What it shows: on OS X Yosemite the child crashed ("PC/SC functions crash after a fork(2)", January 2015,
https://blog.apdu.fr/posts/2015/01/os-x-yosemite-bug-pcsc-functions-crash/).  On Linux the child used its parent's
connection.  With pcsc_safe the child gets its own context, and the parent's context continues to work.

The report's sample is a C program.  These are the same steps, written for pyscard; only the import is different.  Run
it, with any reader or with the virtual stack of ``pcsc_safe.testing``::

    python examples/report_2015.py
"""

import os
import sys

from pcsc_safe.scard import (
    SCARD_S_SUCCESS,
    SCARD_SCOPE_SYSTEM,
    SCardEstablishContext,
    SCardGetErrorMessage,
    SCardListReaders,
    SCardReleaseContext,
)


def list_readers(who, context):
    hresult, readers = SCardListReaders(context, [])
    print(f"{who}: {SCardGetErrorMessage(hresult)} {readers}", flush=True)
    return hresult


hresult, context = SCardEstablishContext(SCARD_SCOPE_SYSTEM)
if hresult != SCARD_S_SUCCESS:
    sys.exit(f"SCardEstablishContext: {SCardGetErrorMessage(hresult)}")

pid = os.fork()
if pid == 0:
    failed = list_readers("child", context) != SCARD_S_SUCCESS
    SCardReleaseContext(context)
    os._exit(failed)

_, status = os.waitpid(pid, 0)
print(f"child ended with {os.waitstatus_to_exitcode(status)}", flush=True)
failed = status != 0 or list_readers("parent", context) != SCARD_S_SUCCESS
hresult = SCardReleaseContext(context)
sys.exit(failed or hresult != SCARD_S_SUCCESS)
