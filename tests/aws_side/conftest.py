"""The scene is played once; everything is compared with it."""

from __future__ import annotations

import asyncio

import pytest

from tests.aws_side.scene import Scene, play


@pytest.fixture(scope="session")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """Log events and findings of the demo's alerts."""
    return asyncio.run(play(tmp_path_factory.mktemp("scene")))
