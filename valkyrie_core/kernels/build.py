"""Native code, compiled on the machine it runs on, at its first use, and kept.

The sources in `csrc` are plain C++ with a C interface and no header of torch's, so a build takes
about a second. A library is named by a hash of its source, its flags, the compiler and the
processor, and renamed into place whole: two processes that build at once write the same file.

Which vectors it uses is chosen at run time: AVX-512 or AVX2 where the processor has them, else
what every processor of its kind has. VALKYRIE_ISA=avx512|avx2|portable chooses another;
VALKYRIE_NATIVE=0 switches native code off.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from valkyrie_core.cache import cache_dir

log = logging.getLogger("valkyrie")

SOURCES = Path(__file__).with_name("csrc")
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-shared", "-fPIC")
ISA_FLAGS: dict[str, tuple[tuple[str, ...], ...]] = {
    # gcc prefers 256 bits on many processors that have 512
    "avx512": (("-march=native", "-mprefer-vector-width=512"), ("-march=x86-64-v4",)),
    "avx2": (("-march=x86-64-v3",),),
    "portable": ((),),
}
"""Per instruction set, flags to try in turn."""
BUILD_SECONDS = 120
BUILD_FOLDER = ".build-"
KEPT_SECONDS = 24 * 3600
DTYPES = (torch.float32, torch.bfloat16)
"""What native code reads and writes."""


class BuildError(Exception):
    """There is no compiler, or it refuses the source; the message is its last word."""


class RefusedError(BuildError):
    """The compiler does not take these flags; it may take others."""


def isa() -> str:
    """The instruction set that native code is compiled for: avx512, avx2 or portable.

    Raises:
        BuildError: VALKYRIE_ISA names none, or one that this processor lacks.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    have = ["portable"]
    if platform.machine().lower() in ("x86_64", "amd64"):
        # AVX-512 comes with AVX2
        have += ["avx2"] * (capability in ("AVX2", "AVX512")) + ["avx512"] * (
            capability == "AVX512"
        )
    wanted = os.environ.get("VALKYRIE_ISA", have[-1])
    if wanted not in have:
        raise BuildError(f"VALKYRIE_ISA={wanted}: this processor has {', '.join(have)}")
    return wanted


def library(source: str, **defines: int) -> ctypes.CDLL:
    """The library made of `csrc/<source>.cpp`, built on first use.

    Args:
        source: the file's name without its ending.
        defines: macros to set.

    Raises:
        BuildError: it can't be built or loaded here, or VALKYRIE_NATIVE=0.
    """
    if os.environ.get("VALKYRIE_NATIVE") == "0":
        raise BuildError("VALKYRIE_NATIVE=0")
    key = (source, isa(), tuple(sorted(defines.items())))
    if key not in _loaded:
        # a build that failed is not tried again at every call
        try:
            _loaded[key] = _load(source, key[1], defines)
        except BuildError as error:
            _loaded[key] = error
    found = _loaded[key]
    if isinstance(found, BuildError):
        raise found
    return found


_loaded: dict[tuple[str, str, tuple[tuple[str, int], ...]], ctypes.CDLL | BuildError] = {}


def _load(source: str, isa: str, defines: Mapping[str, int]) -> ctypes.CDLL:
    """Tries the flags of an instruction set, with both cores and then with one."""
    compiler = _compiler()
    texts = [path.read_bytes() for path in (SOURCES / f"{source}.cpp", *_headers())]
    macros = [f"-D{name}={value}" for name, value in defines.items()]
    errors = []
    for openmp in (("-fopenmp",), ()):
        for vectors in ISA_FLAGS[isa]:
            flags = (*FLAGS, *vectors, *openmp, *macros)
            parts = [*texts, *(flag.encode() for flag in flags), _machine(compiler)]
            digest = hashlib.sha256(b"\0".join(parts)).hexdigest()
            name = "-".join([source, *(str(value) for value in defines.values()), digest[:20]])
            path = cache_dir() / "kernels" / f"{name}.so"
            try:
                if not _is_whole(path):
                    _build(compiler, flags, SOURCES / f"{source}.cpp", path)
                loaded = ctypes.CDLL(str(path))
            except (RefusedError, OSError) as error:
                errors.append(str(error))
                continue
            if not openmp:
                log.warning("native %s runs on one core: %s", source, errors[0])
            return loaded
    raise BuildError(errors[0])


