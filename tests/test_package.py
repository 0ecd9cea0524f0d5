"""The package: who may import whom, what the wheel holds, and where it runs."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import qemu_vtpm_bridge

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "qemu_vtpm_bridge"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
VERSION = f"qemu-vtpm-bridge {qemu_vtpm_bridge.__version__}"
DEPENDENCIES = {"cffi", "construct", "pyxs", "trio"}

SHARED = {"cpio", "errors", "ratelimit", "retries", "carrier", "deadlines", "supervise", "_shim"}
"""Small modules that any floor may use."""

# From top to bottom; a floor imports from those below it.
FLOORS: list[set[str]] = [
    {"__main__"},
    {"cli"},
    {"cli_options"},
    {"commands", "demo", "image"},
    {"embedded"},
    {"opened"},
    {"guest_service"},
    {"device_service"},
    {"service", "config", "decode"},
    {"vtpm_follower", "evidence"},
    {"bridge", "vtpm", "toolstack"},
    {"xen"},
    {"names", "confine", "preload", "process_name"},
    SHARED,
]
TOOLS = {"cli", "commands", "demo", "embedded"}
"""Who may import the embedded Xen: nothing that runs on a Xen host."""


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        yield ".".join(path.relative_to(ROOT).with_suffix("").parts), path


def imports(name: str, path: Path) -> Iterator[str]:
    """Yield the absolute names of the modules that a module imports, wherever it does."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    package = package.removesuffix(".__init__")
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")
            base = base[: len(base) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            if module == "qemu_vtpm_bridge":
                yield from (f"{module}.{alias.name}" for alias in node.names)
            else:
                yield module


def room(name: str) -> str:
    """Return the room that a module is in; `decode_...` are one with `decode`, and so on."""
    found = [*name.split("."), "__init__"][1]
    return found.split("_")[0] if found.startswith(("decode_", "confine_")) else found


def floor(name: str) -> int:
    found = [number for number, rooms in enumerate(FLOORS) if room(name) in rooms]
    assert found, f"{name} has no floor yet: give it one in FLOORS"
    return found[0]


def our_imports() -> Iterator[tuple[str, str]]:
    for name, path in modules():
        if room(name) == "__init__":
            continue
        for imported in imports(name, path):
            if imported.startswith("qemu_vtpm_bridge.") and "__version__" not in imported:
                yield name, imported


def test_every_module_has_a_floor_and_imports_go_down() -> None:
    pairs = list(our_imports())
    assert len(pairs) > 100
    for name, imported in pairs:
        if room(name) == room(imported):
            continue
        assert floor(imported) > floor(name), f"{name} imports {imported}"


def test_bridge_and_vtpm_do_not_know_of_each_other() -> None:
    for name, imported in our_imports():
        assert {room(name), room(imported)} != {"bridge", "vtpm"}, f"{name} imports {imported}"


def test_nothing_on_a_xen_host_imports_the_embedded_xen() -> None:
    users = {room(name) for name, imported in our_imports() if room(imported) == "embedded"}
    assert users <= TOOLS
    assert "commands" in users  # or the walk sees nothing


def test_four_dependencies_and_no_more() -> None:
    declared = {word.split(">=")[0] for word in PYPROJECT["dependencies"]}
    assert declared == DEPENDENCIES
    for name, path in modules():
        for imported in imports(name, path):
            top = imported.split(".")[0]
            assert top in sys.stdlib_module_names | DEPENDENCIES | {"qemu_vtpm_bridge"}, name


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that this tree gives."""
    directory = tmp_path_factory.mktemp("wheel")
    scripts = Path(sys.executable).parent  # meson and ninja
    environment = {**os.environ, "PATH": f"{scripts}:{os.environ['PATH']}"}
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation"),
            *("--no-deps", "--wheel-dir", str(directory), str(ROOT)),
        ],
        check=True,
        env=environment,
    )
    (found,) = directory.iterdir()
    return found


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(directory)
    return directory


def test_one_wheel_for_every_python_from_3_11(wheel: Path, unpacked: Path) -> None:
    assert wheel.name.split("-")[2:4] == ["cp311", "abi3"]
    assert len(list(unpacked.rglob("*.so"))) == 1
    assert list(unpacked.rglob("LICENSE"))
    assert {path.name.split("-")[0] for path in unpacked.iterdir()} == {"qemu_vtpm_bridge"}
    installed = {path.name for path in unpacked.rglob("*.py")}
    assert {path.name for _, path in modules()} == installed


def test_the_wheel_holds_libvirts_hook_as_a_program(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (hook,) = (entry for entry in archive.infolist() if "/libvirt/" in entry.filename)
    assert hook.filename.endswith(".data/data/share/qemu-vtpm-bridge/libvirt/qemu-vtpm-bridge")
    assert hook.external_attr >> 16 & 0o111 == 0o111


def test_the_wheel_brings_the_man_pages(unpacked: Path) -> None:
    pages = {path.name for path in (ROOT / "docs/man").glob("man?/*")}
    assert {"qemu-vtpm-bridge.1", "qemu-vtpm-bridge-run.1", "qemu-vtpm-bridge.toml.5"} <= pages
    installed = list(unpacked.rglob("*.data/data/share/man/man?/*"))
    assert {path.name for path in installed} == pages
    assert all(path.parent.name == f"man{path.suffix[1:]}" for path in installed)


@pytest.mark.skipif(shutil.which("readelf") is None, reason="binutils are not installed")
def test_the_extension_links_no_xen_and_exports_one_name(unpacked: Path) -> None:
    (extension,) = unpacked.rglob("*.so")
    dynamic = subprocess.run(
        ["readelf", "-d", extension], check=True, capture_output=True, text=True
    ).stdout
    needed = [line.split("[")[1].rstrip("]") for line in dynamic.splitlines() if "NEEDED" in line]
    assert needed
    assert all(library.split(".")[0] in ("libc", "libdl", "libpthread") for library in needed)
    names = subprocess.run(
        ["nm", "-D", "--defined-only", extension], check=True, capture_output=True, text=True
    ).stdout
    assert [line.split()[-1] for line in names.splitlines()] == ["PyInit__shim"]


def test_the_wheel_puts_the_systemd_units_where_systemd_looks(unpacked: Path) -> None:
    """Below the prefix, which is /usr/local for pip as root; both directories are searched."""
    (prefix,) = unpacked.glob("*.data/data")
    units = {path.name for path in (ROOT / "packaging/systemd").iterdir()}
    assert len(units) == 5
    assert {path.name for path in (prefix / "lib/systemd/system").iterdir()} == units
    assert (prefix / "lib/sysusers.d/qemu-vtpm-bridge.conf").exists()


def interpreters() -> dict[str, str]:
    """Return the Pythons on this machine that the package is for, by version."""
    found = {}
    versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for version in ("3.11", "3.12", "3.13"):
        ours = sys.executable if sys.version_info[:2] == tuple(map(int, version.split("."))) else ""
        for candidate in (
            ours,
            shutil.which(f"python{version}"),
            *map(str, versions.glob(f"{version}.*/bin/python{version}")),
        ):
            if candidate and _runs(candidate):
                found[version] = candidate
                break
    return found


def _runs(program: str) -> bool:
    command = [program, "-c", "import venv, ssl"]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


INTERPRETERS = interpreters()


@pytest.mark.timeout(400)
@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
def test_the_wheel_installs_and_runs(wheel: Path, tmp_path: Path, version: str) -> None:
    if version not in INTERPRETERS:
        pytest.skip(f"no Python {version} here")
    if sys.version_info[:2] == tuple(map(int, version.split("."))):
        venv.create(tmp_path / "venv", with_pip=True)
    else:
        command = [INTERPRETERS[version], "-m", "venv", str(tmp_path / "venv")]
        subprocess.run(command, check=True)
    scripts = tmp_path / "venv" / "bin"
    subprocess.run([scripts / "pip", "install", "--quiet", str(wheel)], check=True)
    for command in (
        [scripts / "qemu-vtpm-bridge", "--version"],
        [scripts / "python", "-m", "qemu_vtpm_bridge", "--version"],
    ):
        done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path)
        assert done.stdout.strip() == VERSION
    shim = [scripts / "python", "-c", "from qemu_vtpm_bridge.xen.platform import Platform"]
    subprocess.run(shim, check=True, cwd=tmp_path)
    packages = subprocess.run(
        [scripts / "pip", "list", "--format", "freeze"], check=True, capture_output=True, text=True
    ).stdout
    assert {word.split("==")[0] for word in packages.split()} >= {"pyxs", "cffi", "trio"}


def test_the_metadata_names_the_versions_and_no_address() -> None:
    classifiers = set(PYPROJECT["classifiers"])
    for version in ("3.11", "3.12", "3.13"):
        assert f"Programming Language :: Python :: {version}" in classifiers
    assert PYPROJECT["requires-python"] == ">=3.11"
    assert "urls" not in PYPROJECT


def test_both_ways_to_call_it() -> None:
    for command in (
        [Path(sys.executable).parent / "qemu-vtpm-bridge"],
        [sys.executable, "-m", "qemu_vtpm_bridge"],
    ):
        done = subprocess.run([*command, "--version"], check=True, capture_output=True, text=True)
        assert done.stdout.strip() == VERSION
