"""The flywheel engine: a class on Modal, MK1's or our own, that generates."""
