"""einscade: an attention compiler for PyTorch."""
