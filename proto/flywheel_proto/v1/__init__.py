"""Generated from `flywheel/v1/generation.proto`."""
