"""The process: sockets, health, reflection, signals."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import resource
import signal
import socket
import stat
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Final

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from gketrace.errors import ExitCode, ForbiddenError, UnavailableError
from gketrace_agent.access.bounds import Bounds
from gketrace_agent.access.cache import ASKING, WAITING
from gketrace_agent.access.guard import Guard
from gketrace_agent.config import Config, Listen
from gketrace_agent.interceptor import CallInterceptor
from gketrace_agent.kernel.memory import give_back_memory
from gketrace_agent.log import logger, start_logging
from gketrace_agent.resolve.host import see_all_cgroups
from gketrace_agent.service import AgentService
from gketrace_proto.v1alpha1 import agent_pb2, agent_pb2_grpc

if TYPE_CHECKING:
    from gketrace_agent.access.apiserver import KubeApi
    from gketrace_agent.metrics import MetricsServer
    from gketrace_agent.tls import Certificate

__all__ = ["AgentServer", "serve"]

_GRACE: Final = 3.0
"""Seconds that calls in progress get to end."""
_LOOK: Final = 1.0
"""Seconds between looks for a signal that came at the wrong moment."""
_LAST: Final = 1.0
"""Seconds that the threads of cancelled calls get after that."""
_FILES: Final = 4096
"""Descriptors for other things than connections: processes looked at, captures, children."""
_DOORMEN: Final = ASKING + 2 * WAITING
"""Threads more than calls: they refuse what is too much, and check who calls.  As many as ask the
API server about a caller and wait to: whoever is known already finds one that is free."""
_QUEUE: Final = 512
"""Calls that wait for one of them.  gRPC itself refuses what is more, whoever calls: a crowd that
is nobody's would else keep a good client out."""
_TCP_OPTIONS: Final = (
    # A connection that does not finish its handshake, or says nothing, is not kept for long.
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.max_connection_idle_ms", 300_000),
    ("grpc.max_connection_age_ms", 3_600_000),
    ("grpc.max_connection_age_grace_ms", 3_600_000),
    # A peer that is gone is noticed; one that pings without need is cut off.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 30_000),
    ("grpc.http2.max_ping_strikes", 3),
    ("grpc.max_concurrent_streams", 64),
    ("grpc.max_metadata_size", 16 << 10),
    ("grpc.absolute_max_metadata_size", 32 << 10),
)
_SERVICE: Final = agent_pb2.DESCRIPTOR.services_by_name["Agent"].full_name


