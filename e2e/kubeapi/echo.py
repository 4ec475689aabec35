"""Servers for the port-forward tests: ``python -m e2e.kubeapi.echo echo:8080 flood:8082 ...``.

``echo`` sends back what comes; ``greet`` speaks first, then waits for the end; ``flood`` sends for
as long as somebody reads; ``deaf`` accepts and never reads. An address may be put after the port
(``echo:8080:::1``), 127.0.0.1 is the default. It prints ``up`` once it serves; ``echo`` prints
``end`` when a client goes away.
"""

from __future__ import annotations

import socket
import sys
import threading

GREETING = b"hello from the pod\n"


def _echo(conn: socket.socket) -> None:
    while data := conn.recv(65536):
        conn.sendall(data)
    print("end", flush=True)


def _greet(conn: socket.socket) -> None:
    conn.sendall(GREETING)
    while conn.recv(65536):
        pass


def _flood(conn: socket.socket) -> None:
    chunk, total = bytes(range(256)) * 256, 0
    conn.settimeout(1.0)
    try:
        while True:
            total += conn.send(chunk)
    except TimeoutError:
        print(f"stalled {total}", flush=True)
    conn.settimeout(None)
    while conn.recv(65536):
        pass


def _deaf(conn: socket.socket) -> None:
    threading.Event().wait()


_SERVERS = {"echo": _echo, "greet": _greet, "flood": _flood, "deaf": _deaf}


def _serve(listener: socket.socket, kind: str) -> None:
    def one(conn: socket.socket) -> None:
        with conn:
            try:
                _SERVERS[kind](conn)
            except OSError:  # the client went away in the middle: its right
                print("end", flush=True)

    while True:
        conn, _ = listener.accept()
        threading.Thread(target=one, args=(conn,), daemon=True).start()


def main() -> None:
    threads = []
    for spec in sys.argv[1:]:
        kind, port, *address = spec.split(":", 2)
        host = address[0] if address else "127.0.0.1"
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, int(port)), family=family, backlog=512)
        thread = threading.Thread(target=_serve, args=(listener, kind))
        threads.append(thread)
        thread.start()
    print("up", flush=True)
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main()
