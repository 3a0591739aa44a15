"""How many bytes of machine code a C source becomes, where there is a compiler to ask."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path


def code_size(source: str, header: str, header_name: str) -> tuple[int, str] | None:
    """Bytes of code by ``size`` after ``-Os``, and the compiler with version and target; None without one."""
    compiler, size = shutil.which("gcc") or shutil.which("cc"), shutil.which("size")
    if compiler is None or size is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / header_name).write_text(header, encoding="utf-8")
        (Path(folder) / "network.c").write_text(source, encoding="utf-8")
        try:
            _run([compiler, "-std=c99", "-Os", "-c", "network.c", "-o", "network.o"], folder)
            sections = re.findall(r"^\.text\S*\s+(\d+)", _run([size, "-A", "network.o"], folder), re.MULTILINE)
            version = _run([compiler, "-dumpversion"], folder).strip()
            target = _run([compiler, "-dumpmachine"], folder).strip()
        except subprocess.CalledProcessError:
            return None
    return sum(map(int, sections)), f"{Path(compiler).name} {version} -Os, {target}"


def _run(command: list[str], folder: str) -> str:
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout
