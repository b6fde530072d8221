"""The planner: which split of every layer makes a step shortest, and how far from the best that is at most."""
