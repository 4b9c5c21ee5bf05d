"""Moto's S3 server, one request at a time: `python moto_serial.py PORT`.

Moto looks whether a key is there and then puts it, in two steps: of a thousand races one or two have two winners.
"""

from __future__ import annotations

import io
import sys
import threading

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import run_simple

moto = DomainDispatcherApplication(create_backend_app)
turn = threading.Lock()


def application(environ, start_response):
    body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
    with turn:
        return list(moto(environ | {"wsgi.input": io.BytesIO(body)}, start_response))


run_simple("127.0.0.1", int(sys.argv[1]), application, threaded=True)
