"""A run as one page of HTML that needs nothing else: for `shardckpt report`."""
