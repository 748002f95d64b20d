"""Measures speed, mostly as ratios within one run, because the machines are shared and absolute speed means little."""
