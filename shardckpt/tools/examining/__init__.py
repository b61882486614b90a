"""What a machine and a place can do, found by trying: for `shardckpt doctor` and `shardckpt bench`."""
