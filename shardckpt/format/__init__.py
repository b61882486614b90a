"""WHAT lies on disk: every name, the archive, its index and the commit record. Pure: no I/O, no gang."""
