"""What options of several methods share: their types, and refusals with the option's name."""

from typing import Literal

from underhood.core.errors import OutOfRange, UsageError

__all__ = ["By", "Cut", "at_least", "below_one", "written_by"]

By = Literal["eap", "clean-corrupted", "eap-ig", "eap-ig-activations", "relp", "exact", "ifr"]
"""How edges are scored."""

Cut = Literal["resample", "mean", "mean-position", "zero"]
"""What is carried by edges that are cut."""


def at_least(least: int, **counts: int | None) -> None:
    """Refuse smaller counts; None is an option that was left out.

    Raises:
        OutOfRange: With the option's name.
    """
    for name, count in counts.items():
        if count is not None and count < least:
            raise OutOfRange(f"{name} must be at least {least}", given=count, do="leave it out")


def below_one(**shares: float) -> None:
    """Refuse shares that are negative, or leave nothing.

    Raises:
        OutOfRange: With the option's name.
    """
    for name, share in shares.items():
        if not 0 <= share < 1:
            raise OutOfRange(
                f"{name} must be from 0 to below 1", given=share, do=f"e.g. {name}=0.5"
            )


def written_by(direction: str, value: str) -> None:
    """Refuse to denoise with anything but what the clean run holds.

    Raises:
        UsageError: A baseline that only noising can write.
    """
    if direction == "denoise" and value != "resample":
        raise UsageError(
            "denoising writes what the clean run holds, and nothing else",
            given=f"direction='denoise', value={value!r}",
            do=f"ablate the clean run instead: direction='noise', value={value!r}",
        )
