"""What parts are called: one form is written, three are read."""

import pytest

from underhood.core.errors import UsageError
from underhood.core.names import head_named, part_name


@pytest.mark.parametrize("text", ["a3.h11", "3.11", "z.3.11"])
def test_a_head_is_read_in_three_forms(text: str) -> None:
    assert head_named(text) == (3, 11)
    assert part_name("head", *head_named(text)) == "a3.h11"


@pytest.mark.parametrize(
    "text", ["", "3", "m3", "a3", "a3.h", "a3.h1<q>", "L3.H1", "3.1.2", "-1.2"]
)
def test_what_names_no_head_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="names no head"):
        head_named(text)
