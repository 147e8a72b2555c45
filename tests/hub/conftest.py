"""Fixtures of the tests in transformers."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def _registered() -> None:
    import transnormer.hub  # noqa: F401  registers our classes with the Auto classes