class AgentServer:
    """One running server.  `start`, then `stop`, once each."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._service = AgentService(config)
        self._health = health.HealthServicer()
        self._sockets: list[tuple[Path, int]] = []
        self._metrics: MetricsServer | None = None
        limits = config.limits
        authentication = config.authentication
        self._api: KubeApi | None = None
        self._certificate: Certificate | None = None
        if authentication is not None:
            from gketrace_agent.access.apiserver import KubeApi  # HTTP and TLS: only if asked for

            self._api = KubeApi(
                authentication.api_url, ca=authentication.ca, token=authentication.token
            )
        if config.tls is not None:
            from gketrace_agent.tls import Certificate

            self._certificate = Certificate(*config.tls)
        self._guard = Guard(
            self._api,
            config.node,
            Bounds(
                calls=limits.concurrent_calls,
                of_a_user=limits.user_calls,
                classes=limits.classes,
                memory_bytes=limits.memory_bytes,
                proc=config.paths.proc,
            ),
            node_addresses=self._service.node_addresses,
        )
        # Two servers, as gRPC does not tell an interceptor by which listener a call comes; and
        # what crowds the one leaves the other free.
        self._pools: list[ThreadPoolExecutor] = []
        self._local = self._make_server(local=True)
        self._remote = self._make_server(local=False)

    def _make_server(self, *, local: bool) -> grpc.Server | None:
        """For the unix sockets, or for TCP; None: nobody listens there."""
        if all((address.path is not None) is not local for address in self._config.listen):
            return None
        limits = self._config.limits
        pool = ThreadPoolExecutor(limits.concurrent_calls + _DOORMEN, thread_name_prefix="call")
        self._pools.append(pool)
        server = grpc.server(
            pool,
            interceptors=[
                CallInterceptor(self._guard, local=local, reply_bytes=limits.reply_bytes)
            ],
            maximum_concurrent_rpcs=limits.concurrent_calls + _DOORMEN + _QUEUE,
            options=(
                ("grpc.max_receive_message_length", limits.request_bytes),
                ("grpc.max_send_message_length", limits.reply_bytes + 1024),
                ("grpc.so_reuseport", 0),
                *(() if local else _TCP_OPTIONS),
                *(
                    ()
                    if local
                    else (("grpc.max_allowed_incoming_connections", limits.connections),)
                ),
            ),
        )
        agent_pb2_grpc.add_AgentServicer_to_server(self._service, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = (_SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
        return server

    def start(self) -> tuple[Listen, ...]:
        """Binds and serves.  Returns the addresses, ports filled in.

        Raises `UnavailableError` when an address is taken, `ForbiddenError` when it may not be
        bound.
        """
        self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        bound = tuple(self._bind(address) for address in self._config.listen)
        self._service.ports = tuple(address.port for address in bound if address.port)
        for server in self._servers:
            server.start()
        self._set_health(health_pb2.HealthCheckResponse.SERVING)
        return bound

    def stop(self, grace: float = _GRACE) -> bool:
        """Says NOT_SERVING, lets calls in progress end for `grace` seconds, removes the sockets.

        False: some call is still running in its thread, its client already told CANCELLED.
        """
        self._health.enter_graceful_shutdown()
        for ended in [server.stop(grace) for server in self._servers]:
            ended.wait()
        if self._metrics is not None:
            self._metrics.stop()
        for path, inode in self._sockets:
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_ino == inode:
                    path.unlink()
        endings = [threading.Thread(target=pool.shutdown, daemon=True) for pool in self._pools]
        for ending in endings:
            ending.start()
        last = time.monotonic() + _LAST
        for ending in endings:
            ending.join(max(0.0, last - time.monotonic()))
        self._service.close()
        if self._api is not None:
            self._api.close()
        return not any(ending.is_alive() for ending in endings)

    @property
    def _servers(self) -> tuple[grpc.Server, ...]:
        return tuple(server for server in (self._local, self._remote) if server is not None)

    def start_metrics(self, address: Listen) -> tuple[str, int]:
        """Serves metrics there, until `stop`; returns the host and the port."""
        from gketrace_agent.metrics import MetricsServer  # NumPy and the client: only if asked for

        self._metrics = MetricsServer(
            host=address.host,
            port=address.port,
            node=self._config.node,
            netns=self._service.host_netns(),
            paths=self._config.paths,
            names=self._service.service_names,
            pods=self._service.pod_tables,
            every=self._config.sample_seconds,
            certificate=self._certificate,
        )
        return address.host, self._metrics.start()

    def _set_health(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        for name in ("", _SERVICE):
            self._health.set(name, status)

    def _bind(self, address: Listen) -> Listen:
        if address.path is not None:
            self._bind_unix(address, address.path)
            return address
        return Listen(host=address.host, port=self._add_port(address))

    def _bind_unix(self, address: Listen, path: Path) -> None:
        try:
            path.parent.mkdir(mode=0o755, exist_ok=True)
            _remove_stale(path)
        except PermissionError as error:
            raise ForbiddenError(f"cannot make {path}: {error.strerror}") from None
        except OSError as error:
            raise UnavailableError(f"cannot make {path}: {error.strerror}") from None
        # The mode must be right from the first moment, so it is not set after the bind.
        before = os.umask(0o177)
        try:
            self._add_port(address)
        finally:
            os.umask(before)
        self._sockets.append((path, path.stat().st_ino))

    def _add_port(self, address: Listen) -> int:
        server = self._remote if address.path is None else self._local
        assert server is not None
        try:
            if address.path is None and self._certificate is not None:
                return server.add_secure_port(address.grpc, self._certificate.credentials())
            return server.add_insecure_port(address.grpc)
        except RuntimeError:
            raise UnavailableError(
                f"cannot listen on {address}", hint="is the address taken, or not this machine's?"
            ) from None


def _remove_stale(path: Path) -> None:
    """Removes a socket that nobody listens on any more.  Raises `UnavailableError` otherwise."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise UnavailableError(f"{path} is there and is no socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        try:
            probe.connect(str(path))
        except OSError as error:
            if error.errno not in (errno.ECONNREFUSED, errno.ENOENT):
                raise
        else:
            raise UnavailableError(f"another process serves on {path}")
    path.unlink(missing_ok=True)


def _raise_file_limit(connections: int) -> None:
    """Some runtimes start containers with a soft limit of 1,024 open files, which as many
    connections would use up."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + _FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def serve(config: Config) -> None:
    """Serves until SIGTERM or SIGINT."""
    started = time.monotonic()
    give_back_memory()
    try:
        start_logging(config.log_file, debug=config.log_debug)
    except OSError as error:
        raise UnavailableError(f"cannot log to {config.log_file}: {error.strerror}") from None
    _raise_file_limit(config.limits.connections)
    stop = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    # Before there are other threads, which would stay where they are.
    if why := see_all_cgroups(config.paths):
        logger.warning("the agent's own pod is not seen: cgroups are told from its own: %s", why)
    server = AgentServer(config)
    for address in server.start():
        if address.path is None and config.authentication is None:
            without = "access control" if config.tls else "TLS and without access control"
            warning = f"INSECURE: {address} is served without {without}"
            print(f"gketrace-agent: WARNING: {warning}", file=sys.stderr, flush=True)  # noqa: T201
            logger.warning(warning)
        logger.info("listening", extra={"fields": {"address": str(address)}})
    if config.metrics is not None:
        host, port = server.start_metrics(config.metrics)
        logger.info("metrics", extra={"fields": {"address": f"tcp://{host}:{port}"}})
    threading.Thread(target=AgentService.preload, name="preload", daemon=True).start()
    startup = round((time.monotonic() - started) * 1000, 1)
    logger.info(
        "serving",
        extra={"fields": {"node": config.node, "pid": os.getpid(), "startup_ms": startup}},
    )
    # Not for ever at once: a signal that comes between the interpreter's last look for signals and
    # its wait for the lock does not end that wait.
    while not stop.wait(_LOOK):
        pass
    logger.info("stopping")
    ended = server.stop()
    logger.info("stopped" if ended else "stopped; calls that did not end in time are abandoned")
    if not ended:
        logging.shutdown()
        # Python would wait for the pool's threads, however long their calls take.
        os._exit(ExitCode.OK)
