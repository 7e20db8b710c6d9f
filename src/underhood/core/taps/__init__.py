"""Taps: how recordings and edits reach the inside of a running model.

`session` decides what happens to an activation; the other modules are the places where a model lets
us see one: torch modules (`modules`), the attention call (`attention`), expert layers (`experts`)
and state-space scans (`scans`). Nothing is installed outside a session, and nothing survives one.
"""

from underhood.core.taps.session import Read, Session, current_session

__all__ = ["Read", "Session", "current_session"]
