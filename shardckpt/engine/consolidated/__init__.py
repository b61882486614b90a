"""The consolidated model file: whole tensors under plain names in one archive, written by ranks that hold shards.

`write_consolidated` (in `write`) is called by all ranks. Why it is as it is (2026-11):

**Through the storage, not through the ranks.** Whoever gathers a model to write it needs memory for the model, and
torch's `get_model_state_dict(full_state_dict=True, cpu_offload=True)` uses the training's groups to do it. Here every
rank puts what it holds into a file of its own below the attempt, from live memory, and these parts are read while the
one file is written, 2 MiB at a time. Who does that needs some windows of memory, and twice half of the largest tensor
(never more than 64 MiB) to read many ranges at once; the gang moves names, placements and checksums. The price: most of
the model is written twice and read once. It is less than what gathering costs where there is no fast network
(`benchmarks/README.md`). The parts are deleted before the call returns, whatever happens.

**CRCs before data.** A local header holds the CRC of its record and comes before it, and a put is a stream, in which
nobody goes back. CRC-32 is linear: each rank sums up what it holds at its place among zeros, and the sums of all make
the CRC of the whole tensor before rank 0 has seen a byte of it (`fragments.sum_of`). They also check everything that
lies between: what rank 0 puts is summed up again, and a byte that the storage has changed is an error.

**No index of the parts.** A part is bytes, one fragment after the other, in the natural order of names. Who writes
which box follows from the placements, which ranks of one kind describe once (`inventory`); who puts the file goes
through the names in the same order, and counts. Indexes of all parts would be the plans of all ranks, on one.

**Copies.** Of shards that several ranks hold (HSDP; FSDP on top of TP) one of them writes, by turns; plain tensors are
written by the first rank that has them. What is only taken to be a copy, because it belongs to a model and is not
sharded, is summed up by all who hold it and compared, as in every save: a difference is an error that names the tensor
and the ranks. Where rank 0 puts the file alone, it writes no part: its shards go straight into the file. A model that
it holds whole (one process, DDP) needs none in any case.

**FSDP1** is read from its flat shards (`flat`), where an interval of a flat parameter is a few boxes of a parameter.
None of its own state dicts would do: they gather, on the training's groups, and crash on CPU.

**All ranks, or one** (`stretches`). From 64 MiB on, each rank puts a stretch of the file of its own: into one file by
positioned writes, or into one upload of an object store. For that it must know what all kinds of ranks hold and the
CRCs of the tensors, which rank 0 tells, and takes from its own memory what it holds itself. Of a tensor that ends in
another's stretch each sums up its part, and rank 0 joins the sums. What all hold alike is then in no part. Smaller
files, and those on storages where several cannot put one file, are put by rank 0.
"""
