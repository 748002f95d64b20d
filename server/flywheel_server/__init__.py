"""The Flywheel gRPC server: contract → service → engine."""
