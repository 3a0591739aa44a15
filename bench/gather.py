"""Joins what the stages of gpu_suite.sh left in a folder into one results.json: python gather.py WORK RESULTS"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def gathered(work: Path) -> dict[str, Any]:
    """``stages``: name, exit status, seconds; ``records``: every JSON file by its path, without the ending."""
    stages = []
    for line in (work / "stages.tsv").read_text().splitlines():
        name, status, seconds = line.split("\t")
        stages.append({"stage": name, "status": int(status), "seconds": int(seconds)})
    records = {}
    for path in sorted(work.rglob("*.json")):
        name = str(path.relative_to(work).with_suffix(""))
        try:
            records[name] = json.loads(path.read_text())
        except ValueError as error:
            records[name] = {"error": f"torn: {error}"}
    return {"stages": stages, "records": records}


if __name__ == "__main__":
    work, results = map(Path, sys.argv[1:])
    new = results.with_suffix(".new")
    new.write_text(json.dumps(gathered(work), indent=1))
    new.replace(results)
