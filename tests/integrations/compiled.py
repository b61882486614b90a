"""Imported by the process that forks ranks: what torch.compile and S3 load at their first use, once for all ranks."""

import s3fs  # noqa: F401
import torch

torch.compile(torch.nn.Linear(1, 1), backend="eager")(torch.ones(1, 1))
