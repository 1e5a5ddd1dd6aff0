"""A web service that signs with a card, under gunicorn or uWSGI, with two workers.

What it shows: the server opens the card when it loads the application, so a missing card or a wrong PIN is reported
before the service starts.  Then the server forks its workers.  Each worker connects again at its first request, the PIN
is still verified, and the worker signs.  Workers may die and be replaced.

Run it under gunicorn or uWSGI.  It asks for the PIN, or takes it from the environment variable PIV_PIN::

    gunicorn --preload --workers 2 --bind 127.0.0.1:8000 --chdir examples wsgi_sign:application
    uwsgi --http-socket 127.0.0.1:8000 --master --processes 2 --chdir examples --wsgi-file wsgi_sign.py

On a virtual card::

    PIV_PIN=123456 python -m pcsc_safe.testing --card piv -- gunicorn ...

Sign a file, and check the signature::

    curl --data-binary @file http://127.0.0.1:8000/sign > file.sig
    curl http://127.0.0.1:8000/certificate > certificate.pem
    openssl x509 -in certificate.pem -pubkey -noout > key.pem
    openssl dgst -sha256 -verify key.pem -signature file.sig file
"""

import hashlib
import ssl
import threading

import piv

LONGEST = 1 << 20  # bytes of a message

signer = piv.Signer(piv.pin())
turns = threading.Lock()  # only one thread at a time may use a Signer, and a server may have several


def application(environ, start_response):
    """POST /sign: the signature of the body, in DER.  GET /certificate: the key's certificate, in PEM."""
    handle = ROUTES.get((environ["REQUEST_METHOD"], environ["PATH_INFO"]), not_found)
    try:
        status, kind, body = handle(environ)
    except piv.CardError as error:
        status, kind, body = "503 Service Unavailable", "text/plain", f"{error}\n".encode()
    start_response(status, [("Content-Type", kind), ("Content-Length", str(len(body)))])
    return [body]


def sign(environ):
    if not environ.get("CONTENT_LENGTH"):
        return "411 Length Required", "text/plain", b"How long is the message?\n"
    length = int(environ["CONTENT_LENGTH"])
    if length > LONGEST:
        return "413 Content Too Large", "text/plain", f"At most {LONGEST} bytes.\n".encode()
    message = environ["wsgi.input"].read(length)
    if len(message) < length:
        return "400 Bad Request", "text/plain", b"That is not the whole message.\n"
    digest = hashlib.sha256(message).digest()
    with turns:
        return "200 OK", "application/octet-stream", signer.sign(digest)


def certificate(environ):
    with turns:
        return "200 OK", "application/x-pem-file", ssl.DER_cert_to_PEM_cert(signer.certificate()).encode()


def not_found(environ):
    return "404 Not Found", "text/plain", b"POST /sign or GET /certificate\n"


ROUTES = {("POST", "/sign"): sign, ("GET", "/certificate"): certificate}
