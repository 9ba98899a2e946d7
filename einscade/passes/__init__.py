"""Rewrites: cascades in, cascades out; `recipes` has the sequences that users ask for, `pipeline` runs them."""
