"""Kernels compiled for GPUs that are not here: launchers run on CPU tensors, but their kernels are only compiled.

Run in a process of its own, without TRITON_INTERPRET.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ARCHITECTURES = (80, 90, 100)


class AbsentGPU:
    """A Triton driver that says which GPU to compile for and has none to launch on."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_device(self) -> int:
        return self.architecture  # compiled kernels are kept by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)


@dataclass
class Launch:
    """A kernel as it would have been launched: the compiled code and the grid."""

    name: str
    grid: tuple[int, ...]
    compiled: Any

    def _tool(self, *command: str) -> str:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.compiled.asm["cubin"])
            file.flush()
            done = subprocess.run([TOOLS / command[0], *command[1:], file.name], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    @cached_property
    def sass(self) -> list[str]:
        """The machine code, an instruction a line, such as ``@P0 LDG.E.128 R4, desc[UR4][R2.64]``."""
        lines = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+([^;]*?)\s*;", self._tool("cuobjdump", "--dump-sass"), re.M)
        assert lines
        return lines

    @cached_property
    def resources(self) -> dict[str, int]:
        """Per thread: registers (REG), stack and local bytes (STACK, LOCAL); per block: SHARED bytes."""
        found = re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", self._tool("cuobjdump", "--dump-resource-usage"))
        return {name: int(value) for name, value in found}

    @property
    def registers(self) -> int:
        return self.resources["REG"]

    def count(self, pattern: str) -> int:
        """How many instructions match, from the start of the operation's name: ``LDG\\.E\\.128``."""
        return sum(bool(re.match(rf"(@!?U?P\w+ )?{pattern}\b", line)) for line in self.sass)

    @property
    def spills(self) -> int:
        return self.resources["STACK"] + self.resources["LOCAL"] + self.count(r"(LDL|STL)")

    @cached_property
    def wide_path(self) -> list[str]:
        """A kernel's path for whole, aligned tiles: of the straight runs of instructions between branches the one with
        the most 16-byte loads, and, if it is another, the one with the most wide stores."""
        runs: list[list[str]] = [[]]
        for line in self.sass:
            runs[-1].append(line)
            if re.match(r"(@!?U?P\w+ )?(BRA|EXIT|RET|BSYNC|CALL)\b", line):
                runs.append([])

        def wide(kind: str, run: list[str]) -> tuple[int, int]:
            return tuple(sum(f"{kind}.E.{bits}" in line for line in run) for bits in (128, 64))  # type: ignore[return-value]

        loads, stores = (max(runs, key=lambda run, kind=kind: wide(kind, run)) for kind in ("LDG", "STG"))
        return loads if stores is loads or wide("STG", stores) == (0, 0) else [*loads, *stores]

    def bytes_moved(self, operation: str) -> int:
        """Bytes that a thread loads (``LDG``) or stores (``STG``) on the wide path."""
        sizes = [re.match(rf"(?:@!?U?P\w+ )?{operation}\.E((?:\.\w+)*)", line) for line in self.wide_path]
        widths = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
        return sum(next((widths[w] for w in found[1].split(".") if w in widths), 4) for found in sizes if found)

    def fused_roundings(self) -> int:
        """Fused multiply-adds with the constant that rounds: ties would go elsewhere."""
        return sum("FFMA" in line and "12582912" in line for line in self.sass)

    def summary(self) -> dict[str, Any]:
        kinds = (
            "LDG.E.128",
            "LDGSTS.E.BYPASS.128",
            "HGMMA",
            "HMMA",
            "UTCHMMA",
            "UTCQMMA",
            "FFMA",
            "FFMA2",
            "ATOMG",
            "RED",
        )
        return {
            "kernel": self.name,
            "grid": self.grid,
            "registers": self.registers,
            "shared": self.compiled.metadata.shared,
            "spills": self.spills,
            "loaded": self.bytes_moved("LDG"),
            "stored": self.bytes_moved("STG"),
            "rounds": sum("FADD" in line and "12582912" in line for line in self.sass),
            "fused_roundings": self.fused_roundings(),
            **{kind: self.count(kind.replace(".", r"\.") + r"[.\w]*") for kind in kinds},
        }


@contextmanager
def compiled_only(architecture: int) -> Iterator[list[Launch]]:
    """Within, ``kernel[grid](...)`` compiles for the architecture and is noted in the list instead of launched."""
    launches: list[Launch] = []
    run: Callable[..., Any] = JITFunction.run

    def compile_instead(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        launches.append(Launch(self.__name__, tuple(grid), compiled))
        return compiled

    driver.set_active(AbsentGPU(architecture))  # type: ignore[arg-type]
    JITFunction.run = compile_instead  # type: ignore[method-assign]
    try:
        yield launches
    finally:
        JITFunction.run = run  # type: ignore[method-assign]
        driver._active = None
