"""What we measure, as ratios side by side in one run: the machines are shared, and their absolute speed means little."""
