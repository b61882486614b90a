"""Read once: what several ranks need of an object store, one of them fetches, and passes on to the others."""
