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
