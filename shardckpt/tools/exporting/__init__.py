"""Files that hold tensors of a source: what is in them, who writes which bytes of them, and how they become known.

A sink says what its files are made of before it reads a tensor (`FileSet`). So their bytes can be written in any
order and by anybody: by one process, from the first to the last (`sink`), or by all ranks of a gang at once
(`jointly`), each a stretch of its own (`shares`), without any rank having a tensor whole or sending one to another.
"""
