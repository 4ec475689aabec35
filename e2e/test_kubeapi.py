"""The lab's API server, by the stock client and by hand."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kubernetes import client, config, dynamic, watch

from .kubeapi.harness import KubeApi, running_server, until

WORLD = Path(__file__).parents[1] / "tests/data/worlds/kube-proxy-1.36-iptables-nft"
PODS = "/api/v1/namespaces/default/pods"
MAPS = "/api/v1/namespaces/default/configmaps"
REVIEW = "/apis/authentication.k8s.io/v1/tokenreviews"
ACCESS = "/apis/authorization.k8s.io/v1/subjectaccessreviews"


def fixture(stem: str) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = json.loads((WORLD / f"{stem}.json").read_text())["items"]
    return items


def configmap(name: str, **labels: str) -> dict[str, Any]:
    return {"metadata": {"name": name, "labels": labels}, "data": {"a": "1"}}


@pytest.fixture
def api(tmp_path: Path) -> Iterator[KubeApi]:
    with running_server(
        tmp_path / "api",
        name="world",
        objects_dir=str(WORLD),
        users={"alice": {"groups": ["dev"]}},
        min_token_seconds=1,
        extra_pods=[
            {
                "metadata": {"name": "agent-1", "namespace": "gketrace", "labels": {"app": "a"}},
                "spec": {"nodeName": "n1", "containers": []},
            }
        ],
        overrides={"pods/default/web-0": {"status": {"podIP": "10.40.0.99"}}},
    ) as running:
        yield running


@pytest.fixture
def core(api: KubeApi) -> Iterator[client.CoreV1Api]:
    configuration = client.Configuration()
    config.load_kube_config(str(api.kubeconfig), client_configuration=configuration)
    with client.ApiClient(configuration) as transport:
        yield client.CoreV1Api(transport)


def test_stock_client_reads_the_world(core: client.CoreV1Api) -> None:
    slices = client.DiscoveryV1Api(core.api_client)
    for stem, listed in (
        ("services", core.list_service_for_all_namespaces()),
        ("endpoints", core.list_endpoints_for_all_namespaces()),
        ("endpointslices", slices.list_endpoint_slice_for_all_namespaces()),
        ("nodes", core.list_node()),
    ):
        wanted = {(i["metadata"].get("namespace"), i["metadata"]["name"]) for i in fixture(stem)}
        assert {(i.metadata.namespace, i.metadata.name) for i in listed.items} == wanted
    pods = {p.metadata.name: p for p in core.list_pod_for_all_namespaces().items}
    assert pods["agent-1"].metadata.uid
    assert pods["agent-1"].metadata.namespace == "gketrace"
    assert pods["web-0"].status.pod_ip == "10.40.0.99"
    assert "gketrace" in {n.metadata.name for n in core.list_namespace().items}
    assert client.VersionApi(core.api_client).get_code().git_version == "v1.36.2"


def test_get_answers_the_fixtures_object(api: KubeApi) -> None:
    for obj in fixture("services"):
        metadata = obj["metadata"]
        path = f"/api/v1/namespaces/{metadata['namespace']}/services/{metadata['name']}"
        assert api.call("GET", path) == (200, obj)


def test_discovery_serves_the_dynamic_client(core: client.CoreV1Api) -> None:
    found = dynamic.DynamicClient(core.api_client)
    resource = found.resources.get(api_version="discovery.k8s.io/v1", kind="EndpointSlice")
    assert len(resource.get().items) == len(fixture("endpointslices"))
    assert found.resources.get(api_version="v1", kind="Pod").subresources["portforward"]


def test_selectors(core: client.CoreV1Api) -> None:
    def names(**query: str) -> set[str]:
        return {p.metadata.name for p in core.list_pod_for_all_namespaces(**query).items}

    node = fixture("nodes")[0]["metadata"]["name"]
    on_node = {p["metadata"]["name"] for p in fixture("pods") if p["spec"].get("nodeName") == node}
    assert names(field_selector=f"spec.nodeName={node}") == on_node
    assert names(field_selector="metadata.name=web-1,metadata.namespace=default") == {"web-1"}
    assert names(field_selector="status.podIP=10.40.0.99") == {"web-0"}
    web = names(label_selector="app=web")
    assert {"web-0", "web-1", "web-2"} <= web
    assert names(label_selector="app in (web, a)") == web | {"agent-1"}
    assert names(label_selector="app,app!=web,app notin (a)") == names() - web - {"agent-1"}
    assert names(label_selector="!app") == set()
    with pytest.raises(client.ApiException) as caught:
        names(field_selector="spec.color=red")
    assert caught.value.status == 400
    assert "field label not supported: spec.color" in json.loads(caught.value.body)["message"]


def test_pages_show_one_version(api: KubeApi) -> None:
    for number in range(7):
        api.call("POST", MAPS, configmap(f"m{number}"))
    _, first = api.call("GET", f"{MAPS}?limit=3")
    assert [i["metadata"]["name"] for i in first["items"]] == ["m0", "m1", "m2"]
    assert first["metadata"]["remainingItemCount"] == 4
    api.call("DELETE", f"{MAPS}/m4")
    api.call("POST", MAPS, configmap("m33"))
    token = first["metadata"]["continue"]
    _, second = api.call("GET", f"{MAPS}?limit=3&continue={token}")
    assert [i["metadata"]["name"] for i in second["items"]] == ["m3", "m4", "m5"]
    assert second["metadata"]["resourceVersion"] == first["metadata"]["resourceVersion"]
    token = second["metadata"]["continue"]
    api.call("POST", "/lab/compact")
    status, gone = api.call("GET", f"{MAPS}?limit=3&continue={token}")
    assert (status, gone["reason"]) == (410, "Expired")
    assert api.call("GET", f"{MAPS}?limit=3&continue=rubbish")[0] == 400


def test_watch_sees_every_change(api: KubeApi, core: client.CoreV1Api) -> None:
    version = core.list_namespaced_config_map("default").metadata.resource_version
    seen: list[tuple[str, str]] = []
    api.call("POST", MAPS, configmap("one", keep="yes"))
    patch = {"metadata": {"labels": {"keep": None}}}
    api.call("PATCH", f"{MAPS}/one", patch, content_type="application/merge-patch+json")
    api.call("DELETE", f"{MAPS}/one")
    for selector, wanted in (
        ("", ["ADDED", "MODIFIED", "DELETED"]),
        ("keep=yes", ["ADDED", "DELETED"]),
    ):
        seen = [
            (event["type"], event["object"].metadata.name)
            for event in watch.Watch().stream(
                core.list_namespaced_config_map,
                "default",
                resource_version=version,
                label_selector=selector,
                timeout_seconds=1,
            )
        ]
        assert seen == [(kind, "one") for kind in wanted]


def test_watch_is_live(api: KubeApi, core: client.CoreV1Api) -> None:
    watching = watch.Watch()
    events = watching.stream(core.list_namespaced_pod, "default", timeout_seconds=30)
    present = [next(events) for _ in fixture("pods")]
    assert {event["type"] for event in present} == {"ADDED"}
    started = time.monotonic()
    patch = {"status": {"phase": "Failed"}}
    kind = "application/merge-patch+json"
    assert api.call("PATCH", f"{PODS}/web-1/status", patch, content_type=kind)[0] == 200
    event = next(events)
    assert (event["type"], event["object"].status.phase) == ("MODIFIED", "Failed")
    assert time.monotonic() - started < 15  # not when the watch ends, after 30
    assert api.open_count("watches") == 1
    watching.stop()
    events.close()
    core.api_client.rest_client.pool_manager.clear()
    until(lambda: api.open_count("watches") == 0)


def raw_watch(core: client.CoreV1Api, **query: Any) -> list[dict[str, Any]]:
    response = core.list_namespaced_config_map(
        "default", watch=True, _preload_content=False, **query
    )
    return [json.loads(line) for line in response.data.splitlines()]


def test_watch_too_old_bookmark_and_initial_events(api: KubeApi, core: client.CoreV1Api) -> None:
    api.call("POST", MAPS, configmap("one"))
    api.call("POST", "/lab/compact")
    (gone,) = raw_watch(core, resource_version="5", timeout_seconds=5)
    assert (gone["type"], gone["object"]["code"]) == ("ERROR", 410)
    added, end, last = raw_watch(
        core,
        allow_watch_bookmarks=True,
        send_initial_events=True,
        resource_version_match="NotOlderThan",
        timeout_seconds=1,
    )
    assert (added["type"], added["object"]["metadata"]["name"]) == ("ADDED", "one")
    assert end["object"]["metadata"]["annotations"] == {"k8s.io/initial-events-end": "true"}
    assert last["type"] == "BOOKMARK"


def test_errors_are_worded_as_the_real_ones(api: KubeApi) -> None:
    status, body = api.call("GET", f"{PODS}/nope")
    assert (status, body["message"], body["reason"], body["details"]) == (
        404,
        'pods "nope" not found',
        "NotFound",
        {"name": "nope", "kind": "pods"},
    )
    slices = "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices"
    assert api.call("GET", f"{slices}/x")[1]["message"] == (
        'endpointslices.discovery.k8s.io "x" not found'
    )
    assert api.call("GET", PODS, token="wrong")[0] == 401
    status, body = api.call("GET", PODS, token=None)
    assert (status, body["message"]) == (
        403,
        'pods is forbidden: User "system:anonymous" cannot list resource "pods" in API group "" '
        'in the namespace "default"',
    )
    assert api.call("GET", "/api/v1/nodes", token=api.tokens["alice"])[1]["message"].endswith(
        'User "alice" cannot list resource "nodes" in API group "" at the cluster scope'
    )
    assert api.call("POST", f"{PODS}/web-0", {})[0] == 405
    assert api.call("GET", "/apis/x/v1/y")[0] == 404
    assert api.call("GET", f"{PODS}/web-0/portforward?ports=80")[1]["message"] == (
        "Upgrade request required"
    )
    assert api.call("GET", "/version", token=None)[0] == 200


def test_writes(api: KubeApi) -> None:
    status, made = api.call("POST", MAPS, configmap("one"))
    assert (status, made["data"]) == (201, {"a": "1"})
    status, body = api.call("POST", MAPS, configmap("one"))
    assert (status, body["message"]) == (409, 'configmaps "one" already exists')
    status, second = api.call("PUT", f"{MAPS}/one", {**made, "data": {"a": "2"}})
    assert status == 200
    assert int(second["metadata"]["resourceVersion"]) > int(made["metadata"]["resourceVersion"])
    status, body = api.call("PUT", f"{MAPS}/one", {**made, "data": {"a": "3"}})
    assert (status, body["reason"]) == (409, "Conflict")
    operations = [
        {"op": "test", "path": "/data/a", "value": "2"},
        {"op": "add", "path": "/data/b", "value": "x"},
        {"op": "remove", "path": "/data/a"},
    ]
    kind = "application/json-patch+json"
    status, body = api.call("PATCH", f"{MAPS}/one", operations, content_type=kind)
    assert (status, body["data"]) == (200, {"b": "x"})
    assert api.call("PATCH", f"{MAPS}/one", operations, content_type=kind)[0] == 422
    kind = "application/strategic-merge-patch+json"
    assert api.call("PATCH", f"{MAPS}/one", {}, content_type=kind)[0] == 415
    assert api.call("POST", "/api/v1/namespaces/none/configmaps", configmap("x"))[0] == 404
    assert api.call("DELETE", f"{MAPS}/one")[1]["status"] == "Success"
    assert api.call("GET", f"{MAPS}/one")[0] == 404


def token_for(api: KubeApi, **spec: Any) -> str:
    path = "/api/v1/namespaces/default/serviceaccounts/default/token"
    status, body = api.call("POST", path, {"spec": spec})
    assert status == 201, body
    token: str = body["status"]["token"]
    return token


def review(api: KubeApi, token: str, *audiences: str) -> dict[str, Any]:
    spec: dict[str, Any] = {"token": token, "audiences": list(audiences)}
    status: dict[str, Any] = api.call("POST", REVIEW, {"spec": spec})[1]["status"]
    return status


def test_service_account_tokens(api: KubeApi) -> None:
    mine = "gketrace.dev/node/n1"
    bound = {"kind": "Pod", "apiVersion": "v1", "name": "web-1"}
    token = token_for(api, audiences=[mine], expirationSeconds=3600, boundObjectRef=bound)
    good = review(api, token, mine, "other")
    assert good["authenticated"] is True
    assert good["audiences"] == [mine]
    assert good["user"]["username"] == "system:serviceaccount:default:default"
    assert "system:serviceaccounts:default" in good["user"]["groups"]
    extra = good["user"]["extra"]
    assert extra["authentication.kubernetes.io/pod-name"] == ["web-1"]
    assert extra["authentication.kubernetes.io/credential-id"][0].startswith("JTI=")
    wrong = review(api, token, "gketrace.dev/node/n2")
    assert not wrong.get("authenticated")
    assert "invalid for the target audiences" in wrong["error"]
    assert not review(api, token).get("authenticated")
    assert api.call("GET", PODS, token=token)[0] == 401
    head, body, signature = token.split(".")
    assert not review(api, f"{head}.{body}.{signature[::-1]}", mine).get("authenticated")
    assert not review(api, "garbage", mine).get("authenticated")
    api.call("DELETE", f"{PODS}/web-1")
    assert "was deleted" in review(api, token, mine)["error"]
    short = token_for(api, expirationSeconds=1)
    assert review(api, short)["authenticated"]
    until(lambda: "expired" in review(api, short).get("error", ""))
    path = "/api/v1/namespaces/default/serviceaccounts/nobody/token"
    assert api.call("POST", path, {"spec": {}})[0] == 404


def test_rbac_by_objects_posted_later(api: KubeApi) -> None:
    rbac = "/apis/rbac.authorization.k8s.io/v1"
    rules = [{"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list"]}]
    api.call("POST", f"{rbac}/namespaces/default/roles", _named("reader", rules=rules))
    subjects = [
        {"kind": "ServiceAccount", "name": "default", "namespace": "default"},
        {"kind": "Group", "name": "dev"},
    ]
    reference = {"kind": "Role", "name": "reader", "apiGroup": "rbac.authorization.k8s.io"}
    binding = _named("reader", roleRef=reference, subjects=subjects)
    path = f"{rbac}/namespaces/default/rolebindings"
    alice, account = api.tokens["alice"], token_for(api)
    assert api.call("GET", PODS, token=alice)[0] == 403
    assert api.call("POST", path, binding)[0] == 201
    for token in (alice, account):
        assert api.call("GET", PODS, token=token)[0] == 200
        assert api.call("GET", "/api/v1/pods", token=token)[0] == 403
        assert api.call("DELETE", f"{PODS}/web-0", token=token)[0] == 403

    def allowed(**attributes: str) -> Any:
        spec = {"user": "bob", "groups": ["dev"], "resourceAttributes": attributes}
        return api.call("POST", ACCESS, {"spec": spec})[1]["status"]

    granted = allowed(verb="get", resource="pods", namespace="default", name="web-0")
    assert granted["allowed"] is True
    assert "RBAC: allowed by RoleBinding" in granted["reason"]
    assert allowed(verb="get", resource="pods", namespace="kube-system") == {"allowed": False}
    assert allowed(verb="get", resource="pods", subresource="log", namespace="default") == {
        "allowed": False
    }
    assert api.call("POST", ACCESS, {"spec": {}}, token=alice)[0] == 403


def _named(name: str, **body: Any) -> dict[str, Any]:
    return {"metadata": {"name": name}, **body}


def test_told_to_fail(api: KubeApi) -> None:
    api.call("POST", "/lab/fail", {"path": "/api/v1/nodes*", "status": 503, "times": 2})
    assert api.call("GET", "/api/v1/nodes")[1]["reason"] == "ServiceUnavailable"
    assert api.call("GET", "/api/v1/pods")[0] == 200
    assert api.call("GET", "/api/v1/nodes")[0] == 503
    assert api.call("GET", "/api/v1/nodes")[0] == 200
    api.call("POST", "/lab/fail", {"path": "*", "drop": True})
    with pytest.raises(OSError):
        api.call("GET", "/api/v1/nodes")
    api.call("DELETE", "/lab/fail")
    assert api.call("GET", "/api/v1/nodes")[0] == 200
    assert api.call("GET", "/lab/state", token=api.tokens["alice"])[0] == 403


def test_lists_come_in_milliseconds(core: client.CoreV1Api) -> None:
    took: list[float] = []
    # The best: whoever else is at work on the machine only adds to it.
    while len(took) < 30 or (min(took) >= 0.02 and len(took) < 300):
        started = time.perf_counter()
        assert core.list_service_for_all_namespaces(_preload_content=False).data
        took.append(time.perf_counter() - started)
    assert min(took) < 0.02, took


def test_stops_at_once_and_leaves_nothing(api: KubeApi, core: client.CoreV1Api) -> None:
    assert api.kubeconfig.stat().st_mode & 0o777 == 0o600
    events = watch.Watch().stream(core.list_node, timeout_seconds=60)
    next(events)
    started = time.monotonic()
    api.process.send_signal(signal.SIGTERM)
    assert api.process.wait(30) == 0
    assert time.monotonic() - started < 20  # not when the watch ends, after 60
    assert not api.kubeconfig.exists()
    events.close()


def test_wrong_configuration_is_named(tmp_path: Path) -> None:
    import subprocess
    import sys

    path = tmp_path / "c.json"
    for text, complaint in (
        ("{}", "state_dir is missing"),
        ('{"state_dir": "x", "colour": 1}', "unknown member colour"),
        ('{"state_dir": "x", "listen": "here"}', "not ADDRESS:PORT"),
        ('{"state_dir": "x", "objects_dir": "/nowhere"}', "does not exist"),
        ('{"state_dir": "x", "overrides": {"pods/a/b": {}}}', "there is no pods/a/b"),
        ("no", "Expecting value"),
    ):
        path.write_text(text)
        done = subprocess.run(
            [sys.executable, "-m", "e2e.kubeapi", "--config", str(path)],
            capture_output=True,
            text=True,
            cwd=WORLD.parents[3],
            check=False,
        )
        assert done.returncode == 2
        assert complaint in done.stderr
        assert "Traceback" not in done.stderr
