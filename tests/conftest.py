"""Shared test set-up: runtime shape checks, eight virtual CPU devices, float32 matmuls in full precision."""

from jaxtyping import install_import_hook

install_import_hook("jaxwan", "beartype.beartype")

import jax  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")
