"""What the storages over fsspec are made of: requests, uploads that never publish half an object, errors, secrets."""
