"""How the executor's C code is compiled: once, with the compiler that is there, or with a clear message."""

from __future__ import annotations

import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bnfast import __main__, dispatch
from bnfast.ptx import MissingCompiler, library


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, from which nothing is loaded yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library.load.cache_clear()
    yield tmp_path / "bnfast"
    library.load.cache_clear()


@pytest.mark.usefixtures("executor")
def test_it_is_compiled_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library.load()
    (made,) = cache.iterdir()
    library.load.cache_clear()
    monkeypatch.setattr(library, "_compile", lambda *given: pytest.fail("it is there"))
    library.load()
    monkeypatch.setattr(library, "processor", lambda: "another")
    library.load.cache_clear()
    with pytest.raises(pytest.fail.Exception, match="it is there"):
        library.load()
    assert [*cache.iterdir()] == [made]


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(MissingCompiler, match="install gcc or clang, or name one in CC"):
        library.load()


def test_a_compiler_that_fails(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "cc"
    broken.write_text(f"#!{sys.executable}\nimport sys\nsys.exit('no such flag')\n")
    broken.chmod(broken.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CC", str(broken))
    with pytest.raises(MissingCompiler, match="cannot compile the executor of PTX:\nno such flag"):
        library.load()
    assert not [*cache.iterdir()]


@pytest.mark.parametrize("named", ["no-such-compiler", "no-such-compiler -m64"])
def test_a_compiler_that_is_not_there(named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", named)
    with pytest.raises(MissingCompiler, match=f"CC={named} names none"):
        library.load()


@pytest.mark.parametrize("named", ["{} -m64 '-D A'", "{}"])
def test_a_compiler_with_arguments(named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its path may have spaces, as it may for Triton, if that is all."""
    path = tmp_path / ("cc" if " " in named else "my cc")
    path.touch()
    path.chmod(0o755)
    monkeypatch.setenv("CC", named.format(path))
    assert library.compiler() == [str(path), *["-m64", "-D A"][: 2 * named.count("-m64")]]


def test_a_compiler_that_cannot_be_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cc"
    path.write_bytes(b"\x7fELF")
    path.chmod(0o755)
    monkeypatch.setenv("CC", str(path))
    with pytest.raises(MissingCompiler, match="cc, the C compiler, cannot be run"):
        library.load()


def test_a_cache_that_cannot_be_written(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "compiler", lambda: ["cc"])
    cache.write_text("in the folder's place")
    with pytest.raises(MissingCompiler, match=f"kept in {cache}.* XDG_CACHE_HOME"):
        library.load()


@pytest.mark.usefixtures("executor")
def test_a_library_that_is_cut_short_is_compiled_anew(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Path] = []
    compile_ = library._compile

    def broken_at_first(command: list[str], made: Path) -> None:
        compiled.append(made)
        compile_(command, made)
        if len(compiled) == 1:
            made.write_bytes(made.read_bytes()[:100])

    monkeypatch.setattr(library, "_compile", broken_at_first)
    library.load()
    assert len(compiled) == 2
    monkeypatch.setattr(library, "_compile", lambda command, made: made.write_bytes(b""))
    monkeypatch.setattr(library, "processor", lambda: "another")
    library.load.cache_clear()
    with pytest.raises(MissingCompiler, match="XDG_CACHE_HOME"):
        library.load()


def test_the_check_falls_back_to_the_interpreter(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dispatch, "INTERPRET", False)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    started: list[list[str]] = []
    monkeypatch.setattr("subprocess.call", lambda command, env: started.append(command) or 7)
    assert __main__.check(1.0, compiled=True) == 7
    assert "Checking in Triton's interpreter instead." in capsys.readouterr().out
    assert started[0][1:] == ["-m", "bnfast", "check", "--seconds", "1.0"]
    monkeypatch.setattr(dispatch, "INTERPRET", True)
    assert __main__.check(1.0, compiled=True) == 1
    assert "unset it" in capsys.readouterr().out
