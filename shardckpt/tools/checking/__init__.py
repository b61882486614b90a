"""Bytes held against checksums: whole files, the tensors in them, archives that only speak of themselves."""
