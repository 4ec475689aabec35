"""Files of /proc, kubeconfigs, API objects and capture files."""

from __future__ import annotations

import atexit
import functools
import json
import random
import struct
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from gketrace.capture.dissect import dissect, dissect_ip
from gketrace.capture.layers import tuple_of
from gketrace.errors import ParseError
from gketrace_agent.kernel.hostpaths import HostPaths
from gketrace_agent.kernel.memory import used_memory
from gketrace_agent.kernel.netns import process_starttime
from gketrace_agent.observe.ipsets import parse_ipset_save
from gketrace_agent.observe.recent import parse_recent
from gketrace_agent.observe.sockets import _raw_sockets
from gketrace_agent.resolve.cgroup import parse_cgroup_file
from gketrace_agent.resolve.scan import scan_cgroups
from gketrace_cli.capture.reader import CaptureReader
from gketrace_cli.kubeconfig import load_settings
from gketrace_cli.object_json import (
    parse_endpoints,
    parse_endpointslice,
    parse_node,
    parse_pod,
    parse_service,
)
from tests.fuzz.mutate import change_node, mutate_lines

__all__ = [
    "config_seeds",
    "mutate_config",
    "mutate_object",
    "object_seeds",
    "packet_seeds",
    "proc_seeds",
    "read_config",
    "read_object",
    "read_packets",
    "read_proc",
]

_WORLD: Final = Path(__file__).parents[1] / "data/worlds/kube-proxy-1.36-iptables-legacy"
_UID: Final = "11fe6a9c-6bfb-4f1c-9c2b-2f1c1d4b5a66"


@functools.cache
def _folder() -> str:
    made = tempfile.TemporaryDirectory(prefix="gkfuzz")
    atexit.register(made.cleanup)
    return made.name


def _scratch(name: str, data: bytes) -> Path:
    path = Path(_folder(), name)
    path.write_bytes(data)
    return path


# /proc

_RAW: Final = (
    b"  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout"
    b" inode ref pointer drops\n"
    b"    1: 00000000:0001 00000000:0000 07 00000000:00000000 00:00000000 00000000     0        0"
    b" 21345 2 0000000000000000 0\n"
)
_STAT: Final = b"77 (a (b) c) S 1 77 77 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 4711 0 0 1\n"


def proc_seeds() -> list[bytes]:
    pod = f"0::/kubepods/burstable/pod{_UID}/{'ab' * 32}\n".encode()
    scope = f"pod{_UID.replace('-', '_')}.slice/cri-containerd-{'cd' * 32}.scope"
    return [
        pod,
        b"12:devices:/\n11:memory:/x\n" + pod,
        f"0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-{scope}\n".encode(),
        _STAT,
        Path("/proc/self/stat").read_bytes(),
        Path("/proc/self/status").read_bytes(),
        _RAW,
        b"src=10.0.0.1 ttl: 64 last_seen: 4295 oldest_pkt: 2 4290, 4295\n",
        b"create a hash:ip,port family inet hashsize 1024 maxelem 65536\nadd a 10.0.0.1,tcp:80\n",
    ]


def read_proc(data: bytes) -> None:
    """All of the readers read it: as the files of process 1 of a /proc of its own."""
    with tempfile.TemporaryDirectory(prefix="gkfuzz", dir="/dev/shm") as folder:
        proc = Path(folder)
        for place in ("1", "self", "thread-self/net"):
            (proc / place).mkdir(parents=True)
        for name in ("1/cgroup", "1/stat", "1/cmdline", "self/status", "thread-self/net/raw"):
            (proc / name).write_bytes(data)
        paths = HostPaths(proc=proc)
        text = data.decode("utf-8", "backslashreplace")
        readers = (
            lambda: scan_cgroups(paths),
            lambda: parse_cgroup_file(text),
            lambda: process_starttime(paths, 1),
            lambda: used_memory(proc),
            lambda: _raw_sockets(paths),
            lambda: parse_recent(text, 5000.0, 250),
            lambda: parse_ipset_save(text),
        )
        refused: Exception | None = None
        for read in readers:
            try:
                read()
            # What an observer takes for an answer that is not understood.
            except (ParseError, ValueError, IndexError, KeyError) as error:
                refused = error
        if refused is not None:
            raise ValueError(str(refused))


# kubeconfig


def config_seeds() -> list[bytes]:
    cluster = {"server": "https://10.0.0.1:6443", "certificate-authority-data": "eA=="}
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "a",
        "contexts": [{"name": "a", "context": {"cluster": "c", "user": "u", "namespace": "n"}}],
        "clusters": [{"name": "c", "cluster": cluster}],
        "users": [{"name": "u", "user": {"token": "x", "tokenFile": "/nonexistent"}}],
    }
    other = json.loads(json.dumps(config))
    other["users"][0]["user"] = {"client-certificate-data": "eA==", "client-key-data": "eA=="}
    other["clusters"][0]["cluster"] |= {"proxy-url": "http://p:1", "tls-server-name": "s"}
    return [json.dumps(one, indent=1).encode() for one in (config, other)]


