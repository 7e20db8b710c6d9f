"""Build the script that pages inline and the module that the workbench imports.

    python scripts/build_web.py

Needs node 18 and npm; nothing else in the project does. The packages of `web/package-lock.json` are
installed into `web/node_modules` if they are not there, tsc checks the types of the sources,
esbuild bundles `web/report.js` and `web/index.js`, and `src/underhood/view/static` gets the two
bundles, the licences of what is in them, and a manifest with the digest of every source and output.
`tests/view/test_bundle.py` fails when a source has changed and this was not run.
"""

import base64
import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from underhood.view import colour

ROOT = Path(__file__).parents[1]
WEB = ROOT / "web"
STATIC = ROOT / "src" / "underhood" / "view" / "static"
BUNDLES = {"underhood.js": ("report.js", "iife"), "underhood.mjs": ("index.js", "esm")}
LICENCES = "THIRD_PARTY.txt"


def main() -> None:
    """Write the bundles into the package."""
    write_palette()
    if not all((WEB / "node_modules" / ".bin" / tool).exists() for tool in ("tsc", "esbuild")):
        subprocess.run(["npm", "ci", "--no-audit", "--no-fund"], cwd=WEB, check=True)
    if subprocess.run(["npm", "run", "--silent", "check"], cwd=WEB).returncode:
        sys.exit("Nothing was built: the types named above do not fit.")
    outputs = build(STATIC)
    manifest = {"schema": "bundle/1", "sources": digests(), "outputs": outputs}
    (STATIC / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    for name, about in outputs.items():
        print(f"{name:<18} {about['bytes']:>9,} bytes")


def build(folder: Path) -> dict[str, dict[str, Any]]:
    """Bundle into a folder; returns the digest and size of each file written."""
    folder.mkdir(parents=True, exist_ok=True)
    packages: dict[str, str] = {}
    for name, (entry, kind) in BUNDLES.items():
        code, used = bundle(entry, kind)
        (folder / name).write_bytes(code)
        packages |= used
    (folder / LICENCES).write_text(licences(packages), encoding="utf-8")
    found = {}
    for name in (*BUNDLES, LICENCES):
        content = (folder / name).read_bytes()
        found[name] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    return found


def bundle(entry: str, kind: str) -> tuple[bytes, dict[str, str]]:
    """One bundle, and the packages (name and version) whose code is in it."""
    with tempfile.TemporaryDirectory() as folder:
        meta, made = Path(folder) / "meta.json", Path(folder) / "made.js"
        command = [
            "node_modules/.bin/esbuild", entry, "--bundle", f"--format={kind}", "--minify",
            "--target=es2022", "--legal-comments=none", "--loader:.css=text",
            f"--metafile={meta}", f"--outfile={made}", "--log-level=warning",
        ]  # fmt: skip
        subprocess.run(command, cwd=WEB, check=True)
        code, inputs = made.read_text("utf-8"), json.loads(meta.read_text())["inputs"]
    used = {}
    for path in inputs:
        if "node_modules/" in path:
            parts = path.split("node_modules/")[-1].split("/")
            name = "/".join(parts[: 2 if parts[0].startswith("@") else 1])
            about = json.loads((WEB / "node_modules" / name / "package.json").read_text())
            used[name] = about["version"]
    return inlinable(code).encode(), used


def inlinable(code: str) -> str:
    """The code with nothing in it that could end or confuse the `<script>` around it."""
    return code.replace("</script", "<\\/script").replace("<!--", "\\x3c!--")


def licences(packages: dict[str, str]) -> str:
    """What the bundles contain, and under which licence."""
    parts = ["The bundles in this folder contain code of these packages.\n"]
    for name, version in sorted(packages.items()):
        folder = WEB / "node_modules" / name
        kind = json.loads((folder / "package.json").read_text())["license"]
        text = next(p for p in sorted(folder.iterdir()) if p.name.lower().startswith("license"))
        parts.append(f"{'=' * 78}\n{name} {version} ({kind})\n\n{text.read_text().strip()}\n")
    return "\n".join(parts)


def write_palette() -> None:
    """The colours, from the one place where they are."""
    (WEB / "core" / "palette.json").write_text(palette())


def palette() -> str:
    """The colour tables of `view/colour.py` as JSON."""
    tables = {
        scale: base64.b64encode(colour.palette(scale).tobytes()).decode("ascii")
        for scale in ("diverging", "sequential", "probability")
    }
    document = {"robust": colour.ROBUST, "palettes": tables}
    return json.dumps(document, indent=1) + "\n"


def sources() -> list[Path]:
    """Everything that the bundles are made from."""
    found = [WEB / name for name in ("package.json", "package-lock.json", "tsconfig.json")]
    for pattern in ("*.js", "*.css", "core/*", "elements/*"):
        found += WEB.glob(pattern)
    return sorted(found)


def digests() -> dict[str, str]:
    """sha256 of each source by its path in `web`."""
    return {
        path.relative_to(WEB).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sources()
    }


if __name__ == "__main__":
    sys.exit(main())
