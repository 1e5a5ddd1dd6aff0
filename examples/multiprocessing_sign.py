"""Signatures by worker processes, with a card that was opened before they were forked.

What it shows: the process from which the workers are forked opens the card once and verifies the PIN.  Each worker
connects again at its first signature, and the PIN is still verified.  Some workers die.  Other workers then sign the
messages that these workers had.  A program notices the death of a worker in three different ways, depending on the kind
of its workers: see the functions below.

The program signs each line of standard input; equal lines are signed once.  It prints the signature in hex and then
the line, in any order::

    seq 1000 | python examples/multiprocessing_sign.py executor           # or pool, or process
    seq 1000 | PYTHONPATH=examples python examples/multiprocessing_sign.py executor forkserver

The program sets the start method ``fork``, because it is not the default since Python 3.14, and with another one the
workers would not inherit this process's card.  With ``forkserver`` the fork server opens the card, not this process.
The fork server preloads the module `opened_card`, so this module must be on PYTHONPATH.  The program asks for the PIN
on the terminal, or takes it from the environment variable PIV_PIN.  Without a card::

    pip install 'pcsc-safe[piv]'
    export PIV_PIN=123456
    seq 1000 | python -m pcsc_safe.testing --card piv -- python examples/multiprocessing_sign.py executor
"""

import concurrent.futures
import contextlib
import hashlib
import multiprocessing
import multiprocessing.connection
import sys

WORKERS = 3
TASKS = 50  # after so many tasks a worker is replaced
TIMEOUT = 5  # seconds without any signature


def sign(message):
    """In a worker: sign with the card.  The parent or the fork server has imported `opened_card` already."""
    import opened_card

    return message, opened_card.signer.sign(hashlib.sha256(message).digest())


def by_pool(how, messages):
    """`multiprocessing.Pool` replaces a worker that died, but doesn't report that its task is lost.

    So if no signature arrives for some seconds, a new pool signs the missing messages.  (If a worker is killed while it
    takes a task from the queue, the queue stays locked and the pool hangs.  Use an executor if workers may be killed.)
    """
    missing = set(messages)
    while missing:
        with how.Pool(WORKERS, maxtasksperchild=TASKS) as pool:
            results = pool.imap_unordered(sign, list(missing))
            with contextlib.suppress(StopIteration, multiprocessing.TimeoutError):
                while True:
                    message, signature = results.next(TIMEOUT)
                    missing.discard(message)
                    yield message, signature


def by_executor(how, messages):
    """`ProcessPoolExecutor` raises BrokenProcessPool if a worker died; a new executor signs the missing messages."""
    missing = set(messages)
    while missing:
        with concurrent.futures.ProcessPoolExecutor(WORKERS, mp_context=how) as executor:
            try:
                results = [executor.submit(sign, message) for message in missing]
                for result in concurrent.futures.as_completed(results):
                    message, signature = result.result()
                    missing.discard(message)
                    yield message, signature
            except concurrent.futures.process.BrokenProcessPool:
                continue


def by_process(how, messages):
    """Each `Process` gets some messages and its own pipe.  When the pipe ends, we know which messages are missing."""
    missing, running = list(messages), {}
    while missing or running:
        while missing and len(running) < WORKERS:
            some = [missing.pop() for _ in range(min(TASKS, len(missing)))]
            pipe, its_end = how.Pipe(duplex=False)
            process = how.Process(target=sign_all, args=(some, its_end))
            process.start()
            its_end.close()  # otherwise the pipe would never end in this process
            running[pipe] = process, set(some)
        for pipe in multiprocessing.connection.wait(running):
            process, expected = running[pipe]
            try:
                message, signature = pipe.recv()
            except (EOFError, OSError):  # OSError: the worker died while it wrote
                process.join()
                if process.exitcode > 0:
                    sys.exit("a worker gave up")  # it has printed why
                missing += expected
                del running[pipe]
            else:
                expected.remove(message)
                yield message, signature


def sign_all(messages, pipe):
    for message in messages:
        pipe.send(sign(message))


def main(kind, method="fork"):
    how = multiprocessing.get_context(method)
    if method == "forkserver":
        how.set_forkserver_preload(["opened_card"])
    else:
        import opened_card  # noqa: F401  # opens the card before the fork
    messages = {line.rstrip(b"\n") for line in sys.stdin.buffer}
    for message, signature in KINDS[kind](how, messages):
        print(signature.hex(), message.decode(errors="replace"), flush=True)


KINDS = {"pool": by_pool, "executor": by_executor, "process": by_process}

if __name__ == "__main__":
    if len(sys.argv) not in (2, 3) or sys.argv[1] not in KINDS or sys.argv[2:] not in ([], ["fork"], ["forkserver"]):
        sys.exit("usage: multiprocessing_sign.py pool|executor|process [fork|forkserver]")
    main(*sys.argv[1:])
