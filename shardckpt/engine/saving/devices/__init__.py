"""Tensors that lie on other devices than the host: in what order they are copied, and into what kind of memory."""
