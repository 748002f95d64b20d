"""Runs around every call: metadata, authentication, the request, and the final status."""
