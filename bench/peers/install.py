"""Makes an environment for each peer, with pinned versions: ``build/peers/NAME``.

    python bench/peers/install.py [all | NAME ...] [--again]

An environment holds the peer and what it needs besides, and takes the rest, torch above all, from the environment of
the interpreter that runs this: so every candidate computes with the same build of torch. A peer that asks for another
torch fails. What an installation took, or its error, stands in ``build/peers/NAME.json``; the exit status is 1 if one
failed. One that is there with the same requirements is left alone, unless ``--again``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from candidates import BUILD, ENVIRONMENTS, HERE, VARIABLES, chosen, python_of

from pqk_fast.files import replacing

# What a peer would otherwise do at its first use.
AFTERWARDS = {
    "nncf": "from nncf.torch.quantization.extensions import QuantizedFunctionsCPU as f; f.get('Quantize_forward')"
}


def requirements(name: str) -> str:
    return (HERE / "requirements" / f"{name}.txt").read_text(encoding="utf-8")


def run(command: list[str | Path]) -> None:
    """RuntimeError with the last lines of what a failed command said."""
    environment = {**os.environ, **VARIABLES}
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    if done.returncode:
        said = [line for line in done.stdout.splitlines() if line.strip()]
        raise RuntimeError(f"{' '.join(map(str, command[1:4]))} ended with {done.returncode}: {' / '.join(said[-3:])}")


def bytes_of(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_symlink() and path.is_file())


def make(name: str, folder: Path) -> dict[str, Any]:
    """The environment itself; gives the versions in it."""
    shutil.rmtree(folder, ignore_errors=True)
    run([sys.executable, "-m", "venv", folder])
    base = sysconfig.get_paths()
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "base.pth").write_text("".join(f"{path}\n" for path in sorted({base["purelib"], base["platlib"]})))
    held = folder / "constraints.txt"
    held.write_text(f"torch=={metadata.version('torch')}\n", encoding="utf-8")
    listed = HERE / "requirements" / f"{name}.txt"
    run([python_of(name), "-m", "pip", "install", "--quiet", "--constraint", held, "--requirement", listed])
    if name in AFTERWARDS:
        run([python_of(name), "-c", AFTERWARDS[name]])
    return {each.metadata["Name"]: each.version for each in metadata.distributions(path=[str(site)])}


def install(name: str) -> dict[str, Any]:
    """What it took, or what went wrong; written beside the environment, too."""
    about: dict[str, Any] = {"requirements": requirements(name), "torch": metadata.version("torch")}
    start = time.perf_counter()
    try:
        about["packages"] = make(name, BUILD / name)
        about["megabytes"] = round(bytes_of(BUILD / name) / 1e6, 1)
    except (RuntimeError, OSError) as error:
        about["error"] = f"{type(error).__name__}: {error}"
        shutil.rmtree(BUILD / name, ignore_errors=True)
    about["seconds"] = round(time.perf_counter() - start, 1)
    with replacing(BUILD / f"{name}.json", "w") as file:
        json.dump(about, file, indent=1)
    return about


def installed(name: str) -> dict[str, Any] | None:
    """What :func:`install` left, None if nothing."""
    path = BUILD / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def is_current(name: str) -> bool:
    about = installed(name)
    same = about is not None and (about["requirements"], about["torch"]) == (
        requirements(name),
        metadata.version("torch"),
    )
    return same and "error" not in about and python_of(name).exists()  # type: ignore[operator]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peers", nargs="*", metavar="NAME", help=f"all, or of {', '.join(ENVIRONMENTS)}")
    parser.add_argument("--again", action="store_true", help="also where it is there already")
    options = parser.parse_args(arguments)
    try:
        names = chosen([name for name in options.peers if name != "all"], ENVIRONMENTS)
    except ValueError as error:
        parser.error(str(error))
    failed = False
    for name in names:
        if not options.again and is_current(name):
            print(f"{name}: is there", flush=True)
            continue
        print(f"{name}: installing ...", flush=True)
        about = install(name)
        failed |= "error" in about
        told = about.get("error") or f"{about['megabytes']} MB besides torch"
        print(f"{name}: {told}, {about['seconds']} s", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
