"""Access control in a whole cluster: a tenant's view, what roles allow, ways that break."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from e2e.answers import document, run_cli
from e2e.netlab import Lab
from gketrace.errors import ExitCode
from gketrace_cli.options import Options
from gketrace_cli.session import Session
from gketrace_proto.v1alpha1 import agent_pb2 as pb

SCHEMAS = Path(__file__).parents[1] / "docs/schema"
GROUP = "rbac.authorization.k8s.io"
TENANT = "shop/tenant"
AS_TENANT = ("--as-serviceaccount", TENANT, "-n", "shop")


def _bind(role: str, namespace: str = "") -> tuple[str, dict[str, Any]]:
    where = f"namespaces/{namespace}/rolebindings" if namespace else "clusterrolebindings"
    of, name = TENANT.split("/")
    body = {
        "apiVersion": f"{GROUP}/v1",
        "kind": "RoleBinding" if namespace else "ClusterRoleBinding",
        "metadata": {"name": f"tenant-{role}"},
        "roleRef": {"apiGroup": GROUP, "kind": "ClusterRole", "name": role},
        "subjects": [{"kind": "ServiceAccount", "namespace": of, "name": name}],
    }
    return f"/apis/{GROUP}/v1/{where}", body


@pytest.fixture(scope="module")
def tenant(lab: Lab) -> Iterator[Lab]:
    """Namespace shop with a ServiceAccount that has the viewer's role there and nowhere else.

    All of the lab's pods are in one namespace: shop/till is edge-0 by another name, which holds
    for the agent, as it knows a pod by what the API says.
    """
    lab.api("POST", "/api/v1/namespaces", {"kind": "Namespace", "metadata": {"name": "shop"}})
    made = ["/api/v1/namespaces/shop"]
    pod = lab.api("GET", "/api/v1/namespaces/default/pods/edge-0")
    pod["metadata"] = {"name": "till", "namespace": "shop"}
    lab.api("POST", "/api/v1/namespaces/shop/pods", pod)
    made.append("/api/v1/namespaces/shop/pods/till")
    accounts = "/api/v1/namespaces/shop/serviceaccounts"
    body = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "tenant"}}
    lab.api("POST", accounts, body)
    made.append(f"{accounts}/tenant")
    for path, binding in (_bind("gketrace-viewer", "shop"), _bind("gketrace-info")):
        lab.api("POST", path, binding)
        made.append(f"{path}/{binding['metadata']['name']}")
    yield lab
    for path in reversed(made):
        lab.api("DELETE", path)


def test_a_tenant_s_trace_is_masked_on_the_node(tenant: Lab) -> None:
    """From an own pod to another namespace's Service: what happens to it, and not to whom."""
    service = tenant.api("GET", "/api/v1/namespaces/default/services/hello-server")
    words = ("trace", "pod/till", f"{service['spec']['clusterIP']}:80", "-n", "shop")
    everybody = run_cli(tenant, *words, "-o", "json")
    masked = run_cli(tenant, *words, *AS_TENANT, "-o", "json")
    secret = tenant.pod("hello-server-579859fb5b-szrwh")["ip"]
    assert secret in json.dumps(document(everybody)["paths"])
    steps = json.dumps([path["hops"] for path in document(masked)["paths"]])
    assert secret not in steps
    assert "default/hello-server" not in steps
    assert tenant.pod("edge-0")["ip"] in steps
    assert "--to-destination 0." in steps
    said = "only namespace shop may be seen: addresses of others are masked"
    assert said in masked.err
    assert any(said in note for note in document(masked)["notes"])


def test_a_tenant_s_connections_are_the_own_ones(tenant: Lab) -> None:
    """On the nodes' own tables: what others hold open is not there, and what is own is."""
    other, own, peer = (tenant.pod(name)["ip"] for name in ("web-2", "edge-0", "web-0"))
    with tenant.hold("pod/web-0", other, 8080), tenant.hold("pod/edge-0", peer, 8080):
        everybody = run_cli(tenant, "conntrack", "-L", "-n", "shop")
        mine = run_cli(tenant, "conntrack", "-L", *AS_TENANT)
    assert f" -> {other}:8080" in everybody.out
    lines = [line for line in mine.out.splitlines() if " -> " in line and "ESTAB" in line]
    assert lines
    assert all(f"{own}:" in line for line in lines), mine.out
    assert other not in mine.out
    assert "their connections are left out" in mine.err


