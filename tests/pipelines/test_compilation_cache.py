"""Compiled programs are kept for the next process, unless someone said otherwise."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxwan import BUNDLED_MODEL
from jaxwan.pipelines import pipeline
from jaxwan.pipelines.compilation_cache import KEPT_FROM, cache_folder, keep_compiled_programs

SCRIPT = Path(__file__).parents[2] / "scripts" / "generate.py"
COUNT = """
import atexit, runpy, sys
import jax
jax.config.update("jax_num_cpu_devices", 1)
events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name.rsplit("/", 1)[-1]))
atexit.register(lambda: print("hits", events.count("cache_hits"), "misses", events.count("cache_misses")))
"""
SMALLEST = ("--prompt", "a", "--num-frames", "1", "--height", "32", "--width", "32", "--num-inference-steps", "2",
            "--seed", "1", "--output", "a.png", "--save-npz", "a.npz", "--overwrite")  # fmt: skip


def python(code, folder, *arguments, **environment):
    """Hits and misses (and what else was printed) of a process whose user's cache folder is in `folder`."""
    kept = {name: value for name, value in os.environ.items() if name != "JAXWAN_COMPILATION_CACHE"}
    environment = kept | {"XDG_CACHE_HOME": str(folder / "cache"), "JAX_PLATFORMS": "cpu",
                          "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2"} | environment  # fmt: skip
    done = subprocess.run([sys.executable, "-c", COUNT + code, *arguments], cwd=folder, env=environment,
                          capture_output=True, text=True, timeout=240)  # fmt: skip
    assert done.returncode == 0, done.stderr
    words = done.stdout.split()
    return int(words[words.index("hits") + 1]), int(words[words.index("misses") + 1]), done.stderr


def generate(folder, *flags, **environment):
    code = f"sys.argv[0] = 'generate'\nrunpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    return python(code, folder, *SMALLEST, *flags, **environment)


def test_a_second_process_compiles_nothing_large_and_makes_the_same_video(tmp_path):
    hits, misses, _ = generate(tmp_path)
    assert hits == 0 and misses > 0 and any((tmp_path / "cache" / "jaxwan" / "compiled").iterdir())
    with np.load(tmp_path / "a.npz") as arrays:
        first = arrays["frames"]
    again, _, stderr = generate(tmp_path)
    assert again > 0
    with np.load(tmp_path / "a.npz") as arrays:
        np.testing.assert_array_equal(arrays["frames"], first)
    assert "Error" not in stderr


KEEP = """
jax.block_until_ready(jax.jit(lambda x: x + 1)(1.0))  # JAX has compiled before
from jaxwan.pipelines.compilation_cache import keep_compiled_programs
print("folder", keep_compiled_programs())
jax.block_until_ready(jax.jit(lambda x: jax.numpy.linalg.eigh(x @ x.T))(jax.numpy.ones((9, 9))))
"""


def test_what_is_compiled_after_the_call_is_kept_even_if_jax_was_in_use(tmp_path):
    zero = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    assert python(KEEP, tmp_path, **zero)[0] == 0
    assert python(KEEP, tmp_path, **zero)[0] > 0


@pytest.mark.parametrize("environment", [{"JAXWAN_COMPILATION_CACHE": "0"}, {"JAX_COMPILATION_CACHE_DIR": "elsewhere"}])
def test_the_environment_turns_it_off_or_elsewhere(tmp_path, environment):
    python(KEEP, tmp_path, **environment | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"})
    assert not (tmp_path / "cache").exists()
    assert (tmp_path / "elsewhere").exists() == ("JAX_COMPILATION_CACHE_DIR" in environment)


@pytest.mark.parametrize(("flags", "kept"), [([], True), (["--no-compilation-cache"], False)])
@pytest.mark.usefixtures("logging_as_before")
def test_the_command_keeps_them_unless_told_not_to(monkeypatch, tmp_path, flags, kept):
    specification = importlib.util.spec_from_file_location("generate_script", SCRIPT)
    script = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)
    folders = []

    def stop(*_, **__):
        folders.append(keep_compiled_programs())
        raise ValueError("far enough")

    names = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
    before = {name: getattr(jax.config, name) for name in names}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("JAXWAN_COMPILATION_CACHE", "1")
    monkeypatch.setattr(pipeline, "load_parts", stop)
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        assert script.main([*SMALLEST, *flags]) == 1
        assert not kept or getattr(jax.config, names[1]) == KEPT_FROM
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
    assert folders == [tmp_path / "jaxwan/compiled" if kept else None]


def test_loading_a_pipeline_keeps_them(monkeypatch):
    calls = []

    def stop(*_, **__):
        raise ValueError("far enough")

    monkeypatch.setattr(pipeline, "keep_compiled_programs", lambda: calls.append("kept"))
    monkeypatch.setattr(pipeline, "load_parts", stop)
    with pytest.raises(ValueError, match="far enough"):
        pipeline.WanPipeline.from_pretrained(BUNDLED_MODEL)
    assert calls == ["kept"]


@pytest.mark.parametrize(
    "value, expected",
    [
        ("/somewhere", "/somewhere/jaxwan"),
        ("not/absolute", "/home/a/.cache/jaxwan"),
        ("", "/home/a/.cache/jaxwan"),
        (None, "/home/a/.cache/jaxwan"),
    ],
)
def test_the_cache_folder_follows_the_xdg_specification(monkeypatch, value, expected):
    monkeypatch.setenv("HOME", "/home/a")
    if value is None:
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", value)
    assert cache_folder() == Path(expected)


def test_without_a_home_nothing_is_kept(monkeypatch):
    for name in ("JAXWAN_COMPILATION_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", classmethod(lambda _: (_ for _ in ()).throw(RuntimeError("no home"))))
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        assert keep_compiled_programs() is None and jax.config.jax_compilation_cache_dir is None
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
