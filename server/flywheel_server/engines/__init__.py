"""The engines: what turns a prompt into text. `base` has the protocol that they share."""
