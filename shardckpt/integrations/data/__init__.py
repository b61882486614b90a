"""Where training is in its data: positions that a checkpoint keeps.

torchdata's `StatefulDataLoader` goes into the state as it is. Give it (as any `DataLoader`) a `generator` of its own:
it draws a seed when it begins, and if it takes that from torch's own stream, then after a resume in the middle of an
epoch dropout draws other numbers than it would have without. Its state is that of one rank of so many: where their
number may change, use `ResumableSampler`, which counts samples.
"""
