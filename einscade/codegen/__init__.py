"""Source text from rewritten cascades: `loops` plans, `space` proposes schedules, `tiled_torch`,
`triton_emit` and `gluon` write."""
