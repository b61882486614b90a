"""Which ranks of those that saved have what of a sharded tensor."""
