"""From a part of a tensor back to the ranks that hold it."""
