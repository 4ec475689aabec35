"""Labs for the e2e tests: built once a session for each (topology, era, backend), then shared."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest

from e2e.netlab import Lab

LabFactory = Callable[..., Lab]


@pytest.fixture(scope="session")
def labs() -> Iterator[LabFactory]:
    """`labs(topology="bridge", era="1.36", backend=None)` gives the session's lab of that kind.

    A test that changes it (stops an agent, moves a load balancer) puts it back.
    """
    built: dict[tuple[str, str, str], Lab] = {}

    def get(topology: str = "bridge", era: str = "1.36", backend: str | None = None) -> Lab:
        lab = Lab(topology=topology, era=era, backend=backend)
        key = (lab.topology, lab.era, lab.backend)
        if key not in built:
            lab.name = f"t{os.getpid()}-{'-'.join(key)}".replace(".", "")
            built[key] = lab.up()
        return built[key]

    yield get
    for lab in built.values():
        lab.down()


@pytest.fixture(scope="session")
def lab(labs: LabFactory) -> Lab:
    """The default lab: bridge, kube-proxy 1.36, iptables-nft."""
    return labs()
