"""Fixture of the Helm chart."""

from __future__ import annotations

import os

import pytest

from tests.support.helm import TOOLS, Chart, issue_certificates


@pytest.fixture(scope="session")
def chart(tmp_path_factory: pytest.TempPathFactory) -> Chart:
    """The chart; skips where ``make deploy-check`` has not fetched helm and kubeconform."""
    if not (TOOLS / ".complete").exists():
        if os.environ.get("KRONOS_REQUIRE_HELM") == "1":
            pytest.fail("no helm and kubeconform: make deploy-check")
        pytest.skip("not tested with helm and kubeconform: make deploy-check fetches them")
    issue_certificates(tmp_path_factory.mktemp("certificates"))
    return Chart()
