"""jaxwan: Wan2.1/2.2 video generation on a mesh of accelerators, in JAX."""
