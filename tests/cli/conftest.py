"""The stage is built once for all tests that only ask it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cli.stage import Stage, stage


@pytest.fixture(scope="session")
def shared_stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with stage(tmp_path_factory.mktemp("stage")) as built:
        yield built


@pytest.fixture
def world(shared_stage: Stage) -> Iterator[Stage]:
    """The shared stage; what a test makes its agents do wrong is undone."""
    yield shared_stage
    for node, agent in shared_stage.agents.items():
        agent.says, agent.sleeps = node, 0.0
        agent.fails.clear()
        agent.entries.clear()
