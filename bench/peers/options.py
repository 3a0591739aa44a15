"""What both comparisons can be told, and how they write their records."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from candidates import CANDIDATES, chosen

from pqk_fast.files import replacing


def parser_of(doc: str | None, out: str) -> argparse.ArgumentParser:
    """What both comparisons can be told."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", nargs="+", default=[], metavar="NAME", help=f"of {', '.join(CANDIDATES)}")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--patience", type=float, default=1800, help="seconds that one answer may take")
    parser.add_argument("--out", type=Path, default=Path(out))
    return parser


def parsed(parser: argparse.ArgumentParser, arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options, and the candidates that they choose."""
    options = parser.parse_args(arguments)
    try:
        return options, chosen(options.peers, CANDIDATES)
    except ValueError as error:
        parser.error(str(error))


def write(path: Path, record: dict[str, Any]) -> None:
    with replacing(path, "w") as file:
        file.write(json.dumps(record, indent=1) + "\n")
