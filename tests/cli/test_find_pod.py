"""Pods by the names of their workloads."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest

from gketrace.errors import GoneError
from gketrace.objects import Pod
from gketrace_cli.find_pod import pods_of_workload
from gketrace_cli.names import parse_named
from gketrace_cli.senders import sender_of
from gketrace_cli.session import Session


def pod(name: str, *, phase: str = "Running", deleted: str = "") -> Pod:
    return Pod(
        namespace="default",
        name=name,
        uid=name,
        node="a",
        phase=phase,
        ready=True,
        host_network=False,
        pod_ips=(),
        host_ip="",
        containers=(),
        labels={},
        deletion_timestamp=deleted,
        reason="",
    )


@pytest.mark.parametrize(
    ("name", "fits"),
    [
        ("hello-server-579859fb5b-szrwh", True),  # Deployment
        ("hello-server-szrwh", True),  # DaemonSet, ReplicaSet, Job
        ("hello-server-12", True),  # StatefulSet
        ("hello-server-29012345-x7gqp", True),  # CronJob
        ("hello-server-0-x7gqp", True),  # indexed Job
        ("hello-server", False),  # a pod's own name is another question
        ("hello-server-admin", False),  # vowels: nobody's random letters
        ("hello-server-admin-579859fb5b-szrwh", False),  # another Deployment
        ("hello-serverx-szrwh", False),
        ("my-hello-server-szrwh", False),
        ("hello-server-szrw", False),
    ],
)
def test_names_that_controllers_make(name: str, fits: bool) -> None:
    assert bool(pods_of_workload("hello-server", [pod(name)])) is fits


def test_pods_that_go_away_count_only_when_there_is_no_other() -> None:
    ended = pod("web-bbbbb", phase="Succeeded")
    leaving = pod("web-ccccc", deleted="2026-01-01T00:00:00Z")
    live = pod("web-ddddd")
    assert pods_of_workload("web", [ended, leaving, live]) == [live]
    assert pods_of_workload("web", [ended, leaving]) == [ended, leaving]


@pytest.mark.parametrize("phase", ["Succeeded", "Failed"])
def test_a_pod_that_is_over_sends_and_receives_nothing(phase: str) -> None:
    """Another one may have its address by now."""
    with pytest.raises(GoneError, match=f"has ended: {phase}; its network is gone"):
        sender_of(
            cast(Session, SimpleNamespace(namespace="shop")),
            parse_named("pod/job-abcde"),
            lambda *_: pod("job-abcde", phase=phase),
        )
