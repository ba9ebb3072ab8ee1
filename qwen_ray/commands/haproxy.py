"""What stands in HAProxy's place, so that a server of this machine speaks TLS, is steered by nobody else, and is not
kept from all by the requests of one.

Ray Serve writes HAProxy's configuration itself. It binds the statistics to all interfaces, puts the socket that HAProxy
is steered through where every user reaches it, and knows no certificate: those that its HTTP options take are for its
Python proxy, through which a plain request takes four times as long. But it can be told which program to run, and where
files go: into a folder that only we can enter. The program is a script that binds the statistics to loopback, refuses
what one key has open beyond what all ingresses take, and, for TLS, names a second file with a frontend that hands on to
Serve's. Certificate and key stay where they are.
"""

from __future__ import annotations

import json
import resource
import ssl
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qwen_ray.commands.ports import free_ports
from qwen_ray.config import HttpSettings, Settings
from qwen_ray.core.errors import Overloaded, QwenRayError, SettingsError
from qwen_ray.machine import haproxy

LOOPBACK = "127.0.0.1"
STATISTICS, METRICS = "RAY_SERVE_HAPROXY_STATS_PORT", "RAY_SERVE_HAPROXY_METRICS_PORT"
# The paths of sockets must be short: 107 characters, of which Serve and HAProxy add 80.
SOCKETS, PREFIX = "/tmp", "qr-proxy-"

MAX_CONNECTIONS = 16384
FILES_EACH, OTHER_FILES = 2.5, 512  # of HAProxy: a file on both sides, and a pipe for every fourth

# The private key is found beside the certificate, under its name with `.key`.
TLS = """
frontend qwen_ray_tls
    mode http
    bind {host}:{port} ssl crt "{certificate}" alpn h2,http/1.1 ssl-min-ver TLSv1.2
    http-request set-header X-Forwarded-Proto https
    default_backend qwen_ray_plain

backend qwen_ray_plain
    mode http
    server serve {loopback}:{plain_port}
"""
# What an ingress refuses, others wait for: it is one event loop. Who sends no key is told apart by address.
OPEN_REQUESTS = """
    stick-table type binary len 32 size 100k expire 10m store conn_cur
    http-request track-sc0 req.fhdr(authorization),sha2(256) if METH_POST {{ req.fhdr(authorization) -m found }}
    http-request track-sc0 src,sha2(256) if METH_POST !{{ req.fhdr(authorization) -m found }}
    http-request return status 429 content-type application/json hdr Retry-After {seconds} string '{body}' \
if {{ sc0_conn_cur gt {limit} }}
"""
RETRY_SECONDS = 10  # of HAProxy, which knows nothing of how long a request takes

# Serve calls it as `haproxy -db -f FILE ...`.
SCRIPT = """#!/bin/sh
grep -q sc0_conn_cur "$3" || sed -i -E -e 's/^( *bind )[*]?:({statistics}|{metrics})$/\\1{loopback}:\\2/' \
    -e '/^frontend http_frontend$/r {open_requests}' "$3"
exec "{haproxy}" "$@"{more}
"""


