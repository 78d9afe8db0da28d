"""An origin that speaks the read half of Azure's Blob REST API from memory-backed files, at C speed.

Duty: write nginx's configuration (nginx.conf.in, origin.lua) into a temporary directory, run it on loopback,
count what it serves, and leave nothing behind. The address has Azurite's shape:
http://127.0.0.1:PORT/ACCOUNT/CONTAINER/BLOB. Nobody is asked for a key: shared keys, SAS and anonymous
requests are all let in. What the origin answers is described in origin.lua. Durations in seconds, sizes in
bytes, rates in bytes per second.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import ssl
import statistics
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import quote

from bench.dataset import Dataset
from bench.processes import END_WITH_PARENT, with_children

ACCOUNT = "benchaccount"
KEY = "YmVuY2gtbm90LWEtc2VjcmV0LW5vdC1hLXNlY3JldC1ub3QtYS1zZWNyZXQ="  # any base64: it is never checked
START_LIMIT_S = 10.0
STOP_LIMIT_S = 5.0
PIECE_S = 0.004  # a rate-limited connection gets its bytes in pieces of this duration
_MODULE_FOLDERS = ("/usr/lib/nginx/modules", "/usr/lib64/nginx/modules", "/usr/share/nginx/modules")


class OriginError(RuntimeError):
    """The origin could not be run on this machine; the message says what to install or what nginx said."""


@dataclass(frozen=True)
class Served:
    """What the origin has answered since it was last reset."""

    requests: int = 0
    get: int = 0
    head: int = 0
    list: int = 0
    other: int = 0
    errors: int = 0
    bytes: int = 0
    get_bytes: int = 0
    unquoted_if_match: int = 0


class Origin:
    """A running origin; use it as a context manager.

    `delay_s` is the time to first byte of every request, `rate` the most one connection is given (None: no
    limit).
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        delay_s: float = 0.0,
        rate: int | None = None,
        tls: bool = False,
        workers: int = 1,
    ) -> None:
        self.delay_s = delay_s
        self.rate = rate
        self.tls = tls
        self.account = ACCOUNT
        self.key = KEY
        self._dataset = dataset
        self._workers = workers
        self._port = 0
        self._run: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """The account's address, without a slash at its end."""
        return f"{'https' if self.tls else 'http'}://127.0.0.1:{self._port}/{ACCOUNT}"

    @property
    def ca_file(self) -> Path | None:
        """The certificate authority a client has to trust (SSL_CERT_FILE), with TLS."""
        return self._run / "ca.pem" if self.tls and self._run is not None else None

    @property
    def folder(self) -> Path:
        """A folder of this origin's own, gone with it."""
        if self._run is None:
            raise OriginError("the origin is not running")
        return self._run

    @property
    def pid(self) -> int:
        """nginx's master process; its workers are its children."""
        if self._process is None:
            raise OriginError("the origin is not running")
        return self._process.pid

    @property
    def description(self) -> str:
        """One phrase for the report."""
        if self.delay_s == 0 and self.rate is None:
            return "no added delay" + (", TLS" if self.tls else "")
        rate = f", {self.rate / 1e6:.0f} MB/s per connection" if self.rate is not None else ""
        return f"{self.delay_s * 1e3:.0f} ms to first byte{rate}" + (", TLS" if self.tls else "")

    def blob_url(self, container: str, name: str) -> str:
        """The address of one blob."""
        return f"{self.url}/{container}/{quote(name)}"

    def __enter__(self) -> Self:
        self._run = Path(tempfile.mkdtemp(prefix="amlmount-origin-"))
        try:
            self._port = _free_port()
            if self.tls:
                _make_certificates(self._run)
            self._dataset.write_index(self._run / "index.tsv")
            configuration = self._run / "nginx.conf"
            configuration.write_text(self._configuration(self._run), encoding="utf-8")
            self._process = subprocess.Popen(
                [
                    *END_WITH_PARENT,
                    nginx_program(),
                    "-c",
                    str(configuration),
                    "-p",
                    str(self._run),
                    "-e",
                    f"{self._run}/error.log",
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            self._wait_until_ready(self._process)
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def served(self) -> Served:
        """The counters now. This request is neither delayed nor counted."""
        return Served(**json.loads(self._control("/-/stats")))

    def reset(self) -> None:
        """Set the counters to zero."""
        self._control("/-/reset")

    def round_trip_s(self, container: str, name: str, samples: int = 40) -> float:
        """The median time of a one-byte GET on an open connection, from this process."""
        connection = self._connect()
        times = []
        for _ in range(samples):
            start = time.perf_counter()
            connection.request("GET", f"/{ACCOUNT}/{container}/{quote(name)}", headers={"Range": "bytes=0-0"})
            response = connection.getresponse()
            body = response.read()
            times.append(time.perf_counter() - start)
            if response.status != 206 or len(body) != 1:
                raise OriginError(f"a one-byte GET was answered {response.status} with {len(body)} bytes")
        connection.close()
        return statistics.median(times)

    def _control(self, path: str) -> bytes:
        connection = self._connect()
        try:
            connection.request("GET", path)
            return connection.getresponse().read()
        finally:
            connection.close()

    def _connect(self) -> http.client.HTTPConnection:
        if self.tls:
            context = ssl.create_default_context(cafile=str(self.ca_file))
            return http.client.HTTPSConnection("127.0.0.1", self._port, timeout=10, context=context)
        return http.client.HTTPConnection("127.0.0.1", self._port, timeout=10)

    def _configuration(self, run: Path) -> str:
        here = Path(__file__).resolve().parent
        certificate = (
            f"ssl_certificate {run}/leaf.pem; ssl_certificate_key {run}/leaf.key;" if self.tls else ""
        )
        values = {
            "MODULES": _module_folder(),
            "USER": "user root root;" if os.geteuid() == 0 else "",
            "RUN": str(run),
            "WORKERS": str(self._workers),
            "PIECE": str(int(self.rate * PIECE_S) if self.rate is not None else 2 << 20),
            "LUA": str(here),
            "INDEX": str(run / "index.tsv"),
            "ACCOUNT": ACCOUNT,
            "URL": self.url,
            "DELAY_S": repr(self.delay_s),
            "PORT": str(self._port),
            "TLS": "ssl" if self.tls else "",
            "CERTIFICATE": certificate,
            "LIMIT_RATE": f"limit_rate {self.rate};" if self.rate is not None else "",
            "DATA": str(self._dataset.root),
        }
        text = (here / "nginx.conf.in").read_text(encoding="utf-8")
        for word, value in values.items():
            text = text.replace(f"@{word}@", value)
        return text

    def _wait_until_ready(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + START_LIMIT_S
        while True:
            try:
                self._control("/-/stats")
                return
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise OriginError(f"nginx did not start: {self._log_tail()}") from None
                time.sleep(0.02)

    def _log_tail(self) -> str:
        log = self._run / "error.log" if self._run is not None else None
        return (
            log.read_text(errors="replace")[-1000:].strip() if log is not None and log.exists() else "no log"
        )

    def _stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(STOP_LIMIT_S)
            except subprocess.TimeoutExpired:
                for pid in with_children(self._process.pid):
                    os.kill(pid, signal.SIGKILL)
                self._process.wait()
            self._process = None
        if self._run is not None:
            shutil.rmtree(self._run, ignore_errors=True)
            self._run = None


def nginx_program() -> str:
    """Where nginx is; OriginError when it is not installed."""
    found = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
    if found is None:
        raise OriginError(
            "nginx is not installed; on Debian and Ubuntu: apt install nginx libnginx-mod-http-lua"
        )
    return found


def _module_folder() -> str:
    for folder in _MODULE_FOLDERS:
        if Path(folder, "ngx_http_lua_module.so").exists():
            return folder
    raise OriginError(
        "nginx's Lua module is not installed; on Debian and Ubuntu: apt install libnginx-mod-http-lua"
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _make_certificates(folder: Path) -> None:
    """A certificate authority for one run, and a certificate it signed for 127.0.0.1.

    Two, because a self-signed one is refused as a leaf by some TLS libraries, as an authority by others.
    """
    names = folder / "names.cnf"
    names.write_text(
        "subjectAltName=IP:127.0.0.1,DNS:localhost\nbasicConstraints=CA:FALSE\n", encoding="ascii"
    )
    ca, ca_key, leaf, leaf_key, wish = (
        str(folder / name) for name in ("ca.pem", "ca.key", "leaf.pem", "leaf.key", "leaf.csr")
    )
    new_key = ("-newkey", "rsa:2048", "-nodes", "-keyout")
    subject = "/CN=amlmount bench authority"
    _openssl("req", "-x509", *new_key, ca_key, "-days", "2", "-subj", subject, "-out", ca)
    _openssl("req", *new_key, leaf_key, "-subj", "/CN=127.0.0.1", "-out", wish)
    signed_by = ("-CA", ca, "-CAkey", ca_key, "-CAcreateserial")
    _openssl("x509", "-req", "-in", wish, *signed_by, "-days", "2", "-extfile", str(names), "-out", leaf)


def _openssl(*arguments: str) -> None:
    done = subprocess.run(["openssl", *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise OriginError(f"openssl {arguments[0]}: {done.stderr.strip()[-500:]}")
