"""Where the test material lies: models and data that nobody in this project made.

The folder is named by the environment variable `UNDERHOOD_MATERIAL`; without it, it is looked for
beside the repository, in `../shared/material`. A test that needs it skips with that sentence where
it is absent.
"""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def material_folder() -> Path:
    """The folder, whether it exists or not."""
    named = os.environ.get("UNDERHOOD_MATERIAL")
    return Path(named) if named else ROOT.parent / "shared" / "material"


def material(name: str) -> Path:
    """One part of the material; skips the test where it is absent."""
    path = material_folder() / name
    if not path.exists():
        pytest.skip(
            f"the test material {name!r} is not in {material_folder()};"
            " name its folder with UNDERHOOD_MATERIAL"
        )
    return path
