"""Tests of what only a GPU shows. Collected where torch sees one; elsewhere nothing here is a test."""

import torch

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py", "symmetric/test_*.py"]
