"""Tests calls while Modal, its network and its containers fail, on the stand-in of Modal's cloud: `python -m chaos`."""
