"""The generated messages and stubs of the contract; see `proto/flywheel/v1/generation.proto`."""
