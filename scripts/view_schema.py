"""Write the JSON Schema of view documents: `python scripts/view_schema.py`."""

import json
from pathlib import Path

from underhood.view.doc import json_schema

OUT = Path(__file__).parent.parent / "docs" / "view-schema.json"

if __name__ == "__main__":
    OUT.write_text(json.dumps(json_schema(), indent=1) + "\n", encoding="utf-8")
