"""What the loop in train.py uses at every step, and what it starts and ends with."""
