"""Records: one JSON file a run, holding all that its tables and plots are made from.

A record is a dictionary:

```
{"format": "pqk_fast record", "version": 1, "created": ISO time, "recipe": {...},
 "options": {"precision", "compile", "capture", "sync_batch_norm", "world"},
 "versions": {...}, "hardware": {...}, "device": "cpu", "seed": int,
 "data": {"name": str, "train": n, "validation": n, "testing": n, "fingerprint": str, "classes": [str, ...]},
 "curves": {STAGE: [{"epoch", "step", "loss", "lr", "sparsity", "validation", "validation_f", "seconds",
                     "kept", "step_size", "clipped_fraction"}, ...]},
 "results": {RESULT: {"last": {"validation", "testing"}, "best_dev": {"validation", "testing", "epoch"},
                      "confusion": [[n, ...], ...]}},
 "kept_fraction": float, "layers": [{"name", "shape", "weights", "kept", "step_size", "clipped_fraction"}, ...],
 "seconds": {STAGE: seconds}}
```

Accuracies are in percent, None where there is no such data. `STAGES` and `RESULTS` list the names; a stage that did not
run is absent. `validation_f` is there in phase 2 only: the full net's accuracy beside the student's. A row's `kept`,
`step_size` and `clipped_fraction` are lists, a value a layer in the order of `layers`. `confusion` counts, after the
last epoch and on the testing split, how often each label (a row) was taken for each class; with few classes only.
"""

import json
import math
import os
import platform
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from pqk_fast.files import replacing

__all__ = ["FORMAT", "RESULTS", "STAGES", "VERSION", "check_record", "environment", "read_record", "write_record"]

FORMAT = "pqk_fast record"
VERSION = 1
STAGES = ("vanilla", "phase1", "phase2", "finetune", "distill")
"""Names of the curves, in the order in which the stages run."""
RESULTS = ("vanilla", "phase1_p", "finetune", "distill", "phase2_p", "phase2_f")
"""Names of the results, in the order of the paper's tables: `_p` is the pruned student, `_f` the full net."""

REQUIRED: dict[str, Any] = {
    "recipe": dict,
    "versions": dict,
    "hardware": dict,
    "seed": int,
    "data": dict,
    "curves": dict,
    "results": dict,
}
OPTIONAL: dict[str, Any] = {
    "created": str,
    "options": dict,
    "layers": list,
    "seconds": dict,
    "kept_fraction": (int, float),
}


def environment() -> dict[str, Any]:
    """Versions and hardware of this process.

    Returns:
        `versions`: name -> version of python, pqk_fast, torch, triton, numpy, torchvision and torchaudio, None where a
        package is not installed (nothing is imported to find out); `hardware`: `cpu` (name), `cores` (that this process
        may use), `threads` (torch's), `memory_gib`, and `gpu` (name of the current CUDA device, or None).
    """
    packages = ("pqk_fast", "torch", "triton", "numpy", "torchvision", "torchaudio")
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in packages}},
        "hardware": {
            "cpu": _cpu_name(),
            "cores": _cores(),
            "threads": torch.get_num_threads(),
            "memory_gib": _memory_gib(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
    }


def write_record(path: str | Path, record: Mapping[str, Any]) -> None:
    """Write a record as JSON. `format` and `version`, and `created` (now, UTC) if missing, are added.

    The file at `path` is the old one or the new one at every moment; its folder is made if missing.

    Raises:
        ValueError: a number is NaN or infinite (the message has its place, as in `curves.phase1[3].loss`), a value is
            not JSON (a tensor, say), or the record is not one that `read_record` would accept.
    """
    record = {
        "format": FORMAT,
        "version": VERSION,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        **record,
    }
    _check_header(record, "cannot write this record")
    check_record(record, "cannot write this record")
    for place, value in _leaves(record):
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(
                f"{place} is {value}: a record holds finite numbers only; leave the key out if there is none"
            )
        if not isinstance(value, str | int | float | None):
            kind = type(value).__name__
            raise ValueError(f"{place} is a {kind}: a record holds text, numbers, lists and dictionaries only")
    text = json.dumps(record, indent=1, allow_nan=False) + "\n"
    with replacing(path, "w") as file:
        file.write(text)


def read_record(path: str | Path) -> dict[str, Any]:
    """Read a record that `write_record` wrote.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is torn, is not a record, or is of a version that this one does not read.
    """
    path = Path(path)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a record: it is torn or not JSON ({error})") from error
    _check_header(record, f"{path} is not a record that can be read")
    check_record(record, f"{path} is not a complete record")
    return record


def check_record(record: Any, problem: str = "not a record") -> None:
    """Refuse a dictionary that tables and plots could not be made from; `format` and `version` may be missing.

    Raises:
        ValueError: a part is missing or of another type; the message begins with `problem`.
    """
    _need(record, REQUIRED, "the record", problem)
    for key, kind in {**REQUIRED, **OPTIONAL}.items():
        if key in record and not isinstance(record[key], kind):
            raise ValueError(f'{problem}: "{key}" is a {type(record[key]).__name__}')
    for key, known in (("curves", STAGES), ("results", RESULTS)):
        if unknown := [name for name in record[key] if name not in known]:
            raise ValueError(f'{problem}: "{key}" has {", ".join(unknown)}; the names are {", ".join(known)}')
    for stage, rows in record["curves"].items():
        if not isinstance(rows, list):
            raise ValueError(f"{problem}: curves.{stage} must be a list, got a {type(rows).__name__}")
        for i, row in enumerate(rows):
            _need(row, ("epoch", "step", "validation"), f"curves.{stage}[{i}]", problem)
    for name, result in record["results"].items():
        _need(result, ("last", "best_dev"), f"results.{name}", problem)
        for moment in ("last", "best_dev"):
            _need(result[moment], ("validation", "testing"), f"results.{name}.{moment}", problem)
    for i, layer in enumerate(record.get("layers", ())):
        _need(layer, ("name", "shape", "weights", "kept"), f"layers[{i}]", problem)


def _check_header(record: Any, problem: str) -> None:
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        got = repr(record.get("format")) if isinstance(record, dict) else f"a {type(record).__name__}"
        raise ValueError(f'{problem}: "format" must be {FORMAT!r}, got {got}')
    if record.get("version") != VERSION:
        raise ValueError(
            f'{problem}: "version" must be {VERSION}, got {record.get("version")!r}; read it with the release of '
            "pqk_fast that wrote it"
        )


def _need(value: Any, keys: Iterable[str], place: str, problem: str) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{problem}: {place} must be a dictionary, got a {type(value).__name__}")
    if missing := [key for key in keys if key not in value]:
        raise ValueError(f"{problem}: {place} has no {', '.join(missing)}")


def _leaves(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Every value that is not a list or dictionary, with its place."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{place or 'the record'} has the key {key!r}: keys must be text")
            yield from _leaves(item, f"{place}.{key}" if place else key)
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _leaves(item, f"{place}[{i}]")
    else:
        yield place, value


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):  # not on every system
        return None