def _sum_of(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _is_whole(path: Path) -> bool:
    """Whether a library is there as it was built: a torn one would end the process unheard."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest() == _sum_of(path).read_text("ascii")
    except (OSError, UnicodeDecodeError):
        return False


def _headers() -> list[Path]:
    return sorted(SOURCES.glob("*.h"))


def pointers(tensors: list[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    """Where the data of tensors lies, as a C array."""
    return (ctypes.c_void_p * len(tensors))(*(x.data_ptr() for x in tensors))


def kinds(tensors: list[Tensor]) -> ctypes.Array[ctypes.c_int]:
    """Per tensor, 1 for bf16 and 0 for fp32, as a C array."""
    return (ctypes.c_int * len(tensors))(*(int(x.dtype == torch.bfloat16) for x in tensors))


def pointer(tensor: Tensor | None) -> int | None:
    """Where the data of a tensor lies."""
    return None if tensor is None else tensor.data_ptr()


def _compiler() -> tuple[str, ...]:
    """The command: CXX, which may have arguments, or the first compiler that is found."""
    wanted = os.environ.get("CXX")
    if wanted:
        try:
            program, *arguments = shlex.split(wanted)
        except ValueError:
            raise BuildError(f"CXX={wanted!r} is no command") from None
        if (path := shutil.which(program)) is None:
            raise BuildError(f"CXX={wanted}: there is no {program}")
        return path, *arguments
    for name in ("c++", "g++", "clang++"):
        if path := shutil.which(name):
            return (path,)
    raise BuildError("no C++ compiler (c++, g++ or clang++)")


@functools.cache
def _machine(compiler: tuple[str, ...]) -> bytes:
    """What -march=native depends on: the compiler and the processor."""
    try:
        run = subprocess.run(
            [*compiler, "--version"], capture_output=True, check=False, timeout=BUILD_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = error.strerror if isinstance(error, OSError) else "it does not answer"
        raise BuildError(f"{compiler[0]} can't be run: {reason}") from None
    cpuinfo = Path("/proc/cpuinfo")
    flags = b""
    if cpuinfo.exists():
        lines = cpuinfo.read_bytes().splitlines()
        wanted = (b"flags", b"model name", b"Features")
        flags = b"\n".join(sorted({x for x in lines if x.startswith(wanted)}))
    words = " ".join(compiler).encode()
    return words + run.stdout + platform.machine().encode() + flags


def _build(compiler: tuple[str, ...], flags: tuple[str, ...], source: Path, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    _forget_killed_builds(path.parent)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=BUILD_FOLDER) as folder:
        out = Path(folder) / path.name
        command = [*compiler, *flags, str(source), "-o", str(out)]
        try:
            run = subprocess.run(
                command, capture_output=True, text=True, timeout=BUILD_SECONDS, check=False
            )
        except OSError as error:
            raise BuildError(f"{compiler[0]} can't be run: {error.strerror}") from None
        except subprocess.TimeoutExpired:
            raise BuildError(
                f"{compiler[0]} took more than {BUILD_SECONDS} s for {source.name}"
            ) from None
        if run.returncode:
            lines = [x for x in run.stderr.splitlines() if "error" in x] or ["it failed"]
            raise RefusedError(f"{compiler[0]}: {lines[0]}")
        # a library without its sum is built again, never loaded
        digest = hashlib.sha256(out.read_bytes()).hexdigest()
        out.replace(path)
        _sum_of(out).write_text(digest, encoding="ascii")
        _sum_of(out).replace(_sum_of(path))
    log.info("built native code: %s", path.stem.rpartition("-")[0])


def _forget_killed_builds(folder: Path) -> None:
    """Removes what builds left that were killed a day ago or earlier."""
    for left in folder.glob(f"{BUILD_FOLDER}*"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > KEPT_SECONDS:
                shutil.rmtree(left)
