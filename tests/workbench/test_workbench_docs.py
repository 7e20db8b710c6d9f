"""docs/workbench.md says what the server answers: every route, every action, every refusal."""

import re
import subprocess
import sys
from pathlib import Path

from underhood.workbench.app import ROUTES
from underhood.workbench.desk import actions

PAGE = (Path(__file__).parents[2] / "docs" / "workbench.md").read_text(encoding="utf-8")


def test_every_route_is_documented_and_no_other() -> None:
    routes = {f"{m} {route.path}" for route in ROUTES for m in (route.methods or set()) - {"HEAD"}}
    told = set(re.findall(r"^\| `((?:GET|POST|DELETE) /[^`]*)`", PAGE, re.MULTILINE))
    assert told == routes


def test_every_action_is_documented_with_its_fields() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", PAGE, re.MULTILINE))
    assert set(rows) == set(actions())
    for name, action in actions().items():
        own = set(action.asks.model_fields) - {"model"}
        assert set(re.findall(r"`(\w+)`", rows[name])) == own, name
        assert action.about in rows[name], name


def test_help_loads_neither_torch_nor_the_server() -> None:
    script = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from underhood.cli.app import app\n"
        "assert CliRunner().invoke(app, ['serve', '--help']).exit_code == 0\n"
        "print(sorted({'torch', 'starlette', 'uvicorn', 'numpy'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
