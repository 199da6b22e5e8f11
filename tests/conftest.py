"""Shared test set-up: runtime shape checks, eight virtual CPU devices, float32 matmuls in full precision."""

import os

from jaxtyping import install_import_hook

install_import_hook("jaxwan", "beartype.beartype")

import jax  # noqa: E402

os.environ.setdefault("JAXWAN_COMPILATION_CACHE", "0")  # nothing of tests in the user's cache folder
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")
