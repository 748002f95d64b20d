"""What a deployment knows about its machines: which weights there are, where they fit, and how they get there."""
