"""Signatures by worker processes, with a card that was opened before they were forked.

What it shows: the process from which the workers are forked opens the card once and verifies the PIN.  Each worker
connects again at its first signature, and finds the PIN verified.  Workers are replaced, and some die: another worker
then signs the messages that such a worker had.  The three kinds of workers differ in how a program notices that; see
each below.

Sign every line of standard input; on standard output, the line after its signature in hex, in any order::

    seq 1000 | python examples/multiprocessing_sign.py executor           # or pool, or process
    seq 1000 | PYTHONPATH=examples python examples/multiprocessing_sign.py executor forkserver

The start method ``fork`` is named explicitly, because it is not the default since Python 3.14, and with another one the
workers would not inherit this process's card.  With ``forkserver`` the fork server opens the card, not this process:
it preloads the module `opened_card`, which has to be on PYTHONPATH for that.  The PIN is asked for on the terminal, or
taken from PIV_PIN in the environment.  Without a card::

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
PATIENCE = 5  # seconds without any signature


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
                    message, signature = results.next(PATIENCE)
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
    """Each `Process` gets some messages and its own pipe.  The end of the pipe tells which messages are missing."""
    missing, running = list(messages), {}
    while missing or running:
        while missing and len(running) < WORKERS:
            some = [missing.pop() for _ in range(min(TASKS, len(missing)))]
            pipe, its_end = how.Pipe(duplex=False)
            process = how.Process(target=sign_all, args=(some, its_end))
            process.start()
            its_end.close()  # otherwise the pipe would never end
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
