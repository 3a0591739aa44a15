"""What the kernels become on GPUs that are not here (sm_80, 90, 100): no spills, wide accesses, tensor cores, rounding.

The launchers of compiled_cases.py are called as they would be on such a GPU; Triton carries the assembler. Ceilings of
registers are what was seen with the Triton of constraints.txt.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cases import package, required
from machine_code_ceilings import REGISTERS

ARCHITECTURES = (80, 90, 100)
ELEMENTS = 16  # of a thread, in the element-wise kernels
# Bytes a weight that an element-wise operation reads and writes at least, as its docstring says.
TRAFFIC = {
    "fake_quant float32": (4 + 1, 4),
    "fake_quant bfloat16": (2 + 1, 2),
    "fake_quant float32, a step a channel": (4 + 1, 4),
    "fake_quant backward float32": (4 + 4 + 1, 0),
    "fake_quant backward bfloat16": (2 + 2 + 1, 0),
    "fake_quant backward float32, a step a channel": (4 + 4 + 1, 0),
    "fake_quant backward clipped float32": (4 + 4 + 1, 4),
    "fake_quant backward clipped bfloat16": (2 + 2 + 1, 2),
    "fake_quant backward clipped float32, a step a channel": (4 + 4 + 1, 4),
    "dual weight gradient": (4 + 4 + 4 + 1, 4),
}
# All others take one.
LAUNCHES = {
    **{f"topk_mask {kind}": count for kind, count in (("float32", 5), ("float32, not aligned", 5), ("bfloat16", 3))},
    **{f"mask_at_threshold {kind}": 2 for kind in ("float32", "float32, not aligned", "bfloat16")},
    "group_mask 2:4": 2,
    "group_mask 8:16": 2,
}
TENSOR_CORES = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}


@pytest.fixture(scope="module")
def compiled() -> dict[int, list[dict]]:
    """The summaries for each architecture, an entry a launch."""
    triton = package("triton")
    tested = "3.6.0"
    if triton.__version__ != tested:
        (pytest.fail if required("INTERPRETER") else pytest.skip)(
            f"ceilings are those of Triton {tested}, this is {triton.__version__}"
        )
    program = Path(__file__).with_name("compiled_cases.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    made = {}
    for architecture in ARCHITECTURES:
        command = [sys.executable, str(program), str(architecture)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        made[architecture] = json.loads(done.stdout)
    return made


@pytest.fixture(params=ARCHITECTURES, ids=lambda architecture: f"sm_{architecture}")
def architecture(request: pytest.FixtureRequest) -> int:
    return request.param


def test_nothing_spills(compiled, architecture: int) -> None:
    assert {row["case"]: row["spills"] for row in compiled[architecture] if row["spills"]} == {}


def test_registers_stay_under_their_ceilings(compiled, architecture: int) -> None:
    found: dict[str, int] = {}
    for row in compiled[architecture]:
        found[row["case"]] = max(row["registers"], found.get(row["case"], 0))
    ceilings = {case: dict(zip(ARCHITECTURES, each, strict=True))[architecture] for case, each in REGISTERS.items()}
    assert {case for case, ceiling in ceilings.items() if ceiling} == set(found)
    assert {case: (count, ceilings[case]) for case, count in found.items() if count > ceilings[case]} == {}


@pytest.mark.parametrize("case", TRAFFIC)
def test_bytes_a_weight_are_the_least_there_are(compiled, architecture: int, case: str) -> None:
    (row,) = [row for row in compiled[architecture] if row["case"] == case]
    assert row["LDG.E.128"] > 0
    loaded, stored = TRAFFIC[case]
    assert row["stored"] == ELEMENTS * stored
    # and, the same for all of a layer or row, S and what the table says of a row: 4 bytes and 16
    assert row["loaded"] - ELEMENTS * loaded == (20 if "a step a channel" in case else 4)


def test_no_rounding_is_fused_into_a_product(compiled, architecture: int) -> None:
    quantizing = [row for row in compiled[architecture] if row["rounds"]]
    assert {"fake_quant float32", "dual_linear bfloat16"} <= {row["case"] for row in quantizing}
    assert not any(row["fused_roundings"] for row in quantizing)
    if architecture < 100:  # where two additions may be one instruction
        two_paths = {row["case"]: row["rounds"] for row in quantizing if row["case"].startswith("fake_quant")}
        assert set(two_paths.values()) == {2 * 2 * ELEMENTS}, "an addition and a subtraction for each weight"


def test_launches(compiled, architecture: int) -> None:
    counts: dict[str, int] = {}
    for row in compiled[architecture]:
        counts[row["case"]] = counts.get(row["case"], 0) + 1
    assert {case: count for case, count in counts.items() if count > 1} == LAUNCHES


def test_products_use_tensor_cores_and_wide_copies(compiled, architecture: int) -> None:
    products = [row for row in compiled[architecture] if row["case"].startswith("dual_")]
    on_cores = {row["case"] for row in products if not row[TENSOR_CORES[architecture]]}
    assert on_cores == {case for case in {row["case"] for row in products} if case.endswith("float32")}
    half = [row for row in products if "float16" in row["case"] and "linear" in row["case"]]
    assert half
    assert all(row["LDGSTS.E.BYPASS.128"] for row in half)


def test_selection_reads_16_bytes_at_a_time(compiled, architecture: int) -> None:
    rows = [row for row in compiled[architecture] if row["case"].startswith(("topk_mask", "mask_at_threshold"))]
    assert {bool(row["LDG.E.128"]) for row in rows if "not aligned" not in row["case"]} == {True}
