"""Training frameworks: their own vocabulary over the engine. Importing any of these modules imports no framework."""
