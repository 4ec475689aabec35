"""A caller who may see one namespace sees that one: what is left out, what is masked, what is
refused, and what no request can talk the agent into."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import ip_address

import grpc
import pytest

from gketrace_agent.access.guard import _leave_out
from gketrace_agent.access.masking import Masker, is_masked
from gketrace_proto.v1alpha1 import agent_pb2 as pb
from gketrace_proto.v1alpha1 import packet_pb2, target_pb2, trace_pb2
from gketrace_proto.v1alpha1.agent_pb2_grpc import AgentStub
from tests.security.bed import Bed, agent_bed, binding, metadata

HOST = target_pb2.Target(host=True)
OWN = frozenset({ip_address("10.40.0.20"), ip_address("fd00::20")})


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bed]:
    with agent_bed(tmp_path_factory.mktemp("bed")) as made:
        group = "rbac.authorization.k8s.io"
        path = f"/apis/{group}/v1/clusterrolebindings"
        made.api.call("POST", path, binding("gketrace-info", "shop/tenant"))
        path = f"/apis/{group}/v1/namespaces/shop/rolebindings"
        made.api.call("POST", path, binding("gketrace-capturer", "shop/tenant", "shop"))
        yield made


@pytest.fixture
def stub(bed: Bed) -> Iterator[AgentStub]:
    with bed.channel() as channel:
        yield AgentStub(channel)


@pytest.fixture
def tenant(bed: Bed) -> tuple[tuple[str, str], ...]:
    return metadata(bed.token("shop/tenant"), "shop,default")


def _target(namespace: str, name: str, **fields: str) -> target_pb2.Target:
    return target_pb2.Target(pod=target_pb2.PodRef(namespace=namespace, name=name, **fields))


def _walk(target: target_pb2.Target, src: str, dst: str, dport: int = 80) -> pb.WalkRequest:
    request = pb.WalkRequest(target=target)
    request.packet.src, request.packet.dst = src, dst
    request.packet.protocol, request.packet.dport = 6, dport
    return request


class TestWhoIsRefused:
    def test_another_namespace_s_pod(self, stub: AgentStub, tenant) -> None:
        request = pb.GetNetnsRequest(target=_target("default", "web"))
        with pytest.raises(grpc.RpcError) as caught:
            stub.GetNetns(request, metadata=tenant, timeout=20)
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
        assert "may not get pods/routes.gketrace.dev in namespace default" in caught.value.details()

    def test_the_node(self, stub: AgentStub, tenant) -> None:
        with pytest.raises(grpc.RpcError) as caught:
            stub.GetNetns(pb.GetNetnsRequest(target=HOST), metadata=tenant, timeout=20)
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
        assert "may not get nodes/routes.gketrace.dev of node node-a" in caught.value.details()

    def test_an_own_pod_that_is_in_the_node_s_network(self, stub: AgentStub, tenant) -> None:
        request = pb.GetNetnsRequest(target=_target("shop", "on-node"))
        with pytest.raises(grpc.RpcError) as caught:
            stub.GetNetns(request, metadata=tenant, timeout=20)
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
        assert "nodes/routes" in caught.value.details()

    def test_a_pod_of_another_name_under_an_own_one(self, stub: AgentStub, tenant) -> None:
        """The UID is the API's, not the request's."""
        request = pb.GetNetnsRequest(target=_target("shop", "till", uid="11111111-of-another"))
        with pytest.raises(grpc.RpcError) as caught:
            stub.GetNetns(request, metadata=tenant, timeout=20)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        assert caught.value.details() == "the API server has no pod shop/till on node node-a"

    def test_a_pod_without_a_namespace(self, stub: AgentStub, tenant) -> None:
        request = pb.GetNetnsRequest(target=_target("", "", uid="22222222-somebody"))
        with pytest.raises(grpc.RpcError) as caught:
            stub.GetNetns(request, metadata=tenant, timeout=20)
        assert caught.value.code() in (
            grpc.StatusCode.PERMISSION_DENIED,
            grpc.StatusCode.NOT_FOUND,
        )

    def test_a_packet_of_others(self, stub: AgentStub, tenant) -> None:
        with pytest.raises(grpc.RpcError) as caught:
            stub.Walk(_walk(HOST, "10.40.0.10", "10.40.0.99"), metadata=tenant, timeout=20)
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
        assert (
            "may trace on the node only packets of a pod or Service in namespace shop"
            in caught.value.details()
        )

    def test_a_packet_of_others_that_an_own_pod_would_send(self, stub: AgentStub, tenant) -> None:
        """It would meet the node's connections, and tell of those with its ports."""
        request = _walk(_target("shop", "till"), "10.40.0.10", "10.40.0.99")
        with pytest.raises(grpc.RpcError) as caught:
            stub.Walk(request, metadata=tenant, timeout=20)
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
        assert "packets of a pod or Service in namespace shop" in caught.value.details()

    def test_a_capture_of_an_own_pod_beside_the_node(self, stub: AgentStub, tenant) -> None:
        from gketrace_proto.v1alpha1 import capture_pb2

        taps = [
            capture_pb2.CaptureTap(target=target, interface="any")
            for target in (_target("shop", "till"), HOST)
        ]
        with pytest.raises(grpc.RpcError) as caught:
            next(stub.Capture(capture_pb2.CaptureRequest(taps=taps), metadata=tenant, timeout=20))
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED


class TestWhatIsShown:
    def test_a_walk_of_an_own_packet_is_masked_and_says_so(self, stub: AgentStub, tenant) -> None:
        call = stub.Walk.future(
            _walk(HOST, "10.40.0.20", "203.0.113.9"), metadata=tenant, timeout=20
        )
        reply = call.result()
        assert reply.walk.branches
        (hidden,) = [v for k, v in call.initial_metadata() if k == "gketrace-hidden-bin"]
        assert hidden.decode() == (
            "only namespace shop may be seen: addresses of others are masked (0.0.0.0/8 and "
            "100::/64 stand for them), and their connections are left out"
        )

    def test_the_node_s_connections_of_others_are_left_out(self, stub: AgentStub, tenant) -> None:
        request = pb.ListConntrackRequest(target=HOST)
        replies = list(stub.ListConntrack(request, metadata=tenant, timeout=20))
        assert not any(reply.entries or reply.text or reply.records for reply in replies)
        assert replies[-1].HasField("summary")

    def test_records_are_never_sent(self, stub: AgentStub, tenant) -> None:
        request = pb.ListConntrackRequest(target=HOST, format=pb.CONNTRACK_FORMAT_RECORDS)
        replies = list(stub.ListConntrack(request, metadata=tenant, timeout=20))
        assert not any(reply.records for reply in replies)