def mutate_config(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    """The tree, or the text."""
    if rng.random() < 0.4:
        return mutate_lines(rng, seeds)
    tree = json.loads(rng.choice(seeds))
    for _ in range(rng.randint(1, 5)):
        change_node(rng, tree)
    return json.dumps(tree).encode()


def read_config(data: bytes) -> None:
    """Up to the credentials, but for a plugin's: that is a program that the user named."""
    settings = load_settings(kubeconfig=str(_scratch("kubeconfig", data)))
    if b"exec" not in data and b"auth-provider" not in data:
        settings.credentials()


# objects of the Kubernetes API

_PARSERS: Final = {
    "pods": parse_pod,
    "services": parse_service,
    "endpointslices": parse_endpointslice,
    "endpoints": parse_endpoints,
    "nodes": parse_node,
}


def object_seeds() -> list[bytes]:
    found = []
    for kind in _PARSERS:
        for item in json.loads((_WORLD / f"{kind}.json").read_bytes())["items"]:
            found.append(json.dumps({kind: item}).encode())
    return found


def mutate_object(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    """One to five nodes of the tree are changed."""
    tree = json.loads(rng.choice(seeds))
    for _ in range(rng.randint(1, 5)):
        for item in tree.values():
            if isinstance(item, dict | list) and item:
                change_node(rng, item)
    return json.dumps(tree).encode()


def read_object(data: bytes) -> None:
    for kind, item in json.loads(data).items():
        _PARSERS[kind](item)


# packets

_ETHERNET: Final = bytes.fromhex("020000000001020000000002")


def _ip4(protocol: int, rest: bytes) -> bytes:
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(rest), 1, 0, 64, protocol, 0)
    return head + bytes((10, 0, 0, 1, 10, 0, 0, 2)) + rest


def _packets() -> list[bytes]:
    tcp = struct.pack("!HHIIBBHHH", 40000, 80, 1, 2, 0xA0, 2, 65535, 0, 0)
    tcp += bytes.fromhex("020405b40402080a000000010000000001030307") + b"GET /"
    udp = struct.pack("!HHHH", 5, 53, 12, 0) + b"abcd"
    inner = _ip4(6, tcp)
    icmp = struct.pack("!BBHI", 3, 4, 0, 1400) + inner
    sctp = struct.pack("!HHII", 1, 2, 3, 4) + bytes.fromhex("0100001000000001000000010000000a")
    v6 = struct.pack("!IHBB", 6 << 28, len(tcp) + 8, 0, 64) + bytes(31) + b"\1" + bytes(8)
    arp = bytes.fromhex("0001080006040001020000000001 0a000001 000000000000 0a000002")
    found = [_ip4(17, udp), inner, _ip4(1, icmp), _ip4(132, sctp), _ip4(4, inner)]
    frames = [_ETHERNET + b"\x08\x00" + one for one in found]
    frames.append(_ETHERNET + bytes.fromhex("81000007") + b"\x08\x00" + inner)
    frames.append(_ETHERNET + b"\x86\xdd" + v6[:40] + b"\x06\x00" + bytes(6) + tcp)
    frames.append(_ETHERNET + b"\x08\x06" + arp)
    return frames


def packet_seeds() -> list[bytes]:
    """Frames, a classic capture file, and one of the new kind with all of its blocks."""
    frames = _packets()
    classic = struct.pack("<IHHiIII", 0xA1B23C4D, 2, 4, 0, 0, 65535, 1)
    for frame in frames:
        classic += struct.pack("<IIII", 1, 2, len(frame), len(frame)) + frame
    ng = _block(0x0A0D0D0A, struct.pack("<IHHq", 0x1A2B3C4D, 1, 0, -1))
    ng += _block(1, struct.pack("<HHI", 1, 0, 0) + b"\2\0\4\0eth0\x09\0\1\0\x09\0\0\0" + bytes(4))
    for frame in frames:
        padded = frame + bytes(-len(frame) % 4)
        ng += _block(6, struct.pack("<IIIII", 0, 1, 2, len(frame), len(frame)) + padded)
    ng += _block(4, struct.pack("<HH", 1, 8) + bytes((10, 0, 0, 1)) + b"pod\0" + bytes(4))
    ng += _block(5, struct.pack("<III", 0, 1, 2) + struct.pack("<HHQ", 4, 8, 7) + bytes(4))
    ng += _block(3, struct.pack("<I", len(frames[0])) + frames[0] + bytes(-len(frames[0]) % 4))
    return [*frames, classic, ng]


def _block(kind: int, body: bytes) -> bytes:
    length = struct.pack("<I", len(body) + 12)
    return struct.pack("<I", kind) + length + body + length


def read_packets(data: bytes) -> None:
    """As a packet of every link type, and as a file."""
    for link_type in (0, 1, 12, 101, 108, 113, 228, 276, 147):
        _tuple(dissect(link_type, data))
        _tuple(dissect(link_type, data, 1 << 16))
    dissect_ip(data)
    reader = CaptureReader(str(_scratch("packets", data)))
    try:
        for packet in reader:
            _tuple(dissect(packet.tap.link_type, packet.data, packet.original_length))
    finally:
        reader.close()


def _tuple(packet: Any) -> None:
    tuple_of(packet)
