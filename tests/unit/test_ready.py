"""The ready line: every way to reach a server, against small servers of each kind."""

from __future__ import annotations

import datetime
import ipaddress
import os
import shlex
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from vllm_ext.cli import ready
from vllm_ext.cli.serve import check_port
from vllm_ext.errors import UserError

ANNOUNCED_S = 20.0  # far more than it takes: a hang must fail, and not hang the suite


class _Healthy(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health" else 404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_POST = do_GET  # noqa: N815

    def log_message(self, *_: Any) -> None:
        """Quiet."""

    def address_string(self) -> str:
        return "someone"  # a Unix socket's client has no address


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def server_bind(self) -> None:
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()

    def handle_error(self, *_: Any) -> None:
        """Refused handshakes are part of these tests."""


class _Guarded(_Healthy):
    def do_GET(self) -> None:
        self.send_error(401)


@contextmanager
def _serving(
    family: int,
    address: Any,
    trust: ssl.SSLContext | None = None,
    handler: type[_Healthy] = _Healthy,
) -> Iterator[int]:
    """A server on an address; yields its port."""
    kind = type("_Of", (_Server,), {"address_family": family})
    with kind(address, handler) as server:
        if trust is not None:
            server.socket = trust.wrap_socket(
                server.socket, server_side=True, do_handshake_on_connect=False
            )
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        try:
            yield 0 if family == socket.AF_UNIX else server.server_address[1]
        finally:
            server.shutdown()


def _args(**changes: Any) -> Any:
    plain = {
        "host": "127.0.0.1",
        "port": 0,
        "uds": None,
        "ssl_certfile": None,
        "ssl_keyfile": None,
        "api_key": None,
        "served_model_name": None,
        "model": "m",
        "attention_backend": None,
    }
    return SimpleNamespace(**(plain | changes))


@pytest.fixture
def announced(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[Any], str]:
    """What is printed for a server that listens already."""
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    monkeypatch.setattr(ready, "POLL_S", 0.01, raising=False)

    def announce(args: Any) -> str:
        waiting = threading.Thread(target=ready.announce_when_ready, args=(args,), daemon=True)
        waiting.start()
        waiting.join(ANNOUNCED_S)
        assert not waiting.is_alive(), "it asks for ever"
        return capsys.readouterr().out

    return announce


def _answers(printed: str) -> bool:
    """Whether the printed command reaches the server (which knows no route but /health)."""
    words = shlex.split(printed.strip().splitlines()[-1])
    assert words[0] == "curl"
    command = [words[0], "--max-time", "10", "-o", os.devnull, "-w", "%{http_code}", *words[1:]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    return done.stdout == "404"


@pytest.mark.parametrize(
    ("family", "bound", "shown"),
    [
        (socket.AF_INET, "127.0.0.1", "127.0.0.1"),
        (socket.AF_INET, "0.0.0.0", "127.0.0.1"),
        (socket.AF_INET6, "::1", "[::1]"),
        (socket.AF_INET6, "::", "[::1]"),
    ],
)
def test_addresses_are_urls_that_answer(
    family: int, bound: str, shown: str, announced: Callable[[Any], str]
) -> None:
    with _serving(family, (bound, 0)) as port:
        printed = announced(_args(host=bound, port=port))
        assert f"ready on http://{shown}:{port} " in printed
        assert _answers(printed)


def _certificate(folder: Path, names: list[x509.GeneralName]) -> tuple[str, str]:
    """Paths of a self-signed certificate and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(key, hashes.SHA256())
    )
    paths = folder / "server.crt", folder / "server.key"
    paths[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    paths[1].write_bytes(key.private_bytes(pem, pkcs8, serialization.NoEncryption()))
    return str(paths[0]), str(paths[1])


LOOPBACK = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))


@pytest.mark.parametrize(
    ("name", "option"), [(LOOPBACK, "--cacert"), (x509.DNSName("gpu.example.org"), "-k")]
)
def test_tls_is_asked_for_with_whatever_makes_curl_accept_it(
    name: x509.GeneralName, option: str, tmp_path: Path, announced: Callable[[Any], str]
) -> None:
    certificate, key = _certificate(tmp_path, [name])
    trust = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trust.load_cert_chain(certificate, key)
    with _serving(socket.AF_INET, ("127.0.0.1", 0), trust) as port:
        printed = announced(_args(port=port, ssl_certfile=certificate, ssl_keyfile=key))
        assert f"ready on https://127.0.0.1:{port} " in printed
        assert f" {option} " in printed
        assert _answers(printed)


def test_a_server_that_asks_clients_for_certificates_is_not_asked_for_ever(
    tmp_path: Path, announced: Callable[[Any], str]
) -> None:
    certificate, key = _certificate(tmp_path, [LOOPBACK])
    trust = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trust.load_cert_chain(certificate, key)
    trust.load_verify_locations(certificate)
    trust.verify_mode = ssl.CERT_REQUIRED
    with _serving(socket.AF_INET, ("127.0.0.1", 0), trust) as port:
        printed = announced(_args(port=port, ssl_certfile=certificate, ssl_keyfile=key))
    assert f"https://127.0.0.1:{port} listens, but /health did not answer" in printed
    assert "curl" not in printed


def test_a_server_that_refuses_health_is_not_asked_for_ever(
    announced: Callable[[Any], str],
) -> None:
    with _serving(socket.AF_INET, ("127.0.0.1", 0), handler=_Guarded) as port:
        assert "/health did not answer: status 401" in announced(_args(port=port))


def test_a_unix_socket_is_asked_through_itself(
    tmp_path: Path, announced: Callable[[Any], str]
) -> None:
    path = str(tmp_path / "server.sock")
    with _serving(socket.AF_UNIX, path):
        printed = announced(_args(uds=path))
        assert f"ready on unix:{path} " in printed
        assert _answers(printed)


def test_no_proxy_is_asked_for_a_loopback_address(
    monkeypatch: pytest.MonkeyPatch, announced: Callable[[Any], str]
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with _serving(socket.AF_INET, ("127.0.0.1", 0)) as port:
        assert "ready on" in announced(_args(port=port))


def test_a_server_that_still_loads_is_waited_for(announced: Callable[[Any], str]) -> None:
    with socket.socket() as loading:
        loading.bind(("127.0.0.1", 0))  # bound and not listening, as vLLM is while it loads
        port = loading.getsockname()[1]
        waiting = threading.Thread(
            target=ready.announce_when_ready, args=(_args(port=port),), daemon=True
        )
        waiting.start()
        waiting.join((ready.MAX_FAILURES + 20) * ready.POLL_S)
        assert waiting.is_alive()
    with _serving(socket.AF_INET, ("127.0.0.1", port)):
        waiting.join(ANNOUNCED_S)
    assert not waiting.is_alive()


def test_an_ipv6_port_that_is_taken_is_named_as_a_url_has_it() -> None:
    with socket.socket(socket.AF_INET6) as server:
        server.bind(("::1", 0))
        server.listen()
        with pytest.raises(UserError, match=r"cannot listen on \[::1\]:\d+: "):
            check_port("::1", server.getsockname()[1])
