"""Does a checkpoint fit a state? Each part against the record, and what all ranks together leave unclaimed."""
