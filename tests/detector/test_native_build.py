"""Attention in C is built where it can be, and whatever goes wrong with that leaves attention to torch."""

from __future__ import annotations

import runpy
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

from lapwing_detector import native
from lapwing_detector.native import build, library
from tests.detector.native_cases import NARROW, needs_compiler


@needs_compiler
def test_a_compiler_means_a_library():
    assert native.available() or library.kind_of_cpu() is None


def test_a_library_of_another_source_is_refused(tmp_path, monkeypatch):
    with pytest.raises(library.Missing, match=r"is not built .*-m lapwing_detector.native does so"):
        library.load(tmp_path / "none.so", NARROW)
    (tmp_path / "text.so").write_text("no library")
    with pytest.raises(library.Missing, match=r"can't be used: .*text\.so"):
        library.load(tmp_path / "text.so", NARROW)


@needs_compiler
def test_a_library_that_was_built_otherwise_is_refused(tmp_path, monkeypatch):
    path = build.build(NARROW, tmp_path / "built.so")
    assert library.load(path, NARROW).lanes == 4
    with pytest.raises(library.Missing, match="built from another version of its source"):
        library.load(path, (*NARROW, "-O1"))
    monkeypatch.setattr(build, "SOURCE", tmp_path / "changed.c")
    build.SOURCE.write_text("int changed;")
    with pytest.raises(library.Missing, match="built from another version of its source"):
        library.load(path, NARROW)
    path = build.build(NARROW, tmp_path / "other.so")  # a library, but of something else
    with pytest.raises(library.Missing, match=r"can't be used: .*built_from"):
        library.load(path, NARROW)


def test_without_a_library_torch_does_the_same_and_says_so_once(monkeypatch, recwarn):
    monkeypatch.setattr(library, "kind_of_cpu", lambda: "avx2")
    monkeypatch.setattr(library, "load", _missing)
    library.installed.cache_clear()
    try:
        assert not native.available()
        assert not native.available()
    finally:
        library.installed.cache_clear()
    assert [str(one.message) for one in recwarn if one.category is native.NativeMissing] == [
        "not built, so torch alone captures attention, more slowly"
    ]


def _missing(path: Path, options: tuple[str, ...]) -> library.Library:
    raise library.Missing("not built")


@pytest.mark.parametrize(
    ("compiler", "message"),
    [("no-such-compiler", "No such file or directory: 'no-such-compiler'"), ("false", "false refuses attention.c")],
)
def test_a_failed_build_leaves_what_was_there(compiler, message, tmp_path, monkeypatch):
    monkeypatch.setenv("CC", compiler)
    path = tmp_path / "built.so"
    path.write_text("as it was")
    with pytest.raises(build.CannotBuild, match=message):
        build.build(NARROW, path)
    assert path.read_text() == "as it was"
    assert list(tmp_path.iterdir()) == [path]


def test_without_a_compiler_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(build.CannotBuild, match="install gcc, 9 or newer, or set CC"):
        build.build(NARROW, tmp_path / "built.so")


@needs_compiler
def test_a_folder_that_cannot_be_written(tmp_path):
    with pytest.raises(build.CannotBuild, match=r"No such file or directory: .*/none/"):
        build.build(NARROW, tmp_path / "none" / "built.so")


class Hook:
    """Of hatchling, which is there while a package is built, and not here."""

    def __init__(self, root: str) -> None:
        self.root = root

    def __class_getitem__(cls, _: object) -> type[Hook]:
        return cls


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Builds what an installation builds, from a copy of the sources."""
    root = Path(__file__).parents[2]
    for place in ("detector/build_native.py", "detector/lapwing_detector/native/build.py"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / place, tmp_path / place)
    shutil.copy(build.SOURCE, tmp_path / "detector/lapwing_detector/native")
    interface = ModuleType("hatchling.builders.hooks.plugin.interface")
    interface.BuildHookInterface = Hook
    monkeypatch.setitem(sys.modules, interface.__name__, interface)
    hook = runpy.run_path(str(tmp_path / "detector/build_native.py"))["NativeBuild"]

    def installed() -> dict[str, object]:
        data: dict[str, object] = {"artifacts": [], "pure_python": True}
        hook(str(tmp_path)).initialize("editable", data)
        return data

    return installed


@needs_compiler
def test_an_installation_builds_the_library_for_each_kind_of_cpu(install, tmp_path):
    data = install()
    folder = "/detector/lapwing_detector/native"
    assert data["artifacts"] == [f"{folder}/attention_avx2.so", f"{folder}/attention_avx512.so"]
    assert data["pure_python"] is False
    assert data["tag"] == "py3-none-linux_x86_64"
    assert all((tmp_path / str(path)[1:]).stat().st_size > 10_000 for path in data["artifacts"])


def test_an_installation_without_a_compiler_is_one_of_python_alone(install, monkeypatch, capfd):
    monkeypatch.setenv("CC", "no-such-compiler")
    assert install() == {"artifacts": [], "pure_python": True}
    said = capfd.readouterr().err
    assert not build.here() or "without attention in C for avx512: [Errno 2]" in said


@needs_compiler
def test_an_installation_takes_what_an_old_compiler_can_build(install, tmp_path, monkeypatch):
    compiler = tmp_path / "old"
    compiler.write_text('#!/bin/sh\ncase "$*" in *avx512*) exit 1;; esac\nexec cc "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    assert install()["artifacts"] == ["/detector/lapwing_detector/native/attention_avx2.so"]
