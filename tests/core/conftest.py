"""After every test of the core: no hooks, no patches, nobody's session left open."""

from collections.abc import Iterator

import kit
import pytest

from underhood.core.taps import current_session
from underhood.core.taps.patches import active_patches


@pytest.fixture(autouse=True)
def no_trace() -> Iterator[None]:
    """Fails the test that left something behind."""
    yield
    assert active_patches() == 0, "a patch was left behind"
    assert current_session() is None, "a session was left open"
    for model in kit.MADE:
        assert kit.hooks(model.module) == kit.HOOKS[id(model)], f"hooks left on {model.name}"
