"""The generated messages and stubs of the contract; see `proto/flywheel/v1/generation.proto`.

The commands `flywheel` and `flywheel-server` share the private modules.
"""

__version__ = "0.1.0"
"""The version of the distribution, for the client and the server alike."""
