"""Which tritonserver runs here, and what its Python backend needs of this interpreter. Standard library only."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


class ServerError(RuntimeError):
    """The server can't be started, or stopped by itself; the text says why and what to do."""


@dataclass(frozen=True)
class Installation:
    """A tritonserver; `wheel` is the folder of nvidia-pytriton it lies in, None in NVIDIA's image."""

    binary: Path
    wheel: Path | None = None


def find_tritonserver() -> Installation:
    """`tritonserver` on PATH, else the one in the nvidia-pytriton wheel, else ServerError."""
    on_path = shutil.which("tritonserver")
    if on_path:
        return Installation(Path(on_path))
    spec = importlib.util.find_spec("pytriton")  # finds a top-level package without importing it
    for package in (spec.submodule_search_locations or []) if spec else []:
        wheel = Path(package) / "tritonserver"
        if (wheel / "bin" / "tritonserver").is_file():
            return Installation(wheel / "bin" / "tritonserver", wheel)
    raise ServerError(
        "no tritonserver here: run in NVIDIA's Triton image, or pip install 'florence2-triton[local-server]', whose "
        "server is for Python 3.11 and 3.12"
    )


def lay_out_backend(wheel: Path, runtime: Path) -> None:
    """Links what the wheel's server needs into `runtime`: site-packages may be read-only."""
    stub = wheel / "python_backend_stubs" / _PYTHON / "triton_python_backend_stub"
    if not stub.is_file():
        raise ServerError(f"the nvidia-pytriton wheel has no python backend for Python {_PYTHON}")
    backend = runtime / "backends" / "python"
    backend.mkdir(parents=True)
    for file in (*(wheel / "backends" / "python").glob("*triton_python*.*"), stub):
        (backend / file.name).symlink_to(file)
    libraries = runtime / "lib"
    libraries.mkdir()
    # The one library, not its folder: a conda prefix holds other versions of what tritonserver links too.
    library = libpython()
    if library:
        (libraries / library.name).symlink_to(library)


def libpython() -> Path | None:
    """This interpreter's shared library, which the python stub links."""
    name = f"libpython{_PYTHON}.so.1.0"
    folder = Path(sysconfig.get_config_var("LIBDIR") or "/usr/lib")
    places = (folder, folder / (sysconfig.get_config_var("MULTIARCH") or ""), Path(sys.base_prefix, "lib"))
    return next((place / name for place in places if (place / name).is_file()), None)


def check_libraries(program: Path, env: dict[str, str]) -> None:
    """Asks the loader, as ldd does, so that a missing library is told before the server starts."""
    trace = {**env, "LD_TRACE_LOADED_OBJECTS": "1"}
    listing = subprocess.run([program], env=trace, capture_output=True, text=True).stdout
    missing = re.findall(r"(\S+) => not found", listing)
    python = next((name for name in missing if name.startswith("libpython")), None)
    if python:
        package = python.removesuffix(".so.1.0")
        raise ServerError(
            f"the python backend needs {python}, which this Python was built without: apt install {package}, "
            "or use a Python built with --enable-shared"
        )
    if missing:
        raise ServerError(f"{program.name} needs libraries that are not here: {', '.join(missing)}")


def lay_out_python(runtime: Path) -> Path:
    """Makes a virtual environment whose modules are this process's, and returns its folder of programs.

    The python backend embeds an isolated Python (sys.flags.isolated is 1 in the stubs of 24.10, so neither
    PYTHONPATH nor PYTHONDONTWRITEBYTECODE counts). It takes the first `python3` on PATH for its own and reads
    the .pth files there.
    """
    environment = runtime / "python"
    programs = environment / "bin"
    programs.mkdir(parents=True)
    (programs / "python3").symlink_to(sys.executable)
    home = os.path.dirname(os.path.realpath(sys.executable))
    (environment / "pyvenv.cfg").write_text(f"home = {home}\ninclude-system-site-packages = false\n")
    site = environment / "lib" / f"python{_PYTHON}" / "site-packages"
    site.mkdir(parents=True)
    # A __pycache__ in a model's folder counts as a change of the model (triton-inference-server/server#7489).
    lines = ["import sys; sys.dont_write_bytecode = True"]
    lines += [f"import site; site.addsitedir({folder!a})" for folder in _import_path()]
    (site / "florence2.pth").write_text("\n".join(lines))
    return programs


def _import_path() -> list[str]:
    """sys.path without the standard library, which the embedded Python has of its own."""
    standard = [os.path.realpath(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib")]
    standard += [os.path.join(folder, "lib-dynload") for folder in standard]
    folders = [os.path.abspath(entry) for entry in sys.path if os.path.isdir(entry or ".")]
    return [folder for folder in folders if os.path.realpath(folder) not in standard]


def environment(installation: Installation, runtime: Path, programs: Path) -> dict[str, str]:
    env = dict(os.environ)
    env["PATH"] = os.pathsep.join([str(programs), env.get("PATH", os.defpath)])
    env["PYTHONDONTWRITEBYTECODE"] = "1"  # for the stubs that are not isolated
    if installation.wheel:
        ours = [str(runtime / "lib"), str(installation.wheel.parent.parent / "nvidia_pytriton.libs")]
        env["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, [*ours, env.get("LD_LIBRARY_PATH")]))
    return env
