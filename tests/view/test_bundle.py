"""The committed bundles are those of the sources, small, licensed, and closed to the outside.

All of it holds without node; where `web/node_modules` is there, the bundles are also built again.
"""

import hashlib
import importlib.util
import json
import re
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
BUDGET = 120_000  # bytes of the script that every report carries
AGAIN = "run python scripts/build_web.py"


@pytest.fixture(scope="module")
def build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_web", ROOT / "scripts" / "build_web.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def manifest(build: ModuleType) -> dict:
    return json.loads((build.STATIC / "manifest.json").read_text())


def test_sources_are_those_that_were_built(build: ModuleType, manifest: dict) -> None:
    found = build.digests()
    changed = [name for name in {*found, *manifest["sources"]}
               if found.get(name) != manifest["sources"].get(name)]  # fmt: skip
    assert not changed, f"{sorted(changed)} changed since the bundles were built: {AGAIN}"


def test_outputs_are_what_was_built(build: ModuleType, manifest: dict) -> None:
    assert set(manifest["outputs"]) == {"underhood.js", "underhood.mjs", "THIRD_PARTY.txt"}
    for name, about in manifest["outputs"].items():
        content = (build.STATIC / name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == about["sha256"], f"{name}: {AGAIN}"
        assert len(content) == about["bytes"]


def test_colours_are_those_of_python(build: ModuleType) -> None:
    assert (build.WEB / "core" / "palette.json").read_text() == build.palette(), AGAIN


def test_bundle_is_small(build: ModuleType) -> None:
    assert len((build.STATIC / "underhood.js").read_bytes()) <= BUDGET


def test_bundle_can_stand_in_a_page(build: ModuleType) -> None:
    code = (build.STATIC / "underhood.js").read_text()
    assert not re.search(r"</?script|<!--", code, re.IGNORECASE)


def test_bundles_know_no_other_host(build: ModuleType) -> None:
    for name in build.BUNDLES:
        code = (build.STATIC / name).read_text()
        hosts = set(re.findall(r"(?:https?:|wss?:)?//([\w-]+(?:\.[\w-]+)+)", code))
        assert hosts <= {"www.w3.org"}, "only the names of XML vocabularies"
        assert not re.search(r"\bfetch\(|XMLHttpRequest|WebSocket|EventSource|sendBeacon|\beval\(",
                             code)  # fmt: skip
        assert not re.search(r"@import|url\(\s*[\"']?(?!#|\$)[a-z]", code)


def test_licences_are_there(build: ModuleType) -> None:
    text = (build.STATIC / "THIRD_PARTY.txt").read_text()
    assert re.search(r"^lit \d+\.\d+\.\d+ \(BSD-3-Clause\)$", text, re.MULTILINE)
    lock = json.loads((build.WEB / "package-lock.json").read_text())["packages"]
    named = re.findall(r"^(\S+) (\d\S+) \(", text, re.MULTILINE)
    assert len(named) >= 3
    for name, version in named:
        assert lock[f"node_modules/{name}"]["version"] == version
    assert text.count("Redistribution") >= len(named)


def test_types_fit(build: ModuleType) -> None:
    tsc = build.WEB / "node_modules" / ".bin" / "tsc"
    if not tsc.exists():
        pytest.skip("web/node_modules is not installed (npm ci in web/)")
    done = subprocess.run([tsc, "--project", "."], cwd=build.WEB, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_built_again_is_the_same(build: ModuleType, manifest: dict, tmp_path: Path) -> None:
    if not (build.WEB / "node_modules").is_dir():
        pytest.skip("web/node_modules is not installed (npm ci in web/)")
    assert build.build(tmp_path) == manifest["outputs"], AGAIN
