"""A signing queue on Celery and Redis, with a worker for each card, on one or more machines.

What it shows: the worker opens the card and verifies the PIN before its pool forks, and every process of the pool signs
with this card.  A card can only be used on the machine of its reader, so queues route tasks to cards.  Idle workers
take tasks from the queue "sign".  Only the worker that has the card takes tasks from the queue "sign.FINGERPRINT".
FINGERPRINT is the SHA-256 of the card's certificate in hex.  A task is acknowledged when it is done.  If a process is
killed or a machine disappears, its tasks are delivered again.  Signing twice is harmless.

Start a worker for each reader.  It asks for the PIN, or takes it from the environment variable PIV_PIN.  If there are
several readers, set PIV_READER to a part of the reader's name::

    export CELERY_BROKER_URL=redis://127.0.0.1/0 CELERY_RESULT_BACKEND=redis://127.0.0.1/0
    celery --workdir examples -A celery_sign worker --concurrency 2

Sign a message with any card, or with the card that has this certificate.  The program prints the certificate and the
signature.  `celery ... inspect active_queues` lists the cards::

    python examples/celery_sign.py "to be signed" [FINGERPRINT]

Without a card, on a virtual one whose PIN is 123456::

    pip install 'pcsc-safe[piv]' 'celery[redis]'
    python -m pcsc_safe.testing --card piv -- celery --workdir examples -A celery_sign worker --concurrency 2
"""

import hashlib
import os
import signal
import ssl
import sys
import threading

import piv
from celery import Celery
from celery.exceptions import Reject, TimeoutError  # noqa: A004  # Celery's own class, not a subclass of OSError
from celery.signals import worker_init

REDELIVER_AFTER = int(os.environ.get("SIGN_REDELIVER_AFTER", "60"))  # seconds; many times what a signature takes

app = Celery("celery_sign")  # CELERY_BROKER_URL and CELERY_RESULT_BACKEND have Redis' address
app.conf.update(
    broker_connection_retry_on_startup=True,
    broker_transport_options={
        "visibility_timeout": REDELIVER_AFTER,
        "unacked_restore_interval": 1,  # every worker looks for lost tasks every second; by default every 100 s
        "unacked_restore_throttle": 1,
        "unacked_mutex_expire": 10,  # seconds; the lock of a host that died while it looked
    },
    result_expires=3600,
    task_acks_late=True,
    task_default_queue="sign",
    task_reject_on_worker_lost=True,
    worker_lost_wait=1,
    worker_prefetch_multiplier=1,  # tasks wait in Redis, where other workers can take them
)
card = None


class Card:
    """The card, which the worker opens before its pool forks.

    :raises piv.CardError: there is no card, or it refuses the PIN.
    """

    def __init__(self):
        self.signer = piv.Signer(piv.pin(), os.environ.get("PIV_READER", ""))
        self.certificate = self.signer.certificate()
        self.queue = f"sign.{hashlib.sha256(self.certificate).hexdigest()}"
        self.worker = os.getpid()
        self.turn = threading.Lock()  # needed with --pool threads


@worker_init.connect
def open_card(**_):
    global card
    try:
        card = Card()
    except piv.CardError as error:
        sys.exit(f"celery_sign.py: {error}")
    app.amqp.queues.select_add(card.queue)


@app.task
def sign(message):
    """The certificate in PEM, and the ECDSA signature (SHA-256, DER) of the message in hex."""
    try:
        with card.turn:
            signature = card.signer.sign(hashlib.sha256(message.encode()).digest())
    except piv.CardError as error:
        # A worker without its card would take all tasks and fail them.  So it ends, and its supervisor restarts it.
        os.kill(card.worker, signal.SIGTERM)
        raise Reject(error, requeue=True) from error
    return ssl.DER_cert_to_PEM_cert(card.certificate), signature.hex()


def signed(message, fingerprint="", timeout=4 * REDELIVER_AFTER):
    """Call `sign` in a worker, and return what it returns.

    A task can be lost if a host dies just after it has taken the task, or if Redis restarts without its data.
    So a task that has no result after `timeout` seconds is sent again, with the same ID.
    """
    queue = f"sign.{fingerprint}" if fingerprint else "sign"
    task = sign.apply_async((message,), queue=queue)
    while True:
        try:
            return task.get(timeout=timeout)
        except TimeoutError:
            sign.apply_async((message,), queue=queue, task_id=task.id)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: celery_sign.py MESSAGE [FINGERPRINT]")
    print(*signed(*sys.argv[1:]), sep="")
