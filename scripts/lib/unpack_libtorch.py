"""Lays out a libtorch for the CPU from PyTorch's wheels, without their Python part and without CUDA.

usage: unpack_libtorch.py VERSION DEST TORCH_WHEEL CUDART_WHEEL CUPTI_WHEEL

PyPI has no CPU-only wheel for Linux on x86_64. libtorch_cpu of the CUDA wheel does all we need; it only wants to find the CUDA
runtime and CUPTI (which it never calls without a GPU) when it is loaded, hence the two other wheels.
"""

import shutil
import sys
import zipfile
from pathlib import Path, PurePosixPath

LIBRARIES = {"libc10.so", "libtorch_cpu.so", "libgomp.so.1", "libcudart.so.13", "libcupti.so.13"}
# The wheel's own libtorch.so is a shell that insists on libtorch_cuda.so; a linker script takes its place.
LINKER_SCRIPT = "INPUT(-ltorch_cpu -lc10)\n"


def place(name):
    """Where a member of a wheel goes, or None."""
    path = PurePosixPath(name)
    if name.endswith("/"):
        return None
    if path.parts[:2] == ("torch", "include"):
        return Path(*path.parts[1:])
    if path.parent.name == "lib" and path.name in LIBRARIES:
        return Path("lib", path.name)
    if path.parent.name == "licenses" and path.parts[0].endswith(".dist-info"):
        return Path("licenses", path.parts[0].split("-")[0], path.name)
    return None


def unpack(wheel, dest):
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            to = place(name)
            if to is None:
                continue
            (dest / to).parent.mkdir(parents=True, exist_ok=True)
            with archive.open(name) as source, open(dest / to, "wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)


def main(version, dest, *wheels):
    dest = Path(dest)
    for wheel in wheels:
        unpack(wheel, dest)
    missing = sorted(name for name in LIBRARIES if not (dest / "lib" / name).is_file())
    if missing:
        sys.exit(f"error: the wheels hold no {', '.join(missing)}")
    (dest / "lib" / "libtorch.so").write_text(LINKER_SCRIPT)
    (dest / "build-version").write_text(version + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