@contextmanager
def in_front(settings: Settings) -> Iterator[tuple[Settings, dict[str, str]]]:
    """The settings of the server behind (which speaks no TLS), and what tells its Serve of HAProxy."""
    http = settings.http
    plain = http
    if http.ssl_certfile is not None and http.ssl_keyfile is not None:
        changes = {"host": LOOPBACK, "port": free_ports(1)[0], "ssl_certfile": None, "ssl_keyfile": None}
        plain = http.model_copy(update=changes)
    ports = own_ports()
    settings.cache_dir.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix=PREFIX, dir=SOCKETS) as sockets,
        tempfile.TemporaryDirectory(prefix=PREFIX, dir=settings.cache_dir) as folder,  # /tmp may be for data only
    ):
        more = "" if plain is http else f' -f "{_write_tls(Path(folder), http, plain)}"'
        script = Path(folder) / "haproxy"
        limit = http.max_open_requests * http.num_ingress
        message = f"{limit} requests of this key or address are open; come back in {RETRY_SECONDS} s."
        open_requests = Path(folder) / "open-requests.cfg"
        open_requests.write_text(OPEN_REQUESTS.format(limit=limit, seconds=RETRY_SECONDS, body=_overloaded(message)))
        script.write_text(
            SCRIPT.format(
                statistics=ports[STATISTICS],
                metrics=ports[METRICS],
                loopback=LOOPBACK,
                open_requests=open_requests,
                haproxy=_haproxy(),
                more=more,
            )
        )
        script.chmod(0o700)
        environment = {
            "RAY_SERVE_HAPROXY_BINARY_PATH": str(script),
            "RAY_SERVE_HAPROXY_NBTHREAD": "2",
            "RAY_SERVE_HAPROXY_MAXCONN": str(_max_connections()),
        }
        yield settings.model_copy(update={"http": plain}), {**environment, **ports, **_places(Path(sockets))}


def own_ports() -> dict[str, str]:
    """What tells Serve to take ports that no other Serve of this machine has.

    Two that fell back to the same Python proxy's port would both be let in (SO_REUSEPORT), and each would get requests
    that are the other's.
    """
    names = STATISTICS, METRICS, "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT", "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT"
    return {name: str(port) for name, port in zip(names, free_ports(len(names)), strict=True)}


def _max_connections() -> int:
    """Beyond them whoever comes waits for others to leave, who may not even have asked yet."""
    _, files = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    return max(1024, min(MAX_CONNECTIONS, int((files - OTHER_FILES) / FILES_EACH)))


def _places(folder: Path) -> dict[str, str]:
    """Where Serve is to put HAProxy's files, each below a folder named after its node."""
    names = {
        "CONFIG_FILE_LOC": "haproxy.cfg",
        "SOCKET_PATH": "admin.sock",
        "SERVER_STATE_BASE": "",
        "SERVER_STATE_FILE": "server-state",
        "METRICS_SOCKET_PATH": "metrics.sock",
    }
    return {f"RAY_SERVE_HAPROXY_{name}": str(folder / file) for name, file in names.items()}


def _overloaded(message: str) -> str:
    """As `serving.errors` spells it, which would bring a second of imports along."""
    error = Overloaded(message, retry_after=RETRY_SECONDS)
    return json.dumps({"error": {"message": message, "type": error.kind, "param": None, "code": error.code}})


def _write_tls(folder: Path, http: HttpSettings, plain: HttpSettings) -> Path:
    assert http.ssl_certfile is not None
    assert http.ssl_keyfile is not None
    certificate = folder / "server.pem"
    certificate.symlink_to(http.ssl_certfile.resolve())
    (folder / "server.pem.key").symlink_to(http.ssl_keyfile.resolve())
    file = folder / "tls.cfg"
    file.write_text(
        TLS.format(host=http.host, port=http.port, certificate=certificate, loopback=LOOPBACK, plain_port=plain.port)
    )
    return file


def _haproxy() -> Path:
    found = haproxy()
    if found is None:
        raise QwenRayError("There is no HAProxy here: install ray[serve], which brings one.")
    return found


def check_certificate(http: HttpSettings) -> None:
    """Raises SettingsError for files that a server cannot use; fine without any."""
    certificate, key = http.ssl_certfile, http.ssl_keyfile
    if certificate is None or key is None:
        return
    for path in (certificate, key):
        try:
            path.read_bytes()
        except OSError as error:
            raise SettingsError(f"{path}: cannot be read: {error.strerror}.", field="http.ssl_certfile") from error
    try:
        # An encrypted key would be asked for at the terminal, by a process that has none.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password=lambda: b"")
    except (ssl.SSLError, ValueError) as error:
        message = f"{certificate} and {key} are no certificate (PEM) with its unencrypted key: {error}."
        raise SettingsError(message, field="http.ssl_certfile") from error