def test_a_tenant_may_not_look_at_another_s_pod(tenant: Lab) -> None:
    ran = run_cli(tenant, "rules", "pod/web-0", "--as-serviceaccount", TENANT)
    assert "may not get pods/iptables.gketrace.dev in namespace default" in ran.err + ran.out, ran
    assert ran.code == ExitCode.FORBIDDEN


def test_status(lab: Lab) -> None:
    ran = run_cli(lab, "status", "-o", "json")
    found = document(ran)
    jsonschema.validate(found, json.loads((SCHEMAS / "status.json").read_text()))
    assert [one["dataPlane"] for one in found["nodes"]] == ["iptables"] * 3
    assert [one["iptablesBackend"] for one in found["nodes"]] == ["iptables-nft"] * 3
    assert all(abs(one["clockOffsetSeconds"]) < 5 for one in found["nodes"])
    assert list(found["versions"].values()) == [3]
    # The lab's process pods have no container runtime.
    assert ran.code == (ExitCode.OK if lab.pods == "containerd" else ExitCode.PARTIAL)
    lab.stop_agent("33fg")
    try:
        text = run_cli(lab, "status").out
    finally:
        lab.start_agent("33fg")
    assert text.startswith("2 of 3 nodes have an agent that answers; ")


def test_can_i_prints_what_makes_it_work(lab: Lab) -> None:
    """Its YAML, applied, is enough; then it is taken away again."""
    account = "/api/v1/namespaces/default/serviceaccounts"
    body = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "fresh"}}
    lab.api("POST", account, body)
    made = [f"{account}/fresh"]
    words = ("--as-serviceaccount", "default/fresh")
    try:
        refused = run_cli(lab, "pod", "web-0", *words)
        assert refused.code == ExitCode.FORBIDDEN, refused
        assert "may not get nodes/info.gketrace.dev" in refused.err
        ran = run_cli(lab, "auth", "can-i", "--for", "capturer", *words)
        assert ran.code == ExitCode.FORBIDDEN
        assert ran.out.startswith("no - of what a capturer needs, this is missing: get ")
        text = ran.out.partition("would be granted by:\n")[2]
        for one in yaml.safe_load_all(text):
            plural = f"{one['kind'].lower()}s"
            path = f"/apis/{GROUP}/v1/{plural}"
            lab.api("POST", path, one)
            made.append(f"{path}/{one['metadata']['name']}")
        ran = run_cli(lab, "auth", "can-i", "--for", "capturer", *words)
        assert ran.code == ExitCode.OK
        assert ran.out.startswith("yes - what a capturer needs is allowed\n")
    finally:
        for path in made:
            lab.api("DELETE", path)


def test_ways_that_break_are_made_again(lab: Lab) -> None:
    """All at once, under agents that were already asked."""
    options = Options(kubeconfig=str(lab.kubeconfig))
    with Session(options) as session:
        names = [node.name for node in session.nodes]
        calls = {name: (name, "GetInfo", pb.GetInfoRequest()) for name in names}
        assert len(session.fleet.nodes) == 3
        for _ in range(3):
            lab.api("POST", "/lab/hangup", {})
            answers: dict[str, Any] = {}
            for _ in range(20):  # the first calls may meet the end of the old connections
                answers = session.fleet.ask(calls)
                if all(isinstance(answer, pb.GetInfoReply) for answer in answers.values()):
                    break
            assert {answer.node for answer in answers.values()} == set(names)


def test_nobody_is_let_in_while_the_api_server_is_away(lab: Lab) -> None:
    """A new token cannot be reviewed: refused, and said why."""
    reviews = "/apis/authentication.k8s.io/v1/tokenreviews"
    lab.api("POST", "/lab/fail", {"path": reviews, "status": 503, "message": "no etcd"})
    try:
        ran = run_cli(lab, "rules", "2jdh")
    finally:
        lab.api("DELETE", "/lab/fail")
    assert ran.code == ExitCode.UNAVAILABLE
    assert "lets nobody in: the caller's token could not be reviewed" in ran.err