def test_a_stream_ends_when_its_permission_does(
    bed: Bed, stub: AgentStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looked at again while it goes on, not only when it begins."""
    monkeypatch.setattr("gketrace_agent.interceptor._RENEW_SECONDS", 0.2)
    path = "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings"
    bed.api.call("POST", path, binding("gketrace-viewer", "default/nobody"))
    extra = metadata(bed.token("default/nobody"))
    call = stub.FollowConntrack(pb.FollowConntrackRequest(target=HOST), metadata=extra, timeout=60)
    try:
        assert next(call).HasField("status")
        bed.api.call("DELETE", f"{path}/nobody-gketrace-viewer")
        bed.server._guard._permissions._cache._kept.clear()  # as after five minutes
        with pytest.raises(grpc.RpcError) as caught:
            list(call)
    finally:
        call.cancel()
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert "may not get nodes/conntrack.gketrace.dev of node node-a" in caught.value.details()


def _masker() -> Masker:
    visible = OWN | {ip_address("10.142.0.6"), ip_address("8.8.8.8")}
    return Masker(visible.__contains__, ("shop",))


class TestMasking:
    @pytest.mark.parametrize(
        "text",
        [
            "10.40.0.20",
            "10.142.0.6:30080",
            "src=10.40.0.20 dst=8.8.8.8",
            "127.0.0.1",
            "-s 10.40.0.0/14 -j MASQUERADE",
            "0.0.0.0/0",
            "169.254.169.254",
            "fd00::20",
            "fd00::/48",
            "224.0.0.1",
            "42:01:0a:8e:00:06",
            "0a:58:0a:28:00:14",
            "version 1.2.3",
            '--comment "shop/till:http"',
            "service-ULMVA6XW-shop/till/tcp/http",
            "12:30:59",
            "/proc/sys/net/ipv4/conf",
        ],
    )
    def test_what_stays(self, text: str) -> None:
        assert _masker().text(text) == text

    @pytest.mark.parametrize(
        ("text", "secret"),
        [
            ("10.40.0.10", "10.40.0.10"),
            ("10.40.0.10:8080", "10.40.0.10"),
            ("10.40.0.10/32", "10.40.0.10"),
            ("10.40.0.8/29", "10.40.0.8"),
            ("--to-destination 10.40.1.10:8080", "10.40.1.10"),
            ("fd00::10", "fd00::10"),
            ("[fd00::10]:8080", "fd00::10"),
            ("::ffff:10.40.0.10", "10.40.0.10"),
            ("0a:58:0a:28:00:0a", "0a:58:0a:28:00:0a"),
            ('--comment "bank/vault:https cluster IP"', "bank"),
            ("comment bank/vault", "vault"),
            ("endpoint-5OJB2KTY-bank/vault/tcp/https__10.40.0.10/8443", "10.40.0.10"),
            ("service-ULMVA6XW-bank/vault/tcp/https", "vault"),
        ],
    )
    def test_what_goes(self, text: str, secret: str) -> None:
        assert secret not in _masker().text(text)

    def test_the_same_address_becomes_the_same_one(self) -> None:
        masker = _masker()
        one = masker.text("10.40.0.10")
        assert masker.text("x 10.40.0.10:80 y") == f"x {one}:80 y"
        assert is_masked(ip_address(one))
        assert masker.masked == 1
        assert _masker().text("10.40.0.10") != one

    def test_a_message_all_the_way_down(self) -> None:
        step = trace_pb2.Step(
            note="becomes 10.40.1.10:8080",
            citation=trace_pb2.Citation(text='-A KUBE-SEP -m comment --comment "bank/v:x"'),
        )
        step.after.dst = "10.40.1.10"
        reply = pb.WalkReply(arrival="by 10.40.1.1")
        reply.walk.branches.add(steps=[step], because="bank's 10.40.1.10")
        _masker().message(reply)
        assert "10.40.1." not in str(reply)
        assert "bank/v" not in str(reply)

    def test_bytes_that_are_no_text_are_left_out(self) -> None:
        reply = pb.ListConntrackReply(text=b"src=10.40.0.10 dst=8.8.8.8\n", records=b"\x0a\x28")
        _masker().message(reply)
        assert reply.records == b""
        assert b"10.40.0.10" not in reply.text
        assert reply.text.endswith(b" dst=8.8.8.8\n")


def test_connections_of_others_are_left_out() -> None:
    def entry(src: str, dst: str) -> packet_pb2.ConntrackEntry:
        tuples = packet_pb2.Tuple5(src=src, dst=dst), packet_pb2.Tuple5(src=dst, dst=src)
        return packet_pb2.ConntrackEntry(orig=tuples[0], reply=tuples[1])

    masker = _masker()
    entries = [entry("10.40.0.20", "10.40.9.9"), entry("10.40.0.10", "10.40.9.9")]
    text = b"tcp src=10.40.0.20 dst=1.1.1.1\ntcp src=10.40.0.10 dst=1.1.1.1\n"
    reply = pb.ListConntrackReply(entries=entries, text=text)
    _leave_out(reply, OWN, masker)
    assert [one.orig.src for one in reply.entries] == ["10.40.0.20"]
    assert reply.text == b"tcp src=10.40.0.20 dst=1.1.1.1\n"
    assert masker.withheld == 2
