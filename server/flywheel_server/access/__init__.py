"""Decides who may call, and how much: callers, their keys and certificates, the keys file and its command, quotas."""
