"""The line that a server prints when it answers, with a command to try it."""

from __future__ import annotations

import json
import os
import shlex
import socket
import ssl
import time
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from typing import Any

POLL_S = 0.5
TIMEOUT_S = 2.0
MAX_FAILURES = 20  # of a server that listens, and does not answer as ours do


def in_url(host: str) -> str:
    """A host as URLs have it: IPv6 addresses in brackets."""
    return f"[{host.replace('%', '%25')}]" if ":" in host else host


@dataclass(frozen=True)
class Address:
    """Where a client on this machine reaches the server.

    Attributes:
        host: name or address; of a Unix socket without meaning, but HTTP wants one.
        port: of TCP.
        socket_path: of a Unix socket instead; or empty.
        certificate: path of the server's certificate; empty: no TLS.
    """

    host: str
    port: int
    socket_path: str
    certificate: str

    @classmethod
    def of(cls, args: Any) -> Address:
        """From vLLM's parsed arguments."""
        anywhere = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}
        host = "localhost" if args.uds else anywhere.get(args.host or "", args.host)
        files = (args.uds, args.ssl_certfile or args.ssl_keyfile)  # one file may hold both
        # Absolute: the command may be pasted in another folder.
        socket_path, certificate = (os.path.abspath(name) if name else "" for name in files)
        return cls(host, args.port, socket_path, certificate)

    @property
    def url(self) -> str:
        """For clients."""
        scheme = "https" if self.certificate else "http"
        port = "" if self.socket_path else f":{self.port}"
        return f"{scheme}://{in_url(self.host)}{port}"

    def __str__(self) -> str:
        """For people."""
        return f"unix:{self.socket_path}" if self.socket_path else self.url

    def connect(self) -> socket.socket:
        """A connection, without TLS yet.

        Raises:
            OSError: nobody listens.
        """
        if not self.socket_path:
            return socket.create_connection((self.host, self.port), TIMEOUT_S)
        connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connected.settimeout(TIMEOUT_S)
        try:
            connected.connect(self.socket_path)
        except OSError:
            connected.close()
            raise
        return connected


class _NotListening(OSError):
    """Nobody answers there: the server is still loading."""


class _Connection(HTTPConnection):
    """HTTP to an address of any kind; unlike urllib it never asks a proxy."""

    def __init__(self, address: Address, trust: ssl.SSLContext) -> None:
        super().__init__(address.host, address.port)
        self._address, self._trust = address, trust

    def connect(self) -> None:
        try:
            self.sock = self._address.connect()
        except OSError as error:
            raise _NotListening(error.errno, str(error)) from None
        if self._address.certificate:
            host = self._address.host
            self.sock = self._trust.wrap_socket(self.sock, server_hostname=host)


def _health(address: Address, trust: ssl.SSLContext) -> int:
    """Status of /health, which needs no key.

    Raises:
        OSError: nobody listens, or a certificate that ``trust`` does not accept.
        HTTPException: the answer is not HTTP.
    """
    connection = _Connection(address, trust)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status
    finally:
        connection.close()


def _any_certificate() -> ssl.SSLContext:
    # To know that our own process answers; nothing is sent that a stranger must not see.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def _trust_options(address: Address) -> str:
    """What curl needs to accept the server's certificate: nothing, the file, or to look away."""
    if not address.certificate:
        return ""
    pinned = f" --cacert {shlex.quote(address.certificate)}"
    for options, authority in (("", None), (pinned, address.certificate)):
        try:
            _health(address, ssl.create_default_context(cafile=authority))
        except (OSError, HTTPException):
            continue
        return options
    return " -k"


def curl_line(args: Any, address: Address) -> str:
    """A command that asks the server a question; the API key stays in the environment."""
    model = args.served_model_name[0] if args.served_model_name else args.model
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "max_tokens": 32,
        "temperature": 0,
    }
    has_key = bool(args.api_key or os.environ.get("VLLM_API_KEY"))
    auth = ' -H "Authorization: Bearer $VLLM_API_KEY"' if has_key else ""
    way = f" --unix-socket {shlex.quote(address.socket_path)}" if address.socket_path else ""
    url = shlex.quote(f"{address.url}/v1/chat/completions")
    data = shlex.quote(json.dumps(body))
    return (
        f"curl -s{way}{_trust_options(address)} {url} "
        f"-H 'Content-Type: application/json'{auth} -d {data}"
    )


def wait_until_ready(address: Address) -> str | None:
    """Waits for /health, while the server loads for as long as it takes.

    Returns:
        None when it answered, else why it will not: it listens, but wants something else (a
        client's certificate, say).
    """
    trust, problem = _any_certificate(), ""
    failures = 0
    while failures < MAX_FAILURES:
        time.sleep(POLL_S)
        try:
            status = _health(address, trust)
            if status == 200:
                return None
            if status != 503:  # not yet
                failures, problem = failures + 1, f"status {status}"
        except _NotListening:
            continue
        except (OSError, HTTPException) as error:
            failures, problem = failures + 1, str(error) or type(error).__name__
    return problem


def announce_when_ready(args: Any) -> None:
    """Waits for the server, then prints; runs in a thread that ends with the process."""
    address = Address.of(args)
    problem = wait_until_ready(address)
    if problem is not None:
        print(f"\nvllm-ext: {address} listens, but /health did not answer: {problem}", flush=True)
        return
    backend = args.attention_backend
    name = getattr(backend, "name", backend) or "vLLM's own choice"
    print(
        f"\nvllm-ext: ready on {address} (attention backend: {name}). Try it:\n\n"
        f"  {curl_line(args, address)}\n",
        flush=True,
    )
