"""What becomes of calls while Modal, its network and its containers fail, on the stand-in of its cloud: `python -m chaos`."""
