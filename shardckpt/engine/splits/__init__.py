"""Plain tensors that are parts of whole ones because the user says so (`shardckpt.split`)."""
